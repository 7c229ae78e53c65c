import math

import pytest
import torch

from hf_genarm.functional import guided_log_probs, shared_prefix_length, token_log_probs


def test_guided_log_probs_of_two_tokens():
    """
    Two tokens: base (3/4, 1/4), reward (1/5, 4/5), alpha 2.
    Products: 3/4 · 1/25 = 3/100 and 1/4 · 16/25 = 16/100, so the guided distribution is (3/19, 16/19).
    """
    base = torch.tensor([[0.75, 0.25]]).log()
    reward = torch.tensor([[0.2, 0.8]]).log()
    guided = guided_log_probs(base, [reward], [2.0])
    torch.testing.assert_close(guided.exp(), torch.tensor([[3 / 19, 16 / 19]]))


def test_guided_log_probs_takes_logits_as_well_as_log_probs():
    logits = torch.randn(3, 7)
    rewards = [torch.randn(3, 7).log_softmax(-1), torch.randn(3, 7).log_softmax(-1)]
    torch.testing.assert_close(
        guided_log_probs(logits + 5, rewards, [0.5, -1.5]),
        guided_log_probs(logits.log_softmax(-1), rewards, [0.5, -1.5]),
    )


def test_forbidden_tokens_stay_forbidden_and_the_rest_is_normalised():
    scores = torch.tensor([[0.0, -math.inf, 1.0, 2.0]])
    guided = guided_log_probs(scores, [torch.tensor([[0.1, 0.7, 0.1, 0.1]]).log()], [3.0])
    assert guided[0, 1] == -math.inf
    torch.testing.assert_close(guided.exp().sum(), torch.tensor(1.0))


def test_guided_log_probs_leaves_its_arguments_alone():
    scores, reward = torch.randn(2, 5), torch.randn(2, 5)
    copies = scores.clone(), reward.clone()
    guided_log_probs(scores, [reward], [1.0])
    assert torch.equal(scores, copies[0])
    assert torch.equal(reward, copies[1])


def test_one_alpha_for_each_reward():
    with pytest.raises(ValueError, match="zip"):
        guided_log_probs(torch.zeros(1, 2), [torch.zeros(1, 2)], [1.0, 2.0])


def test_token_log_probs_of_two_tokens():
    """Logits (0, log 3) give the probabilities (1/4, 3/4)."""
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, math.log(3.0)]]])
    expected = torch.tensor([[math.log(0.25), math.log(0.75)]])
    torch.testing.assert_close(token_log_probs(logits, torch.tensor([[0, 1]])), expected)


def test_token_log_probs_are_float32_for_bfloat16_logits():
    logits = torch.randn(2, 3, 50, dtype=torch.bfloat16)
    tokens = torch.randint(50, (2, 3))
    expected = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    result = token_log_probs(logits, tokens)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "length"),
    [([1, 2, 3, 4], [1, 2, 5, 4], 2), ([1, 2], [3, 2], 0), ([1, 2], [1, 2], 2), ([1, 2, -1], [1, 2, 3], 2)],
)
def test_shared_prefix_length(chosen, rejected, length):
    assert shared_prefix_length(torch.tensor([chosen]), torch.tensor([rejected])).tolist() == [length]
