"""The baselines of the benchmarks compute what they are named for."""

import json

import pytest
import torch
from helpers import run_script
from tiny import random_prompts, tiny_llama

from examples.benchmarks import decode_cost
from hf_genarm.decoding.fusion import joint_network


def test_the_baseline_has_the_products_of_joint_passes_and_the_logits_of_the_base(monkeypatch):
    model, prompts = tiny_llama(), random_prompts(2, 5)
    calls, product = [], joint_network._linear

    def recorded(layer, x):
        calls.append(layer)
        return product(layer, x)

    monkeypatch.setattr(joint_network, "_linear", recorded)
    with torch.no_grad():
        before = model(prompts).logits
        with decode_cost.products_of_joint_passes(model):
            inside = model(prompts).logits
        after = model(prompts).logits
    assert calls == [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    torch.testing.assert_close(inside, before, atol=1e-5, rtol=1e-5)
    assert torch.equal(after, before)


def test_a_dry_run_of_the_benchmark_for_gpus(tmp_path):
    output = tmp_path / "gpu.json"
    done = run_script("examples.benchmarks.gpu", "--device", "cpu", "--tiny", "--output", output)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(output.read_text(encoding="utf-8"))
    assert record["machine"]["is_tiny"]
    results = record["results"]
    assert [name for name, rows in results.items() if not rows] == ["reads"]  # which needs CUDA
    assert not [row for rows in results.values() for row in rows if "error" in row]
    assert {row["result"] for row in results["devices"]} == {"runs"}
    assert max(row["max_difference"] for row in results["exactness"] if "bf16" not in row["way"]) < 1e-4
    losses = {row["way"]: row["loss"] for row in results["training"]}
    assert list(losses.values()) == pytest.approx([losses["naive"]] * 3, rel=0.05)  # in bfloat16
