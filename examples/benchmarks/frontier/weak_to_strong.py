"""Weak to strong: a reward model made of the first layers of the base steers the whole base."""

from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor

from ..make_shallow import DISTILLED, shallow_reward_model
from .bench import Bench, Point, Step, Task
from .methods import by_row
from .settings import MARGIN, OBJECTIVES, WEAK
from .training import train_arm


def steps(bench: Bench, task: Task) -> list[Step]:
    """Returns the steps of several training runs on one distilled model: guiding the base, and answering alone."""
    work = []
    shallow = shallow_reward_model() / DISTILLED
    for seed in task.size.few_seeds:
        train = partial(train_arm, bench, task.pairs, seed=seed, model_path=str(shallow), **OBJECTIVES[MARGIN])
        adapter = bench.training(f"weak-{seed}", task, train, shallow, OBJECTIVES[MARGIN], seed)
        for name, strengths, is_alone in (("weak to strong", WEAK, False), ("the weak model alone", [1.0], True)):
            points, method = [Point(x) for x in strengths], by_row(partial(weak, bench, shallow, adapter, is_alone))
            work.append(bench.answering(task, "test", name, seed, points, [adapter], bench.sampler(task, method)))
    return work


def weak(bench: Bench, shallow: Path, adapter: Step, is_alone: bool) -> GenARMLogitsProcessor:
    """
    Returns the processor that guides by the weak model minus the distilled model that it was trained from. If
    `is_alone`, the reference is the base, and log π_base + (log π_weak − log π_base) leaves the weak model alone.
    """
    model = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32)
    arm = AutoregressiveRewardModel.from_pretrained(str(adapter.path), base_model=model)
    return GenARMLogitsProcessor(arm, base_model=bench.model, reference="base" if is_alone else arm.reference)
