"""Several processes, processes that are killed, sharded weights; what the launchers of PyTorch really start."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from packaging.version import Version

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "examples" / "recipes"
METRICS = ("eval_n_pairs", "eval_pair_accuracy", "eval_rms_margin", "eval_margin_length_correlation")


def start(script, *arguments, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(TESTS / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, timeout=300)


def train(folder, *arguments, processes=1):
    run = start("train_tiny.py", folder, "--processes", processes, *arguments, processes=processes)
    assert run.returncode == 0, run.stderr
    return json.loads(Path(folder, "results.json").read_text())


KINDS = {
    "LoRA": [],
    "full, gradient checkpointing": ["--full", "--gradient-checkpointing"],
    "margin, LoRA": ["--reference", "base"],
    "margin, full": ["--full", "--reference", "base"],
    "SFT term": ["--full", "--sft-coefficient", 1.0],
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, kind):
    one = train(tmp_path / "one", "--batch-size", 4, *KINDS[kind])
    two = train(tmp_path / "two", "--batch-size", 2, *KINDS[kind], processes=2)
    assert one["shares"]
    assert two["shares"]
    assert len(set(one["losses"])) == len(one["losses"]) == 6
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    if kind == "SFT term":  # two processes, each with one pair at a time
        parts = train(tmp_path / "parts", "--batch-size", 1, "--accumulate", 2, *KINDS[kind], processes=2)
        assert parts["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name in METRICS:
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4), name
    assert two["metrics"]["eval_n_pairs"] == 7


def test_training_resumes_after_a_kill(tmp_path):
    whole = train(tmp_path / "whole", "--accumulate", 2)
    run = start("train_tiny.py", tmp_path / "killed", "--accumulate", 2, "--kill-at", 5)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results.json").exists()
    resumed = train(tmp_path / "killed", "--accumulate", 2, "--resume")
    assert resumed["losses"] == whole["losses"]
    assert resumed["metrics"]["eval_loss"] == whole["metrics"]["eval_loss"]


@pytest.mark.skipif(Version(torch.__version__) < Version("2.8"), reason="gloo lacked what FSDP2 needs (seen on 2.6)")
def test_sharded_weights(tmp_path):
    """FSDP2 by itself, since accelerate starts plain data parallelism on CPUs, and tensor parallelism for decoding."""
    run = start("sharded_weights.py", tmp_path, processes=2)
    assert run.returncode == 0, run.stderr
    assert "2 processes, sharded: equal" in run.stdout


@pytest.mark.parametrize("name", ["fsdp2.yaml", "deepspeed_zero3.yaml"])
def test_launcher_configs_are_valid(name):
    """Read by accelerate; not run, for want of accelerators."""
    config = load_config_from_file(str(RECIPES / name))
    assert config.distributed_type == {"fsdp2.yaml": "FSDP", "deepspeed_zero3.yaml": "DEEPSPEED"}[name]
