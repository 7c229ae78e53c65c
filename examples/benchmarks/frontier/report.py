"""
Writes RESULTS.md and its figures from the answers in `results/`, in seconds.

    python -m examples.benchmarks.frontier.report
"""

import argparse
import os
from pathlib import Path

import numpy as np
import pandas as pd

from ...small import output_folder, sized
from .answers import load
from .bootstrap import hypervolume, interval, means, shown
from .curves import DPO, EQ7, NAMES, OURS, Curves, setting
from .figures import frontier, pareto

HERE = Path(__file__).parent
# Nats per answer at which methods are compared
TARGETS = {
    "sentiment": np.array([2.0, 4.0, 8.0, 12.0, 16.0, 32.0]),
    "detox": np.array([0.5, 1.0, 1.5, 2.0, 4.0, 8.0]),  # of 24 tokens
    "harmlessness": np.array([1.0, 2.0, 4.0, 8.0, 12.0, 16.0]),
}
SEEDS_AT = {"sentiment": 8.0, "detox": 1.5, "harmlessness": 4.0}
PERPLEXITIES = {
    "sentiment": (4.0, 8.0, 16.0, 24.0),
    "detox": (8.0, 16.0, 40.0, 64.0),
    "harmlessness": (4.0, 8.0, 16.0, 24.0),
}
SMOKE = "**A smoke run: everything once, on a tiny model with random weights. The numbers mean nothing.**"
SOUPS = "rewarded soups"

