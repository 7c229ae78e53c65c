"""The first layers of the base, distilled and then trained on the pairs, steer all of it."""

from functools import cache, partial
from typing import Any

import torch
from bench import Bench, Point, Step, Task
from make_shallow import DISTILLED, shallow_reward_model
from settings import MARGIN, OBJECTIVES, WEAK
from training import train_arm
from transformers import AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor


def steps(bench: Bench, task: Task) -> list[Step]:
    """Of several training runs on one distilled model: that beside the base, and each alone."""
    work = []
    shallow = shallow_reward_model() / DISTILLED
    for seed in task.size.few_seeds:
        train = partial(train_arm, bench, task.pairs, seed=seed, model_path=str(shallow), **OBJECTIVES[MARGIN])
        adapter = bench.training(f"weak-{seed}", task, train, shallow, OBJECTIVES[MARGIN], seed)

        @cache
        def arm(folder: str = str(adapter.path)) -> Any:
            model = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32)
            return AutoregressiveRewardModel.from_pretrained(folder, base_model=model)

        @cache
        def steering(arm: Any = arm) -> GenARMLogitsProcessor:
            return GenARMLogitsProcessor(arm(), base_model=bench.model, reference=arm().reference)

        @cache
        def alone(arm: Any = arm) -> GenARMLogitsProcessor:
            # What is left of log π_base + (log π_weak − log π_base)
            return GenARMLogitsProcessor(arm(), base_model=bench.model, reference="base")

        for name, processor, strengths in (
            ("weak to strong", steering, WEAK),
            ("the weak model alone", alone, [1.0]),
        ):

            def processors(strengths: torch.Tensor, processor: Any = processor) -> list:
                processor().alpha = strengths[:, None]
                return [processor()]

            points, answer = [Point(x) for x in strengths], bench.sampler(task, processors)
            work.append(bench.answering(task, "test", name, seed, points, [adapter], answer))
    return work
