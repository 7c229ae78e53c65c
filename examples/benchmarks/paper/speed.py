"""Time of a token with each method, in one interleaved run."""

import statistics
import time
from collections.abc import Callable

import torch
from bench import Bench, Step
from headline import merged_dpo, rollouts
from intervals import shown
from methods import ARGS, GENARM, LESS_BASE, choose
from prompts import test_prompts
from report import table
from settings import ROLLOUT_TOP_K
from trajectory_reward import load_trajectory_reward_model, trajectory_rewards

from hf_genarm import AutoregressiveRewardModel


def steps(bench: Bench) -> list[Step]:
    return [bench.measuring("speed", 40.0 * bench.size.n_rounds, lambda: measure(bench))]


def measure(bench: Bench) -> dict[str, list[float]]:
    """Seconds that one answer to one prompt takes, for each method and round; all answers have the same length."""
    prompt = test_prompts(bench.size.n_prompts)[0]
    inputs, n_tokens, n = bench.chats([prompt]), bench.size.max_new_tokens, bench.size.n_samples
    reward_model = load_trajectory_reward_model(bench.adapter("rm-seed0"))
    dpo = merged_dpo(bench)
    arm = AutoregressiveRewardModel.from_pretrained(str(bench.adapter("arm-seed0")), base_model=bench.model)
    arm.tokenizer = bench.tokenizer

    def generate(model, processors=(), n_answers=1):
        return model.generate(
            **inputs,
            logits_processor=list(processors),
            do_sample=True,
            top_k=0,
            num_return_sequences=n_answers,
            min_new_tokens=n_tokens,
            max_new_tokens=n_tokens,
        )

    def best_of_n(score: Callable[[list[str], list[str]], object]) -> None:
        output = generate(bench.model, n_answers=n)[:, inputs.input_ids.shape[1] :]
        score([prompt] * n, bench.tokenizer.batch_decode(output, skip_special_tokens=True))

    genarm = GENARM.processors(bench, choose(bench, GENARM), 0)
    less_base = LESS_BASE.processors(bench, choose(bench, LESS_BASE), 0)
    args = ARGS.processors(bench, choose(bench, ARGS), 0)
    transfer_q = rollouts(bench, [prompt])
    methods: dict[str, Callable[[], object]] = {
        "base": lambda: generate(bench.model),
        "DPO, merged into the base": lambda: generate(dpo),
        "GenARM": lambda: generate(bench.model, genarm),
        "GenARM less base": lambda: generate(bench.model, less_base),
        "ARGS": lambda: generate(bench.model, args),
        f"best of {n}, trajectory RM": lambda: best_of_n(
            lambda prompts, texts: trajectory_rewards(reward_model, bench.tokenizer, prompts, texts)
        ),
        f"best of {n}, ARM": lambda: best_of_n(arm.score),
        f"Transfer-Q style rollouts, {ROLLOUT_TOP_K} candidates": lambda: generate(bench.model, [transfer_q]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for round_number in range(bench.size.n_rounds + 1):
        for name, method in methods.items():
            torch.manual_seed(round_number)
            start = time.perf_counter()
            method()
            if round_number > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def section(bench: Bench) -> str:
    seconds = bench.measured("speed")
    rows = []
    for name, times in seconds.items():
        ratios = [time / base for time, base in zip(times, seconds["base"], strict=True)]
        rows.append([name, shown(statistics.median(ratios), min(ratios), max(ratios))])
    return "\n\n".join(
        [
            "## Time of a token",
            f"One prompt, {bench.size.max_new_tokens} tokens of answer, all methods in turn, "
            f"{bench.size.n_rounds} rounds: median [range] of the time over that of the base in the same round.",
            table(["method", "time over base"], rows),
        ]
    )
