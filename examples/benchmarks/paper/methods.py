"""The methods that steer the base, each with one setting, of which the same number of values is tried."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from args_search import ARGSLogitsProcessor
from bench import Bench, Step
from judges import is_degenerate, judge, oracle
from prompts import dev_prompts, sentiment_pairs
from settings import (
    ALPHAS,
    BETAS,
    LENGTH_NORMALISED,
    PAPER_ALPHAS,
    PAPER_OBJECTIVE,
    SHARPENING,
    TOP_K,
    WEIGHTS,
)
from training import train_arm, train_dpo, train_trajectory_reward_model
from trajectory_reward import load_trajectory_reward_model
from transformers import LogitsProcessor, TemperatureLogitsWarper

from hf_genarm import GenARMLogitsProcessor

Processors = list[LogitsProcessor]


def guided(bench: Bench, *names: str, alpha, **kwargs) -> Processors:
    """The base guided by adapters of this run."""
    folders = [str(bench.adapter(name)) for name in names]
    return [GenARMLogitsProcessor.from_pretrained(folders, bench.model, alpha, tokenizer=bench.tokenizer, **kwargs)]


def policy(bench: Bench, *names: str, weights: list[float]) -> Processors:
    r"""
    Policies that are adapters on the base, mixed as $\prod_k \pi_k^{w_k}$ with weights that sum to 1. One of weight 1
    is the policy itself: the base cancels in $\log\pi_\text{base} + (\log\pi_1 - \log\pi_\text{base})$.
    """
    return guided(bench, *names, alpha=weights, reference="base")


def sharpened(bench: Bench, alpha: float, seed: int) -> Processors:
    r"""What an ARM that has learned nothing does: it is the base, so the product is $\pi_\text{base}^{1+\alpha}$."""
    return [TemperatureLogitsWarper(1 / (1 + alpha))]


def genarm(bench: Bench, alpha: float, seed: int) -> Processors:
    return guided(bench, f"arm-seed{seed}", alpha=alpha)


def genarm_less_base(bench: Bench, alpha: float, seed: int) -> Processors:
    return guided(bench, f"arm-seed{seed}", alpha=alpha, reference="base")


def paper_beta(bench: Bench, alpha: float, seed: int) -> Processors:
    return guided(bench, "arm-paper-beta", alpha=alpha)


def length_normalised(bench: Bench, alpha: float, seed: int) -> Processors:
    return guided(bench, "arm-length-normalised", alpha=alpha)


def dpo(bench: Bench, beta: float, seed: int) -> Processors:
    return policy(bench, dpo_adapter(beta, seed), weights=[1.0])


def args_search(bench: Bench, weight: float, seed: int) -> Processors:
    model = load_trajectory_reward_model(bench.adapter(f"rm-seed{seed}"))
    return [ARGSLogitsProcessor(model, weight, TOP_K)]


def dpo_adapter(beta: float, seed: int) -> str:
    """Seed 0 is trained with each β that is tried; the others only with the one that was chosen."""
    return f"dpo-{beta:g}-seed0" if seed == 0 else f"dpo-seed{seed}"


@dataclass(frozen=True)
class Method:
    name: str
    key: str
    setting: str
    values: tuple[float, ...]
    cost: float  # of a token, in those of the base
    processors: Callable[[Bench, float, int], Processors]

    def dev_cell(self, value: float) -> str:
        return f"dev-{self.key}-{value:g}"

    def test_cell(self, seed: int) -> str:
        return f"test-{self.key}-seed{seed}"


SHARPENED = Method("base, sharpened", "sharpened", "α", SHARPENING, 1, sharpened)
GENARM = Method("GenARM", "genarm", "α", ALPHAS, 1.7, genarm)
LESS_BASE = Method("GenARM less base", "genarm-contrast", "α", ALPHAS, 1.9, genarm_less_base)
PAPER_BETA = Method("GenARM, β_r = 0.05", "paper-beta", "α", PAPER_ALPHAS, 1.7, paper_beta)
NORMALISED = Method("GenARM, length-normalised", "length-normalised", "α", ALPHAS, 1.7, length_normalised)
DPO = Method("DPO", "dpo", "β", BETAS, 1.7, dpo)
ARGS = Method("ARGS", "args", "w", WEIGHTS, 5, args_search)
METHODS = (SHARPENED, GENARM, LESS_BASE, PAPER_BETA, NORMALISED, DPO, ARGS)


def trainings(bench: Bench) -> list[Step]:
    """Those of all methods, but for the further seeds of DPO."""
    pairs, n_texts = sentiment_pairs(bench.size.n_pairs), bench.size.n_pairs * bench.size.n_epochs
    steps = []
    for seed in bench.size.seeds:
        steps.append(bench.training(f"arm-seed{seed}", 0.6 * n_texts, partial(train_arm, bench, pairs, seed=seed)))
    for seed in seeds_of(bench, ARGS):
        reward_model = partial(train_trajectory_reward_model, bench, pairs, seed=seed)
        steps.append(bench.training(f"rm-seed{seed}", 0.6 * n_texts, reward_model))
    for name, objective in (("arm-paper-beta", PAPER_OBJECTIVE), ("arm-length-normalised", LENGTH_NORMALISED)):
        steps.append(bench.training(name, 0.6 * n_texts, partial(train_arm, bench, pairs, **objective)))
    for beta in BETAS:
        steps.append(bench.training(dpo_adapter(beta, 0), 1.6 * n_texts, partial(train_dpo, bench, pairs, beta=beta)))
    return steps


def further_dpo_trainings(bench: Bench) -> list[Step]:
    pairs, n_texts = sentiment_pairs(bench.size.n_pairs), bench.size.n_pairs * bench.size.n_epochs

    def train_chosen(folder: Path, seed: int) -> None:
        train_dpo(bench, pairs, folder, beta=choose(bench, DPO), seed=seed)

    return [
        bench.training(dpo_adapter(0, seed), 1.6 * n_texts, partial(train_chosen, seed=seed))
        for seed in bench.size.seeds[1:]
    ]


def trial(bench: Bench, method: Method, value: float) -> Step:
    """Answers to the dev prompts with one value of the setting, from seed 0."""
    return bench.sampling(
        method.dev_cell(value),
        dev_prompts(bench.size.n_dev_prompts),
        lambda: (method.processors(bench, value, 0), {method.setting: value}),
        method.cost,
    )


@cache
def choose(bench: Bench, method: Method) -> float:
    """The value with the highest oracle reward on dev prompts, of those that degenerate little more than the base."""
    tolerated = judge(is_degenerate, bench.answers("dev-base")).mean() + 0.05
    rewards = {}
    for value in method.values:
        answers = bench.answers(method.dev_cell(value))
        degenerate = judge(is_degenerate, answers).mean() > tolerated
        rewards[value] = (not degenerate, judge(oracle, answers).mean())
    return max(rewards, key=lambda value: rewards[value])


def seeds_of(bench: Bench, method: Method) -> tuple[int, ...]:
    return bench.size.seeds[: bench.size.n_args_seeds] if method is ARGS else bench.size.seeds


def all_seeds(bench: Bench, method: Method) -> list[list[dict]]:
    """The answers of all training seeds, as further answers to each prompt."""
    runs = [bench.answers(method.test_cell(seed)) for seed in seeds_of(bench, method)]
    return [[answer for row in rows for answer in row] for rows in zip(*runs, strict=True)]


def mean(values: np.ndarray) -> np.ndarray:
    """Of each prompt."""
    return values.mean(axis=1)
