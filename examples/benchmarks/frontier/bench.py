"""What the experiments share: the base, and work whose outcome is kept under a key of all that it depends on."""

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedModel, set_seed

from hf_genarm.demo import demo_model
from hf_genarm.hub.info import package_versions
from hf_genarm.scripts.prompts import left_padded, token_ids
from hf_genarm.scripts.sweep import Answers, sample_answers

from ...fingerprint import fingerprint
from .settings import ADAPTER, TARGETS, TRAINING, Size

Judge = Callable[[Sequence[str], Sequence[str]], Iterable[float]]
Processors = Callable[[Tensor], list[LogitsProcessor]]

_ROWS_AT_ONCE = 96


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        name: of the file of answers.
        title, described: for the report.
        pairs: what is trained on, with messages or texts.
        dev, test: prompts, for choosing settings and for the results.
        judges: what gives an answer its numbers, of prompts and texts.
        size: how large a run is.
        is_chat: whether prompts are questions, or texts to go on with.
        n_scored: number of the first test prompts whose answers are to have a high reward; all of them if `None`.
    """

    name: str
    title: str
    described: str
    pairs: Dataset = field(repr=False)
    dev: list[str]
    test: list[str]
    judges: dict[str, Judge] = field(repr=False)
    size: Size
    is_chat: bool = True
    n_scored: int | None = None

    def prompts(self, split: str) -> list[str]:
        return self.dev if split == "dev" else self.test

    def asked(self, prompts: Sequence[str]) -> list:
        """As the model is asked: messages, or texts that it goes on with."""
        return [[{"role": "user", "content": x}] for x in prompts] if self.is_chat else list(prompts)


@dataclass(frozen=True)
class Point:
    """A setting of a method: its strength, and the temperature."""

    strength: float
    temperature: float = 1.0


@dataclass
class Step:
    """
    A piece of work that is done when `path` is there. `run` writes somewhere else, and what it has written moves to
    `path` when it is complete; what is left of a run that was stopped is given to it again.
    """

    path: Path
    run: Callable[[Path], None]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.path.exists()

    def __call__(self, wait: bool = True) -> bool:
        """Whether it is done. Without `wait`, it is left to another process that is at it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(self.path.name + ".lock").open("w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not self.is_done:
                partial = self.path.with_name(self.path.name + ".partial")
                self.run(partial)
                os.replace(partial, self.path)
                del self.run  # and with it the models and caches that it holds
        return True


class Bench:
    """Keeps adapters and answers in a folder."""

    def __init__(self, output: Path):
        self.output = output
        self.model_path = demo_model()
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path, padding_side="left")
        self._base_key = fingerprint(Path(self.model_path), package_versions())

    @cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32)

    def training(self, name: str, task: Task, train: Callable[[Path], None], *settings: object) -> Step:
        """A folder of weights that `train` makes of the pairs and the settings."""

        def run(partial: Path) -> None:
            shutil.rmtree(partial, ignore_errors=True)
            print(f"\ntraining {name}", file=sys.stderr)
            train(partial)

        key = fingerprint(self._base_key, task.pairs.to_list(), TRAINING, ADAPTER, TARGETS, settings)
        return Step(self.output / f"{task.name}-{name}-{key}", run)

    def answering(
        self,
        task: Task,
        split: str,
        method: str,
        seed: int,
        points: Sequence[Point],
        adapters: Sequence[Step],
        answer: Callable[[list[str], list[Point]], list[dict[str, Any]]],
        *settings: object,
        n_prompts: int | None = None,
    ) -> Step:
        """
        A file with an answer to each prompt at each point.

        Args:
            method: names it, in the report.
            seed: of the training run, and of the sampling; the same numbers for every method.
            points: settings, of which a batch may have several.
            adapters: what it takes, made if it isn't there.
            answer: of prompts and as many points, the answers with what is measured.
            settings: what else the answers depend on.
        """
        prompts = task.prompts(split)[:n_prompts]
        rows = [(index, point) for point in points for index in range(len(prompts))]

        def write(partial: Path) -> None:
            n_done = len(partial.read_text(encoding="utf-8").splitlines()) if partial.exists() else 0
            for start in range(n_done, len(rows), _ROWS_AT_ONCE):
                batch = rows[start : start + _ROWS_AT_ONCE]
                print(f"\n{split} {method}, seed {seed}: {start} of {len(rows)}", file=sys.stderr)
                set_seed(1000 * seed + start)
                answers = answer([prompts[index] for index, _ in batch], [point for _, point in batch])
                with partial.open("a", encoding="utf-8") as file:
                    for (index, point), row in zip(batch, answers, strict=True):
                        setting = {"strength": point.strength, "temperature": point.temperature}
                        file.write(json.dumps({"prompt": index} | setting | row) + "\n")

        key = (points, prompts, task.size.max_new_tokens, _ROWS_AT_ONCE, settings)
        return self.file(task, split, method, seed, adapters, write, *key)

    def file(
        self,
        task: Task,
        split: str,
        method: str,
        seed: int,
        needed: Sequence[Step],
        write: Callable[[Path], None],
        *settings: object,
    ) -> Step:
        """Of answers, a line each. What is `needed` is made first, if it isn't there."""

        def run(partial: Path) -> None:
            for step in needed:
                step()
            write(partial)

        about = {"split": split, "method": method, "seed": seed}
        key = fingerprint(self._base_key, about, [step.path.name for step in needed], settings)
        name = re.sub(r"\W+", "-", method)
        return Step(self.output / f"{task.name}-{split}-{name}-{seed}-{key}.jsonl", run, about)

    def inputs(self, task: Task, prompts: Sequence[str]) -> dict[str, Tensor]:
        ids = [token_ids(self.tokenizer, prompt) for prompt in task.asked(prompts)]
        return left_padded(self.tokenizer, ids, self.model.device)

    def sampler(self, task: Task, processors: Processors | None) -> Callable[[list[str], list[Point]], list[dict]]:
        """
        Samples answers.

        Args:
            processors: makes the method of the base, of a strength `(n_prompts,)` for each prompt.
        """

        def answer(prompts: list[str], points: list[Point]) -> list[dict]:
            method = processors(torch.tensor([point.strength for point in points])) if processors else []
            method = [*method, RowTemperature(torch.tensor([point.temperature for point in points]))]
            asked, n_tokens = task.asked(prompts), task.size.max_new_tokens
            return as_rows(sample_answers(self.model, self.tokenizer, asked, method, n_tokens))

        return answer


def as_rows(answers: Answers) -> list[dict[str, Any]]:
    """As they are kept."""
    numbers = zip(answers.texts, answers.n_tokens, answers.kl, answers.base_log_prob, strict=True)
    return [{"text": text, "n_tokens": n, "kl": round(k, 3), "base_log_prob": round(p, 3)} for text, n, k, p in numbers]


class RowTemperature(LogitsProcessor):
    """Of each row its own. Here, and not in `generate`, it is seen by the meter."""

    supports_continuous_batching = False

    def __init__(self, temperatures: Tensor):
        self.temperatures = temperatures[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.float() / self.temperatures
