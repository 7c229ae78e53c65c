"""Rewards and win rates of all methods, and how far from the base they go for it."""

from dataclasses import dataclass

import numpy as np
import torch
from bench import Answers, Bench, Step
from figures import forest, frontier
from intervals import cell, holm, interval, length_matched, p_value, win_rates
from judges import is_degenerate, judge, n_words, oracle, perplexity, read, second_judge
from methods import (
    ARGS,
    DPO,
    GENARM,
    LESS_BASE,
    METHODS,
    SHARPENED,
    Method,
    all_seeds,
    choose,
    dpo_adapter,
    further_dpo_trainings,
    guided,
    mean,
    policy,
    seeds_of,
    trainings,
    trial,
)
from peft import PeftModel
from prompts import dev_prompts, test_prompts
from report import table
from rollouts import RolloutLogitsProcessor
from settings import MORE_ALPHAS, ROLLOUT_TOP_K
from trajectory_reward import load_trajectory_reward_model, trajectory_rewards
from transformers import AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardModel

TRAINED = (GENARM, LESS_BASE, DPO, ARGS)
BEST_OF = {
    "rm": "best of {n}, trajectory RM",
    "arm": "best of {n}, ARM",
    "arm-contrast": "best of {n}, ARM less base",
}


def steps(bench: Bench) -> list[Step]:
    size = bench.size
    dev, test = dev_prompts(size.n_dev_prompts), test_prompts(size.n_prompts)
    work = [*trainings(bench), bench.sampling("dev-base", dev, lambda: ([], {}))]
    work += [trial(bench, method, value) for method in METHODS for value in method.values]
    work += further_dpo_trainings(bench)
    work += [bench.sampling("test-base", test, lambda: ([], {})), answer_test_prompts(bench, SHARPENED)]
    work += [
        answer_test_prompts(bench, method, seed, has_seeds=True)
        for method in TRAINED
        for seed in seeds_of(bench, method)
    ]
    n_texts = size.n_prompts * size.n_samples
    work.append(bench.measuring("best-of-rm", 0.15 * n_texts, lambda: best_by_reward_model(bench)))
    work.append(bench.measuring("best-of-arm", 0.4 * n_texts, lambda: best_by_arm(bench)))
    work += frontier_steps(bench)
    work.append(rollout_step(bench))
    return work


def answer_test_prompts(bench: Bench, method: Method, seed: int = 0, has_seeds: bool = False) -> Step:
    def with_chosen_setting():
        value = choose(bench, method)
        return method.processors(bench, value, seed), {method.setting: value}

    n_samples = bench.size.n_samples_of_seed if has_seeds else bench.size.n_samples
    prompts = test_prompts(bench.size.n_prompts)
    return bench.sampling(method.test_cell(seed), prompts, with_chosen_setting, method.cost, n_samples, seed)


def frontier_steps(bench: Bench) -> list[Step]:
    dev = dev_prompts(bench.size.n_dev_prompts)

    def method(key: str, alpha: float):
        if key == "dpo-strength":
            return policy(bench, dpo_adapter(choose(bench, DPO), 0), weights=[alpha]), {"α": alpha}
        return guided(bench, "arm-seed0", alpha=alpha), {"α": alpha}

    return [
        bench.sampling(f"dev-{key}-{alpha:g}", dev, lambda key=key, alpha=alpha: method(key, alpha), 1.7)
        for key, alphas in MORE_ALPHAS.items()
        for alpha in alphas
    ]


def merged_dpo(bench: Bench):
    """The policy as a plain model, as one would deploy it."""
    model = AutoModelForCausalLM.from_pretrained(bench.model_path, dtype=torch.float32)
    adapter = str(bench.adapter(dpo_adapter(choose(bench, DPO), 0)))
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def rollouts(bench: Bench, prompts: list[str]) -> RolloutLogitsProcessor:
    return RolloutLogitsProcessor(
        merged_dpo(bench),
        load_trajectory_reward_model(bench.adapter("rm-seed0")),
        bench.tokenizer,
        prompts,
        bench.chats(prompts).input_ids.shape[1],
        bench.size.max_new_tokens,
        choose(bench, ARGS),
        ROLLOUT_TOP_K,
    )


def rollout_step(bench: Bench) -> Step:
    """One answer to each of the first prompts, in one batch."""
    prompts = test_prompts(bench.size.n_prompts)[: bench.size.n_rollout_prompts]

    def method():
        processor = rollouts(bench, prompts)
        return [processor], {"w": processor.weight, "k": processor.top_k}

    return bench.sampling("test-rollouts", prompts, method, cost=200, n_samples=1)


