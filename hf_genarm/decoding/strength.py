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


def alpha_of_beta(beta: float, reward_betas: Sequence[float | None]) -> list[float]:
    r"""
    The strengths $\alpha_k = \beta_{r,k} / \beta$ that realise a KL temperature, from the scales $\beta_{r,k}$ that the
    reward models were trained with: decoding then samples from $\pi_\text{base}\exp(r / \beta)$, with the reward
    $r = \beta_r\log\pi_r$ of Eq. 5.

    Args:
        beta (`float`):
            The KL temperature.
        reward_betas (sequence of `float`):
            $\beta_{r,k}$ of each reward model, `None` if it is not known.

    Raises:
        ValueError: if `beta` is not positive, or a scale is not known.
    """
    if not beta > 0:
        raise ValueError(f"`beta` is {beta}, but a KL temperature is positive: the smaller, the stronger the guidance.")
    return [scale / beta for scale in _known(reward_betas, "beta", "the `beta` that it was trained with")]


def alpha_of_weights(
    weights: Sequence[float] | Tensor, alpha: float, reward_scales: Sequence[float | None]
) -> list[float] | Tensor:
    r"""
    Strengths that trade objectives off on one scale: $\alpha_k = \alpha\,w_k\,\bar s / s_k$, where $s_k$ is the scale
    of the log-probabilities of reward model $k$ on held-out pairs, and $\bar s$ their geometric mean.

    Args:
        weights (sequence of `float`, or `torch.Tensor` of shape `(n_requests, n_rewards)`):
            $w_k$ of each objective, summing to 1.
        alpha (`float`):
            The strength that they share.
        reward_scales (sequence of `float`):
            $s_k$ of each reward model, in nats, `None` if it is not known.

    Raises:
        ValueError: if weights are negative or do not sum to 1, or a scale is not known.
    """
    given = torch.as_tensor(weights, dtype=torch.float32)
    if given.shape[-1:] != (len(reward_scales),) or not (given >= 0).all() or (given.sum(-1) - 1).abs().max() > 1e-3:
        raise ValueError(
            f"`weights` is {given.tolist()}, but it must have one weight for each of the {len(reward_scales)} reward "
            "models, none of them negative, with the sum 1. To steer away or more strongly, set `alpha`."
        )
    scales = torch.tensor(_known(reward_scales, "reward_scale", "its scale on held-out pairs"))
    alphas = alpha * given * scales.log().mean().exp() / scales
    return alphas.tolist() if alphas.ndim == 1 else alphas


def _known(values: Sequence[float | None], name: str, what: str) -> list[float]:
    unknown = [index for index, value in enumerate(values) if value is None]
    if unknown:
        raise ValueError(
            f"Reward model {unknown[0]} does not say {what} (`{name}` in its `genarm_config.json`). Set `alpha` "
            "instead."
        )
    return [value for value in values if value is not None]


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
