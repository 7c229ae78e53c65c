"""The tables of the report."""

import numpy as np

from .bootstrap import interval, shown
from .curves import Curves, setting


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def matched(curves: Curves, what: str, targets: np.ndarray, runs_are: str = "training seeds") -> str:
    """Returns the table of all methods at the same divergences."""
    rows = []
    for name, runs in curves.runs.items():
        cells = reading(curves, name, targets, curves.at(name, what, targets))
        rows += [[name, str(runs.n_seeds), *cells]] * any(cells)
    return table(["", runs_are, *(f"KL {target:g}" for target in targets)], rows)


def reading(curves: Curves, name: str, targets: np.ndarray, values: np.ndarray, form: str = ".2f") -> list[str]:
    """
    Returns the cells of a row: values at the divergences. Those between the base and the first point get a `≥`, because
    curves are bent, so that a straight line is too low.
    """
    first = curves.mean(name, "kl")[0].min()
    cells = [shown(column, form) for column in values.T]
    return ["≥ " * bool(cell and target < first) + cell for cell, target in zip(cells, targets, strict=True)]


def differences(curves: Curves, pairs: list[tuple[str, str]], targets: np.ndarray, what: str = "reward") -> str:
    """Returns the table of paired differences, where the method that is subtracted was measured on both sides."""
    rows = []
    for one, other in pairs:
        if one in curves.runs and other in curves.runs:
            gap = curves.at(one, what, targets) - curves.at(other, what, targets)
            gap[:, curves.mean(other, "kl")[0].min() > targets] = np.nan
            cells = reading(curves, one, targets, gap, "+.2f")
            rows += [[one, other, *cells]] * any(cells)
    return table(["", "minus", *(f"KL {target:g}" for target in targets)], rows)


def bounded(curves: Curves, bounds: tuple[float, ...]) -> str:
    """Returns the table of the highest reward among the settings whose perplexity is within a bound."""
    rows = []
    for name, runs in curves.runs.items():
        reward, perplexity, cells = curves.mean(name, "reward"), curves.mean(name, "perplexity")[0], []
        for bound in bounds:
            within = [index for index in range(len(runs.points)) if perplexity[index] <= bound]
            best = max(within, key=lambda index: reward[0, index], default=None)
            cells.append("" if best is None else f"{shown(reward[:, best])} ({setting(name, runs.points[best])})")
        rows.append([name, *cells])
    return table(["", *(f"at most {bound:g}" for bound in bounds)], rows)


def levels(curves: Curves, names: list[str]) -> str:
    """Returns the table of all settings of some methods."""
    rows = []
    for name in names:
        measures = [
            (curves.mean(name, what), form)
            for what, form in (("reward", ".2f"), ("second", ".2f"), ("kl", ".1f"), ("perplexity", ".1f"))
        ]
        words, ended = curves.mean(name, "words"), curves.mean(name, "ended")
        runs = curves.runs[name] if name != "base" else curves.base
        for index, point in enumerate(runs.points):
            cells = [shown(values[:, index], form) for values, form in measures]
            cells += [f"{interval(words[:, index])[0]:.1f}", f"{interval(ended[:, index])[0]:.0%}"]
            distinct = runs.distinct[index]  # NaN, where no answer has two words
            rows.append([name, setting(name, point), *cells, "" if np.isnan(distinct) else f"{distinct:.2f}"])
    header = ["", "", "reward", "second judge", "KL per answer, nats", "perplexity under the base", "words", "ended"]
    return table([*header, "distinct-2"], rows)


def seeds(curves: Curves, target: float) -> list[str]:
    """Returns the section on single training runs, for methods that have several."""
    rows = []
    for name, runs in curves.runs.items():
        if runs.n_seeds > 1:
            cells = [curves.of_seed(name, seed, "reward", target) for seed in range(runs.n_seeds)]
            if not np.isnan(cells).all():
                rows.append([name, *("" if np.isnan(x) else f"{x:.2f}" for x in cells)])
    if not rows:
        return []
    width = max(len(row) for row in rows)
    rows = [row + [""] * (width - len(row)) for row in rows]
    title = f"### Training seeds\n\nReward at KL {target:g} of each training run."
    return [title, table(["", *(f"seed {seed}" for seed in range(width - 1))], rows)]


def by_strength(curves: Curves, name: str, what: str, form: str) -> str:
    """Returns the table of a measure at each strength of a method, and of how it differs from that at strength 1."""
    points, rows = curves.runs[name].points, []
    at_one = curves.mean(name, what)[:, points.index((1.0, 1.0))]
    for method, point in [("base", (0.0, 1.0)), *((name, point) for point in points)]:
        index = points.index(point) if method == name else 0
        value, kl, perplexity, words, ended = (
            curves.mean(method, x)[:, index] for x in (what, "kl", "perplexity", "words", "ended")
        )
        minus = "" if point[0] == 1 else shown(value - at_one, f"+{form}")
        cells = [shown(value, form), minus, shown(kl, ".1f"), shown(perplexity, ".1f")]
        cells += [f"{interval(words)[0]:.1f}"] * (what != "words") + [f"{interval(ended)[0]:.0%}"]
        rows.append(["base" if method == "base" else setting(name, point), *cells])
    head = ["", what, "minus prompting (α = 1)", "KL per answer, nats", "perplexity under the base"]
    return table([*head, *["words"] * (what != "words"), "ended"], rows)


def by_sentence(curves: Curves, name: str, what: str, sentences: list[str], form: str) -> str:
    """Returns the table of the mean of a measure for each sentence at each strength."""
    runs = curves.runs[name]
    means = runs.values[what].mean(axis=1)
    rows = [[text, *(f"{x:{form}}" for x in row)] for text, row in zip(sentences, means, strict=True)]
    return table([what, *(setting(name, point) for point in runs.points)], rows)
