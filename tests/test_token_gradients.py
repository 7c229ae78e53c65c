"""The gradient of token log-probabilities against its closed form in float64, in every precision of the logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch.nn.functional import one_hot

from hf_genarm.functional import selected_log_probs
from hf_genarm.training.prefix_sharing import PairBatch, PairLogProbs

# The largest error of a row's gradient relative to its length; bfloat16 has 8 bits, float16 has 11.
PRECISION = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 5e-3}


def closed_form(logits, rows, tokens, gradient):
    """d log p(token) / d logits = one-hot(token) - softmax, summed over the tokens that a row predicts."""
    selected = one_hot(tokens, logits.shape[-1]).double() - logits.double().softmax(-1)[rows]
    return torch.zeros_like(logits, dtype=torch.double).index_add(0, rows, selected * gradient.double()[:, None])


def relative_error(result, expected):
    """The largest over the rows that have a gradient at all."""
    length = expected.norm(dim=-1)
    has_gradient = length > 1e-9 * length.max()
    return float(((result.double() - expected).norm(dim=-1) / length)[has_gradient].max())


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("probability", [0.01, 0.5, 0.994, 0.9999])
@pytest.mark.parametrize("shift", [0.0, 40.0])  # a large logit must not round away the distance of p from 1
def test_confident_tokens_keep_their_gradient(dtype, probability, shift):
    n_rows, vocab_size = 150, 64
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (n_rows,), generator=generator)
    rows = torch.arange(n_rows)
    logits = torch.randn(n_rows, vocab_size, generator=generator)
    others = logits.scatter(1, tokens[:, None], -torch.inf).logsumexp(-1)
    logits[rows, tokens] = others + torch.tensor(probability).logit()
    logits = (logits + shift).to(dtype).requires_grad_()
    remaining = float(1 - logits.detach().double().softmax(-1)[rows, tokens].median())
    assert remaining == pytest.approx(1 - probability, rel=0.3)
    # Large, as of a scaled loss: float16 has no numbers below 6e-8.
    gradient = 1000 * torch.linspace(-1, 2, n_rows)
    log_probs = selected_log_probs(logits, rows, tokens)
    expected = logits.double().log_softmax(-1)[rows, tokens]
    torch.testing.assert_close(log_probs.double(), expected, rtol=5e-3, atol=1e-7)
    log_probs.backward(gradient)
    assert logits.grad.dtype == dtype
    assert relative_error(logits.grad, closed_form(logits.detach(), rows, tokens, gradient)) < PRECISION[dtype]


def test_a_confident_row_that_predicts_several_tokens():
    """As the last shared token of a pair does; the same token may be scored in both texts."""
    logits = torch.zeros(70, 8, dtype=torch.bfloat16)
    logits[:, 3] = 11.0
    logits.requires_grad_()
    rows, tokens = torch.tensor([69, 69, 2, 2, 64]), torch.tensor([3, 3, 3, 5, 3])
    gradient = torch.tensor([1.0, -0.5, 2.0, -2.0, 1.0])
    selected_log_probs(logits, rows, tokens).backward(gradient)
    expected = closed_form(logits.detach(), rows, tokens, gradient)
    assert (logits.grad[[0, 1, 63]] == 0).all()
    assert relative_error(logits.grad, expected) < PRECISION[torch.bfloat16]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("precision", ["weights", "autocast"])
def test_confident_tokens_of_pairs(shares, precision):
    """What reaches the logits of a model in bfloat16, of pairs in one row and in two, with and without an adapter."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(6)
    if precision == "weights":
        model.to(torch.bfloat16)
    # The greedy continuation of a prompt, against other tokens.
    prompt = torch.arange(3, 15)[None]
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, min_new_tokens=10)
    ids = torch.cat([greedy, torch.cat([prompt, (greedy[:, 12:] + 1) % 48], dim=1)])
    pairs = PairBatch(ids, torch.ones_like(ids))
    method, seen = PairLogProbs(model), []
    method._may_share = shares

    def keep(module, args, output):
        output.logits.retain_grad()
        seen.append(output.logits)

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        handle = model.get_base_model().register_forward_hook(keep)
        log_probs = method(model, pairs, pairs.is_own)
        handle.remove()
        (logits,) = seen
        assert logits.dtype == torch.bfloat16
        assert (len(logits) == 1) == shares
        assert (log_probs[0][pairs.is_own[0]] > -1e-2).sum() >= 2  # some are confident
        log_probs.chunk(2)[0].sum().backward()

    first = logits.shape[1] - 11 if not shares else logits.shape[1] - 21
    rows = first + torch.arange(10)
    expected = closed_form(logits[0].detach(), rows, ids[0, 12:], torch.ones(10))
    assert relative_error(logits.grad[0], expected) < PRECISION[torch.bfloat16]
