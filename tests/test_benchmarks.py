"""The baselines of the benchmarks compute what they are named for."""

import torch
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
