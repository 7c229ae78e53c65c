"""All that results depend on, besides the data: how large a run is, how everything is trained, and what is tried."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Size:
    """
    How large a run is. Every size does the same; only the numbers differ.

    Attributes:
        n_shallow_layers: layers that the weak reward model keeps.
        n_pairs, n_epochs: what every method is trained on, and how often.
        n_dev_prompts, n_prompts: prompts for choosing settings, and for the results.
        n_samples: answers to each prompt.
        n_samples_of_seed: answers to each prompt from each training seed, of the methods that have several.
        n_distilled_pairs: whose texts the weak reward model is distilled on.
        n_rollout_prompts: prompts that the rollouts of Transfer-Q are affordable for.
        n_pareto_prompts: prompts for each point of the Pareto fronts.
        weightings: of the first of two objectives, a point each.
        seeds: of the training runs.
        n_args_seeds: how many of them the trajectory RM of ARGS, the slowest method, is trained with.
        max_new_tokens: length at which answers are cut.
        n_rounds: of the timing.
        n_hh_pairs, n_cpo_pairs: real pairs in both halves, and those that TRL's CPO is trained on, too.
    """

    n_shallow_layers: int
    n_pairs: int
    n_epochs: int
    n_dev_prompts: int
    n_prompts: int
    n_samples: int
    n_samples_of_seed: int
    n_distilled_pairs: int
    n_rollout_prompts: int
    n_pareto_prompts: int
    weightings: tuple[float, ...]
    seeds: tuple[int, ...]
    n_args_seeds: int
    max_new_tokens: int
    n_rounds: int
    n_hh_pairs: int
    n_cpo_pairs: int


SIZES = {
    "smoke": Size(
        n_shallow_layers=1,
        n_pairs=4,
        n_epochs=1,
        n_dev_prompts=2,
        n_prompts=4,
        n_samples=2,
        n_samples_of_seed=1,
        n_distilled_pairs=2,
        n_rollout_prompts=2,
        n_pareto_prompts=3,
        weightings=(0.0, 0.5, 1.0),
        seeds=(0, 1),
        n_args_seeds=1,
        max_new_tokens=3,
        n_rounds=1,
        n_hh_pairs=4,
        n_cpo_pairs=2,
    ),
    "laptop": Size(
        n_shallow_layers=10,
        n_pairs=128,
        n_epochs=1,
        n_dev_prompts=24,
        n_prompts=204,
        n_samples=4,
        n_samples_of_seed=2,
        n_distilled_pairs=120,
        n_rollout_prompts=12,
        n_pareto_prompts=68,
        weightings=(0.0, 0.25, 0.5, 0.75, 1.0),
        seeds=(0, 1, 2),
        n_args_seeds=2,
        max_new_tokens=24,
        n_rounds=3,
        n_hh_pairs=1156,
        n_cpo_pairs=64,
    ),
}
SIZES["full"] = replace(
    SIZES["laptop"],
    n_pairs=333,
    n_epochs=2,
    n_dev_prompts=36,
    n_prompts=360,
    n_samples=8,
    n_samples_of_seed=4,
    n_distilled_pairs=333,
    n_rollout_prompts=72,
    n_pareto_prompts=204,
    n_args_seeds=3,
    max_new_tokens=48,
    n_rounds=9,
    n_cpo_pairs=256,
)

# What is tried for each method, on the dev prompts. DPO and GenARM have three training runs to choose from.
SHARPENING = (0.5, 1.0, 2.0)  # α of the base at temperature 1 / (1 + α)
ALPHAS = (1.0, 2.0, 4.0)  # strength of GenARM
PAPER_ALPHAS = (0.5, 1.0, 2.0)  # the same for the paper's β_r
BETAS = (0.03, 0.1, 0.3)  # β of DPO
WEIGHTS = (1.0, 4.0, 16.0)  # weight of the reward in ARGS

WEAK_ALPHAS = (0.5, 0.75, 1.0)  # the same for the shallow ARM less what it was
MORE_ALPHAS = {"genarm": (0.5,), "dpo-strength": (2.0, 4.0)}  # for the frontier: of GenARM, and of DPO's policies

# How every method is trained, and its adapter on the upper half of the layers
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_length": 1024,  # all texts are shorter
}
ADAPTER: dict[str, Any] = {"r": 4, "lora_dropout": 0.0}
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")

# The shallow model is distilled for as many epochs; the ARM that it becomes has a third of the layers.
DISTILLING: dict[str, Any] = {"n_epochs": 2, "batch_size": 8, "learning_rate": 1e-3}
N_SHALLOW_ARM_EPOCHS = 3

# The ablations: what each is called, what is changed, and the share of the pairs
VARIANTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "beta-high": ("β_r = 0.2", {"beta": 0.2}, 1.0),
    "decode-aware": ("decode-aware, at α = 2", {"decode_alpha": 2.0}, 1.0),
    "half": ("half of the pairs", {}, 0.5),
    "quarter": ("a quarter of the pairs", {}, 0.25),
}

# Real pairs. Sums of log-probs would be judged by length.
REAL_PAIRS: dict[str, Any] = {
    "beta": 1.0,
    "length_normalized": True,
    "num_train_epochs": 2,
    "learning_rate": 1.5e-3,
    "warmup_steps": 5,
    "gradient_accumulation_steps": 4,
    "max_length": 128,
    "truncation_mode": "keep_end",
    "train_sampling_strategy": "group_by_length",
    "adapter": {"r": 8, "lora_dropout": 0.05},
}
CPO: dict[str, Any] = {"learning_rate": 1e-3, "num_train_epochs": 1, "beta": 0.05, "per_device_eval_batch_size": 4}

# The training runs of GenARM: Eq. 5 with the β_r that does best on the dev prompts, and the two others
OBJECTIVE = {"beta": 0.01}
PAPER_OBJECTIVE = {"beta": 0.05}  # for longer answers
LENGTH_NORMALISED = {"beta": 2.0, "length_normalized": True}
TOP_K = 10  # candidates that ARGS scores at each step, the paper's
ROLLOUT_TOP_K = 3  # candidates that rollouts are made for at each step


def tried_and_trained() -> dict[str, Any]:
    """All of the above but the sizes, by name."""
    return {name: value for name, value in globals().items() if name.isupper() and name != "SIZES"}
