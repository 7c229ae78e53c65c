"""The methods that steer the base. Each is a function that returns a step, which makes a file of answers."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, smc_sample
from hf_genarm.decoding.meter import answer_lengths
from hf_genarm.scripts.prompts import completion_of
from hf_genarm.scripts.sweep import Answers

from .args_search import ARGSLogitsProcessor
from .bench import Bench, Point, Processors, Step, Task, as_rows
from .rollouts import RolloutLogitsProcessor
from .settings import (
    ALPHAS,
    MARGIN,
    OBJECTIVES,
    ROLLOUT_TOP_K,
    TEMPERATURES,
    TOP_K,
)
from .training import train_arm, train_trajectory_reward_model
from .trajectory_reward import load_trajectory_reward_model, trajectory_rewards

_SMC_PROMPTS = 24  # at once, with all their particles

GRID = [Point(alpha, temperature) for temperature in TEMPERATURES for alpha in ALPHAS]

# The objective, and the reference that is subtracted: none (Eq. 7), or the base (the ratio)
GUIDED = {
    "Eq. 5, Eq. 7": ("eq5", None),
    "Eq. 5, ratio": ("eq5", "base"),
    "DPO loss, Eq. 7": (MARGIN, None),
    "DPO loss, ratio": (MARGIN, "base"),
}


def arm(bench: Bench, task: Task, objective: str, seed: int) -> Step:
    """Returns the step that trains an adapter by one of the `OBJECTIVES`."""
    loss = OBJECTIVES[objective]
    train = partial(train_arm, bench, task.pairs, seed=seed, **loss)
    return bench.training(f"{objective}-{seed}", task, train, loss, seed)


def trajectory_rm(bench: Bench, task: Task, seed: int) -> Step:
    """Returns the step that trains a classifier of whole answers."""
    train = partial(train_trajectory_reward_model, bench, task.pairs, seed=seed)
    return bench.training(f"rm-{seed}", task, train, seed)


def guided(bench: Bench, adapters: list[Step], reference: str | None) -> Processors:
    """Returns what makes the processor that guides by adapters on the base."""

    def make() -> GenARMLogitsProcessor:
        folders = [str(adapter.path) for adapter in adapters]
        return GenARMLogitsProcessor.from_pretrained(
            folders, bench.model, 1.0, reference=reference, tokenizer=bench.tokenizer
        )

    return by_row(make)


def by_row(make: Callable[[], GenARMLogitsProcessor]) -> Processors:
    """Makes a processor once, when it is first needed. Strengths are `(n_prompts,)` or `(n_prompts, n_rewards)`."""
    made = cache(make)

    def processors(strengths: Tensor) -> list:
        made().alpha = strengths.view(len(strengths), -1)
        return [made()]

    return processors


def guided_step(
    bench: Bench, task: Task, split: str, method: str, objective: str, reference: str | None, seed: int, points: Any
) -> Step:
    """Returns the step of a guided method."""
    adapter = arm(bench, task, objective, seed)
    answer = bench.sampler(task, guided(bench, [adapter], reference))
    return bench.answering(task, split, method, seed, points, [adapter], answer, reference)


def base_step(bench: Bench, task: Task, split: str, method: str, points: list[Point], seed: int = 0) -> Step:
    """Returns the step of the base itself, at some temperatures."""
    return bench.answering(task, split, method, seed, points, [], bench.sampler(task, None))


def args_step(bench: Bench, task: Task, split: str, seed: int, points: list[Point]) -> Step:
    """Returns the step of ARGS."""
    adapter = trajectory_rm(bench, task, seed)

    @cache
    def model():
        return load_trajectory_reward_model(adapter.path)

    def processors(weights: Tensor) -> list:
        return [ARGSLogitsProcessor(model(), weights[:, None], TOP_K)]

    return bench.answering(task, split, "ARGS", seed, points, [adapter], bench.sampler(task, processors), TOP_K)


def smc_step(bench: Bench, task: Task, split: str, seed: int, points: list[Point]) -> Step:
    r"""
    Returns the step of sequential Monte Carlo. Its divergence is an estimate: the mean over answers of
    $\alpha\,(\log\pi_r(y) - \log\pi_\text{base}(y)) - \log Z$ is the divergence of the target from the base.
    """
    adapter, n = arm(bench, task, MARGIN, seed), task.size.n_particles
    processors, reward_model = guided(bench, [adapter], "base"), cache(partial(scorer, bench, adapter))
    base = cache(lambda: AutoregressiveRewardModel(bench.model, bench.tokenizer))

    def answer(prompts: list[str], points: list[Point]) -> list[dict]:
        rows: list[dict] = []
        for start in range(0, len(prompts), _SMC_PROMPTS):
            batch = prompts[start : start + _SMC_PROMPTS]
            strengths = torch.tensor([point.strength for point in points[start : start + _SMC_PROMPTS]])
            inputs = bench.inputs(task, batch)
            output = bench.model.generate(
                **inputs,
                logits_processor=processors(strengths),
                custom_generate=smc_sample,
                n_particles=n,
                do_sample=True,
                top_k=0,
                max_new_tokens=task.size.max_new_tokens,
                return_dict_in_generate=True,
            )
            answers = output.sequences[:, inputs["input_ids"].shape[1] :]
            texts = bench.tokenizer.batch_decode(answers, skip_special_tokens=True)
            lengths = answer_lengths(answers, [bench.tokenizer.eos_token_id]).tolist()
            kl = strengths * scores(task, reward_model(), batch, texts) - output.log_z
            log_probs = scores(task, base(), batch, texts)
            rows += as_rows(Answers(texts, lengths, kl.tolist(), log_probs.tolist()))
        return rows

    return bench.answering(task, split, f"SMC of {n}", seed, points, [adapter], answer, n)


def scorer(bench: Bench, adapter: Step) -> AutoregressiveRewardModel:
    """Returns the reward model that was trained by the loss of DPO, whose scores are log π_r − log π_base."""
    model = AutoModelForCausalLM.from_pretrained(bench.model_path, dtype=torch.float32)
    reward_model = AutoregressiveRewardModel.from_pretrained(str(adapter.path), base_model=model)
    reward_model.tokenizer = bench.tokenizer
    return reward_model


def scores(task: Task, model: AutoregressiveRewardModel, prompts: list[str], texts: list[str]) -> Tensor:
    """Returns the reward of each answer, `(n_answers,)`."""
    asked = task.asked(prompts)
    answered = [completion_of(prompt, text) for prompt, text in zip(asked, texts, strict=True)]
    rows = model.token_rewards(asked, answered, batch_size=32)
    # Nothing was trained on the end of a continuation.
    return torch.stack([(row.rewards if task.is_chat else row.rewards[:-1]).sum() for row in rows])


def best_of_step(bench: Bench, task: Task, split: str, seed: int, samples: Step, by: str) -> Step:
    r"""
    Returns the step that takes the best of the first n answers of the base, judged by the reward model (`"reward
    model"`) or by a classifier of whole answers (`"classifier"`). Its divergence is at most $\log n - (n - 1) / n$ (https://hf.co/papers/2401.01879).
    """
    adapter = trajectory_rm(bench, task, seed) if by == "classifier" else arm(bench, task, MARGIN, seed)

    def rewards(prompts: list[str], texts: list[str]) -> list[float]:
        if by == "classifier":
            model = load_trajectory_reward_model(adapter.path)
            return trajectory_rewards(model, bench.tokenizer, prompts, texts).tolist()
        return scores(task, scorer(bench, adapter), prompts, texts).tolist()

    def write(partial: Path) -> None:
        answers = [json.loads(line) for line in samples.path.read_text(encoding="utf-8").splitlines()]
        prompts = task.prompts(split)
        scored = rewards([prompts[row["prompt"]] for row in answers], [row["text"] for row in answers])
        by_prompt: dict[int, list[tuple[float, dict]]] = {}
        for reward, row in zip(scored, answers, strict=True):
            by_prompt.setdefault(row["prompt"], []).append((reward, row))
        with partial.open("w", encoding="utf-8") as file:
            for n in task.size.n_best_of:
                bound = round(math.log(n) - (n - 1) / n, 3)
                for candidates in by_prompt.values():
                    _, best = max(candidates[:n], key=lambda candidate: candidate[0])
                    file.write(json.dumps(best | {"strength": n, "kl": bound}) + "\n")

    return bench.file(task, split, f"best of n, {by}", seed, [samples, adapter], write, task.size.n_best_of)


def rollout_step(bench: Bench, task: Task, split: str, seed: int, points: list[Point]) -> Step:
    """Returns the step of Transfer-Q: short answers to the first prompts only, since each token needs whole answers."""
    policy, classifier = arm(bench, task, MARGIN, seed), trajectory_rm(bench, task, seed)
    few = replace(task, size=replace(task.size, max_new_tokens=min(24, task.size.max_new_tokens)))

    def answer(prompts: list[str], points: list[Point]) -> list[dict]:
        model = AutoModelForCausalLM.from_pretrained(bench.model_path, dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, str(policy.path)).merge_and_unload()
        processor = RolloutLogitsProcessor(
            merged,
            load_trajectory_reward_model(classifier.path),
            bench.tokenizer,
            prompts,
            bench.inputs(few, prompts)["input_ids"].shape[1],
            few.size.max_new_tokens,
            points[0].strength,
            ROLLOUT_TOP_K,
        )
        return bench.sampler(few, lambda strengths: [processor])(prompts, points)

    n_prompts = task.size.n_rollout_prompts
    needed = [policy, classifier]
    return bench.answering(few, split, "Transfer-Q", seed, points, needed, answer, ROLLOUT_TOP_K, n_prompts=n_prompts)
