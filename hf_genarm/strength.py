"""How strongly each reward acts on each row of a batch: numbers, one row for each request, or a schedule."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Strengths = float | Sequence[float] | Tensor
Alpha = Strengths | Callable[[int], Strengths]


def check_alpha(alpha: Alpha, n_rewards: int) -> list[float] | Tensor | Callable[[int], Strengths]:
    """
    Args:
        alpha (`float`, list of `float`, `torch.Tensor` or callable):
            As the user gives it.
        n_rewards (`int`):
            Number of reward models.

    Returns:
        One number for each reward model; or a float32 tensor of shape `(n_requests, n_rewards)` on the CPU; or the
        callable, whose values are checked when they are known.

    Raises:
        ValueError: if the numbers do not fit the reward models, or are not finite.
    """
    if callable(alpha):
        return alpha
    if isinstance(alpha, Tensor) and alpha.ndim > 0:
        if alpha.ndim > 2 or alpha.shape[-1] != n_rewards or alpha.numel() == 0:
            raise ValueError(
                f"`alpha` has shape {tuple(alpha.shape)}, but there are {n_rewards} reward models. Its shape must be "
                f"(n_requests, {n_rewards}), one row for each request."
            )
        if not alpha.isfinite().all():
            raise ValueError(f"`alpha` is {alpha.tolist()}, but strengths must be finite numbers.")
        return alpha.tolist() if alpha.ndim == 1 else alpha.detach().to("cpu", torch.float32, copy=True)
    alphas = list(alpha) if isinstance(alpha, Sequence) else [float(alpha)] * n_rewards
    if len(alphas) != n_rewards:
        raise ValueError(
            f"`alpha` is {alpha}, which has {len(alphas)} values, but there are {n_rewards} reward models. Give one "
            "value for each, a single one for all, or a tensor with one row for each request."
        )
    if not all(math.isfinite(value) for value in alphas):
        raise ValueError(f"`alpha` is {alpha}, but strengths must be finite numbers.")
    return [float(value) for value in alphas]


def by_reward(alphas: list[float] | Tensor, scores: Tensor) -> list[float | Tensor]:
    """
    The strength of each reward: one number, or if requests differ a tensor of shape `(batch_size, 1)`.

    Args:
        alphas (list of `float` or `torch.Tensor` of shape `(n_requests, n_rewards)`):
            From [`check_alpha`]. The rows of a request, for beams or several returns, follow each other.
        scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
            What the strengths are for.

    Raises:
        ValueError: if the rows are not a multiple of the requests.
    """
    if isinstance(alphas, list):
        return list(alphas)
    if len(scores) % len(alphas):
        raise ValueError(
            f"`alpha` has {len(alphas)} rows, one for each request, but `generate` runs {len(scores)} rows, which is "
            "no multiple. Set `processor.alpha` to the strengths of these requests."
        )
    expanded = alphas.to(scores.device).repeat_interleave(len(scores) // len(alphas), dim=0)
    return [column[:, None] for column in expanded.unbind(dim=1)]
