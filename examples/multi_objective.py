"""
Trades two objectives off at decoding time: positive sentiment against brevity, on SmolLM2-135M-Instruct.

    python examples/multi_objective.py         # about 20 minutes on 2 cores

Two shipped reward models are mixed with 7 weightings; nothing is trained for any of them. Beside it is what *rewarded
soups* do: for each weighting, one adapter whose low-rank products are the weighted averages of the two. One answer is
sampled to each held-out prompt, under the same seed. Intervals are 95 % bootstrap intervals over prompts. The answers
are kept in the output folder, under a key of all that they depend on, so a run that was stopped goes on where it was.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from fingerprint import fingerprint
from quickstart import Steering, bootstrap, held_out_prompts
from scorers import sentiment
from small import fitting_adapter, output_folder, sized
from soup import save_soup
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.demo import demo_model
from hf_genarm.hub.info import package_versions

CARDS = Path(__file__).parent.parent / "model_cards"
NAMES = ("sentiment", "brevity")


def measure(texts: list[str], steer: Steering) -> dict[str, np.ndarray]:
    return {
        "sentiment": np.array(sentiment(steer.prompts, texts)),
        "words": np.array([float(len(text.split())) for text in texts]),
    }


def interval(values: np.ndarray) -> str:
    return "{:6.2f} [{:6.2f}, {:6.2f}]".format(*bootstrap(values, seed=0))


def plot(results: dict[str, list[dict[str, np.ndarray]]], weights: np.ndarray, unguided: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.6), dpi=160)
    styles = {"mixed rewards": ("#1f77b4", "o-"), "rewarded soups": ("#d95f02", "s--")}
    for method, runs in results.items():
        colour, style = styles[method]
        points = {what: np.array([bootstrap(run[what], seed=0) for run in runs]).T for what in ("words", "sentiment")}
        (x, x_low, x_high), (y, y_low, y_high) = points["words"], points["sentiment"]
        axis.errorbar(
            x, y, [y - y_low, y_high - y], [x - x_low, x_high - x], fmt=style, color=colour, capsize=2, alpha=0.85,
            elinewidth=0.8, label=method,
        )  # fmt: skip
        if method == "mixed rewards":
            for weight, left, top in zip(weights, x, y, strict=True):
                axis.annotate(
                    f"{weight:.2f}", (left, top), (5, 6), textcoords="offset points", fontsize=8, color=colour
                )
    axis.plot(unguided["words"].mean(), unguided["sentiment"].mean(), "X", color="0.4", markersize=9, label="unguided")
    axis.invert_xaxis()
    axis.set(xlabel="words in the answer (fewer to the right)", ylabel="sentiment of the answer (VADER)")
    axis.set_title(
        f"Two rewards, one base: the weight of sentiment from 0 to 1\n{len(unguided['words'])} held-out prompts, "
        "95 % intervals",
        fontsize=11,
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpha", type=float, default=1.5, help="strength that the weights share")
    parser.add_argument("--n-prompts", type=int, help="held-out prompts (default: all 72)")
    parser.add_argument("--max-new-tokens", type=int, default=sized(48, 4))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_folder, default="outputs/multi_objective")
    args = parser.parse_args()
    folders = [fitting_adapter(str(CARDS / f"arm-smollm2-135m-{name}")) for name in NAMES]
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_model(), padding_side="left")
    steer = Steering(model, tokenizer, held_out_prompts(args.n_prompts), args.max_new_tokens, args.seed)
    weights = np.linspace(0, 1, sized(7, 3))

    settings = (args.alpha, args.max_new_tokens, args.seed, weights.tolist(), steer.prompts, package_versions())
    key = fingerprint(*settings, *map(Path, (demo_model(), *folders)))
    cache = args.output / f"answers-{key}.jsonl"
    known = [json.loads(line) for line in cache.read_text(encoding="utf-8").splitlines()] if cache.exists() else []
    answers = {(row["method"], row["run"]): row["texts"] for row in known}
    progress = tqdm(total=2 * len(weights) - 1, desc="Generating")

    def run(method: str, number: int, processor: GenARMLogitsProcessor) -> dict[str, np.ndarray]:
        if (method, number) not in answers:
            answers[method, number] = steer(processor)[0]
            with cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"method": method, "run": number, "texts": answers[method, number]}) + "\n")
        progress.update()
        return measure(answers[method, number], steer)

    mixed = GenARMLogitsProcessor.from_pretrained(folders, base_model=model, alpha=0.0)
    unguided = run("unguided", 0, mixed)
    results: dict[str, list[dict[str, np.ndarray]]] = {"mixed rewards": [], "rewarded soups": []}
    for number, weight in enumerate(weights):
        mixed.alpha = [args.alpha * weight, args.alpha * (1 - weight)]
        results["mixed rewards"].append(run("mixed rewards", number, mixed))
    first, *_, last = results["mixed rewards"]  # of one reward alone, a soup is the same
    with tempfile.TemporaryDirectory() as folder:
        for number, weight in enumerate(weights[1:-1], start=1):
            path = Path(folder) / str(number)
            save_soup(demo_model(), folders, [float(weight), 1 - float(weight)], path)
            soup = GenARMLogitsProcessor.from_pretrained(str(path), base_model=model, alpha=args.alpha)
            results["rewarded soups"].append(run("rewarded soups", number, soup))
    results["rewarded soups"] = [first, *results["rewarded soups"], last]

    print(f"\n{len(steer.prompts)} held-out prompts, means with 95 % bootstrap intervals:")
    print(f"{'':<16} weight   sentiment              words")
    print(f"{'unguided':<16}          {interval(unguided['sentiment'])}  {interval(unguided['words'])}")
    for method, runs in results.items():
        for weight, values in zip(weights, runs, strict=True):
            print(f"{method:<16}   {weight:.2f}   {interval(values['sentiment'])}  {interval(values['words'])}")
    print("\nMixed rewards less soups, paired over prompts, mean over the inner weightings:")
    for what in ("sentiment", "words"):
        pairs = zip(*(runs[1:-1] for runs in results.values()), strict=True)
        difference = np.mean([one[what] - other[what] for one, other in pairs], axis=0)
        print(f"  {what:<10} {interval(difference)}")
    plot(results, weights, unguided, args.output / "pareto.png")
    print(f"\nThe plot is in {args.output / 'pareto.png'}")


if __name__ == "__main__":
    main()
