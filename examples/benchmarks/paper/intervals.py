"""Statistics over prompts: whatever has several answers to a prompt is one number for that prompt, paired by prompt."""

import numpy as np

N_RESAMPLES = 10_000


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means over prompts of 10,000 bootstrap resamples of the prompts, `(10000, ...)` for values `(n_prompts, ...)`."""
    # To resample prompts is to draw how often each of them occurs; the same draws for everything with as many prompts.
    n = len(values)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    return (counts @ values.reshape(n, -1) / n).reshape(N_RESAMPLES, *values.shape[1:])


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of values `(n_prompts,)` with its 95 % interval."""
    return (float(values.mean()), *bounds(resampled_means(values)))


def bounds(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of what was computed from each resample."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def shown(value: float, low: float, high: float, form: str = ".2f") -> str:
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def cell(values: np.ndarray, digits: int = 2) -> str:
    """Nothing, where there is nothing to average."""
    if len(values) == 0:
        return ""
    return shown(*interval(values), f".{digits}f")


def p_value(differences: np.ndarray) -> float:
    """Two-sided bootstrap p-value that the mean of paired differences `(n_prompts,)` is 0."""
    means = resampled_means(differences)
    # One is added to both, as the data are a resample, too: no p-value is 0.
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return min(1.0, 2 * (tail + 1) / (N_RESAMPLES + 1))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for as many comparisons (Holm, 1979)."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def win_rates(scores: np.ndarray, other_scores: np.ndarray) -> np.ndarray:
    """Win + half-tie rate of each prompt, over all pairs of an answer and one of the other method; `(n_prompts,)`."""
    difference = scores[:, :, None] - other_scores[:, None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(1, 2))


def length_matched(
    scores: np.ndarray, words: np.ndarray, other_scores: np.ndarray, other_words: np.ndarray, tolerance: int = 2
) -> np.ndarray:
    """
    Mean difference of the scores over pairs of answers to a prompt whose numbers of words differ by at most
    `tolerance`, for the prompts that have such pairs.
    """
    matched = np.abs(words[:, :, None] - other_words[:, None, :]) <= tolerance
    difference = scores[:, :, None] - other_scores[:, None, :]
    n_matched = matched.sum(axis=(1, 2))
    return ((difference * matched).sum(axis=(1, 2)) / n_matched.clip(min=1))[n_matched > 0]


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Area that points `(n, 2)` dominate above `reference`; more is better in both."""
    above = points[(points > reference).all(axis=1)]
    area, height = 0.0, reference[1]
    for x, y in above[np.argsort(-above[:, 0])]:
        if y > height:
            area += (x - reference[0]) * (y - height)
            height = y
    return area
