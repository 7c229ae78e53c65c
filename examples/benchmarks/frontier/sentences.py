"""Steering by a sentence in the prompt, at strengths below and above prompting, and by a published adapter."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.scripts.sweep import sample_answers

from ...fingerprint import fingerprint
from ...small import fitting_adapter
from . import sentiment
from .bench import Bench, Point, Step, Task, as_rows
from .curves import ADAPTER, BOTH, BRIEF, SENTENCE
from .methods import base_step
from .settings import PUBLISHED_STRENGTHS, SENTENCE_STRENGTHS, SENTENCES, Size

PUBLISHED = "model_cards/arm-smollm2-135m-sentiment"

_N_SAMPLES = 4  # of the base, to each prompt


def task(size: Size, base: str | None = None) -> Task:
    """Returns the task of steering a base, which is SmolLM2-135M-Instruct if it is `None`."""
    of_base = "" if base is None else f": {Path(base).name}"
    return replace(
        sentiment.task(replace(size, n_test_prompts=size.n_sentence_prompts)),
        name="sentences_on_base" if of_base else "sentences",
        title=f"Steering by a sentence{of_base}",
        described="The reward model is the base itself with a sentence in its system message; the reference is the "
        "base with its own prompt. At strength 1 that is prompting with the sentence. The reward is VADER's score of "
        f"the answer, from −1 to 1; the second judge is TextBlob. There are {size.n_sentences} sentences for positive "
        f"answers, and as many for short ones. The base computes in bfloat16.",
    )


def steps(bench: Bench, task: Task) -> list[Step]:
    """
    Returns the steps of each sentence, for positive and for short answers, and of the published adapter, alone and
    together with sentences, at all strengths. The number of the sentence, or of the sample, is the `seed`.
    """
    size, alone, add = task.size, SENTENCE_STRENGTHS, partial(step, bench, task)
    work = [base_step(bench, task, "test", "base", [Point(0.0)] * _N_SAMPLES)]
    work += [add(SENTENCE, i, alone, SENTENCES["sentiment"][i]) for i in range(size.n_sentences)]
    work += [add(BRIEF, i, alone, SENTENCES["brevity"][i]) for i in range(size.n_sentences)]
    # With fewer runs of what has the adapter: samples of it alone, and some of the sentences
    work += [add(ADAPTER, seed, PUBLISHED_STRENGTHS, adapter=PUBLISHED) for seed in size.dev_seeds]
    work += [add(BOTH, i, alone, SENTENCES["sentiment"][i], PUBLISHED) for i in size.few_seeds]
    return work


def step(
    bench: Bench,
    task: Task,
    method: str,
    seed: int,
    strengths: Sequence[float],
    sentence: str | None = None,
    adapter: str | None = None,
) -> Step:
    """Returns the step that steers by a sentence, by an adapter, or by both."""
    weights = fingerprint(Path(adapter)) if adapter else None
    answer, points = answerer(bench, task, sentence, adapter), [Point(x) for x in strengths]
    return bench.answering(task, "test", method, seed, points, [], answer, sentence, weights)


def answerer(
    bench: Bench, task: Task, sentence: str | None, adapter: str | None
) -> Callable[[list[str], list[Point]], list[dict]]:
    """
    Returns the function that answers prompts at points.

    The strength of a point is that of the sentence, or of the adapter if there is no sentence. If there are both, each
    has half the strength that it has alone at the point of the same rank.
    """

    @cache
    def processor() -> GenARMLogitsProcessor:
        models = []
        if sentence:
            models.append(AutoregressiveRewardModel.from_sentence(sentence, bench.model, bench.tokenizer))
        if adapter:
            folder = fitting_adapter(adapter)
            models.append(AutoregressiveRewardModel.from_pretrained(folder, base_model=bench.model))
        return GenARMLogitsProcessor(models, base_model=bench.model, tokenizer=bench.tokenizer, reference="base")

    def answer(prompts: list[str], points: list[Point]) -> list[dict]:
        steered, asked = processor(), task.asked(prompts)
        steered.alpha = torch.tensor([strengths(point, sentence, adapter) for point in points])
        steered.encode(asked)
        answers = sample_answers(bench.model, bench.tokenizer, asked, [steered], task.size.max_new_tokens)
        return [row | {"sentence": sentence} for row in as_rows(answers)]

    return answer


def strengths(point: Point, sentence: str | None, adapter: str | None) -> list[float]:
    """Returns the strength of each reward model at a point."""
    if sentence and adapter:
        rank = SENTENCE_STRENGTHS.index(point.strength)
        return [point.strength / 2, PUBLISHED_STRENGTHS[rank] / 2]
    return [point.strength]
