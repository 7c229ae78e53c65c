"""What the experiments share: the base, tasks, and steps of work whose results are kept in files."""

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
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedModel, set_seed

from hf_genarm.demo import demo_model
from hf_genarm.hub.compatibility import chat_of
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
    A reward, with the pairs that teach it, the prompts that it is measured on, and the judges that measure it.

    Attributes:
        name: the stem of the file of answers.
        title, described: for the report.
        pairs: the preference pairs that every method is trained on, as messages or texts.
        dev, test: the prompts for choosing settings, and those for the results.
        judges: by name, functions of prompts and texts that return one number per answer.
        size: how large a run is.
        is_chat: whether prompts are questions; otherwise they are texts to be continued.
        n_scored: the answers to so many of the first test prompts should have a high reward; to all of them if `None`.
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
        """Returns the prompts of `"dev"` or `"test"`."""
        return self.dev if split == "dev" else self.test

    def asked(self, prompts: Sequence[str]) -> list:
        """Returns prompts in the form that the model reads: messages, or texts to be continued."""
        return [chat_of(x) for x in prompts] if self.is_chat else list(prompts)


@dataclass(frozen=True)
class Point:
    """A setting of a method: its strength and the temperature."""

    strength: float
    temperature: float = 1.0


@dataclass
class Step:
    """
    A piece of work that is done when `path` exists. `run` writes to another path, which is renamed to `path` when it is
    complete. If it was stopped, `run` is called again with the incomplete path.
    """

    path: Path
    run: Callable[[Path], None]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.path.exists()

    def __call__(self, wait: bool = True) -> bool:
        """Does the work and returns `True`; or `False`, if another process is doing it and `wait` is `False`."""
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
                del self.run  # frees the models and caches that it holds
        return True


class Bench:
    """
    Makes steps that keep adapters and answers in a folder, under names with a hash of all that they depend on. The base
    is SmolLM2-135M-Instruct, or else the one that is named.
    """

    def __init__(self, output: Path, base: str | None = None, dtype: torch.dtype = torch.float32):
        self.output = output
        self.model_path = demo_model() if base is None else base if Path(base).is_dir() else snapshot_download(base)
        self._dtype = dtype
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path, padding_side="left")
        self._base_key = fingerprint(Path(self.model_path), package_versions(), *[dtype] * (dtype != torch.float32))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base."""
        model = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=self._dtype)
        model.generation_config.repetition_penalty = None  # some models have one, and it would be part of the base
        return model

    def training(self, name: str, task: Task, train: Callable[[Path], None], *settings: object) -> Step:
        """Returns the step that makes a folder of weights, by `train`, from the pairs and the settings."""

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
        Returns the step that makes a file with one answer to each prompt at each point.

        Args:
            task: the prompts and the length of answers.
            split: `"dev"` or `"test"`.
            method: its name in the report.
            seed: of the training run and of the sampling; the same numbers for every method.
            points: the settings. One batch may have several.
            adapters: steps that have to be done first.
            answer: a function of prompts and as many points that returns the answers with their measures.
            settings: what else the answers depend on.
            n_prompts: takes the first prompts only.
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
        """Returns the step that makes a file of answers, one per line, by `write`, after the steps in `needed`."""

        def run(partial: Path) -> None:
            for step in needed:
                step()
            write(partial)

        about = {"split": split, "method": method, "seed": seed}
        key = fingerprint(self._base_key, about, [step.path.name for step in needed], settings)
        name = re.sub(r"\W+", "-", method)
        return Step(self.output / f"{task.name}-{split}-{name}-{seed}-{key}.jsonl", run, about)

    def inputs(self, task: Task, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Returns token ids and mask, padded on the left."""
        ids = [token_ids(self.tokenizer, prompt) for prompt in task.asked(prompts)]
        return left_padded(self.tokenizer, ids, self.model.device)

    def sampler(self, task: Task, processors: Processors | None) -> Callable[[list[str], list[Point]], list[dict]]:
        """
        Returns a function of prompts and points that samples answers.

        Args:
            task: the form of prompts and the length of answers.
            processors: makes the method's processors from strengths `(n_prompts,)`; `None` is the base itself.
        """

        def answer(prompts: list[str], points: list[Point]) -> list[dict]:
            method = processors(torch.tensor([point.strength for point in points])) if processors else []
            method = [*method, RowTemperature(torch.tensor([point.temperature for point in points]))]
            asked, n_tokens = task.asked(prompts), task.size.max_new_tokens
            return as_rows(sample_answers(self.model, self.tokenizer, asked, method, n_tokens))

        return answer


def as_rows(answers: Answers) -> list[dict[str, Any]]:
    """Returns answers as they are kept in files."""
    numbers = zip(answers.texts, answers.n_tokens, answers.kl, answers.base_log_prob, strict=True)
    return [{"text": text, "n_tokens": n, "kl": round(k, 3), "base_log_prob": round(p, 3)} for text, n, k, p in numbers]


class RowTemperature(LogitsProcessor):
    """Applies one temperature per row. Unlike the temperature of `generate`, it is seen by the meter."""

    supports_continuous_batching = False

    def __init__(self, temperatures: Tensor):
        self.temperatures = temperatures[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.float() / self.temperatures
