"""What a reward model has learned: the held-out pairs that it gets right, and how far it moves their answers."""

import warnings
from dataclasses import dataclass

from ..hub.info import GuidanceWarning, RewardInfo

# At a strength of 1, half a nat makes one of two answers at most 1.6 times as likely, for a divergence of about 0.1.
TOO_LITTLE = 0.5


@dataclass(frozen=True)
class Learned:
    r"""
    Holds what was measured on held-out pairs of $\log\pi_r - \log\pi_\text{base}$, where what the base prefers cancels.

    Parameters:
        share (`float`), low, high (`float`):
            Share of the pairs in which it prefers the chosen answer, ties count half, and its 95 % interval.
        n_pairs (`int`):
            Number of pairs.
        nats (`float`):
            Root mean square of its difference between the two answers of a pair, in nats; in nats per token, if the
            loss was length-normalised.
    """

    share: float
    low: float
    high: float
    n_pairs: int
    nats: float

    def warn_if_too_little(self, learning_rate: float | None, n_steps: int) -> None:
        """
        Warns if guidance by it can't be seen.

        Args:
            learning_rate (`float`, *optional*), n_steps (`int`):
                How it was trained.
        """
        if self.nats < TOO_LITTLE:
            warnings.warn(
                "The reward model has learned too little to be seen in guided text: it moves the two answers of a pair "
                f"{self.nats:.2g} nats apart, after {n_steps} steps at a learning rate of {learning_rate:g}. Raise "
                "one of them: `learning_rate`, or `num_train_epochs`.",
                GuidanceWarning,
                stacklevel=4,
            )


def learned(info: RewardInfo) -> Learned | None:
    """Returns what a reward model has learned; `None` if that was not measured, or there is no base to compare with."""
    metrics = info.metrics
    if "contrast_accuracy" in metrics:
        accuracy, margin = "contrast_accuracy", metrics.get("contrast_rms_margin")
    elif info.reference == "base" and "pair_accuracy" in metrics:
        accuracy, margin = "pair_accuracy", metrics["rms_margin"]
    else:
        return None
    if margin is None or info.beta is None:
        return None
    share, low, high = (metrics[f"{accuracy}{end}"] for end in ("", "_low", "_high"))
    return Learned(share, low, high, int(metrics["n_pairs"]), margin / info.beta)
