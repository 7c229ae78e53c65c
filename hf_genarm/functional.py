"""The formulas of GenARM (Xu et al., ICLR 2025, https://hf.co/papers/2410.08193) as pure functions on tensors."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, relu

# Bound the float32 copies that are made of logits: on CPUs to what caches hold, elsewhere, where each part costs some
# kernels, to 256 MB.
_ROWS_AT_ONCE, _NUMBERS_AT_ONCE = 64, 2**26


def guided_log_probs(scores: Tensor, reward_log_probs: Sequence[Tensor], alphas: Sequence[float | Tensor]) -> Tensor:
    r"""
    Returns the next-token log-probabilities of the guided model, Eq. 7 of the paper with several rewards:

    $$\log\pi(y_t) = \log\pi_\text{base}(y_t) + \sum_k \alpha_k \log\pi_{r,k}(y_t) - \log Z_t$$

    Args:
        scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
            Logits or log-probabilities of the base model: the softmax that normalises the result makes no difference
            between the two. Tokens at $-\infty$ stay there.
        reward_log_probs (sequence of `torch.Tensor` of shape `(batch_size, vocab_size)`):
            Next-token log-probabilities of each reward model, in float32.
        alphas (sequence of `float` or `torch.Tensor` of shape `(batch_size, 1)`):
            Strength of each reward; $1/\beta$ in the paper. Where it is 0, the reward makes no difference at all.

    Returns:
        `torch.Tensor` of shape `(batch_size, vocab_size)`: normalised log-probabilities, in float32.
    """
    guided = scores.float()
    for log_probs, alpha in zip(reward_log_probs, alphas, strict=True):
        guided = guided + weighted(log_probs, alpha)
    return guided.log_softmax(dim=-1)


def log_normaliser(scores: Tensor, reward_log_probs: Sequence[Tensor], alphas: Sequence[float | Tensor]) -> Tensor:
    r"""
    Returns $\log Z_t = \log \sum_v \pi_\text{base}(v) \prod_k \pi_{r,k}(v)^{\alpha_k}$, by which Eq. 7 is normalised.

    Sampling token by token draws each text with $1 / \prod_t Z_t$ times its share under the optimum over whole texts.

    Args:
        scores, reward_log_probs, alphas:
            As for [`guided_log_probs`].

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, in float32.
    """
    product = scores.float().log_softmax(dim=-1)
    for log_probs, alpha in zip(reward_log_probs, alphas, strict=True):
        product = product + weighted(log_probs, alpha)
    return product.logsumexp(dim=-1)


@dataclass(frozen=True)
class GuidedProduct:
    r"""
    Holds the guided distribution of some rows, and what it was made of.

    Parameters:
        log_probs (`torch.Tensor` of shape `(n_rows, vocab_size)`):
            Guided log-probabilities in float32; a row without any guidance has its scores. A row with NaN has no token
            left to choose from.
        scores (`torch.Tensor` of shape `(n_rows, vocab_size)`):
            Logits or log-probabilities of the base model.
        rewards (list of `torch.Tensor` of shape `(n_rows, vocab_size)`):
            What was added for each reward at strength 1, minus the reference, NaN for tokens without a reward.
        filled (list of `torch.Tensor` of shape `(n_rows, vocab_size)`):
            The same, with the tokens without a reward filled in by [`fill_unscored`].
        strengths (list of `float` or `torch.Tensor` of shape `(n_rows, 1)`):
            The strengths in force.
    """

    log_probs: Tensor
    scores: Tensor
    rewards: list[Tensor]
    filled: list[Tensor]
    strengths: list[float | Tensor]

    @property
    def log_z(self) -> Tensor:
        r"""$\log Z_t$ of each row, `(n_rows,)`, as [`log_normaliser`] defines it."""
        return log_normaliser(self.scores, self.filled, self.strengths)

    @property
    def is_empty(self) -> Tensor:
        """Which rows have no token to choose from, `(n_rows,)`."""
        return self.log_probs.isnan().any(dim=-1)

    def refuse_empty_rows(self) -> None:
        """
        Checks that each row is a distribution.

        Raises:
            ValueError: if one is not.
        """
        is_empty = self.is_empty
        if is_empty.any():
            row = int(is_empty.nonzero()[0])
            cause = "guidance" if (self.scores[row] > -torch.inf).any() else "what runs before guidance"
            raise ValueError(
                f"In row {row}, {cause} leaves no token to choose from (strengths {[str(x) for x in self.strengths]}). "
                "A token to which a reward model gives no probability is excluded by a positive strength, and can't "
                "have a negative one. Use positive strengths, and processors that leave tokens which the reward models "
                "know."
            )


def guided_product(
    scores: Tensor,
    reward_log_probs: Sequence[Tensor],
    strengths: Sequence[float | Tensor],
    reference_log_probs: Tensor | Sequence[Tensor | None] | None = None,
    incomplete: Collection[int] = (),
    scale: Callable[[Tensor, list[Tensor], list[float | Tensor]], Tensor] | None = None,
) -> GuidedProduct:
    r"""
    Makes the guided distribution, as every engine of this package does: contrast, fill, scale, multiply.

    $$\log\pi(y_t) = \log\pi_\text{base}(y_t) + \sum_k \alpha_k
    \big(\log\pi_{r,k}(y_t) - \log\pi_\text{ref}(y_t)\big) - \log Z_t$$

    Args:
        scores (`torch.Tensor` of shape `(n_rows, vocab_size)`):
            Logits or log-probabilities of the base model.
        reward_log_probs (sequence of `torch.Tensor` of shape `(n_rows, vocab_size)`):
            Next-token log-probabilities of each reward model, in float32.
        strengths (sequence of `float` or `torch.Tensor` of shape `(n_rows, 1)`):
            One for each reward model. A row whose strengths are all 0 keeps its scores.
        reference_log_probs (`torch.Tensor` of shape `(n_rows, vocab_size)`, or a sequence of them, *optional*):
            Those of the reference, which each reward is contrasted with; or one for each reward, `None` for those that
            are contrasted already.
        incomplete (collection of `int`, *optional*):
            Which reward models have no reward, but NaN, for some tokens. These tokens keep their probability.
        scale (callable, *optional*):
            Returns what the strengths are multiplied with, `(n_rows, 1)`, for scores, rewards and strengths.

    Returns:
        [`GuidedProduct`]
    """
    rewards = list(reward_log_probs)
    if isinstance(reference_log_probs, Tensor):
        reference_log_probs = [reference_log_probs] * len(rewards)
    if reference_log_probs is not None:
        pairs = zip(rewards, reference_log_probs, strict=True)
        rewards = [x if reference is None else contrast(x, reference) for x, reference in pairs]

    def filled(strengths: Sequence[float | Tensor]) -> list[Tensor]:
        pairs = enumerate(zip(rewards, strengths, strict=True))
        return [fill_unscored(x, alpha, scores) if index in incomplete else x for index, (x, alpha) in pairs]

    scaled, complete = list(strengths), filled(strengths)
    if scale is not None:
        factor = scale(scores, complete, scaled)
        scaled = [alpha * factor for alpha in strengths]
        complete = filled(scaled)
    guided = guided_log_probs(scores, complete, scaled)
    per_row = [alpha != 0 for alpha in strengths if isinstance(alpha, Tensor)]
    if per_row and len(per_row) == len(strengths):
        guided = torch.where(torch.stack(per_row).any(dim=0), guided, scores.float())
    return GuidedProduct(guided, scores, rewards, complete, scaled)


def contrast(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    r"""
    Returns $\log\pi_r - \log\pi_\text{ref}$, the implicit reward of DPO
    ([Rafailov et al., 2023](https://hf.co/papers/2305.18290)), by which proxy tuning and emulated fine-tuning also
    steer. It is 0 for tokens that the reference excludes.
    """
    return torch.where(reference_log_probs == -torch.inf, 0.0, log_probs - reference_log_probs)


def ratio_equivalent(alpha: float, temperature: float = 1.0) -> tuple[float, float]:
    r"""
    Returns the strength and the temperature at which steering by $\log\pi_r - \log\pi_\text{base}$ is Eq. 7 at `alpha`.

    With $\pi_r = \pi_\text{base}\,e^\Delta$, which is what an adapter on the base is, Eq. 7 turns two knobs at once: it
    steers by the ratio $\Delta$, and samples at a lower temperature.

    $$\pi_\text{base}\,\pi_r^\alpha = \pi_\text{base}^{1+\alpha}\,e^{\alpha\Delta} =
    \big(\pi_\text{base}\,e^{\Delta\,\alpha/(1+\alpha)}\big)^{1+\alpha}$$

    Args:
        alpha (`float`):
            Strength of Eq. 7, more than -1.
        temperature (`float`, *optional*, defaults to 1.0):
            Temperature at which Eq. 7 is sampled.

    Returns:
        `tuple[float, float]`: the strength $\alpha/(1+\alpha)$ for `reference="base"`, and the temperature
        $T/(1+\alpha)$ for `generate`.

    Raises:
        ValueError: if `alpha` is -1 or less, where tokens that the base prefers would become the less likely ones.
    """
    if not alpha > -1:
        raise ValueError(f"`alpha` is {alpha}, but only above -1 is Eq. 7 a ratio that is sampled at a temperature.")
    return alpha / (1 + alpha), temperature / (1 + alpha)


def weighted(log_probs: Tensor, alpha: float | Tensor) -> Tensor:
    """Returns `alpha * log_probs`, where 0 times anything is 0, minus infinity and NaN included."""
    return torch.where(alpha == 0, 0.0, alpha * log_probs) if isinstance(alpha, Tensor) else alpha * log_probs


def fill_unscored(log_probs: Tensor, alpha: float | Tensor, scores: Tensor) -> Tensor:
    r"""
    Fills in log-probabilities for tokens that a reward model can't score, so that guidance doesn't change their share.

    Guidance multiplies the probability of the scored tokens $S$ by $\sum_{v \in S} \pi_\text{base}(v) \pi_r(v)^\alpha /
    \sum_{v \in S} \pi_\text{base}(v)$ before it normalises. The other tokens get the same factor, so that they keep
    their share.

    Args:
        log_probs (`torch.Tensor` of shape `(batch_size, vocab_size)`):
            Next-token log-probabilities of the reward model, NaN where unknown.
        alpha (`float` or `torch.Tensor` of shape `(batch_size, 1)`):
            Strength of the reward. Where it is 0, the filled-in values mean nothing.
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


def kl_divergence(log_probs: Tensor, base_log_probs: Tensor) -> Tensor:
    r"""
    Returns $\text{KL}(\pi \,\|\, \pi_\text{base})$ of each row of log-probabilities `(batch_size, vocab_size)`;
    impossible tokens add nothing to it.
    """
    ratio = (log_probs - base_log_probs).masked_fill(log_probs == -torch.inf, 0.0)
    return (log_probs.exp() * ratio).sum(dim=-1)


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    r"""
    Returns the log-probability $\log\pi_r(y_t \mid x, y_{<t})$ of each given token, computed in float32.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, length, vocab_size)`):
            `logits[:, t]` is the prediction for `tokens[:, t]`, so the two are already shifted against each other.
        tokens (`torch.LongTensor` of shape `(batch_size, length)`):
            The tokens that were written.

    Returns:
        `torch.Tensor` of shape `(batch_size, length)`, in float32.
    """
    rows = torch.arange(tokens.numel(), device=tokens.device)
    return selected_log_probs(logits.flatten(0, 1), rows, tokens.flatten()).view(tokens.shape)


def selected_log_probs(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """
    Returns the log-probability of one token each under some rows of logits, computed in float32.

    The backward pass needs the logits and two numbers per row, and makes one gradient, that of the logits;
    `log_softmax` would keep a copy of them in float32 and make two gradients. The gradient is rounded once, at the end:
    that of a token at probability 0.9999 is 0.0001, the difference of two numbers that are equal in bfloat16.

    Args:
        logits (`torch.Tensor` of shape `(n_rows, vocab_size)`):
            Predictions.
        rows (`torch.LongTensor` of shape `(n_selected,)`):
            Which prediction each token is looked up in. A row may occur several times, or never.
        tokens (`torch.LongTensor` of shape `(n_selected,)`):
            The tokens.

    Returns:
        `torch.Tensor` of shape `(n_selected,)`, in float32.
    """
    return _SelectedLogProbs.apply(logits, rows, tokens)


class _SelectedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
        peak, n_rows = logits.amax(dim=-1, keepdim=True).float(), _rows_at_once(logits)
        # Not added to the peak: next to a large number, the small logarithm of a confident row would be rounded away.
        log_sum = torch.cat(
            [
                (part.float() - part_peak).exp_().sum(dim=-1, keepdim=True).log_()
                for part, part_peak in zip(logits.split(n_rows), peak.split(n_rows), strict=True)
            ]
        )
        ctx.save_for_backward(logits, rows, tokens, peak, log_sum)
        return logits[rows, tokens].float() - peak[rows, 0] - log_sum[rows, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, rows, tokens, peak, log_sum = ctx.saved_tensors
        # d log p(token) / d logits = one-hot(token) - softmax
        per_row = torch.zeros_like(log_sum).index_add(0, rows, gradient[:, None])
        result = torch.empty_like(logits)
        n_rows = _rows_at_once(logits)
        for first in range(0, len(logits), n_rows):
            part = slice(first, first + n_rows)
            exact = (logits[part].float() - peak[part]).sub_(log_sum[part]).exp_().mul_(-per_row[part])
            # Tokens of other parts add 0, so that the number of those in this part isn't read from the device.
            row = rows - first
            own = torch.where((row >= 0) & (row < len(exact)), gradient, 0.0)
            result[part] = exact.index_put_((row.clamp(0, len(exact) - 1), tokens), own, accumulate=True)
        return result, None, None


def _rows_at_once(logits: Tensor) -> int:
    if logits.device.type == "cpu":
        return _ROWS_AT_ONCE
    return max(_NUMBERS_AT_ONCE // logits.shape[-1], _ROWS_AT_ONCE)


def preference_loss(margin: Tensor, loss_type: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    r"""
    Returns the loss of each pair, for the margin $m = r(y_w) - r(y_l)$ of its rewards, minus a target margin if there
    is one.

    - `"sigmoid"`: $-(1 - \epsilon)\log\sigma(m) - \epsilon\log\sigma(-m)$, Eq. 5 of the paper; with $\epsilon > 0$ that
      of [conservative DPO](https://ericmitchell.ai/cdpo.pdf)
    - `"hinge"`: $\max(0, 1 - m)$, of [SLiC-HF](https://hf.co/papers/2305.10425)

    Args:
        margin (`torch.Tensor` of shape `(batch_size,)`):
            The margins.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            Which loss.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            $\epsilon$, the share of the labels that are expected to be wrong.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    if loss_type == "hinge":
        return relu(1 - margin)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def shared_prefix_length(chosen_ids: Tensor, rejected_ids: Tensor) -> Tensor:
    """
    Returns the number of leading tokens that the two sequences of each pair have in common.

    Those tokens add the same log-probability to both rewards of a pair, so they cancel in Eq. 5.

    Args:
        chosen_ids, rejected_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            The token ids of the pairs, prompt and response.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`.
    """
    return (chosen_ids == rejected_ids).long().cumprod(dim=-1).sum(dim=-1)
