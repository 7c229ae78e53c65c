"""Which run a text belongs to: `generate` inside of `generate`, loops after it, other dtypes, copies."""

import copy
import gc

import pytest
import torch
from helpers import assert_same, generate
from oracle import Recompute
from peft import PeftModel
from tiny import PAD, save_adapter, tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.hub.kv_cache import CACHE

BASE, ARM = tiny_llama(0), tiny_llama(1)
PROMPTS = torch.tensor([[PAD, PAD, 5, 6, 7], [4, 8, 9, 5, 3]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
LONG = {"max_new_tokens": 6, "min_new_tokens": 6}


def six_tokens(processors, input_ids=PROMPTS, mask=MASK, base=BASE, **options):
    """Calls `generate` for six new tokens."""
    return generate(base, list(processors), {"input_ids": input_ids, "attention_mask": mask}, **LONG | options)


class Rollout(LogitsProcessor):
    """Continues the texts with the same model before each token, as a look-ahead method does."""

    def __init__(self, n_rows=None, n_tokens=3, inner=()):
        self.n_rows, self.n_tokens, self.inner, self.n_calls = n_rows, n_tokens, list(inner), 0

    def __call__(self, input_ids, scores):
        self.n_calls += 1
        rows = input_ids[: self.n_rows]
        mask = torch.cat([MASK, MASK.new_ones(2, input_ids.shape[1] - MASK.shape[1])], dim=1)[: self.n_rows]
        options = {"max_new_tokens": self.n_tokens, "min_new_tokens": self.n_tokens, "do_sample": False}
        BASE.generate(input_ids=rows, attention_mask=mask, logits_processor=self.inner, **options)
        return scores


@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("n_rows", [None, 1])
def test_another_processor_may_generate_in_between(n_rows, n_tokens):
    processor = GenARMLogitsProcessor(ARM, lambda step: 0.2 + 0.2 * step, base_model=BASE)
    plain = six_tokens([processor])
    assert len({tuple(x.flatten().tolist()) for x in plain.scores}) == len(plain.scores)
    processor.keeps_statistics = True
    rollout = Rollout(n_rows, n_tokens)
    output = six_tokens([rollout, processor])
    assert rollout.n_calls == 6
    assert_same(output, plain)
    table = processor.statistics(output.sequences)
    assert len(table["token"]) == 12
    assert table["alpha_0"][:6] == pytest.approx([0.2 + 0.2 * step for step in range(6)])


def test_a_guided_rollout_is_a_run_of_its_own():
    processor = GenARMLogitsProcessor(ARM, lambda step: 1.0 + step, base_model=BASE)
    plain = six_tokens([processor])
    assert_same(six_tokens([Rollout(inner=[processor]), processor]), plain)


def test_a_custom_loop_after_generate():
    """It is a run of its own: nothing of the finished call is taken over."""
    processor = GenARMLogitsProcessor(ARM, lambda step: 1.0 + step, base_model=BASE)
    one = {"input_ids": PROMPTS[1:], "mask": MASK[1:]}
    written = six_tokens([processor], **one).sequences
    expected = GenARMLogitsProcessor(ARM, lambda step: 1.0 + step)
    for length in range(written.shape[1], written.shape[1] + 3):
        text = torch.cat([written, torch.full((1, length - written.shape[1]), 5)], dim=1)
        scores = BASE(input_ids=text).logits[:, -1]
        torch.testing.assert_close(processor(text, scores), expected(text, scores), atol=1e-4, rtol=0)
    both = torch.cat([text, text.flip(1)])  # more rows than the call before
    scores = BASE(input_ids=both).logits[:, -1]
    torch.testing.assert_close(processor(both, scores), expected(both, scores), atol=1e-4, rtol=0)


def test_ids_of_another_dtype():
    processor = GenARMLogitsProcessor(ARM, target_kl=0.05, base_model=BASE)
    processor.keeps_statistics = True
    output = six_tokens([processor])
    table = processor.statistics(output.sequences)
    short = six_tokens([processor], input_ids=PROMPTS.int())
    assert_same(short, output)
    assert processor.statistics(short.sequences.int())["kl"] == table["kl"]
    assert len(table["kl"]) == 12


def test_a_copy_has_a_mask_of_its_own():
    processor = GenARMLogitsProcessor(ARM, attention_mask=MASK)
    other = copy.copy(processor)
    other.attention_mask = torch.ones_like(MASK)
    other.alpha[0] = 3.0
    assert processor.attention_mask.tolist() == MASK.tolist()
    assert processor.alpha == [1.0]
    scores = BASE(input_ids=PROMPTS, attention_mask=MASK).logits[:, -1]
    expected = Recompute([ARM], [1.0], MASK)(PROMPTS, scores)
    torch.testing.assert_close(processor(PROMPTS, scores).softmax(-1), expected.softmax(-1), atol=1e-5, rtol=0)
    assert (other(PROMPTS, scores) - processor(PROMPTS, scores)).abs().max() > 0.1


@pytest.mark.parametrize("n_more", [0, 1, 3])
def test_a_cache_that_is_not_of_the_prompt_is_refused(n_more):
    """With `n_more` at 0 `generate` reads the whole prompt after itself."""
    cache = DynamicCache(config=BASE.config)
    longer = torch.cat([PROMPTS[1:], torch.full((1, n_more), 5)], dim=1)
    BASE(input_ids=longer, use_cache=True, **{CACHE: cache})
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    with pytest.raises(ValueError, match=r"The base model has read \d+ tokens, but `generate` was given 5"):
        six_tokens([processor], PROMPTS[1:], MASK[1:], **{CACHE: cache})


def test_the_base_drafts_for_itself_over_generated_pad_tokens():
    """`generate` takes a pad token that was generated for padding, where it infers the mask of its drafts."""
    base = tiny_llama(0, num_hidden_layers=3)
    prompt = {"input_ids": PROMPTS[1:], "mask": MASK[1:], "base": base}
    likely_pad = {"sequence_bias": {(PAD,): 6.0}, "do_sample": True, "top_k": 0, "max_new_tokens": 12}
    processor = GenARMLogitsProcessor(ARM, base_model=base)
    output = six_tokens([processor], **prompt, **likely_pad, assistant_early_exit=2)
    assert PAD in output.sequences[0, 5:].tolist()[:-1]
    expected = six_tokens([Recompute([ARM], [1.0], MASK[1:])], **prompt, **likely_pad, assistant_early_exit=2)
    assert_same(output, expected)


def test_buffers_of_the_base_that_differ_are_not_used_for_a_reward_model(tmp_path):
    BASE.save_pretrained(tmp_path / "base")
    adapter = save_adapter(str(tmp_path / "base"), str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    processor = GenARMLogitsProcessor.from_pretrained(adapter, base_model=base)
    assert processor.engine == "fused"
    rotary = base.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq * 1.5
    assert processor.engine == "shared"
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    assert_same(six_tokens([processor], base=base), six_tokens([Recompute([expected], [1.0], MASK)], base=base))


def test_inputs_that_change_how_tokens_are_read_are_refused():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    usual = BASE.get_input_embeddings()(PROMPTS)
    output = six_tokens([processor])
    same = six_tokens([processor], inputs_embeds=usual)
    assert same.sequences.tolist() == output.sequences.tolist()
    with pytest.raises(ValueError, match="The base model reads `inputs_embeds` in addition to tokens"):
        six_tokens([processor], inputs_embeds=usual + 0.5)
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    assert_same(six_tokens([processor], position_ids=positions), output)
    with pytest.raises(ValueError, match="The base model reads `position_ids` in addition to tokens"):
        six_tokens([processor], position_ids=positions * 2)


def test_strengths_for_each_beam_are_refused():
    """Beams change places, so that a row of strengths would not stay with its beam."""
    processor = GenARMLogitsProcessor(ARM, torch.tensor([[0.5], [1.0]]), base_model=BASE)
    six_tokens([processor], num_beams=2, do_sample=False)
    for options in ({"num_beams": 2, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}):
        processor.alpha = torch.tensor([[0.5], [1.0], [0.5], [2.0]])
        with pytest.raises(ValueError, match=r"`alpha` has 4 rows.*was given 2 prompts"):
            six_tokens([processor], **options)


@pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning")  # met among all objects
@pytest.mark.parametrize("kept", [False, True], ids=["text alone", "with its cache"])
@pytest.mark.parametrize("reference", [None, "base", ARM], ids=["no reference", "base", "a model"])
def test_memory_is_given_back(tmp_path, kept, reference):
    """Keys and values of reward models and reference, and what a returned cache holds beside its own rows."""
    BASE.save_pretrained(tmp_path / "base")
    adapter = save_adapter(str(tmp_path / "base"), str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fused = AutoregressiveRewardModel.from_pretrained(adapter, base)
    processor = GenARMLogitsProcessor([fused, tiny_llama(2)], base_model=base, reference=reference)
    gc.collect()
    before = n_keys_and_values()
    output = six_tokens([processor], base=base, return_dict_in_generate=kept)
    assert max(getattr(x, "joint_passes", 0) for x in processor._machine.rewards.models) > 3
    gc.collect()
    cache = output.past_key_values if kept else None
    own = 0 if cache is None else sum(x.keys.numel() + x.values.numel() for x in cache.layers)
    assert n_keys_and_values() - before == own


def test_a_custom_loop_gives_its_memory_back_with_the_cache_of_the_base():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    cache, mask = DynamicCache(config=BASE.config), MASK
    inputs = BASE.prepare_inputs_for_generation(PROMPTS, attention_mask=mask, is_first_iteration=True, **{CACHE: cache})
    with torch.no_grad():
        scores = BASE(**inputs | {"use_cache": True}).logits[:, -1]
    processor(PROMPTS, scores)
    (reward,) = processor._machine.rewards.models
    assert reward._state.length == PROMPTS.shape[1]
    del inputs, cache
    gc.collect()
    assert reward._state is None
    processor(PROMPTS, scores)


@pytest.mark.parametrize("is_joint", [False, True])
def test_a_lack_of_memory_is_reported_as_such(tmp_path, is_joint, monkeypatch):
    """And what is left is right: the next call begins again."""
    BASE.save_pretrained(tmp_path / "base")
    adapter = save_adapter(str(tmp_path / "base"), str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    processor = GenARMLogitsProcessor.from_pretrained(adapter, base_model=base)
    if not is_joint:
        base.register_forward_hook(lambda *_: None)
    expected = six_tokens([processor], base=base)
    calls, attend = [], LlamaMLP.forward

    def fail(self, *args):
        calls.append(self)
        if len(calls) == 11:  # in the second layer, after the prompt
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return attend(self, *args)

    monkeypatch.setattr(LlamaMLP, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        six_tokens([processor], base=base)
    assert_same(six_tokens([processor], base=base), expected)


def n_keys_and_values():
    """Numbers in the storage of all keys and values that are alive."""
    layers = [x for x in gc.get_objects() if isinstance(x, DynamicLayer)]
    tensors = [x for layer in layers for x in (layer.keys, layer.values) if x is not None]
    storages = {x.untyped_storage().data_ptr(): x for x in tensors}
    return sum(x.untyped_storage().nbytes() // x.element_size() for x in storages.values())
