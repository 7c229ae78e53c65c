"""The LM head, run a few rows at a time outside of the model: values and gradients are those of all logits at once."""

import pytest
import torch
from helpers import batch, gradients
from oracle import naive
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_model

from hf_genarm.training import chunked_head
from hf_genarm.training.chunked_head import ChunkedHead, head_log_probs
from hf_genarm.training.prefix_sharing import PairLogProbs

N_TOKENS = 37


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("n_rows", [1, 3, 10])
def test_gradients_equal_those_of_all_logits(n_rows, has_bias, monkeypatch):
    """In float64, by three rows at a time; the last part is a smaller one."""
    monkeypatch.setattr(chunked_head, "_AT_ONCE", 3 * N_TOKENS)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((n_rows, 5), (N_TOKENS, 5), (N_TOKENS,))
    ]
    inputs = inputs if has_bias else inputs[:2]
    tokens = torch.randint(0, N_TOKENS, (n_rows,), generator=generator)
    weights = torch.randn(n_rows, generator=generator, dtype=torch.float64)
    result = head_log_probs(*inputs, *([] if has_bias else [None]), tokens)
    logits = inputs[0] @ inputs[1].T + (inputs[2] if has_bias else 0)
    expected = logits.log_softmax(-1)[torch.arange(n_rows), tokens]
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    for one, other in zip(
        torch.autograd.grad((result * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_confident_tokens_in_bfloat16_have_a_gradient():
    """That of a token at 1 - p = 0.0001 is about as small; it is rounded once, not the difference of two numbers."""
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[9.25], [0.0]], dtype=torch.bfloat16)
    head_log_probs(hidden, weight, None, torch.tensor([0])).sum().backward()
    exact = 9.25 * (1 - torch.tensor(9.25, dtype=torch.float64).sigmoid())
    assert 0 < exact < 1e-3
    assert hidden.grad.item() == pytest.approx(exact.item(), rel=0.01)


def method_of(model, pairs, **options):
    """Log-probabilities whose head is run outside for every batch, if it can be."""
    method = PairLogProbs(model, **options)
    method(model, pairs, pairs.is_own)  # looks whether it can
    if method._head is not None:
        method._head = ChunkedHead(method._network, from_size=0)
    return method


ARCHITECTURES = {
    "llama": ({}, True),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, True),
    "cohere": ({"logit_scale": 0.5}, True),  # a factor of hidden states is one of logits
    "phi": ({}, True),  # its head has a bias
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 1.0}, False),
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(model_type):
    config, is_usable = ARCHITECTURES[model_type]
    model = tiny_model(model_type, **config)
    pairs = batch([(9, 4, 5), (8, 3, 2)])
    method, widths = method_of(model, pairs), []
    assert (method._head is not None) == is_usable
    handle = model.register_forward_hook(lambda *args: widths.append(args[2].logits.shape[-1]))
    result = method(model, pairs, pairs.is_own)
    handle.remove()
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    assert vocab_size != hidden_size
    assert widths == [hidden_size if is_usable else vocab_size]
    expected = naive(model, pairs, pairs.is_own)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(model, result), gradients(model, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert model(pairs.input_ids).logits.shape[-1] == vocab_size


def test_an_adapter_on_the_head_is_part_of_the_model():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    pairs = batch([(9, 4, 5)])
    method = method_of(model, pairs)
    assert method._head is None
    torch.testing.assert_close(method(model, pairs, pairs.is_own), naive(model, pairs, pairs.is_own))


def test_mixed_precision():
    """As accelerate wraps the forward pass: the head computes in bfloat16, too, and what comes out is float32."""
    pairs, model = batch([(9, 4, 5), (8, 3, 2)]), tiny_llama(initializer_range=0.1)
    expected = naive(model, pairs, pairs.is_own)
    inner = torch.autocast("cpu", torch.bfloat16)(model.forward)

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = forward
    method = method_of(model, pairs, mixed_precision=True)
    result = method(model, pairs, pairs.is_own)
    assert method._head._dtype == torch.bfloat16
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=0.05)


def test_small_batches_make_their_logits_at_once():
    model, pairs = tiny_llama(), batch([(9, 4, 5)])
    method, widths = PairLogProbs(model), []
    method(model, pairs, pairs.is_own)
    assert method._head is not None
    model.register_forward_hook(lambda *args: widths.append(args[2].logits.shape[-1]))
    method(model, pairs, pairs.is_own)
    assert widths == [model.config.vocab_size]
    assert ChunkedHead(model).is_worth_it(8 * 1024 * 2 * 128_000 // model.config.vocab_size)
