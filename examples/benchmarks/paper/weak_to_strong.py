"""Does a shallow reward model steer the whole model?"""

from functools import partial

import numpy as np
from bench import Bench, Step
from figures import gap
from headline import answer_test_prompts
from intervals import cell, interval, resampled_means
from judges import judge, oracle, second_judge
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


def untrained(bench: Bench, alpha: float, seed: int) -> list:
    """The control: the shallow model before it saw a preference pair."""
    return [GenARMLogitsProcessor(shallow_model(bench), alpha)]


def shallow_model(bench: Bench):
    return AutoModelForCausalLM.from_pretrained(bench.adapter(SHALLOW))


WEAK = Method("GenARM, shallow ARM", "weak", "α", ALPHAS, 1.5, weak)
CONTROL = Method("control: shallow, untrained", "weak-control", "α", ALPHAS, 1.5, untrained)


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
        *(trial(bench, WEAK, alpha) for alpha in WEAK.values),
        answer_test_prompts(bench, WEAK),
        bench.sampling(CONTROL.test_cell(0), test_prompts(size.n_prompts), control, CONTROL.cost),
    ]


def section(bench: Bench) -> str:
    runs = {
        "base": bench.answers("test-base"),
        CONTROL.name: bench.answers(CONTROL.test_cell(0)),
        WEAK.name: bench.answers(WEAK.test_cell(0)),
        "DPO of the whole model": all_seeds(bench, DPO),
    }
    rewards = {name: mean(judge(oracle, answers)) for name, answers in runs.items()}
    recovered = _ratio(rewards[WEAK.name] - rewards["base"], rewards["DPO of the whole model"] - rewards["base"])
    by_control = _ratio(rewards[CONTROL.name] - rewards["base"], rewards["DPO of the whole model"] - rewards["base"])
    shares = ["0", by_control, recovered, "1"]
    rows = [
        [name, cell(rewards[name]), cell(mean(judge(second_judge, answers))), share]
        for (name, answers), share in zip(runs.items(), shares, strict=True)
    ]
    tried = [
        f"α = {alpha:g}, {cell(mean(judge(oracle, bench.answers(WEAK.dev_cell(alpha)))))}" for alpha in WEAK.values
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
            "written, and then trained as an ARM on the same pairs, steer the whole model at "
            f"α = {choose(bench, WEAK):g}, chosen on dev prompts from {', '.join(f'{a:g}' for a in WEAK.values)}.",
            "Gap recovered is (guided − base) / (DPO − base); the control has the same strength.",
            table(["", "oracle", "second judge", "gap recovered"], rows),
            "What was tried on the dev prompts: " + "; ".join(tried) + ".",
            "![Rewards, weak to strong](figures/weak_to_strong.png)",
        ]
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> str:
    low, high = np.quantile(resampled_means(part) / resampled_means(whole), [0.025, 0.975])
    return f"{part.mean() / whole.mean():.2f} [{low:.2f}, {high:.2f}]"
