"""The likeliest mistakes of those who start a server for the first time: one readable last line, within ten seconds."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from tiny_server import save_tiny

from hf_genarm.vllm.__main__ import _device

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, (adapter,) = save_tiny(tmp_path_factory.mktemp("served"))
    return base, adapter


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model with fewer tokens."""
    folder = str(tmp_path_factory.mktemp("other"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tiny_llama(vocab_size=len(tokenizer), head_dim=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def last_line(*arguments):
    """The last line of what a server prints that doesn't start; it must take less than ten seconds of computing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "hf_genarm.vllm", *(str(x) for x in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    return done.stderr.splitlines()[-1]


def genarm(**config):
    return ["--additional-config", json.dumps({"genarm": config})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda base, adapter, _: [*genarm(reward_models=adapter)], "the following arguments are required: --model"),
        (
            lambda base, adapter, _: ["--model", base],
            "`additional_config` has no object `genarm`. Name the reward models",
        ),
        (
            lambda base, adapter, _: ["--model", base, "--additional-config", "{'genarm': {}}"],
            "`--additional-config` is \"{'genarm': {}}\", which is not JSON",
        ),
        (
            lambda base, adapter, _: ["--model", base, *genarm(reward_model=adapter)],
            "has the key `reward_model`, but the known ones are ['reward_models', ",
        ),
        (
            lambda base, adapter, _: ["--model", base, *genarm(reward_models=f"{adapter}-1")],
            "adapter-0-1` is no folder here, and can't be loaded from the Hub",
        ),
        (
            lambda base, adapter, _: ["--model", f"{base}-instruct", *genarm(reward_models=adapter)],
            "tiny-instruct`, which is no folder here, and can't be loaded from the Hub",
        ),
        (
            lambda base, adapter, _: ["--model", base, *genarm(reward_models=adapter, alpha=[1, 2])],
            "`alpha` in `genarm` of `additional_config` is [1, 2], but must be a finite number, or a list of 1",
        ),
        (
            lambda base, adapter, _: ["--model", base, "--max-model-len", 4096, *genarm(reward_models=adapter)],
            "reads texts of up to 256 tokens, but the server takes up to 4096. Start it with `--max-model-len 256`",
        ),
        (
            lambda base, adapter, other: ["--model", other, *genarm(reward_models=base)],
            "lacks tokens of the served model, such as ['<more>']",
        ),
        (
            lambda base, adapter, _: ["--model", base, *genarm(reward_models=adapter, slots=10**9)],
            "`slots` in `genarm` of `additional_config` is 1000000000: ",
        ),
        (
            lambda base, adapter, _: ["--model", base, *genarm(reward_models=adapter, reward_memory=1000)],
            "but the keys and values of one text of 256 tokens take ",
        ),
    ],
    ids=["model", "config", "json", "key", "folder", "served", "alpha", "length", "tokens", "slots", "memory"],
)
def test_mistakes(folders, other, arguments, message):
    assert message in last_line(*arguments(*folders, other))


def test_a_build_for_cpus_runs_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _device() == "cpu"
