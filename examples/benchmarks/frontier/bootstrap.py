"""Means over training seeds and prompts, with intervals from a bootstrap of both together."""

from functools import cache

import numpy as np

from hf_genarm.bootstrap import interval as interval_of_resamples

N_RESAMPLES = 2_000


@cache
def draws(n_seeds: int, n_prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns how often each training seed and each prompt occurs in each resample, as shares, of shapes
    `(1 + n_resamples, n_seeds)` and `(1 + n_resamples, n_prompts)`. The first row is the sample itself. Methods with
    the same number of seeds, or of prompts, get the same draws, so that differences are paired.
    """

    def shares(n: int, key: int) -> np.ndarray:
        rng = np.random.default_rng([key, n])
        counts = rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n
        return np.concatenate([np.full((1, n), 1 / n), counts])

    return shares(n_seeds, 0), shares(n_prompts, 1)


def means(values: np.ndarray) -> np.ndarray:
    """Returns means of values `(n_seeds, n_prompts, n_points)` and their resamples, `(1 + n_resamples, n_points)`."""
    seeds, prompts = draws(*values.shape[:2])
    return np.einsum("rs,spk,rp->rk", seeds, values, prompts, optimize=True)


def interpolated(x: np.ndarray, y: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """
    Reads curves at some `x`, on straight lines between their points.

    Args:
        x, y (`np.ndarray` of shape `(n_curves, n_points)`):
            The points of each curve.
        targets (`np.ndarray` of shape `(n_targets,)`):
            Where they are read.

    Returns:
        `np.ndarray` of shape `(n_curves, n_targets)`. Where the first curve does not reach, all are NaN. Where only
        another one does not reach, it has the value of its end.
    """
    order = x.argsort(axis=1)
    x, y = np.take_along_axis(x, order, axis=1), np.take_along_axis(y, order, axis=1)
    values = np.stack([np.interp(targets, one, other) for one, other in zip(x, y, strict=True)])
    values[:, (targets < x[0, 0]) | (targets > x[0, -1])] = np.nan
    return values


def interval(resampled: np.ndarray) -> tuple[float, float, float]:
    """
    Returns a number and its 95 % interval, from its values on the sample and on each resample, `(1 + n_resamples,)`.
    They are rounded, so that a tie at the last digit shown is the same on every processor.
    """
    value, low, high = (round(float(x), 9) for x in (resampled[0], *interval_of_resamples(resampled[1:])))
    return value, low, high


def shown(resampled: np.ndarray, form: str = ".2f") -> str:
    """Returns a number with its interval as text; an empty one if it is NaN."""
    if np.isnan(resampled[0]):
        return ""
    value, low, high = interval(resampled)
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def hypervolume(points: np.ndarray, worst: np.ndarray) -> float:
    """Returns the area that points `(n, 2)` dominate above the worst value of each axis; larger values are better."""
    points = points[(points > worst).all(axis=1)]
    volume, height = 0.0, worst[1]
    for x, y in points[points[:, 0].argsort()[::-1]]:
        if y > height:
            volume += (x - worst[0]) * (y - height)
            height = y
    return float(volume)
