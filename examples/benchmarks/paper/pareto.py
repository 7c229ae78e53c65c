"""Two objectives, mixed with weights at decoding time or in the weights."""

from functools import partial
from pathlib import Path

import numpy as np
from bench import Bench, Step
from figures import pareto
from intervals import bounds, cell, hypervolume, interval, resampled_means, shown
from judges import judge, n_words, oracle, perplexity, read
from methods import DPO, GENARM, LESS_BASE, choose, dpo_adapter, guided, mean, policy
from prompts import brevity_pairs, test_prompts
from report import table
from soup import save_soup
from training import train_arm, train_dpo

ARMS = ("arm-seed0", "arm-brevity")
# For each mix of ARMs: whose strength, what share of it, and what the rewards are contrasted with
MIXES = {
    "GenARM": (GENARM, 1.0, None),
    "GenARM less base": (LESS_BASE, 1.0, "base"),
    "GenARM less base, half as strong": (LESS_BASE, 0.5, "base"),
}
METHODS = ("GenARM", "rewarded soups", "MOD", "GenARM less base", "GenARM less base, half as strong")


def dpo_adapters(bench: Bench) -> tuple[str, str]:
    return dpo_adapter(choose(bench, DPO), 0), "dpo-brevity"


def steps(bench: Bench) -> list[Step]:
    size = bench.size
    pairs, n_steps = brevity_pairs(size.n_pairs), size.n_pairs * size.n_epochs
    prompts = test_prompts(size.n_prompts)[: size.n_pareto_prompts]

    def train_chosen(folder: Path) -> None:
        train_dpo(bench, pairs, folder, beta=choose(bench, DPO))

    work = [
        bench.training("arm-brevity", 0.6 * n_steps, partial(train_arm, bench, pairs)),
        bench.training("dpo-brevity", 1.6 * n_steps, train_chosen),
    ]
    work += [bench.training(f"soup-{weight:g}", 2.0, partial(soup, bench, weight)) for weight in size.weightings[1:-1]]
    for method in METHODS:
        for weight in size.weightings:
            if method == "MOD" and is_end(weight):
                continue  # the policies themselves, as with soups
            work.append(
                bench.sampling(
                    front_cell(method, weight),
                    prompts,
                    lambda method=method, weight=weight: (processors(bench, method, weight), {"weight": weight}),
                    2.0,
                    n_samples=1,
                )
            )
    return work


def is_end(weight: float) -> bool:
    """Where there is one policy, and nothing to mix."""
    return weight in (0.0, 1.0)


def front_cell(method: str, weight: float) -> str:
    name = "rewarded soups" if method == "MOD" and is_end(weight) else method
    return f"pareto-{name.replace(',', '').replace(' ', '-')}-{weight:g}"


def processors(bench: Bench, method: str, weight: float) -> list:
    weights = [weight, 1 - weight]
    if method == "MOD":
        return policy(bench, *dpo_adapters(bench), weights=weights)
    if method == "rewarded soups":
        ends = {0.0: dpo_adapters(bench)[1], 1.0: dpo_adapters(bench)[0]}
        return policy(bench, ends.get(weight, f"soup-{weight:g}"), weights=[1.0])
    tuned, share, reference = MIXES[method]
    alpha = share * choose(bench, tuned)
    return guided(bench, *ARMS, alpha=[alpha * w for w in weights], reference=reference)


def soup(bench: Bench, weight: float, folder: Path) -> None:
    folders = [str(bench.adapter(name)) for name in dpo_adapters(bench)]
    save_soup(bench.model_path, folders, [weight, 1 - weight], folder)


def section(bench: Bench) -> str:
    n = bench.size.n_pareto_prompts
    fronts, rows, figure = {}, [], {}
    for method in METHODS:
        for weight in bench.size.weightings:
            answers = bench.answers(front_cell(method, weight))
            reward, words = mean(judge(oracle, answers)), mean(judge(n_words, answers))
            fronts.setdefault(method, []).append(np.stack([reward, -words], axis=1))
            figure.setdefault(method, []).append((interval(words), interval(reward)))
            kl, odd = cell(mean(read("kl", answers)), 1), f"{perplexity(answers):.1f}"
            rows.append([method, f"{weight:g}", cell(reward), cell(words, 1), kl, odd])
    base = [row[:1] for row in bench.answers("test-base", n)]
    base_reward, base_words = mean(judge(oracle, base)), mean(judge(n_words, base))
    rows.insert(0, ["base", "", cell(base_reward), cell(base_words, 1), "0", f"{perplexity(base):.1f}"])
    pareto(figure, (interval(base_words), interval(base_reward)), bench.figures / "pareto.png", n)

    # The worst of every method in each objective, so that no front is cut off.
    worst = np.min([points.mean(axis=0) for front in fronts.values() for points in front], axis=0)
    volumes = {}
    for method, front in fronts.items():
        points = np.stack([resampled_means(values) for values in front], axis=1)  # (resamples, weightings, 2)
        volumes[method] = (
            hypervolume(np.array([values.mean(axis=0) for values in front]), worst),
            np.array([hypervolume(resample, worst) for resample in points]),
        )
    comparison = []
    soups, resampled_soups = volumes["rewarded soups"]
    for method, (volume, resampled) in volumes.items():
        difference = shown(volume - soups, *bounds(resampled - resampled_soups), "+.2f")
        comparison.append([method, shown(volume, *bounds(resampled)), "" if method == "rewarded soups" else difference])
    return "\n\n".join(
        [
            "## Two objectives",
            f"Sentiment and brevity, {len(bench.size.weightings)} weightings, one answer to each of {n} held-out "
            "prompts. GenARM mixes two ARMs at decoding time, with strengths that sum to "
            f"{choose(bench, GENARM):g}; *less base* does it with log π_r − log π_base, at "
            f"{choose(bench, LESS_BASE):g} and at half of it; "
            "rewarded soups average the weights of two DPO policies; MOD mixes the log-probabilities of the policies.",
            "![Pareto fronts](figures/pareto.png)",
            "Hypervolume in sentiment × words, above the worst value of any method in each objective:",
            table(["method", "hypervolume", "less that of rewarded soups"], comparison),
            table(["method", "weight of sentiment", "oracle", "words", "KL per answer, nats", "perplexity"], rows),
        ]
    )
