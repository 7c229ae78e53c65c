"""Loading reward models: what is shared with the base, what is not, and that the base never notices."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from oracle import Recompute
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from tiny import VOCAB_SIZE, random_prompts, save_adapter, save_llama, tiny_llama
from transformers import AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, GuidanceWarning, RewardInfo
from hf_genarm.hub.info import chat_template_fingerprint, tokenizer_fingerprint


@pytest.fixture
def saved(tmp_path):
    """A base and two adapters on it, in folders."""
    base = tmp_path / "org" / "tiny-base"
    tiny_llama(0).save_pretrained(base)
    adapters = {name: save_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("first", "second"))}
    return {"base": str(base)} | adapters


def load(name, base=None, **kwargs):
    return AutoregressiveRewardModel.from_pretrained(name, base, **kwargs).model


def pointers(model):
    return {parameter.data_ptr() for name, parameter in model.named_parameters() if "lora_" not in name}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_an_adapter_shares_the_weights_of_the_base_and_leaves_it_alone(saved):
    base = AutoModelForCausalLM.from_pretrained(saved["base"])
    ids = random_prompts(2, 6)
    before, modules = logits(base, ids), [type(module) for module in base.modules()]
    arms = [load(saved[name], base) for name in ("first", "second")]
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
    assert pointers(load(saved["first"], base)) == pointers(base)
    base.name_or_path = "/cache/models--somebody--tiny-base/snapshots/0a1b2c"
    assert pointers(load(saved["first"], base)) == pointers(base)


@pytest.mark.parametrize("reason", ["another name", "a dtype", "a PeftModel"])
def test_weights_are_not_shared_with_another_model(saved, reason):
    base, kwargs = AutoModelForCausalLM.from_pretrained(saved["base"]), {}
    if reason == "another name":
        base.name_or_path = "org/tiny-base-v2"
    elif reason == "a dtype":
        kwargs = {"dtype": torch.bfloat16}
    else:
        base = PeftModel.from_pretrained(base, saved["second"])
    arm = load(saved["first"], base, **kwargs)
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


# --- what is published ---

INFO = RewardInfo(beta=0.1, objective="warm weather", metrics={"pair_accuracy": 0.75}, versions={"trl": "1.16.0"})


@pytest.mark.parametrize("kind", ["adapter", "full model"])
def test_a_reward_model_is_saved_whole(tokenizer, tmp_path, kind):
    model = tiny_llama(7, vocab_size=len(tokenizer))
    if kind == "adapter":
        model.save_pretrained(tmp_path / "base")
        model = load(save_adapter(tmp_path / "base", tmp_path / "arm"))
    AutoregressiveRewardModel(model, tokenizer, INFO).save_pretrained(tmp_path / "copy")
    arm = AutoregressiveRewardModel.from_pretrained(str(tmp_path / "copy"))
    ids = random_prompts(2, 6)
    assert torch.equal(logits(arm.model, ids), logits(model, ids))
    assert arm.info == INFO
    assert arm.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not list((tmp_path / "copy").glob("*.bin"))
    card = tmp_path / "copy" / "README.md"
    assert "for **warm weather**" in card.read_text()
    assert "pipeline_tag" not in card.read_text()
    card.write_text("A card of my own.")
    arm.save_pretrained(str(tmp_path / "copy"))
    assert card.read_text() == "A card of my own."
    # Plain PEFT and transformers load the same folder.
    plain = (AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM).from_pretrained(tmp_path / "copy")
    assert torch.equal(logits(plain.eval(), ids), logits(model, ids))


def test_an_adapter_of_unknown_origin_is_a_reward_model(saved, caplog):
    caplog.set_level("INFO", "hf_genarm")
    arm = AutoregressiveRewardModel.from_pretrained(saved["first"])
    assert arm.info == RewardInfo()
    assert any("unknown" in record.message and "beta" in record.message for record in caplog.records)


def test_pickled_weights_are_refused(saved, tmp_path):
    model = load(saved["first"])
    state = get_peft_model_state_dict(model)
    (tmp_path / "first" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights in safetensors"):
        load(saved["first"])
    torch.save(state, tmp_path / "first" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"Pickled weights .* are refused"):
        load(saved["first"])
    (tmp_path / "full").mkdir()
    tiny_llama(7).config.save_pretrained(tmp_path / "full")
    torch.save(tiny_llama(7).state_dict(), tmp_path / "full" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="refused"):
        load(str(tmp_path / "full"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 2, "something": 1}', r"format 2, .* formats up to 1. Update it"),
        ('{"format_version": 1, "gamma": 1}', r"does not have: \['gamma'\]"),
        ('{"format_version"', "not valid JSON"),
    ],
)
def test_an_info_that_cant_be_read(saved, tmp_path, text, message):
    (tmp_path / "first" / "genarm_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(saved["first"])


def test_a_subfolder_that_is_not_there(saved):
    with pytest.raises(ValueError, match="no folder `elsewhere`"):
        load(saved["first"], subfolder="elsewhere")


@pytest.mark.parametrize("what", ["nothing", "the tokens", "the template"])
def test_what_the_reward_model_was_trained_with(tokenizer, tmp_path, what):
    """It is compared with the base by fingerprint, with one warning if it differs."""
    base = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "base"))
    adapter = save_adapter(tmp_path / "base", tmp_path / "arm")
    other = copy.deepcopy(tokenizer)
    if what == "the tokens":
        other.add_tokens(["hello"])
    if what == "the template":
        other.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    RewardInfo(tokenizer=tokenizer_fingerprint(other), chat_template=chat_template_fingerprint(other)).save(
        tmp_path / "arm"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GenARMLogitsProcessor.from_pretrained(adapter, base_model=base)
    messages = [str(warning.message) for warning in caught if warning.category is GuidanceWarning]
    assert len(messages) == (what != "nothing")
    if what != "nothing":
        assert {"the tokens": "another tokenizer", "the template": "another chat template"}[what] in messages[0]


def test_the_processor_takes_a_loaded_reward_model(saved):
    arm = AutoregressiveRewardModel.from_pretrained(saved["first"])
    ids, scores = random_prompts(2, 6), torch.randn(2, VOCAB_SIZE)
    assert torch.equal(GenARMLogitsProcessor(arm)(ids, scores), GenARMLogitsProcessor(arm.model)(ids, scores))


def test_steering_does_not_import_trl():
    code = "import sys, hf_genarm; hf_genarm.GenARMLogitsProcessor; assert 'trl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(__import__("hf_genarm").__all__) <= set(dir(__import__("hf_genarm")))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        __import__("hf_genarm").Nothing  # noqa: B018
