"""Loading reward models: what is shared with the base, what is not, and that the base never notices."""

import json
import subprocess
import sys

import pytest
import torch
from oracle import Recompute
from peft import PeftModel
from tiny import VOCAB_SIZE, random_prompts, save_adapter, tiny_llama
from transformers import AutoModelForCausalLM

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.reward_model import load_reward_model


@pytest.fixture
def saved(tmp_path):
    """A base and two adapters on it, in folders."""
    base = tmp_path / "org" / "tiny-base"
    tiny_llama(0).save_pretrained(base)
    adapters = {name: save_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("first", "second"))}
    return {"base": str(base)} | adapters


def pointers(model):
    return {parameter.data_ptr() for name, parameter in model.named_parameters() if "lora_" not in name}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_an_adapter_shares_the_weights_of_the_base_and_leaves_it_alone(saved):
    base = AutoModelForCausalLM.from_pretrained(saved["base"])
    ids = random_prompts(2, 6)
    before, modules = logits(base, ids), [type(module) for module in base.modules()]
    arms = [load_reward_model(saved[name], base) for name in ("first", "second")]
    separate = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved["base"]), saved[name])
        for name in ("first", "second")
    ]
    for arm, expected in zip(arms, separate, strict=True):
        assert pointers(arm) == pointers(base)
        torch.testing.assert_close(logits(arm, ids), logits(expected, ids), atol=1e-5, rtol=0)
        assert not arm.training
    assert not torch.equal(logits(arms[0], ids), logits(arms[1], ids))
    assert not torch.equal(logits(arms[0], ids), before)
    assert torch.equal(logits(base, ids), before)
    assert [type(module) for module in base.modules()] == modules
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_the_base_may_have_another_folder(saved, tmp_path):
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somebody/tiny-base"
    (tmp_path / "first" / "adapter_config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained(saved["base"])
    assert pointers(load_reward_model(saved["first"], base)) == pointers(base)
    base.name_or_path = "/cache/models--somebody--tiny-base/snapshots/0a1b2c"
    assert pointers(load_reward_model(saved["first"], base)) == pointers(base)


@pytest.mark.parametrize("reason", ["another name", "a dtype", "a PeftModel"])
def test_weights_are_not_shared_with_another_model(saved, reason):
    base, kwargs = AutoModelForCausalLM.from_pretrained(saved["base"]), {}
    if reason == "another name":
        base.name_or_path = "org/tiny-base-v2"
    elif reason == "a dtype":
        kwargs = {"dtype": torch.bfloat16}
    else:
        base = PeftModel.from_pretrained(base, saved["second"])
    arm = load_reward_model(saved["first"], base, **kwargs)
    assert not pointers(arm) & pointers(base)
    assert arm.dtype == kwargs.get("dtype", torch.float32)


def test_from_pretrained_takes_adapters_and_full_models(saved, tmp_path):
    tiny_llama(7).save_pretrained(tmp_path / "repo" / "arm")
    base = AutoModelForCausalLM.from_pretrained(saved["base"])
    processor = GenARMLogitsProcessor.from_pretrained(
        [saved["first"], saved["second"]], base_model=base, alpha=[1.0, 0.5]
    )
    arms = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved["base"]), saved[name])
        for name in ("first", "second")
    ]
    ids, scores = random_prompts(2, 6), torch.randn(2, VOCAB_SIZE)
    torch.testing.assert_close(processor(ids, scores), Recompute(arms, [1.0, 0.5])(ids, scores), atol=1e-4, rtol=0)

    full = GenARMLogitsProcessor.from_pretrained(str(tmp_path / "repo"), subfolder="arm")
    torch.testing.assert_close(full(ids, scores), Recompute([tiny_llama(7)], [1.0])(ids, scores), atol=1e-4, rtol=0)


def test_steering_does_not_import_trl():
    code = "import sys, hf_genarm; hf_genarm.GenARMLogitsProcessor; assert 'trl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(__import__("hf_genarm").__all__) <= set(dir(__import__("hf_genarm")))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        __import__("hf_genarm").Nothing  # noqa: B018
