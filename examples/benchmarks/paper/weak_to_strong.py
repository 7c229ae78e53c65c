"""Does a shallow reward model steer the whole model?"""

from functools import partial

import numpy as np
from bench import Bench, Step
from figures import gap
from headline import answer_test_prompts
from intervals import cell, interval, resampled_means
from judges import is_degenerate, judge, oracle, read, second_judge
from methods import DPO, Method, all_seeds, choose, mean, trial
from prompts import sentiment_pairs, test_prompts
from report import table
from settings import ALPHAS
from shallow import make_shallow
from training import train_arm
from transformers import AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor

SHALLOW = "shallow"
N_EPOCHS = 2


def weak(bench: Bench, alpha: float, seed: int) -> list:
    arm = AutoregressiveRewardModel.from_pretrained(str(bench.adapter("arm-shallow")), base_model=shallow_model(bench))
    return [GenARMLogitsProcessor(arm, alpha)]


def weak_less_itself(bench: Bench, alpha: float, seed: int) -> list:
    """What the training has changed, and none of what the shallow model gets wrong."""
    arm = AutoregressiveRewardModel.from_pretrained(str(bench.adapter("arm-shallow")), base_model=shallow_model(bench))
    return [GenARMLogitsProcessor(arm, alpha, reference=shallow_model(bench))]


def untrained(bench: Bench, alpha: float, seed: int) -> list:
    """The control: the shallow model before it saw a preference pair."""
    return [GenARMLogitsProcessor(shallow_model(bench), alpha)]


def shallow_model(bench: Bench):
    return AutoModelForCausalLM.from_pretrained(bench.adapter(SHALLOW))


WEAK = Method("GenARM, shallow ARM", "weak", "α", ALPHAS, 1.5, weak)
WEAK_LESS_ITSELF = Method(
    "GenARM, shallow ARM less what it was", "weak-contrast", "α", (2.0, 4.0, 6.0, 8.0), 2, weak_less_itself
)
CONTROL = Method("control: shallow, untrained", "weak-control", "α", ALPHAS, 1.5, untrained)
GUIDED = (WEAK, WEAK_LESS_ITSELF)


def steps(bench: Bench) -> list[Step]:
    size = bench.size
    n_distilled = size.n_distilled_pairs

    distil = partial(make_shallow, bench, sentiment_pairs(n_distilled), n_epochs=N_EPOCHS)
    arm = partial(train_arm, bench, sentiment_pairs(size.n_pairs), model_path=str(bench.adapter(SHALLOW)))

    def control():
        alpha = choose(bench, WEAK)
        return untrained(bench, alpha, 0), {"α": alpha}

    return [
        bench.training(SHALLOW, 1.3 * n_distilled * N_EPOCHS, distil),
        bench.training("arm-shallow", 0.2 * size.n_pairs * size.n_epochs, arm),
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
    rows = [
        [
            name,
            cell(rewards[name]),
            cell(mean(judge(second_judge, answers))),
            "" if name in ("base", dpo) else _ratio(rewards[name] - rewards["base"], rewards[dpo] - rewards["base"]),
            cell(mean(read("kl", answers)), 1),
            f"{judge(is_degenerate, answers).mean():.3f}",
        ]
        for name, answers in runs.items()
    ]
    tried = [
        f"{method.name}, α = {alpha:g}, {cell(mean(judge(oracle, bench.answers(method.dev_cell(alpha)))))}"
        for method in GUIDED
        for alpha in method.values
    ]
    gap(
        {name: interval(values) for name, values in rewards.items()},
        bench.figures / "weak_to_strong.png",
        bench.size.n_prompts,
    )
    return "\n\n".join(
        [
            "## Weak to strong",
            f"The first {bench.size.n_shallow_layers} of {bench.size.n_layers} layers of SmolLM2, distilled for "
            f"{N_EPOCHS} epochs on {2 * bench.size.n_distilled_pairs} texts that the whole model has "
            "written, and then trained as an ARM on the same pairs, steer the whole model: by their log-probabilities "
            f"(α = {choose(bench, WEAK):g}), or by those less what they were before they saw a pair "
            f"(`reference=`, α = {choose(bench, WEAK_LESS_ITSELF):g}). The control has the strength of the first.",
            "Gap recovered is (guided − base) / (DPO − base).",
            table(["", "oracle", "second judge", "gap recovered", "KL per answer, nats", "empty or looping"], rows),
            "What was tried on the dev prompts: " + "; ".join(tried) + ".",
            "![Rewards, weak to strong](figures/weak_to_strong.png)",
        ]
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> str:
    low, high = np.quantile(resampled_means(part) / resampled_means(whole), [0.025, 0.975])
    return f"{part.mean() / whole.mean():.2f} [{low:.2f}, {high:.2f}]"
