"""`LockstepLM` against a forward pass from scratch, and how many tokens it forwards."""

import copy

import pytest
import torch
import transformers
from packaging import version
from peft import LoraConfig, get_peft_model
from tiny import VOCAB_SIZE, left_padded, random_prompts, tiny_llama

from hf_genarm.decoding.lockstep import LockstepLM


class Counting(LockstepLM):
    """Counts the tokens, padding included, that went through the model."""

    def __init__(self, model):
        super().__init__(model)
        self.forwarded = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.forwarded += kwargs["input_ids"].numel()

    def tokens_for(self, ids, mask=None):
        before = self.forwarded
        check(self, ids, mask)
        # `check` runs the same model once more, from scratch.
        return self.forwarded - before - ids.numel()


def check(lockstep, ids, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    logits = lockstep(ids, mask)
    with torch.no_grad():
        expected = lockstep.model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False
        ).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.fixture
def lockstep():
    return Counting(tiny_llama(1))


def test_each_token_is_forwarded_once(lockstep):
    ids = random_prompts(3, 20)
    counts = [lockstep.tokens_for(ids[:, :length]) for length in range(8, 21)]
    assert counts == [24] + [3] * 12


def test_rows_that_permute_are_reordered(lockstep):
    ids = random_prompts(4, 10)
    lockstep.tokens_for(ids[:, :9])
    permuted = torch.cat([ids[[2, 2, 0, 3], :9], random_prompts(4, 1, seed=5)], dim=1)
    assert lockstep.tokens_for(permuted) == 4


def test_rows_are_kept_when_the_batch_shrinks_or_grows(lockstep):
    ids = random_prompts(4, 8)
    lockstep.tokens_for(ids)
    assert lockstep.tokens_for(torch.cat([ids[1:3], random_prompts(2, 1)], dim=1)) == 2
    lockstep.tokens_for(ids[:1])
    assert lockstep.tokens_for(torch.cat([ids[[0, 0, 0]], random_prompts(3, 1)], dim=1)) == 3


def test_a_draft_is_forwarded_once_and_rolled_back(lockstep):
    """As assisted decoding calls: a draft token by token, every length of it again, then the text that was accepted."""
    ids = random_prompts(1, 12)
    drafted = [lockstep.tokens_for(ids[:, :length]) for length in range(6, 11)]
    assert drafted == [6, 1, 1, 1, 1]
    assert [lockstep.tokens_for(ids[:, :length]) for length in range(6, 11)] == [0] * 5
    accepted = torch.cat([ids[:, :8], random_prompts(1, 1, seed=9)], dim=1)
    assert not torch.equal(accepted, ids[:, :9])
    assert lockstep.tokens_for(accepted) == 1


def test_a_second_prompt_reuses_the_prefix_that_it_shares(lockstep):
    ids = random_prompts(1, 16)
    lockstep.tokens_for(ids)
    second = torch.cat([ids[:, :10], random_prompts(1, 5, seed=3)], dim=1)
    assert not torch.equal(second[:, 10], ids[:, 10])
    assert lockstep.tokens_for(second) == 5


def test_padding_is_part_of_the_key(lockstep):
    batch = left_padded([5, 9])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    lockstep.tokens_for(ids, mask)
    assert lockstep.tokens_for(ids, torch.ones_like(mask)) == ids.numel()
    longer = torch.cat([ids, random_prompts(2, 1)], dim=1)
    assert lockstep.tokens_for(longer, torch.ones_like(longer)) == 2


def test_columns_that_only_pad_are_dropped(lockstep):
    ids = random_prompts(1, 6)
    lockstep.tokens_for(ids)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids, random_prompts(1, 1)], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    before = lockstep.forwarded
    logits = lockstep(padded, mask)
    assert lockstep.forwarded - before == 1
    torch.testing.assert_close(logits, LockstepLM(lockstep.model)(padded[:, 4:], mask[:, 4:]), atol=1e-4, rtol=0)


def test_reset_only_frees_memory(lockstep):
    ids = random_prompts(2, 6)
    lockstep.tokens_for(ids)
    lockstep.reset()
    assert lockstep.tokens_for(ids) == ids.numel()


@pytest.mark.parametrize(
    ("change", "other_logits"),
    [
        (lambda model: torch.nn.init.normal_(next(model.parameters()), std=1.0), True),
        (lambda model: setattr(next(model.parameters()), "data", torch.randn(VOCAB_SIZE, 16)), True),
        (lambda model: model.set_adapter("second"), True),
        (lambda model: model.base_model.disable_adapter_layers(), True),
        (lambda model: model.merge_adapter(), False),
        (lambda model: model.train(), False),
    ],
    ids=["weights in place", "weights replaced", "active adapter", "adapters off", "merged", "training mode"],
)
def test_nothing_stale_is_served_after_a_reset(change, other_logits):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(1), config)
    model.add_adapter("second", config)
    lockstep = Counting(model.eval())
    ids = random_prompts(1, 8)
    before = lockstep(ids, torch.ones_like(ids))
    change(model)
    lockstep.reset()
    assert lockstep.tokens_for(ids) == ids.numel()
    after = lockstep(ids, torch.ones_like(ids))
    assert ((after - before).abs().max() > 0.01) == other_logits


def test_an_interrupted_forward_leaves_nothing_behind(lockstep, monkeypatch):
    ids = random_prompts(2, 8)
    lockstep.tokens_for(ids[:, :6])
    layer = lockstep.model.model.layers[1]
    forward = layer.forward

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lockstep(ids, torch.ones_like(ids))
    monkeypatch.setattr(layer, "forward", forward)
    check(lockstep, ids)


def test_a_model_that_turns_its_cache_off_is_named():
    """As transformers does before 5.24 with gradient checkpointing; since then it keeps it without gradients."""
    model = copy.deepcopy(tiny_llama(1)).train()
    model.gradient_checkpointing_enable()
    lockstep, ids = LockstepLM(model), random_prompts(1, 4)
    if version.parse(transformers.__version__) >= version.parse("5.24"):
        for length in range(1, 5):
            check(lockstep, ids[:, :length])
    else:
        with pytest.raises(RuntimeError, match=r"LlamaForCausalLM.*reward_model.eval\(\)"):
            lockstep(ids, torch.ones_like(ids))


@pytest.mark.parametrize("has_cache", [True, False])
def test_no_logits_outlive_their_text(lockstep, has_cache):
    """A kept length belongs to the text that it was computed for, not to another one that was read since."""
    lockstep.has_cache = has_cache
    first, second = random_prompts(1, 8, seed=0), random_prompts(1, 8, seed=1)
    second[:, :3] = first[:, :3]
    for length in range(3, 8):
        check(lockstep, first[:, :length])
    check(lockstep, second)
    for length in range(3, 8):
        assert not torch.equal(first[:, :length], second[:, :length]) or length == 3
        check(lockstep, second[:, :length])
