"""One row for each pair against two rows, in value and gradients; and the models for which it is not done."""

import copy

import pytest
import torch
from helpers import batch, gradients
from oracle import naive
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_llama, tiny_model
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_genarm.functional import selected_log_probs
from hf_genarm.training.prefix_sharing import PairBatch, PairLogProbs


def assert_like_naive(model, shares, pairs, scored):
    method = PairLogProbs(model)
    result = method(model, pairs, scored)
    assert method._may_share is shares
    expected = naive(model, pairs, scored)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(model, result), gradients(model, expected), strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


SHAPES = {
    "one pair": [(6, 4, 5)],
    "unequal everything": [(6, 4, 1), (2, 7, 3), (11, 1, 1)],
    "no shared token": [(0, 3, 4), (0, 1, 6)],
    "no shared token in one": [(0, 3, 4), (9, 2, 2)],
    "one response begins the other": [(8, 0, 3), (7, 2, 0)],
    "one shared token": [(1, 5, 5)],
    "one token each": [(12, 1, 1)],
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_value_and_gradients_equal_the_naive_form(name, attention, monkeypatch):
    monkeypatch.setattr("hf_genarm.training.prefix_sharing._WORTH_IT", 10)  # also where it takes longer
    model = tiny_llama(attn_implementation=attention)
    pairs = batch(SHAPES[name])
    assert_like_naive(model, True, pairs, pairs.is_own)


def test_responses_that_begin_alike(monkeypatch):
    """Scored from the prompt on, what is shared counts for both responses."""
    pairs = batch([(6, 3, 4), (5, 2, 2)], prompt_length=torch.tensor([4, 5]))
    assert pairs.is_response.sum() - pairs.is_own.sum() == 4
    assert_like_naive(tiny_llama(), True, pairs, pairs.is_response)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("multiple", [8, 16])
def test_joint_rows_are_padded_to_a_multiple(name, multiple, monkeypatch):
    """As are the texts; so are the columns that logits are made for: a compiler sees few shapes."""
    monkeypatch.setattr("hf_genarm.training.prefix_sharing._WORTH_IT", 10)
    pairs, model, shapes = batch(SHAPES[name]), tiny_llama(), []
    padding = -pairs.input_ids.shape[1] % multiple
    pairs = PairBatch(*(pad(x, (0, padding)) for x in (pairs.input_ids, pairs.attention_mask)))
    method = PairLogProbs(model, pad_to_multiple_of=multiple)
    method._may_share = True
    handle = model.register_forward_hook(
        lambda *args: shapes.append((args[2]["input_ids"].shape[1], args[3].logits.shape[1])), with_kwargs=True
    )
    result = method(model, pairs, pairs.is_own)
    handle.remove()
    ((width, n_logits),) = shapes
    assert width % multiple == n_logits % multiple == 0
    assert width < 2 * pairs.input_ids.shape[1] + multiple
    expected = naive(model, pairs, pairs.is_own)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(model, result), gradients(model, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("multiple", [None, 16])
def test_the_trainer_pads_to_a_multiple(make_trainer, multiple):
    trainer, widths = make_trainer(pad_to_multiple_of=multiple), set()
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.add(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    trainer._pair_log_probs._may_share = True  # otherwise it is found out first, on texts of its own
    trainer.train()
    assert all(width % 16 == 0 for width in widths) == (multiple is not None)


def test_random_shapes():
    generator = torch.Generator().manual_seed(0)
    model = tiny_llama()
    for seed in range(20):
        shapes = torch.randint(0, 9, (3, 3), generator=generator) + torch.tensor([8, 1, 1])
        pairs = batch(shapes.tolist(), seed)
        assert_like_naive(model, True, pairs, pairs.is_own)


ARCHITECTURES = {
    "qwen2": {},
    "gemma2": {"head_dim": 8, "sliding_window": 64},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "phi": {},
    "olmo2": {},
    "falcon": {"alibi": False, "new_decoder_architecture": True},
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(model_type):
    pairs = batch([(9, 4, 5), (8, 3, 2)])
    assert_like_naive(tiny_model(model_type, **ARCHITECTURES[model_type]), True, pairs, pairs.is_own)


APART = {
    "mistral": ({"sliding_window": 64}, True),  # could share, were the texts shorter than the window
    "bloom": ({}, False),
    "mamba": ({}, False),
    "falcon": ({"alibi": True}, False),
    "lfm2": ({"layer_types": ["conv", "full_attention"], "norm_eps": 1e-5}, False),
    "qwen3_next": ({"layer_types": ["linear_attention", "full_attention"]}, False),
}


@pytest.mark.parametrize("model_type", APART)
def test_models_that_cannot_share(model_type, monkeypatch):
    """Their texts are forwarded one by one, and right."""
    config, could = APART[model_type]
    model = tiny_model(model_type, **config)
    pairs = batch([(40, 20, 15), (30, 13, 12)])
    monkeypatch.setattr(PairLogProbs, "_joint_inputs", spy := Spy(PairLogProbs._joint_inputs))
    method = PairLogProbs(model)
    assert method._window == config.get("sliding_window")
    result = method(model, pairs, pairs.is_own)
    assert method._may_share is could
    assert all(pairs_seen is not pairs for pairs_seen in spy.pairs)  # the probe at most
    if model_type not in ("mamba", "lfm2", "qwen3_next"):  # their states see the padding that others mask
        torch.testing.assert_close(result, naive(model, pairs, pairs.is_own), rtol=1e-4, atol=1e-4)


class Spy:
    def __init__(self, function):
        self.function, self.pairs = function, []

    def __get__(self, instance, owner):
        def call(pairs, *others):
            self.pairs.append(pairs)
            return self.function(instance, pairs, *others)

        return call


def test_prompt_tuning_is_read_twice():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_llama(), config)
    pairs = batch([(9, 4, 5)])
    assert_like_naive(model, False, pairs, pairs.is_own)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_with_gradient_checkpointing(checkpointing):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    expected_model = copy.deepcopy(model)
    pairs = batch([(9, 4, 5), (8, 3, 2)])
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    method = PairLogProbs(model)
    result = method(model, pairs, pairs.is_own)
    assert method._may_share
    assert model.training
    expected = naive(expected_model, pairs, pairs.is_own)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(model, result), gradients(expected_model, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_lower_precision(dtype):
    """Weights in bfloat16, and mixed precision as accelerate wraps it around the forward pass."""
    model = tiny_llama(initializer_range=0.1)
    if dtype == "autocast":
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    else:
        model.to(dtype)
    pairs = batch([(9, 4, 5), (8, 3, 2)])
    method = PairLogProbs(model, mixed_precision=dtype == "autocast")
    result = method(model, pairs, pairs.is_own)
    assert method._may_share
    expected = naive(tiny_llama(initializer_range=0.1), pairs, pairs.is_own)
    torch.testing.assert_close(result, expected, rtol=0, atol=0.05)
    bloom = tiny_model("bloom").to(torch.bfloat16)
    assert PairLogProbs(bloom)._why_not_shared(bloom, "cpu") is not None


def test_all_layers_keep_one_mask():
    """Other than one of booleans, of which each layer would make one of numbers for its backward pass."""
    model, pairs = tiny_llama(num_hidden_layers=3).train(), batch([(40, 9, 9)])
    method, masks = PairLogProbs(model), {}
    method(model, pairs, pairs.is_own)

    def kept(x):
        if x.ndim == 4 and x.shape[1:] == (1, 58, 58):
            masks[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
        method(model, pairs, pairs.is_own)
    assert len(masks) == 1


def test_prefixes_are_shared_only_where_it_saves(monkeypatch):
    """Not for pairs that share too little, and not where unequal prompts would make a row longer than two."""
    monkeypatch.setattr(PairLogProbs, "_joint_inputs", spy := Spy(PairLogProbs._joint_inputs))
    model = tiny_llama()
    method = PairLogProbs(model)
    method._may_share = True
    for shapes, shares in (([(16, 4, 4)], True), ([(1, 20, 20)], False), ([(20, 1, 1), (1, 20, 20)], False)):
        pairs = batch(shapes)
        method(model, pairs, pairs.is_own)
        assert any(seen is pairs for seen in spy.pairs) is shares


# --- log-probabilities of selected tokens ---


@pytest.mark.parametrize(
    ("n_rows", "dtype"), [(1, torch.float32), (64, torch.float32), (200, torch.float32), (70, torch.bfloat16)]
)
def test_selected_log_probs(n_rows, dtype):
    """Against `log_softmax`; rows are chosen several times, and some never."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(n_rows, 37, generator=generator)).to(dtype).requires_grad_()
    rows = torch.randint(0, n_rows, (n_rows + 5,), generator=generator)
    tokens = torch.randint(0, 37, (n_rows + 5,), generator=generator)
    weights = torch.randn(n_rows + 5, generator=generator)
    result = selected_log_probs(logits, rows, tokens)
    expected = logits.float().log_softmax(-1)[rows, tokens]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    (one,) = torch.autograd.grad((result * weights).sum(), logits)
    (other,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert one.dtype == dtype
    torch.testing.assert_close(
        one, other, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5 if dtype == torch.float32 else 2e-2
    )


def test_selected_log_probs_of_nothing():
    logits = torch.randn(3, 5, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.long)
    (gradient,) = torch.autograd.grad(selected_log_probs(logits, nothing, nothing).sum(), logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("attention", ["sdpa", "my_attention"])
def test_an_attention_that_takes_no_mask_is_reported_once(attention, caplog):
    """In a line that is shown without any setting of loggers."""
    AttentionInterface.register("my_attention", sdpa_attention_forward)
    AttentionMaskInterface.register("my_attention", sdpa_mask)
    model = tiny_llama(attn_implementation=attention)
    method, pairs = PairLogProbs(model), batch([(9, 4, 5)])
    results = [method(model, pairs, pairs.is_own) for _ in range(2)]
    assert method._may_share == (attention == "sdpa")
    shown = [x.getMessage() for x in caplog.records if x.levelname == "WARNING" and "forwarded twice" in x.getMessage()]
    assert len(shown) == (attention != "sdpa")
    assert all("`my_attention`" in line and "`sdpa`" in line for line in shown)
    torch.testing.assert_close(results[1], naive(tiny_llama(), pairs, pairs.is_own), rtol=1e-5, atol=1e-5)