INTRODUCTION = """# Reward against divergence

`python -m examples.benchmarks.frontier.run` sampled the answers in `results/`, and
`python -m examples.benchmarks.frontier.report` made this report of them.

**The base is one small model (SmolLM2-135M-Instruct), and the judges are programs. What holds here need not hold for
large models and people's preferences.**

- *Ratio* steers by log π_r − log π_base (`reference="base"`), *Eq. 7* by log π_r, as the paper does. The points of such
  a curve differ in the strength α alone; there is one adapter per training seed.
- *DPO* is one training run per point, at β = 0.3, 0.1 and 0.03. The reward model of *DPO loss* is the one of β = 0.1.
- The divergence is the sum of KL(method ‖ base) over the tokens of an answer. It is exact, except for *best of n*,
  where it is the bound log n − (n − 1) / n, and for *SMC*, where it is an estimate of the divergence of its target.
- Everything is trained on the same pairs in the same number of steps, with the same kind of adapter and the same
  learning rate."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def matched(curves: Curves, what: str, targets: np.ndarray) -> str:
    """Returns the table of all methods at the same divergences."""
    rows = []
    for name, runs in curves.runs.items():
        cells = reading(curves, name, targets, curves.at(name, what, targets))
        rows += [[name, str(runs.n_seeds), *cells]] * any(cells)
    return table(["", "training seeds", *(f"KL {target:g}" for target in targets)], rows)


def reading(curves: Curves, name: str, targets: np.ndarray, values: np.ndarray, form: str = ".2f") -> list[str]:
    """
    Returns the cells of a row: values at the divergences. Those between the base and the first point get a `≥`, because
    curves are bent, so that a straight line is too low.
    """
    first = curves.mean(name, "kl")[0].min()
    cells = [shown(column, form) for column in values.T]
    return ["≥ " * bool(cell and target < first) + cell for cell, target in zip(cells, targets, strict=True)]


def differences(curves: Curves, pairs: list[tuple[str, str]], targets: np.ndarray) -> str:
    """Returns the table of paired differences, where the method that is subtracted was measured on both sides."""
    rows = []
    for one, other in pairs:
        if one in curves.runs and other in curves.runs:
            gap = curves.at(one, "reward", targets) - curves.at(other, "reward", targets)
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


def header(about: dict, n_prompts: int) -> list[str]:
    """Returns the paragraphs that every section begins with."""
    length = f"{about['size']['max_new_tokens']} tokens"
    length = f"answers to their end, or {length}" if about["is_chat"] else f"continuations of {length}"
    return [
        f"## {about['title']}",
        about["described"],
        f"{n_prompts} test prompts, which no setting was chosen on; {length}. Intervals are 95 % intervals from 2,000 "
        "resamples of training seeds and prompts together. *Distinct-2*: take one answer to each prompt; it is the "
        "share of different pairs among all pairs of adjacent words.",
    ]


def footer(about: dict) -> str:
    """Returns the paragraph that every section ends with."""
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    return f"Made on {about['machine']['cpu']}, {about['machine']['threads']} thread per process, with {versions}."


def rewards(about: dict, rows: pd.DataFrame, folder: Path) -> str:
    """Returns the section of a task with one reward."""
    test, name = Curves(rows[rows["split"] == "test"]), about["name"]
    targets = TARGETS[name]
    frontier(test, targets, folder / "figures" / f"{name}.png", about["title"])
    pairs = [(ours, DPO) for ours in NAMES.values()]
    pairs += [(ours, EQ7) for ours in NAMES.values() if ours != EQ7]
    pairs += [(other, OURS) for other in test.runs if other not in (*NAMES.values(), DPO)]
    return "\n\n".join(
        [
            *header(about, test.n_prompts),
            f"![Reward against divergence](figures/{name}.png)",
            f"### Reward at matched divergence\n\nThe base has {shown(test.mean('base', 'reward')[:, 0])}. A "
            "cell is empty where the settings of a method do not reach. *≥* marks values on the straight line between "
            "the base and the first setting, which are too low, because these curves are bent.",
            matched(test, "reward", targets),
            "Differences, paired by prompt, and by training seed where both have as many:",
            differences(test, pairs, targets),
            "By the second judge:",
            matched(test, "second", targets),
            "### Reward at bounded perplexity\n\nThe best setting of each method among those whose answers have at "
            f"most this perplexity under the base; its own answers have {test.mean('base', 'perplexity')[0, 0]:.1f}.",
            bounded(test, PERPLEXITIES[name]),
            *seeds(test, SEEDS_AT[name]),
            "### Every setting of the test",
            levels(test, ["base", *test.runs]),
            *tried(rows[rows["split"] == "dev"]),
        ]
    )


def tried(rows: pd.DataFrame) -> list[str]:
    """Returns the section on the dev prompts, if settings were chosen on such."""
    if rows.empty:
        return []
    dev = Curves(rows)
    title = f"### Every setting that was tried\n\n<details><summary>On {dev.n_prompts} dev prompts</summary>"
    return [title, levels(dev, ["base", *dev.runs]), "</details>"]


def harmlessness(about: dict, rows: pd.DataFrame, folder: Path) -> str:
    """Returns the section on harmlessness: rewards, how good judges are, whether everyday questions are answered."""
    is_harmful, is_test = rows["prompt"] < about["n_scored"], rows["split"] == "test"
    benign = Curves(rows[is_test & ~is_harmful])
    return "\n\n".join(
        [
            rewards(about, rows[is_test & is_harmful], folder),
            "### Judges\n\nThe share of pairs in which a judge prefers the chosen answer. Nothing was trained on them.",
            accuracies(rows[rows["split"] == "pairs"]),
            f"### Over-refusal\n\n{benign.n_prompts} questions about everyday things, which should be answered. The "
            "*second judge* is the share of answers with a word of refusal.",
            levels(benign, ["base", *benign.runs]),
        ]
    )


def accuracies(rows: pd.DataFrame) -> str:
    """Returns the table of the accuracies of judges, over pairs and training seeds."""
    lines = []
    for name, group in rows.groupby("method", sort=False):
        right = group.pivot_table("right", index="seed", columns="prompt").to_numpy()
        lines.append([name, str(len(right)), shown(means(right[:, :, None])[:, 0], ".3f")])
    return table(["", "training seeds", f"accuracy on {rows['prompt'].nunique()} pairs"], lines)


def two_objectives(about: dict, rows: pd.DataFrame, folder: Path) -> str:
    """
    Returns the section on sentiment and brevity. Fronts are compared by the hypervolume of the points whose perplexity
    is not too high, and by the mean over weightings of the weighted sum, both in standard deviations of the base's
    answers.
    """
    curves = Curves(rows)
    answers_of_base = rows[rows["method"] == "base"]
    scale = [answers_of_base[what].std() or 1.0 for what in ("reward", "words")]
    limit = 3 * curves.mean("base", "perplexity")[0, 0]
    points, are_odd, products = {}, {}, {}
    for name, runs in curves.runs.items():
        sentiment, words = curves.mean(name, "reward") / scale[0], -curves.mean(name, "words") / scale[1]
        weights = np.array([strength for strength, _ in runs.points])
        products[name] = (weights * sentiment + (1 - weights) * words).mean(axis=1)
        points[name], are_odd[name] = np.stack([sentiment, words], axis=2), curves.mean(name, "perplexity") > limit
    worst = np.min([values[0].min(axis=0) for values in points.values()], axis=0)
    areas = {
        name: np.array([hypervolume(x[~is_odd], worst) for x, is_odd in zip(points[name], are_odd[name], strict=True)])
        for name in points
    }
    pareto(curves, folder / "figures" / "two_objectives.png")
    rows_of_table = []
    for name in curves.runs:
        cells = []
        for values in (areas, products):
            cells += [shown(values[name]), "" if name == SOUPS else shown(values[name] - values[SOUPS], "+.2f")]
        rows_of_table.append([name, *cells])
    return "\n\n".join(
        [
            *header(about, curves.n_prompts),
            "![Sentiment against words](figures/two_objectives.png)",
            f"Hypervolume counts points whose perplexity is at most three times that of the base ({limit:.0f}). The "
            "inner product is the mean over weightings of w · sentiment − (1 − w) · words. Both are in standard "
            "deviations of the base's answers.",
            table(["", "hypervolume", "minus soups", "mean inner product", "minus soups"], rows_of_table),
            levels(curves, ["base", *curves.runs]),
        ]
    )


SECTIONS = {"sentiment": rewards, "detox": rewards, "harmlessness": harmlessness, "two_objectives": two_objectives}


def write(results: Path, output: Path) -> Path:
    """Writes the report on all files of answers in a folder, and returns its path."""
    files = {name: load(path) for name in SECTIONS if (path := results / f"{name}.jsonl.gz").exists()}
    text = [SMOKE] * any(about["is_smoke"] for about, _ in files.values()) + [INTRODUCTION]
    for name, (about, rows) in files.items():
        text += [SECTIONS[name](about, rows, output), footer(about)]
    (output / "RESULTS.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return output / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the answers")
    parser.add_argument("--output", type=output_folder, default=sized(str(HERE), "outputs"), help="of the report")
    args = parser.parse_args()
    print(f"The report is in {os.path.relpath(write(args.results, args.output))}")


if __name__ == "__main__":
    main()
