"""Guided generation on a simulated device, run by `test_placement.py` in a process of its own: a device is for good."""

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from oracle import Recompute
from peft import PeftModel
from simulated import DEVICE, SimulatedDevice
from tiny import left_padded, save_adapter, tiny_llama, tiny_tokenizer

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor

BATCH = left_padded([3, 6])
TOKENIZER = tiny_tokenizer()
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def base_model():
    return tiny_llama(0, attn_implementation="eager", vocab_size=len(TOKENIZER))


@pytest.fixture
def arms(tmp_path):
    """A reward model in bfloat16, and an adapter on another base, which shares no weights either."""
    tiny_llama(1, vocab_size=len(TOKENIZER)).to(torch.bfloat16).save_pretrained(tmp_path / "full")
    tiny_llama(2, vocab_size=len(TOKENIZER)).save_pretrained(tmp_path / "other")
    for name in ("full", "other"):
        TOKENIZER.save_pretrained(tmp_path / name)
    return str(tmp_path / "full"), save_adapter(str(tmp_path / "other"), str(tmp_path / "adapter"))


def guided(arm, reward_models, alphas, reference=None, **options):
    """The text on the simulated device, and that of the oracle on the CPU."""
    oracle = Recompute(reward_models, alphas, BATCH["attention_mask"])
    expected = base_model().generate(**BATCH, **GREEDY, logits_processor=[oracle])
    assert expected.tolist() != base_model().generate(**BATCH, **GREEDY).tolist()
    with SimulatedDevice():
        base = base_model().to(DEVICE)
        processor = GenARMLogitsProcessor.from_pretrained(
            arm, base_model=base, reference=reference, tokenizer=TOKENIZER, **options
        )
        inputs = {name: x.to(DEVICE) for name, x in BATCH.items()}
        output = base.generate(**inputs, **GREEDY, logits_processor=[processor])
        assert str(output.device) == DEVICE
        return output.tolist(), expected.tolist()


def on_cpu(arm):
    return AutoregressiveRewardModel.from_pretrained(arm, dtype=torch.float32).model


@pytest.mark.parametrize("index", [0, 1])
def test_a_separate_reward_model_is_where_the_base_is(arms, index):
    with SimulatedDevice():
        base = base_model().to(DEVICE)
        loaded = AutoregressiveRewardModel.from_pretrained(arms[index], base).model
    places = {(str(x.device), x.dtype) for x in [*loaded.parameters(), *loaded.buffers()] if x.is_floating_point()}
    assert places == {(DEVICE, torch.float32)}
    text, expected = guided(arms[index], [on_cpu(arms[index])], [1.0])
    assert text == expected


def test_strengths_and_mask_are_where_the_base_is(arms):
    """Strengths of each request and the mask are given on the CPU."""
    model = on_cpu(arms[0])
    one, other = (guided(arms[0], [model], [alpha])[1] for alpha in (1.5, -1.0))
    assert one != other
    strengths = torch.tensor([[1.5], [-1.0]])
    text, _ = guided(arms[0], [model], [1.5], alpha=strengths, attention_mask=BATCH["attention_mask"])
    assert text == [one[0], other[1]]


def test_the_reference_is_where_the_base_is(arms):
    model = on_cpu(arms[0])
    plain = guided(arms[0], [model], [1.0])[1]
    text, expected = guided(arms[0], [model, base_model()], [1.0, -1.0], reference="base", alpha=1.0)
    assert expected != plain
    assert text == expected


def test_a_base_whose_layers_are_spread(tmp_path):
    """Over the device and the CPU, by accelerate: an adapter is in the base's own passes."""
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.1", "model.norm"), "cpu")
    places |= {"model.layers.0": DEVICE, "lm_head": DEVICE}
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    adapter = save_adapter(str(tmp_path / "base"), str(tmp_path / "adapter"), target_modules="all-linear")
    model = PeftModel.from_pretrained(base_model(), adapter).eval()
    for options in ({}, {"num_beams": 2}):
        oracle = Recompute([model], [1.0], BATCH["attention_mask"])
        expected = base.generate(**BATCH, **GREEDY | options, logits_processor=[oracle])
        assert expected.tolist() != base.generate(**BATCH, **GREEDY | options).tolist()
        with SimulatedDevice():
            spread = base_model()
            spread.name_or_path = str(tmp_path / "base")
            attach_align_device_hook_on_blocks(spread, places, skip_keys="past_key_values")
            assert {str(x.device) for x in spread.parameters()} == {"cpu", DEVICE}
            processor = GenARMLogitsProcessor.from_pretrained(adapter, base_model=spread)
            output = spread.generate(**BATCH, **GREEDY | options, logits_processor=[processor])
        assert processor.engine == "fused"
        assert processor._machine.rewards.models[0].joint_passes == GREEDY["max_new_tokens"] - 1
        assert output.tolist() == expected.tolist()
