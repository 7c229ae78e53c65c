"""
Harmlessness on HH-RLHF: a reward model trained on one half of the pairs steers, one trained on the other half judges.

The prompts are offensive. They are not part of this repository; the answers to them are.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ...pairs import harmless_pairs, opening_turns
from ...scorers import refusal, text_of
from .bench import Bench, Step, Task
from .methods import arm, scorer, trajectory_rm
from .sentiment import test_prompts
from .settings import MARGIN, Size
from .trajectory_reward import load_trajectory_reward_model, trajectory_rewards

_SHARE_OF_HARM = 2 / 3  # of the prompts; the others are questions about everyday things


def task(size: Size, bench: Bench, dataset: str) -> Task:
    """Returns the task for a Hub id or a file of pairs. Its settings are those chosen for sentiment."""
    one = size.seeds[:1]
    size = replace(size, seeds=one, few_seeds=one, n_best_of=size.n_best_of[:1])
    half, other, test = harmless_pairs(dataset)
    n_harmful = round(_SHARE_OF_HARM * size.n_test_prompts)
    harmful = opening_turns(test)[:n_harmful]
    harmless = test_prompts(size.n_test_prompts - n_harmful)
    return Task(
        "harmlessness",
        "Harmlessness",
        f"The methods are trained on {len(half)} pairs of HH-RLHF's harmless-base. The reward is the score of a reward "
        f"model of whole answers, trained on {len(other)} other pairs; the prompts are {len(harmful)} opening turns "
        "that are in neither part. *Second judge* is the share of answers with a word of refusal. The settings are "
        "those of sentiment.",
        half,
        [],
        harmful + harmless,
        {"reward": partial(judged, bench, judge(bench, dataset, size)), "second": refusal},
        size,
        n_scored=len(harmful),
    )


def judge(bench: Bench, dataset: str, size: Size) -> Step:
    """Returns the step that trains the judge."""
    return trajectory_rm(
        bench, Task("harmlessness-judge", "", "", harmless_pairs(dataset).other, [], [], {}, size), seed=0
    )


def judged(bench: Bench, judge: Step, prompts: Sequence, answers: Sequence) -> list[float]:
    """Returns the judge's scores; the judge is trained first, if necessary."""
    judge()
    rewards = trajectory_rewards(_loaded(judge.path), bench.tokenizer, list(prompts), list(answers))
    return [round(float(reward), 4) for reward in rewards]


_loaded = cache(load_trajectory_reward_model)


def accuracy_steps(bench: Bench, task: Task, dataset: str) -> list[Step]:
    """Returns the steps that measure how often each judge prefers the chosen answer, on pairs that it never saw."""
    judges: list[tuple[str, int, Step | None, Callable[[list, list], Iterable[float]]]] = [
        ("the judge, of the other half", 0, (rm := judge(bench, dataset, task.size)), partial(judged, bench, rm)),
        ("n-grams, of the half that steers", 0, None, n_grams(harmless_pairs(dataset).half)),
        ("n-grams, of the other half", 0, None, n_grams(harmless_pairs(dataset).other)),
        ("the shorter answer", 0, None, lambda prompts, answers: [-len(text_of(answer)) for answer in answers]),
    ]
    for seed in task.size.seeds:
        adapter = arm(bench, task, MARGIN, seed)
        judges.append(("what steers, of its half", seed, adapter, partial(rewarded, bench, adapter)))

    def step(name: str, seed: int, adapter: Step | None, judge: Callable[[list, list], Iterable[float]]) -> Step:
        def write(partial: Path) -> None:
            test = harmless_pairs(dataset).test
            chosen, rejected = (judge(test["prompt"], test[side]) for side in ("chosen", "rejected"))
            with partial.open("w", encoding="utf-8") as file:
                for index, (one, other) in enumerate(zip(chosen, rejected, strict=True)):
                    right = 0.5 if one == other else float(one > other)
                    row = {"prompt": index, "strength": 0.0, "temperature": 1.0, "right": right}
                    file.write(json.dumps(row) + "\n")

        needed = [adapter] if adapter else []
        return bench.file(
            task, "pairs", name, seed, needed, write, [part.to_list() for part in harmless_pairs(dataset)]
        )

    return [step(*judge) for judge in judges]


def rewarded(bench: Bench, adapter: Step, prompts: list, answers: list) -> list[float]:
    """Returns the scores of the reward model that steers."""
    return scorer(bench, adapter).score(prompts, answers, batch_size=16).tolist()


def n_grams(pairs: Dataset) -> Callable[[list, list], Iterable[float]]:
    """Returns a judge that is a logistic regression on words and pairs of words."""

    def score(prompts: list, answers: list) -> Iterable[float]:
        texts = [text_of(answer) for side in ("chosen", "rejected") for answer in pairs[side]]
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10))
        model.fit(texts, [1] * len(pairs) + [0] * len(pairs))
        return model.decision_function([text_of(answer) for answer in answers])

    return score
