"""The figures of the report, readable at the width of a README."""

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

COLOURS = ["#1f77b4", "#d95f02", "#17a2b8", "#7b5cd6", "#2ca02c", "#8c564b", "#7f7f7f", "#bcbd22", "#e377c2", "#e41a1c"]


def frontier(curves: Any, targets: np.ndarray, path: Path, title: str) -> None:
    """Plots reward over divergence on a logarithmic axis: settings, the lines between them, and 95 % intervals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(10, 5), dpi=140)
    for name, colour in zip(filter(curves.is_curve, curves.runs), cycle(COLOURS), strict=False):
        kl, reward = curves.mean(name, "kl")[0].clip(min=0.01), curves.mean(name, "reward")
        grid = np.geomspace(kl.min(), kl.max(), 40)
        low, high = np.quantile(curves.at(name, "reward", grid)[1:], [0.025, 0.975], axis=0)
        order = kl.argsort()
        axis.plot(kl[order], reward[0, order], "o-", color=colour, markersize=4, linewidth=1.2, label=name)
        axis.fill_between(grid, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.axhline(curves.mean("base", "reward")[0, 0], color="0.5", linestyle=":", linewidth=1, label="base")
    axis.set_xscale("log")
    axis.set_xticks(targets, [f"{x:g}" for x in targets])
    axis.minorticks_off()
    axis.set(xlabel="KL from the base, nats per answer", ylabel="reward")
    axis.set_title(f"{title}: 95 % intervals over seeds and prompts", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def strength(objectives: dict[str, tuple[Any, str, str]], path: Path, title: str) -> None:
    """
    Plots a measure, the divergence and the perplexity over the strength of a sentence, with 95 % intervals; the measure
    also for each sentence, as a thin line. `objectives` has the curves and the measure of each method.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(len(objectives), 3, figsize=(10, 6), dpi=140, squeeze=False, sharex=True)
    for row, colour, (name, (curves, what, _)) in zip(axes, COLOURS, objectives.items(), strict=False):
        runs = curves.runs[name]
        x = [0, *(point[0] for point in runs.points)]
        for axis, measure in zip(row, (what, "kl", "perplexity"), strict=True):
            y = np.concatenate([curves.mean("base", measure), curves.mean(name, measure)], axis=1)
            low, high = np.quantile(y[1:], [0.025, 0.975], axis=0)
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(x, y[0], "o-", color=colour, markersize=4)
            if measure == what:
                for one in runs.values[what].mean(axis=1):
                    axis.plot(x[1:], one, color=colour, linewidth=0.6, alpha=0.6)
            axis.axvline(1, color="0.5", linestyle=":", linewidth=1)
            axis.spines[["top", "right"]].set_visible(False)
        labels = {"reward": "sentiment (VADER)", "words": "words in the answer"}
        row[0].set_ylabel(labels[what])
        row[1].set_ylabel("KL per answer, nats")
        row[2].set_ylabel("perplexity under the base")
    for axis in axes[-1]:
        axis.set_xlabel("strength (1 is prompting)")
    figure.suptitle(f"{title}: 95 % intervals over sentences and prompts; each sentence is a thin line", fontsize=11)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def pareto(curves: Any, path: Path) -> None:
    """Plots reward over words, with one point per weighting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(8, 5), dpi=140)
    for name, colour in zip(curves.runs, cycle(COLOURS), strict=False):
        words, reward = curves.mean(name, "words"), curves.mean(name, "reward")
        bars = [np.abs(np.quantile(values[1:], [0.025, 0.975], axis=0) - values[0]) for values in (words, reward)]
        axis.errorbar(
            words[0], reward[0], xerr=bars[0], yerr=bars[1], fmt="o-", color=colour, capsize=2, elinewidth=0.7,
            markersize=4, label=name,
        )  # fmt: skip
    base = curves.mean("base", "words")[0], curves.mean("base", "reward")[0]
    axis.plot(*base, "X", color="0.4", markersize=9, label="base")
    axis.invert_xaxis()
    axis.set(xlabel="words in the answer (fewer to the right)", ylabel="sentiment of the answer (VADER)")
    axis.set_title("Two objectives, the weight of sentiment from 0 to 1: 95 % intervals", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
