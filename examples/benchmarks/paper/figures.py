"""The pictures of the report, readable at the width of a README."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Interval = tuple[float, float, float]

COLOURS = {
    "base": "0.4",
    "base, sharpened": "0.4",
    "GenARM": "#1f77b4",
    "GenARM less base": "#17a2b8",
    "GenARM less base, half as strong": "#8fd3de",
    "DPO": "#d95f02",
    "DPO at other strengths": "#f2a65a",
    "ARGS": "#2ca02c",
    "rewarded soups": "#d95f02",
    "MOD": "#9467bd",
}


def _bars(points: Sequence[Interval]) -> list[list[float]]:
    return [[middle - low for middle, low, _ in points], [high - middle for middle, _, high in points]]


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _curve(axis, name: str, x: Sequence[Interval], y: Sequence[Interval]) -> None:
    axis.errorbar(
        [value[0] for value in x], [value[0] for value in y], yerr=_bars(y), xerr=_bars(x), color=COLOURS[name],
        fmt="o--" if name == "base, sharpened" else "o-", capsize=2, elinewidth=0.7, markersize=4, label=name,
    )  # fmt: skip


def _save_curves(figure, axis, path: Path) -> None:
    axis.set(ylabel="oracle reward (VADER)", title=axis.get_title() + ", 95 % intervals")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def forest(points: dict[str, tuple[Interval, Interval]], path: Path, n_prompts: int) -> None:
    """Mean and interval of both judges, a line for each method."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.42 * len(points) + 1.3), dpi=140, sharey=True)
    for axis, judge, index in zip(axes, ("oracle (VADER)", "second judge (TextBlob)"), (0, 1), strict=True):
        for row, (name, judged) in enumerate(points.items()):
            colour = COLOURS.get(name, "#7f7f7f")
            value = judged[index]
            axis.errorbar([value[0]], [row], xerr=_bars([value]), fmt="o", color=colour, capsize=3)
        axis.axvline(points["base"][index][0], color="0.7", linestyle=":", linewidth=1)
        axis.set(xlabel=judge)
    axes[0].set_yticks(range(len(points)), list(points))
    axes[0].invert_yaxis()
    figure.suptitle(f"Mean sentiment of answers to {n_prompts} held-out prompts, 95 % intervals", fontsize=11)
    _save(figure, path)


def frontier(
    curves: dict[str, list[tuple[str, Interval, Interval]]], base: Interval, path: Path, n_prompts: int
) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 4.8), dpi=140)
    for name, points in curves.items():
        settings, x, y = zip(*sorted(points, key=lambda point: point[1][0]), strict=True)
        _curve(axis, name, x, y)
        axis.annotate(settings[-1], (x[-1][0], y[-1][0]), (4, 5), textcoords="offset points", fontsize=7)
    axis.axhline(base[0], color="0.6", linestyle=":", linewidth=1, label="base")
    axis.set(xlabel="KL from the base, nats per answer", title=f"Reward against divergence, {n_prompts} dev prompts")
    _save_curves(figure, axis, path)


def pareto(
    fronts: dict[str, list[tuple[Interval, Interval]]], base: tuple[Interval, Interval], path: Path, n_prompts: int
) -> None:
    """`fronts` has the words and the oracle reward of each weighting."""
    figure, axis = plt.subplots(figsize=(7.5, 4.8), dpi=140)
    for name, points in fronts.items():
        x, y = zip(*points, strict=True)
        _curve(axis, name, x, y)
    axis.plot(base[0][0], base[1][0], "X", color="0.4", markersize=9, label="base")
    axis.invert_xaxis()
    axis.set(
        xlabel="words in the answer (fewer to the right)",
        title=f"Two objectives, weights from 0 to 1, {n_prompts} held-out prompts",
    )
    _save_curves(figure, axis, path)


def gap(rows: dict[str, Interval], path: Path, n_prompts: int) -> None:
    """Weak-to-strong: the reward of each model, a line each."""
    figure, axis = plt.subplots(figsize=(7.5, 0.45 * len(rows) + 1.3), dpi=140)
    for row, value in enumerate(rows.values()):
        axis.errorbar([value[0]], [row], xerr=_bars([value]), fmt="o", color="#1f77b4", capsize=3)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set(xlabel="oracle reward (VADER)", title=f"Weak to strong, {n_prompts} held-out prompts, 95 % intervals")
    _save(figure, path)
