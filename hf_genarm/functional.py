"""The formulas of GenARM (Xu et al., ICLR 2025, https://hf.co/papers/2410.08193) as pure functions on tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def guided_log_probs(scores: Tensor, reward_log_probs: Sequence[Tensor], alphas: Sequence[float]) -> Tensor:
    r"""
    Next-token log-probabilities of the guided model, Eq. 7 of the paper with several rewards:

    $$\log\pi(y_t) = \log\pi_\text{base}(y_t) + \sum_k \alpha_k \log\pi_{r,k}(y_t) - \log Z_t$$

    Args:
        scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
            Logits or log-probabilities of the base model: the softmax that normalises the result makes no difference
            between the two. Tokens at $-\infty$ stay there.
        reward_log_probs (sequence of `torch.Tensor` of shape `(batch_size, vocab_size)`):
            Next-token log-probabilities of each reward model, in float32.
        alphas (sequence of `float`):
            Strength of each reward; $1/\beta$ in the paper.

    Returns:
        `torch.Tensor` of shape `(batch_size, vocab_size)`: normalised log-probabilities, in float32.
    """
    guided = scores.float()
    for log_probs, alpha in zip(reward_log_probs, alphas, strict=True):
        guided = guided + alpha * log_probs
    return guided.log_softmax(dim=-1)


def fill_unscored(log_probs: Tensor, alpha: float, scores: Tensor) -> Tensor:
    r"""
    Gives the tokens that a reward model can't score the log-probability that leaves their guided probability as it is.

    Guidance multiplies the probability of the scored tokens $S$ by $\sum_{v \in S} \pi_\text{base}(v) \pi_r(v)^\alpha /
    \sum_{v \in S} \pi_\text{base}(v)$ before it normalises; with this factor as their own, the others keep their share.

    Args:
        log_probs (`torch.Tensor` of shape `(batch_size, vocab_size)`):
            Next-token log-probabilities of the reward model, NaN where unknown.
        alpha (`float`):
            Strength of the reward, not 0.
        scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
            Logits or log-probabilities of the base model.

    Returns:
        `torch.Tensor` of shape `(batch_size, vocab_size)`.
    """
    unscored = log_probs.isnan()
    base = scores.float().masked_fill(unscored, float("-inf"))
    factor = (base + alpha * log_probs.masked_fill(unscored, 0.0)).logsumexp(-1) - base.logsumexp(-1)
    # Where no scored token is allowed, there is nothing to be neutral against.
    return torch.where(unscored, factor.nan_to_num(0.0)[:, None] / alpha, log_probs)


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    r"""
    Log-probability $\log\pi_r(y_t \mid x, y_{<t})$ of each given token, computed in float32.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
            `logits[:, t]` is the prediction for `tokens[:, t]`, so the two are already shifted against each other.
        tokens (`torch.LongTensor` of shape `(batch_size, length)`):
            The tokens that were written.

    Returns:
        `torch.Tensor` of shape `(batch_size, length)`, in float32.
    """
    return -F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")


def shared_prefix_length(chosen_ids: Tensor, rejected_ids: Tensor) -> Tensor:
    """
    Number of leading tokens that the two sequences of each pair have in common.

    Those tokens add the same log-probability to both rewards of a pair, so they cancel in Eq. 5.

    Args:
        chosen_ids, rejected_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            The token ids of the pairs, prompt and response.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`.
    """
    return (chosen_ids == rejected_ids).long().cumprod(dim=-1).sum(dim=-1)