def best_by_reward_model(bench: Bench) -> dict[str, list[int]]:
    prompts, answers = test_prompts(bench.size.n_prompts), bench.answers("test-base")
    model = load_trajectory_reward_model(bench.adapter("rm-seed0"))
    rewards = trajectory_rewards(model, bench.tokenizer, *_flat(prompts, answers))
    return {"rm": _best(rewards, answers)}


def best_by_arm(bench: Bench) -> dict[str, list[int]]:
    texts = _flat(test_prompts(bench.size.n_prompts), answers := bench.answers("test-base"))
    arm = AutoregressiveRewardModel.from_pretrained(str(bench.adapter("arm-seed0")), base_model=bench.model)
    base = AutoregressiveRewardModel(bench.model, bench.tokenizer)
    arm.tokenizer = bench.tokenizer
    rewards = arm.score(*texts).numpy()
    return {"arm": _best(rewards, answers), "arm-contrast": _best(rewards - base.score(*texts).numpy(), answers)}


def _flat(prompts: list[str], answers: Answers) -> tuple[list[str], list[str]]:
    pairs = [(prompt, answer["text"]) for prompt, row in zip(prompts, answers, strict=True) for answer in row]
    return [prompt for prompt, _ in pairs], [text for _, text in pairs]


def _best(rewards: np.ndarray, answers: Answers) -> list[int]:
    return rewards.reshape(len(answers), -1).argmax(axis=1).tolist()


# --- what it says ---


def runs(bench: Bench) -> dict[str, Answers]:
    """The answers of every method to the test prompts."""
    base = bench.answers("test-base")
    result = {"base": base, SHARPENED.name: bench.answers(SHARPENED.test_cell(0))}
    result |= {method.name: all_seeds(bench, method) for method in TRAINED}
    chosen = bench.measured("best-of-rm") | bench.measured("best-of-arm")
    for key, name in BEST_OF.items():
        best = [[row[index]] for row, index in zip(base, chosen[key], strict=True)]
        result[name.format(n=bench.size.n_samples)] = best
    result["Transfer-Q style rollouts"] = bench.answers("test-rollouts")
    return result


def section(bench: Bench) -> str:
    answers = runs(bench)
    judged = {name: Judged.of(rows) for name, rows in answers.items()}
    return "\n\n".join(
        [
            "## Rewards of all methods",
            f"{bench.size.n_prompts} held-out prompts; the answers of {len(bench.size.seeds)} training seeds (ARGS: "
            f"{bench.size.n_args_seeds}) count as further answers to each. The rollouts answer the first "
            f"{bench.size.n_rollout_prompts} prompts, once. "
            "*GenARM* is Eq. 7 with an ARM that was trained by Eq. 5 with β_r = 0.01: of three training runs the one "
            "that does best on the dev prompts, as β is chosen for DPO from three. The other two, with the paper's β_r "
            "of 0.05 and with length-normalised log-probabilities, are with every setting that was tried. *GenARM less "
            'base* is the same ARM with `reference="base"`: it steers with log π_r − log π_base, and does not '
            "sharpen the base.",
            _levels(bench, answers, judged),
            "![Oracle reward and second judge of all methods](figures/headline.png)",
            "### GenARM against the others",
            "Differences are GenARM less the other, paired by prompt; p-values are two-sided and adjusted for all rows "
            "(Holm). *Length-matched*: over pairs of answers to a prompt that differ by at most 2 words.",
            _comparisons(judged),
            "### Training seeds",
            _seeds(bench),
            "### Every setting that was tried",
            f"On {bench.size.n_dev_prompts} dev prompts, with seed 0. The chosen one (✓) has the highest oracle reward "
            "among those whose share of degenerate answers is at most 5 points above the base's.",
            _trials(bench),
            "## Reward against divergence",
            "Mean oracle reward against the sum of the exact per-step KL divergence from the base along the answer, on "
            "the dev prompts, one point for each setting. *DPO at other strengths* is π_base^(1−α) π_DPO^α.",
            "![Reward against KL](figures/frontier.png)",
            _frontier(bench),
        ]
    )


@dataclass
class Judged:
    """Numbers of each answer of a method, `(n_prompts, n_samples)`."""

    oracle: np.ndarray
    second: np.ndarray
    words: np.ndarray

    @classmethod
    def of(cls, answers: Answers) -> "Judged":
        return cls(judge(oracle, answers), judge(second_judge, answers), judge(n_words, answers))


