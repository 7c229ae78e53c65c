"""Metrics of a reward model on held-out pairs, compared with a rule that only counts tokens."""

from math import sqrt
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..bootstrap import mean_with_interval

# Pairs whose responses differ by at most this share of the longer one count as matched in length.
_MATCHED = 0.1
_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def is_right(margin: np.ndarray) -> np.ndarray:
    """Returns 1 where the chosen response has the higher reward, 0.5 at a tie, 0 elsewhere."""
    return (margin > 0) + 0.5 * (margin == 0)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    r"""
    Returns the 95 % interval of a share of `n` pairs, from [Wilson, 1927](https://doi.org/10.2307/2276774).

    Unlike the bootstrap, it isn't a single point if all pairs are right: 5 of 5 are $[0.57, 1]$.

    Args:
        share (`float`):
            Share of the pairs that are right, where a tie may count half.
        n (`int`):
            Number of pairs, at least 1.
    """
    centre = share + _Z**2 / (2 * n)
    spread = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = ((centre + x) / (1 + _Z**2 / n) for x in (-spread, spread))
    return max(low, 0.0), min(high, 1.0)


def calibration_error(margin: np.ndarray, is_right: np.ndarray, n_bins: int = 10) -> float:
    r"""
    Returns the expected calibration error of the confidence $\sigma(|\text{margin}|)$.

    By the loss, this confidence is the probability that the response with the higher reward is the chosen one. The
    error is the mean distance of confidence and accuracy over equal bins of confidence, weighted by the number of pairs
    in them ([Guo et al., 2017](https://hf.co/papers/1706.04599)).
    """
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    bins = np.minimum(((confidence - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    gaps = [abs((confidence - is_right)[bins == index].sum()) for index in range(n_bins)]
    return float(sum(gaps) / len(margin))


def preference_metrics(prediction: EvalPrediction) -> dict[str, float]:
    r"""
    Measures how well rewards distinguish chosen from rejected responses.

    Args:
        prediction ([`~transformers.EvalPrediction`]):
            `predictions` of shape `(n_pairs, 2)` are the rewards of chosen and rejected. `label_ids` is a tuple: their
            numbers of tokens, and for an adapter the rewards that its base gives, each of shape `(n_pairs, 2)`.

    Returns:
        `dict[str, float]`:
            - `n_pairs`
            - `pair_accuracy`: share of pairs whose chosen response has the higher reward, ties count half; with the
              bounds of its 95 % interval from [`wilson_interval`], `pair_accuracy_low` and `pair_accuracy_high`
            - `shorter_accuracy`: the same for preferring the shorter response, which an untrained model does
            - `gain_over_shorter`, with `gain_over_shorter_low` and `gain_over_shorter_high`: the difference of the two,
              pair by pair, with its bootstrap interval
            - `mean_margin`: mean of the margin, chosen minus rejected reward
            - `rms_margin`: root mean square of the margin
            - `margin_length_correlation`: Pearson correlation of the margin with the difference in length; 0 if one of
              them is constant
            - `calibration_error`: from [`calibration_error`]
            - `n_length_matched`: number of pairs whose lengths differ by at most 10 % of the longer one
            - `length_matched_accuracy`, with `length_matched_accuracy_low` and `length_matched_accuracy_high`: the
              accuracy on those, if there are any
            - `contrast_accuracy`, with `contrast_accuracy_low` and `contrast_accuracy_high`: the accuracy of
              $\log\pi_r - \log\pi_\text{base}$, which is what an adapter has learned: what its base prefers, such as
              likely and short texts, cancels. It is missing with `reference="base"`, where it is `pair_accuracy`
            - `contrast_rms_margin`: root mean square of the margin of what an adapter has learned; missing with
              `reference="base"`, where it is `rms_margin`
    """
    labels: Any = prediction.label_ids
    rewards: Any = prediction.predictions
    lengths, *base = labels
    margin = rewards[:, 0] - rewards[:, 1]
    longer = lengths[:, 0] - lengths[:, 1]
    right, shorter = is_right(margin), is_right(-longer)
    varies = margin.std() > 0 and longer.std() > 0
    matched = np.abs(longer) <= _MATCHED * lengths.max(axis=1)
    metrics = {
        "n_pairs": len(margin),
        **_accuracy("pair_accuracy", right),
        "shorter_accuracy": float(shorter.mean()),
        **_named("gain_over_shorter", mean_with_interval(right - shorter)),
        "mean_margin": float(margin.mean()),
        "rms_margin": _root_mean_square(margin),
        "margin_length_correlation": float(np.corrcoef(margin, longer)[0, 1]) if varies else 0.0,
        "calibration_error": calibration_error(margin, right),
        "n_length_matched": int(matched.sum()),
    }
    if matched.any():
        metrics |= _accuracy("length_matched_accuracy", right[matched])
    for base_rewards in base:
        learned = margin - (base_rewards[:, 0] - base_rewards[:, 1])
        metrics |= _accuracy("contrast_accuracy", is_right(learned))
        metrics["contrast_rms_margin"] = _root_mean_square(learned)
    return metrics


def _accuracy(name: str, right: np.ndarray) -> dict[str, float]:
    """Returns the mean of what [`is_right`] returns, and its interval."""
    share = float(right.mean())
    return _named(name, (share, *wilson_interval(share, len(right))))


def _named(name: str, value: tuple[float, float, float]) -> dict[str, float]:
    """Returns a value and the bounds of its interval under their names."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), value, strict=True))


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


class PreferenceMetrics:
    """
    Computes [`preference_metrics`] for [`~transformers.Trainer`].

    The trainer passes all pairs at once, a list of batches (`eval_do_concat_batches=False`), or one batch after the
    other (`batch_eval_metrics=True`).
    """

    def __init__(self) -> None:
        self._batches: list[list[torch.Tensor]] = []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Returns the metrics of all pairs so far if `compute_result`, which is true for the last batch, or nothing."""
        rewards, given = prediction.predictions, prediction.label_ids
        batches = zip(rewards, given, strict=True) if isinstance(rewards, list) else [(rewards, given)]
        self._batches += [[torch.as_tensor(x).cpu() for x in (one, *others)] for one, others in batches]
        if not compute_result:
            return {}
        arrays = [torch.cat(parts).numpy() for parts in zip(*self._batches, strict=True)]
        self._batches = []
        labels: Any = tuple(arrays[1:])
        return preference_metrics(EvalPrediction(predictions=arrays[0], label_ids=labels))
