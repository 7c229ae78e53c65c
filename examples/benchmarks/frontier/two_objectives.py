"""Sentiment and brevity: rewards mixed at decoding time, with one weighting per request, against averaged adapters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...pairs import shorter_is_chosen
from ...soup import save_soup
from . import sentiment
from .bench import Bench, Point, Step, Task
from .methods import arm, guided
from .settings import MARGIN, STRENGTHS_OF_TWO, WEIGHTINGS, Size


def task(size: Size) -> Task:
    """Returns the task with the prompts of sentiment and the pairs for brevity."""
    pairs = shorter_is_chosen("train").select_columns(["prompt", "chosen", "rejected"])
    pairs = pairs.select(range(min(size.n_pairs, len(pairs))))
    return replace(
        sentiment.task(size),
        name="two_objectives",
        title="Two objectives",
        described=f"The same prompts and {len(pairs)} pairs for each: sentiment, and brevity (of two answers to a "
        "prompt, the one of fewer words). *GenARM* adds the log-ratios of two reward models (*DPO loss*, β = 0.1), "
        "with one weighting per row of a batch; at a total strength of 1 that is multi-objective decoding (MOD). "
        "*Rewarded soups* average the weights of the same two adapters.",
        pairs=pairs,
    )


def steps(bench: Bench, brevity: Task) -> list[Step]:
    r"""
    Returns the steps of mixed rewards and of soups. Files of answers have the weight of sentiment as `strength`. At a
    total strength of 1, the mixed log-ratios give $\prod_k\pi_k^{w_k}$, the distribution of multi-objective decoding
    (MOD, https://hf.co/papers/2406.18853).
    """
    of_sentiment = sentiment.task(brevity.size)
    base = bench.sampler(brevity, None)
    work = [bench.answering(brevity, "test", "base", 0, [Point(0.0)] * 2, [], base)]
    for seed in brevity.size.few_seeds:
        adapters = [arm(bench, one, MARGIN, seed) for one in (of_sentiment, brevity)]
        mix = guided(bench, adapters, "base")
        for total in STRENGTHS_OF_TWO:

            def processors(weights: torch.Tensor, total: float = total, mix: Any = mix) -> list:
                return mix(total * torch.stack([weights, 1 - weights], dim=1))

            points, answer = [Point(x) for x in WEIGHTINGS], bench.sampler(brevity, processors)
            name = f"GenARM, total strength {total:g}"
            work.append(bench.answering(brevity, "test", name, seed, points, adapters, answer, total))
        work += [soup_step(bench, brevity, seed, adapters, weight) for weight in WEIGHTINGS]
    return work


def soup_step(bench: Bench, task: Task, seed: int, adapters: list[Step], weight: float) -> Step:
    """Returns the step of a policy whose adapter is the average of several."""

    def make(folder: Path) -> None:
        for adapter in adapters:
            adapter()
        save_soup(bench.model_path, [str(adapter.path) for adapter in adapters], [weight, 1 - weight], folder)

    soup = bench.training(f"soup-{weight:g}-{seed}", task, make, weight, [adapter.path.name for adapter in adapters])
    policy = guided(bench, [soup], "base")

    def processors(weights: torch.Tensor) -> list:
        return policy(torch.ones_like(weights))

    answer = bench.sampler(task, processors)
    return bench.answering(task, "test", "rewarded soups", seed, [Point(weight)], [soup], answer)