def _levels(bench: Bench, answers: dict[str, Answers], judged: dict[str, Judged]) -> str:
    rows, points = [], {}
    for name, rows_of_answers in answers.items():
        first, second = mean(judged[name].oracle), mean(judged[name].second)
        points[name] = interval(first), interval(second)
        kl = "" if name.startswith("best of") else cell(mean(read("kl", rows_of_answers)), 1)
        rows.append(
            [
                name,
                cell(first),
                cell(second),
                kl,
                f"{perplexity(rows_of_answers):.1f}",
                f"{judge(is_degenerate, rows_of_answers).mean():.1%}",
                f"{judged[name].words.mean():.1f}",
            ]
        )
    forest(points, bench.figures / "headline.png", bench.size.n_prompts)
    header = ["method", "oracle (VADER)", "second judge (TextBlob)", "KL per answer, nats", "perplexity under the base"]
    return table([*header, "degenerate", "words"], rows)


def _comparisons(judged: dict[str, Judged]) -> str:
    rows, p_values = [], []
    for ours in (GENARM.name, LESS_BASE.name):
        for name, theirs in judged.items():
            if name == ours or (ours, name) == (LESS_BASE.name, GENARM.name):
                continue
            n, mine = len(theirs.oracle), judged[ours]  # the rollouts have the first prompts only
            difference = mean(mine.oracle[:n]) - mean(theirs.oracle)
            seconds = mean(mine.second[:n]) - mean(theirs.second)
            matched = length_matched(mine.oracle[:n], mine.words[:n], theirs.oracle, theirs.words)
            p_values.append(p_value(difference))
            wins = win_rates(mine.oracle[:n], theirs.oracle)
            rows.append([ours, name, *map(cell, (wins, difference, seconds, matched))])
    for row, p in zip(rows, holm(p_values), strict=True):
        row.append("< 0.001" if p < 0.001 else f"{p:.3f}")
    header = ["", "against", "win + half-tie rate", "oracle", "second judge", "oracle, length-matched", "p of oracle"]
    return table(header, rows)


def _seeds(bench: Bench) -> str:
    rows = []
    for method in TRAINED:
        runs = [bench.answers(method.test_cell(seed)) for seed in seeds_of(bench, method)]
        cells = [cell(mean(judge(oracle, answers))) for answers in runs]
        rows.append([method.name, *cells, *[""] * (len(bench.size.seeds) - len(cells))])
    return table(["oracle reward", *(f"seed {seed}" for seed in bench.size.seeds)], rows)


def _trials(bench: Bench) -> str:
    rows = []
    for method in METHODS:
        chosen = choose(bench, method)
        for value in method.values:
            answers = bench.answers(method.dev_cell(value))
            mark = " ✓" if value == chosen else ""
            degenerate = f"{judge(is_degenerate, answers).mean():.1%}"
            rows.append(
                [method.name, f"{method.setting} = {value:g}{mark}", cell(mean(judge(oracle, answers))), degenerate]
            )
    return table(["method", "setting", "oracle", "degenerate"], rows)


def _frontier(bench: Bench) -> str:
    cells = {
        SHARPENED.name: [(SHARPENED.dev_cell(value), f"α = {value:g}") for value in SHARPENED.values],
        GENARM.name: [
            (GENARM.dev_cell(alpha), f"α = {alpha:g}") for alpha in sorted({*GENARM.values, *MORE_ALPHAS["genarm"]})
        ],
        LESS_BASE.name: [(LESS_BASE.dev_cell(value), f"α = {value:g}") for value in LESS_BASE.values],
        DPO.name: [(DPO.dev_cell(value), f"β = {value:g}") for value in DPO.values],
        "DPO at other strengths": [
            (f"dev-dpo-strength-{alpha:g}", f"α = {alpha:g}") for alpha in MORE_ALPHAS["dpo-strength"]
        ],
        ARGS.name: [(ARGS.dev_cell(value), f"w = {value:g}") for value in ARGS.values],
    }
    rows, curves = [], {}
    for name, settings in cells.items():
        for key, setting in settings:
            answers = bench.answers(key)
            kl, reward = mean(read("kl", answers)), mean(judge(oracle, answers))
            curves.setdefault(name, []).append((setting, interval(kl), interval(reward)))
            degenerate = f"{judge(is_degenerate, answers).mean():.1%}"
            rows.append(
                [name, setting, cell(kl, 1), cell(reward), cell(mean(judge(second_judge, answers))), degenerate]
            )
    base = interval(mean(judge(oracle, bench.answers("dev-base"))))
    frontier(curves, base, bench.figures / "frontier.png", bench.size.n_dev_prompts)
    return table(["method", "setting", "KL per answer, nats", "oracle", "second judge", "degenerate"], rows)
