"""Does a shallow reward model steer the whole model?"""

from functools import partial

import numpy as np
from bench import Answers, Bench, Step
from figures import gap
from headline import answer_test_prompts
from intervals import bounds, cell, interval, resampled_means, shown
from judges import is_degenerate, judge, oracle, perplexity, read, second_judge
from methods import DPO, Method, all_seeds, choose, mean, trial
from prompts import sentiment_pairs, test_prompts
from report import table
from settings import DISTILLING, N_SHALLOW_ARM_EPOCHS, PAPER_ALPHAS, WEAK_ALPHAS
from shallow import make_shallow
from training import train_arm
from transformers import AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor

SHALLOW = "shallow"


def weak(bench: Bench, alpha: float, seed: int) -> list:
    return [GenARMLogitsProcessor(shallow_arm(bench), alpha, base_model=bench.model)]


def weak_less_itself(bench: Bench, alpha: float, seed: int) -> list:
    """What the training has changed, and none of what the shallow model gets wrong."""
    reference = shallow_model(bench)
    return [GenARMLogitsProcessor(shallow_arm(bench), alpha, base_model=bench.model, reference=reference)]


def untrained(bench: Bench, alpha: float, seed: int) -> list:
    """The control: the shallow model before it saw a preference pair."""
    return [GenARMLogitsProcessor(shallow_model(bench), alpha, base_model=bench.model)]


def shallow_model(bench: Bench):
    return AutoModelForCausalLM.from_pretrained(bench.adapter(SHALLOW))


def shallow_arm(bench: Bench) -> AutoregressiveRewardModel:
    return AutoregressiveRewardModel.from_pretrained(str(bench.adapter("arm-shallow")), base_model=shallow_model(bench))


WEAK = Method("GenARM, shallow ARM", "weak", "α", PAPER_ALPHAS, 1.5, weak)
WEAK_LESS_ITSELF = Method(
    "GenARM, shallow ARM less what it was", "weak-contrast", "α", WEAK_ALPHAS, 2, weak_less_itself
)
CONTROL = Method("control: shallow, untrained", "weak-control", "α", PAPER_ALPHAS, 1.5, untrained)
GUIDED = (WEAK, WEAK_LESS_ITSELF)


def steps(bench: Bench) -> list[Step]:
    size = bench.size
    n_distilled = size.n_distilled_pairs

    distil = partial(make_shallow, bench, sentiment_pairs(n_distilled))
    n_arm_epochs = N_SHALLOW_ARM_EPOCHS * size.n_epochs
    arm = partial(
        train_arm,
        bench,
        sentiment_pairs(size.n_pairs),
        model_path=str(bench.adapter(SHALLOW)),
        num_train_epochs=n_arm_epochs,
    )

    def control():
        alpha = choose(bench, WEAK)
        return untrained(bench, alpha, 0), {"α": alpha}

    return [
        bench.training(SHALLOW, 1.3 * n_distilled * DISTILLING["n_epochs"], distil),
        bench.training("arm-shallow", 0.2 * size.n_pairs * n_arm_epochs, arm),
        *(trial(bench, method, alpha) for method in GUIDED for alpha in method.values),
        *(answer_test_prompts(bench, method) for method in GUIDED),
        bench.sampling(CONTROL.test_cell(0), test_prompts(size.n_prompts), control, CONTROL.cost),
    ]


def section(bench: Bench) -> str:
    dpo = "DPO of the whole model"
    runs = {"base": bench.answers("test-base")}
    runs |= {method.name: bench.answers(method.test_cell(0)) for method in (CONTROL, *GUIDED)}
    runs[dpo] = all_seeds(bench, DPO)
    rewards = {name: mean(judge(oracle, answers)) for name, answers in runs.items()}
    rows = []
    for name, answers in runs.items():
        share = "" if name in ("base", dpo) else _ratio(rewards[name] - rewards["base"], rewards[dpo] - rewards["base"])
        rows.append([name, share, *_levels(answers)])
    tried = []
    for method in GUIDED:
        chosen = choose(bench, method)
        for alpha in method.values:
            mark = " ✓" if alpha == chosen else ""
            tried.append([method.name, f"α = {alpha:g}{mark}", *_levels(bench.answers(method.dev_cell(alpha)))])
    header = ["oracle", "second judge", "KL per answer, nats", "perplexity under the base", "degenerate"]
    gap(
        {name: interval(values) for name, values in rewards.items()},
        bench.figures / "weak_to_strong.png",
        bench.size.n_prompts,
    )
    return "\n\n".join(
        [
            "## Weak to strong",
            f"The first {bench.size.n_shallow_layers} of {bench.n_layers} layers of SmolLM2, distilled for "
            f"{DISTILLING['n_epochs']} epochs on {2 * bench.size.n_distilled_pairs} texts that the whole model has "
            f"written, and then trained as an ARM on the same pairs for {N_SHALLOW_ARM_EPOCHS} times as many epochs, "
            "steer the whole model: by their log-probabilities "
            f"(α = {choose(bench, WEAK):g}), or by those less what they were before they saw a pair "
            f"(`reference=`, α = {choose(bench, WEAK_LESS_ITSELF):g}). The control has the strength of the first.",
            "Gap recovered is (guided − base) / (DPO − base). DPO has all its training seeds, the others have one.",
            table(["", "gap recovered", *header], rows),
            "![Rewards, weak to strong](figures/weak_to_strong.png)",
            "What was tried on the dev prompts:",
            table(["", "setting", *header], tried),
        ]
    )


def _levels(answers: Answers) -> list[str]:
    return [
        cell(mean(judge(oracle, answers))),
        cell(mean(judge(second_judge, answers))),
        cell(mean(read("kl", answers)), 1),
        f"{perplexity(answers):.1f}",
        f"{judge(is_degenerate, answers).mean():.1%}",
    ]


def _ratio(part: np.ndarray, whole: np.ndarray) -> str:
    wholes = resampled_means(whole)
    if bounds(wholes)[0] <= 0:
        return "no gap"  # that could be told from 0
    return shown(part.mean() / whole.mean(), *bounds(resampled_means(part) / wholes))
