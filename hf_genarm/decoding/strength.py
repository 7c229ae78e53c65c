"""How strongly each reward acts on each row of a batch: numbers, one row for each request, or a schedule."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..arguments import as_number, as_tensor, shown
from .texts import Text

Strengths = float | Sequence[float] | Tensor
Alpha = Strengths | Callable[[int], Strengths]

# Products of larger ones with log-probabilities are infinite in float32.
_LARGEST = 1e6


def check_alpha(alpha: Any, n_rewards: int) -> list[float] | Tensor | Callable[[int], Strengths]:
    """
    Checks the strengths that a user gives.

    Args:
        alpha (`float`, list of `float`, `torch.Tensor`, `numpy.ndarray` or callable):
            The strengths.
        n_rewards (`int`):
            Number of reward models.

    Returns:
        One number for each reward model; or a float32 tensor of shape `(n_requests, n_rewards)` on the CPU; or the
        callable, whose values are checked when they are known.

    Raises:
        TypeError: if it is something else.
        ValueError: if the numbers do not fit the reward models, are not finite, or too large.
    """
    rule = (
        f"a number, a list with one for each reward model, an array or tensor of shape (n_requests, {n_rewards}), or a "
        "function of the step that returns one of these"
    )
    if isinstance(alpha, nn.Module | PreTrainedTokenizerBase | type):  # can be called, too
        raise TypeError(f"`alpha` is {shown(alpha)}, but must be {rule}. Pass models and tokenizers by their names.")
    if callable(alpha):
        return alpha
    values = as_tensor("alpha", alpha, rule, dtype=torch.float64).to("cpu", torch.float64)
    is_list = not isinstance(alpha, Tensor) and values.ndim == 1
    if is_list and len(values) != n_rewards:
        raise ValueError(
            f"`alpha` is {shown(alpha)}, which has {len(values)} values, but there are {n_rewards} reward models. Give "
            "one value for each, a single one for all, or a tensor with one row for each request."
        )
    if values.ndim > 2 or (values.ndim > 0 and values.shape[-1] != n_rewards) or values.numel() == 0:
        raise ValueError(
            f"`alpha` has shape {tuple(values.shape)}, but there are {n_rewards} reward models. Its shape must be "
            f"(n_requests, {n_rewards}), one row for each request."
        )
    if not (values.abs() <= _LARGEST).all():
        raise ValueError(
            f"`alpha` is {shown(values.tolist())}, but strengths must be finite, and at most {_LARGEST:g}."
        )
    return values.float() if values.ndim == 2 else values.expand(n_rewards).tolist()


def alpha_of_beta(beta: float, reward_betas: Sequence[float | None]) -> list[float]:
    r"""
    Returns the strengths $\alpha_k = \beta_{r,k} / \beta$ that realise a KL temperature, from the scales $\beta_{r,k}$
    that the reward models were trained with: decoding then samples from $\pi_\text{base}\exp(r / \beta)$, with the
    reward $r = \beta_r\log\pi_r$ of Eq. 5.

    Args:
        beta (`float`):
            The KL temperature.
        reward_betas (sequence of `float`):
            $\beta_{r,k}$ of each reward model, `None` if it is not known.

    Raises:
        TypeError: if `beta` is not a number.
        ValueError: if it is not positive, or a scale is not known.
    """
    beta = as_number("beta", beta, "a KL temperature, a positive number")
    if not beta > 0:
        raise ValueError(f"`beta` is {beta}, but a KL temperature is positive: the smaller, the stronger the guidance.")
    return [scale / beta for scale in _known(reward_betas, "beta", "the `beta` that it was trained with")]


def alpha_of_weights(
    weights: Sequence[float] | Tensor, alpha: float, reward_scales: Sequence[float | None]
) -> list[float] | Tensor:
    r"""
    Returns strengths that trade objectives off on one scale: $\alpha_k = \alpha\,w_k\,\bar s / s_k$, where $s_k$ is the
    scale of the log-probabilities of reward model $k$ on held-out pairs, and $\bar s$ their geometric mean.

    Args:
        weights (sequence of `float`, or `torch.Tensor` of shape `(n_requests, n_rewards)`):
            $w_k$ of each objective, summing to 1.
        alpha (`float`):
            The strength that they share.
        reward_scales (sequence of `float`):
            $s_k$ of each reward model, in nats, `None` if it is not known.

    Raises:
        TypeError: if weights or the strength are no numbers.
        ValueError: if weights are negative or do not sum to 1, or a scale is not known.
    """
    rule = "a list with one number for each reward model, or a tensor with one row for each request"
    given = as_tensor("weights", weights, rule).float().cpu()
    alpha = as_number("alpha", alpha, "the strength that the objectives share, a number")
    if (
        not 1 <= given.ndim <= 2
        or given.shape[-1] != len(reward_scales)
        or not (given >= 0).all()
        or (given.sum(-1) - 1).abs().max() > 1e-3
    ):
        raise ValueError(
            f"`weights` is {shown(given.tolist())}, but it must have one weight for each of the {len(reward_scales)} "
            "reward models, none of them negative, with the sum 1. To steer away or more strongly, set `alpha`."
        )
    scales = torch.tensor(_known(reward_scales, "reward_scale", "its scale on held-out pairs"))
    alphas = alpha * given * scales.log().mean().exp() / scales
    return alphas.tolist() if alphas.ndim == 1 else alphas


def _known(values: Sequence[float | None], name: str, what: str) -> list[float]:
    """Returns the values, or refuses those of which one is not known."""
    unknown = [index for index, value in enumerate(values) if value is None]
    if unknown:
        raise ValueError(
            f"Reward model {unknown[0]} does not record {what} (`{name}` in its `genarm_config.json`). Set `alpha` "
            "instead."
        )
    return [value for value in values if value is not None]


def strengths_at(alpha: Any, n_rewards: int, text: Text, device: torch.device) -> tuple[dict[int, float | Tensor], int]:
    """
    Returns the strength of each reward that is not at 0 everywhere, one number or a tensor of shape `(batch_size, 1)`,
    and the number of requests whose strengths differ.

    Args:
        alpha (as for [`check_alpha`]):
            The strengths, or their schedule.
        n_rewards (`int`):
            Number of reward models.
        text ([`Text`]):
            The texts so far.
        device (`torch.device`):
            Where the tensors are needed.
    """
    by_step, n_requests = {}, 1
    for step in sorted(set(text.n_new)):
        alphas = check_alpha(alpha(step) if callable(alpha) else alpha, n_rewards)
        if callable(alphas):
            raise ValueError(f"`alpha` returned a function for step {step}, but it must return strengths.")
        if isinstance(alphas, Tensor):
            n_requests = len(alphas)
            key = ("alpha", n_requests, len(text.input_ids))
            if text.step is None or key not in text.run.agreed:  # the rows of a request stay its rows
                refuse_other_requests(alphas, text.prompts, text.run.n_prompts)
                text.run.agreed[key] = True
        by_step[step] = by_reward(alphas, len(text.input_ids))
    strengths, *others = by_step.values()
    for step, own in zip(list(by_step)[1:], others, strict=True):  # custom loops may join texts of any length
        is_at = torch.tensor([x == step for x in text.n_new])[:, None]
        strengths = [torch.where(is_at, x, y) for x, y in zip(own, strengths, strict=True)]
    active = {index: strength for index, strength in enumerate(strengths) if torch.as_tensor(strength).any()}
    return {index: _on(device, strength) for index, strength in active.items()}, n_requests


def refuse_other_requests(alphas: Tensor, prompts: Tensor, n_prompts: int | None = None) -> None:
    """
    Refuses strengths `(n_requests, n_rewards)` of other requests than those of a call.

    Args:
        alphas (`torch.Tensor` of shape `(n_requests, n_rewards)`):
            From [`check_alpha`]. The rows of a request, for beams or several returned sequences, follow each
            other.
        prompts (`torch.LongTensor` of shape `(batch_size, prompt_length)`):
            What the rows begin with, on the host.
        n_prompts (`int`, *optional*):
            The number of prompts that `generate` was given, if it is known.

    Raises:
        ValueError: if the rows are not a multiple of the requests, or those of one request have different prompts, or
            there are strengths for each beam or returned sequence.
    """
    repeats = len(prompts) // len(alphas)
    if repeats * len(alphas) != len(prompts) or not torch.equal(
        prompts, prompts[:: max(repeats, 1)].repeat_interleave(max(repeats, 1), dim=0)
    ):
        raise ValueError(
            f"`alpha` has {len(alphas)} rows, one for each request, but there are {len(prompts)} rows to generate, and "
            f"they are not {len(alphas)} prompts of equally many rows. Set `processor.alpha` to the strengths of these "
            "requests."
        )
    if n_prompts is not None and len(alphas) > n_prompts:
        raise ValueError(
            f"`alpha` has {len(alphas)} rows, one for each request, but `generate` was given {n_prompts} prompts. "
            "Beams and returned sequences of one prompt share its strengths: give one row for each prompt."
        )


def by_reward(alphas: list[float] | Tensor, n_rows: int) -> list[float | Tensor]:
    """
    Returns the strength of each reward: one number, or if requests differ a tensor of shape `(n_rows, 1)`.

    Args:
        alphas (list of `float` or `torch.Tensor` of shape `(n_requests, n_rewards)`):
            From [`check_alpha`].
        n_rows (`int`):
            The number of texts. Those of a request follow each other.
    """
    if isinstance(alphas, list):
        return list(alphas)
    expanded = alphas.repeat_interleave(n_rows // len(alphas), dim=0)
    return [column[:, None] for column in expanded.unbind(dim=1)]


def _on(device: torch.device, strength: float | Tensor) -> float | Tensor:
    return strength.to(device, non_blocking=True) if isinstance(strength, Tensor) else strength
