"""Strengths that hold the divergence from the base at a set value, token by token."""

import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..arguments import as_number
from ..functional import kl_divergence, weighted
from .step import Run
from .texts import RecentTexts, Text

# Over how many tokens a text catches up with the target, and how many times as large a strength may become.
_HORIZON, _LARGEST = 4, 16.0
# How often the range of factors is halved, a multiple of 4; and up to how many numbers 15 times as many are few.
_N_HALVINGS, _FEW_NUMBERS = 20, 2**22


class KLControl:
    r"""
    Scales the strengths of each row so that, over its tokens, the mean of $\text{KL}(\pi \,\|\, \pi_\text{base})$
    is a set value.

    What the tokens of a text have spent is kept by its run, its request and the tokens themselves, not by a step
    counter. So beams that permute, rejected drafts and several returned sequences have the strengths that each would
    have alone.
    """

    def __init__(self) -> None:
        self._missing: WeakKeyDictionary[Run, RecentTexts] = WeakKeyDictionary()

    def __call__(
        self,
        text: Text,
        n_requests: int,
        target: float,
        scores: Tensor,
        rewards: Sequence[Tensor],
        alphas: Sequence[float | Tensor],
    ) -> Tensor:
        """
        Returns the factor of the strengths of each row, and records what its next token spends.

        Args:
            text ([`Text`]):
                The texts so far.
            n_requests (`int`):
                The number of requests whose strengths differ.
            target (`float`):
                Mean divergence per token, in nats.
            scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
                Logits or log-probabilities of the base model.
            rewards (sequence of `torch.Tensor` of shape `(batch_size, vocab_size)`):
                Next-token log-probabilities of each reward model.
            alphas (sequence of `float` or `torch.Tensor` of shape `(batch_size, 1)`):
                Their strengths relative to each other.

        Returns:
            `torch.Tensor` of shape `(batch_size, 1)`: the factors of the strengths.
        """
        of_run = self._missing.setdefault(text.run, RecentTexts())
        length = text.input_ids.shape[1]
        found = of_run.find(text.line, length - 1, n_requests) if any(text.n_new) else [None] * len(scores)
        found = [known if n_new else None for known, n_new in zip(found, text.n_new, strict=True)]
        missing = _gathered(found, scores.device)
        scale, missing = controlled_scale(scores, rewards, alphas, torch.full_like(missing, target), missing)
        of_run.record(text.line, length, missing, n_requests)
        return scale[:, None]


def _gathered(found: Sequence[tuple[Tensor, int] | None], device: torch.device) -> Tensor:
    """Returns one value for each row `(n_rows,)`, given which row of some tensor has it; 0 where none does."""
    tensors = {id(known[0]): known[0] for known in found if known is not None}
    values = torch.zeros(len(found), device=device)
    for tensor in tensors.values():
        pairs = [(row, known[1]) for row, known in enumerate(found) if known is not None and known[0] is tensor]
        if len(pairs) == len(found) == len(tensor) and all(row == own for row, own in pairs):
            return tensor
        to, of = torch.tensor(pairs).to(device, non_blocking=True).unbind(1)
        values = values.index_copy(0, to, tensor[of])
    return values


def check_target_kl(target: float) -> float:
    """
    Returns a divergence per token that texts can be held at.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not positive and finite.
    """
    number = as_number("target_kl", target, "a number of nats per token, or `None` for none")
    if not 0 < number < math.inf:
        raise ValueError(
            f"`target_kl` is {target}, but a divergence per token is a positive number. Use `alpha=0` for none."
        )
    return number


def controlled_scale(
    scores: Tensor, rewards: Sequence[Tensor], alphas: Sequence[float | Tensor], target: Tensor, missing: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Returns the factors at which each row spends its budget, and what is missing from the target afterwards.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
            Logits or log-probabilities of the base model.
        rewards, alphas:
            As for [`KLControl`].
        target (`torch.Tensor` of shape `(batch_size,)`):
            Mean divergence per token, in nats.
        missing (`torch.Tensor` of shape `(batch_size,)`):
            By how much the earlier tokens have fallen short of the target, in sum.

    Returns:
        Two `torch.Tensor` of shape `(batch_size,)`: the factors of the strengths, and what is missing after this token.
    """
    base = scores.float().log_softmax(dim=-1)
    parts = [weighted(log_probs, alpha) for log_probs, alpha in zip(rewards, alphas, strict=True)]
    # Impossible tokens stay so at any factor but 0, which would make them NaN.
    direction = torch.stack(parts).sum(dim=0).masked_fill(base == -torch.inf, 0.0).clamp(min=-1e9)
    scale, spent = _solve(base, direction, (target + missing / _HORIZON).clamp(min=0.0), _LARGEST)
    return scale, missing + target - spent


def _solve(base: Tensor, direction: Tensor, wanted: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Finds the factors at which each row has the wanted divergence, by halving their range: it grows with them."""
    low, width, n_at_once = torch.zeros_like(wanted), largest, _n_halvings_at_once(base)
    steps = torch.arange(1, 2**n_at_once, device=base.device)
    for _ in range(_N_HALVINGS // n_at_once):
        width /= 2**n_at_once
        tried = low[:, None] + width * steps
        is_less = divergence(base[:, None], direction[:, None], tried) < wanted[:, None]
        low = low + width * is_less.sum(dim=-1)
    return low, divergence(base, direction, low)


def _n_halvings_at_once(base: Tensor) -> int:
    """
    Returns how often the range of factors is halved in one go. On a GPU the time is that of the kernels, however few
    numbers they have to compute: it may try all factors that some halvings could lead to.
    """
    return 1 if base.device.type == "cpu" else 4 if base.numel() <= _FEW_NUMBERS else 2


def divergence(base: Tensor, direction: Tensor, scale: Tensor) -> Tensor:
    r"""
    Returns $\text{KL}(\pi \,\|\, \pi_\text{base})$ of each row, for
    $\pi \propto \pi_\text{base}\exp(\text{scale} \cdot \text{direction})$.
    """
    guided = (base + scale[..., None] * direction).log_softmax(dim=-1)
    return kl_divergence(guided, base)
