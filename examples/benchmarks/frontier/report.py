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
from .bootstrap import hypervolume, means, shown
from .curves import ADAPTER, BOTH, BRIEF, DPO, EQ7, NAMES, OURS, SENTENCE, TRAINED, Curves
from .figures import frontier, pareto, strength
from .tables import bounded, by_sentence, by_strength, differences, levels, matched, seeds, table

HERE = Path(__file__).parent
# Nats per answer at which methods are compared
TARGETS = {
    "sentiment": np.array([2.0, 4.0, 8.0, 12.0, 16.0, 32.0]),
    "detox": np.array([0.5, 1.0, 1.5, 2.0, 4.0, 8.0]),  # of 24 tokens
    "harmlessness": np.array([1.0, 2.0, 4.0, 8.0, 12.0, 16.0]),
    "sentences": np.array([2.0, 4.0, 8.0, 12.0, 16.0, 32.0]),
}
SEEDS_AT = {"sentiment": 8.0, "detox": 1.5, "harmlessness": 4.0}
PERPLEXITIES = {
    "sentiment": (4.0, 8.0, 16.0, 24.0),
    "detox": (8.0, 16.0, 40.0, 64.0),
    "harmlessness": (4.0, 8.0, 16.0, 24.0),
    "sentences": (16.0, 24.0, 40.0),
}
SMOKE = "**A smoke run: everything once, on a tiny model with random weights. The numbers mean nothing.**"
SOUPS = "rewarded soups"

INTRODUCTION = """# Reward against divergence

`python -m examples.benchmarks.frontier.run` sampled the answers in `results/`, and
`python -m examples.benchmarks.frontier.report` made this report of them.

**The base is one small model (SmolLM2-135M-Instruct, if a section names no other), and the judges are programs. What
holds here need not hold for large models and people's preferences.**

- *Ratio* steers by log π_r − log π_base (`reference="base"`), *Eq. 7* by log π_r, as the paper does. The points of such
  a curve differ in the strength α alone; there is one adapter per training seed.
- *DPO* is one training run per point, at β = 0.3, 0.1 and 0.03. The reward model of *DPO loss* is the one of β = 0.1.
- The divergence is the sum of KL(method ‖ base) over the tokens of an answer. It is exact, except for *best of n*,
  where it is the bound log n − (n − 1) / n, and for *SMC*, where it is an estimate of the divergence of its target.
- Everything is trained on the same pairs in the same number of steps, with the same kind of adapter and the same
  learning rate."""


def header(about: dict, n_prompts: int, resampled: str = "training seeds") -> list[str]:
    """Returns the paragraphs that every section begins with."""
    length = f"{about['size']['max_new_tokens']} tokens"
    length = f"answers to their end, or {length}" if about["is_chat"] else f"continuations of {length}"
    return [
        f"## {about['title']}",
        about["described"],
        f"{n_prompts} test prompts, which no setting was chosen on; {length}. Intervals are 95 % intervals from 2,000 "
        f"resamples of {resampled} and prompts together. *Distinct-2*: take one answer to each prompt; it is the "
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


def sentences(about: dict, rows: pd.DataFrame, folder: Path) -> str:
    """Returns the section on steering by a sentence, where it stands next to an adapter if there is one."""
    of_brevity = rows["method"] == BRIEF
    positive, brief = Curves(rows[~of_brevity]), Curves(rows[of_brevity | (rows["method"] == "base")])
    figures, name, targets = folder / "figures", about["name"], TARGETS["sentences"]
    objectives = {SENTENCE: (positive, "reward", ".2f"), BRIEF: (brief, "words", ".1f")}
    objectives = {method: x for method, x in objectives.items() if method in x[0].runs}
    strength(objectives, figures / f"{name}.png", about["title"])
    parts = [
        *header(about, positive.n_prompts, "sentences"),
        f"![Strength of a sentence](figures/{name}.png)",
    ]
    for method, (curves, what, form) in objectives.items():
        texts = rows[rows["method"] == method].drop_duplicates("seed").sort_values("seed")["sentence"]
        parts += [
            f"### {'For positive answers' if what == 'reward' else 'For short answers'}, by strength",
            by_strength(curves, method, what, form),
            "Each sentence:",
            by_sentence(curves, method, what, list(texts), form),
        ]
    if len(positive.runs) > 1:
        frontier(positive, targets, figures / f"{name}_and_adapter.png", about["title"])
        pairs = [(one, other) for other in (ADAPTER, TRAINED) for one in (SENTENCE, BOTH)] + [(BOTH, SENTENCE)]
        others = "It was trained on SmolLM2, so that its rewards are those of strings."
        if TRAINED in positive.runs:
            others = f"*{TRAINED}* are the runs of *DPO loss, ratio* above."
        parts += [
            "### A sentence or an adapter, at matched divergence",
            f"*{ADAPTER.capitalize()}* is [this one](../../../model_cards/arm-smollm2-135m-sentiment/README.md); its "
            f"runs differ in the samples only. {others} In *{BOTH}* each has half the strength that it has alone; the "
            "strength shown is that of the sentence alone.",
            f"![Reward against divergence](figures/{name}_and_adapter.png)",
            matched(positive, "reward", targets, "sentences or runs"),
            "Differences, paired by prompt:",
            differences(positive, pairs, targets),
            "By the second judge:",
            matched(positive, "second", targets, "sentences or runs"),
            f"Among the settings whose answers have at most this perplexity under the base (its own have "
            f"{positive.mean('base', 'perplexity')[0, 0]:.1f}), the one with the highest reward:",
            bounded(positive, PERPLEXITIES["sentences"]),
        ]
    return "\n\n".join([*parts, "### Every setting", levels(positive, ["base", *positive.runs])])


def trained_adapters(rows: pd.DataFrame, n_prompts: int) -> pd.DataFrame:
    """Returns the answers of the section on sentiment by adapters that a sentence is compared with."""
    is_one = (rows["split"] == "test") & (rows["method"] == "DPO loss, ratio") & (rows["prompt"] < n_prompts)
    return rows[is_one].assign(method=TRAINED)


SECTIONS = {
    "sentiment": rewards,
    "detox": rewards,
    "harmlessness": harmlessness,
    "two_objectives": two_objectives,
    "sentences": sentences,
    "sentences_on_base": sentences,
}


def write(results: Path, output: Path) -> Path:
    """Writes the report on all files of answers in a folder, and returns its path."""
    files = {name: load(path) for name in SECTIONS if (path := results / f"{name}.jsonl.gz").exists()}
    if "sentiment" in files and "sentences" in files:  # they have the same base and prompts
        about, rows = files["sentences"]
        trained = trained_adapters(files["sentiment"][1], rows["prompt"].nunique())
        files["sentences"] = about, pd.concat([rows, trained], ignore_index=True)
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
