"""Curves of reward against divergence, one per method, with their resamples."""

import numpy as np
import pandas as pd

from .answers import Runs
from .bootstrap import N_RESAMPLES, interpolated, means

OURS, DPO = "GenARM: DPO loss, ratio", "DPO, a training run per point"
EQ7 = "GenARM: Eq. 5, Eq. 7 (the paper)"
SENTENCE, BRIEF = "a sentence", "a sentence for brevity"
ADAPTER, BOTH, TRAINED = "the published adapter", "sentence and adapter", "adapters of Sentiment"
NAMES = {
    "DPO loss, ratio": OURS,
    "Eq. 5, ratio": "GenARM: Eq. 5, ratio",
    "Eq. 5, Eq. 7": EQ7,
    "DPO loss, Eq. 7": "GenARM: DPO loss, Eq. 7",
}


class Curves:
    """
    The curves of one split.

    Attributes:
        runs: the methods by name. DPO's policies are one method, with 1 / β as strength.
        base: the base at temperature 1.
        n_prompts: how many prompts the base has answered.
    """

    def __init__(self, rows: pd.DataFrame):
        is_base = rows["method"] == "base"
        self.base = Runs.of(rows[is_base & (rows["temperature"] == 1)])
        self.n_prompts = self.base.values["kl"].shape[1]
        rows = rows[~is_base | (rows["temperature"] != 1)].copy()
        rows.loc[rows["method"] == "base", "method"] = "base, sharpened"
        is_dpo = rows["method"].str.startswith("dpo-")
        rows.loc[is_dpo, "strength"] = 1 / rows.loc[is_dpo, "method"].str.removeprefix("dpo-").astype(float)
        rows.loc[is_dpo, "method"] = DPO
        runs = {NAMES.get(name, name): Runs.of(group) for name, group in rows.groupby("method")}
        first = [OURS, DPO, *(name for name in NAMES.values() if name != OURS)]
        order = [name for name in first if name in runs] + [name for name in runs if name not in first]
        self.runs = {name: runs[name] for name in order}

    def mean(self, name: str, what: str) -> np.ndarray:
        """Returns the mean of a measure at each setting, and of its resamples: `(1 + n_resamples, n_points)`."""
        values = (self.runs[name] if name != "base" else self.base).values
        if what == "perplexity":
            return np.exp(-means(values["base_log_prob"]) / means(values["n_tokens"]))
        return means(values[what])

    def is_curve(self, name: str) -> bool:
        """Returns whether a method has several settings and has answered all prompts."""
        runs = self.runs[name]
        return len(runs.points) > 1 and runs.values["kl"].shape[1] == self.n_prompts

    def at(self, name: str, what: str, targets: np.ndarray) -> np.ndarray:
        """
        Reads a measure off the curve of a method, which starts at the base, where the divergence has some values.

        Returns:
            `np.ndarray` of shape `(1 + n_resamples, n_targets)`; NaN if the method has no curve.
        """
        if not self.is_curve(name):
            return np.full((1 + N_RESAMPLES, len(targets)), np.nan)
        x, y = (np.concatenate([self.mean("base", n), self.mean(name, n)], axis=1) for n in ("kl", what))
        return interpolated(x, y, targets)

    def of_seed(self, name: str, seed: int, what: str, target: float) -> float:
        """Reads a measure off the curve of one training run."""
        x, y = (
            np.concatenate([self.base.values[n].mean(axis=1)[0], self.runs[name].values[n][seed].mean(axis=0)])
            for n in ("kl", what)
        )
        return interpolated(x[None], y[None], np.array([target]))[0, 0]


def setting(name: str, point: tuple[float, float]) -> str:
    """Returns a setting as tables show it."""
    strength, temperature = point
    if name.startswith("base"):
        return "" if temperature == 1 else f"T = {temperature:g}"
    symbols = {DPO: "β", "best of": "n", "ARGS": "w", "Transfer-Q": "w", "GenARM, total": "w", "rewarded soups": "w"}
    symbol = next((symbol for start, symbol in symbols.items() if name.startswith(start)), "α")
    text = f"{symbol} = {1 / strength if name == DPO else strength:g}"
    return text if temperature == 1 else f"{text}, T = {temperature:g}"
