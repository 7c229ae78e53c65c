"""The bootstrap: how much a mean would vary with other prompts or pairs."""

import numpy as np


def resampled_means(values: np.ndarray, n_resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """
    Returns the means of resamples, each drawn with replacement from the values and as large as the sample.

    Args:
        values (`np.ndarray` of shape `(n,)` or `(n, n_measures)`):
            The sample; the measures of one item stay together.
        n_resamples (`int`, *optional*, defaults to 10,000):
            Number of resamples.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random numbers.

    Returns:
        `np.ndarray` of shape `(n_resamples,)` or `(n_resamples, n_measures)`.
    """
    # Drawing how often each different value occurs is the same as drawing the values.
    different, counts = np.unique(values, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=n_resamples)
    return draws @ different / len(values)


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of a number, from its values on resamples, `(n_resamples,)`."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def mean_with_interval(values: np.ndarray, n_resamples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Returns the mean of values, `(n,)`, and the bounds of its 95 % interval."""
    return float(values.mean()), *interval(resampled_means(values, n_resamples, seed))
