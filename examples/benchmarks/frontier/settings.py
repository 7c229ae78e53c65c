"""All that results depend on, besides the data: how large a run is, how methods are trained, and what is tried."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """
    How large a run is. Every size does the same; only the numbers differ.

    Attributes:
        n_pairs: pairs that every method is trained on, in one epoch.
        n_dev_prompts, n_test_prompts: prompts for choosing settings, and for the results.
        dev_seeds, seeds: training runs for choosing settings, and for the results.
        few_seeds: training runs of the slowest methods, of two objectives and of detoxification.
        max_new_tokens: the length at which answers are cut.
        n_best_of: numbers of answers from which the best one is taken.
        n_particles: particles of sequential Monte Carlo.
        n_rollout_prompts: prompts for Transfer-Q, whose rollouts are slow; its answers have at most 24 tokens.
        n_sentences, n_sentence_prompts: sentences for each objective, and the test prompts that they are tried on.
    """

    n_pairs: int = 128
    n_dev_prompts: int = 16
    n_test_prompts: int = 48
    dev_seeds: tuple[int, ...] = (0, 1)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    few_seeds: tuple[int, ...] = (0, 1, 2)
    max_new_tokens: int = 64
    n_best_of: tuple[int, ...] = (4, 16)
    n_particles: int = 4
    n_rollout_prompts: int = 6
    n_sentences: int = 5
    n_sentence_prompts: int = 16


SIZES = {
    "smoke": Size(
        n_pairs=4,
        n_dev_prompts=3,
        n_test_prompts=4,
        dev_seeds=(0,),
        seeds=(0, 1),
        few_seeds=(0, 1),
        max_new_tokens=3,
        n_best_of=(2,),
        n_particles=2,
        n_rollout_prompts=2,
        n_sentences=2,
        n_sentence_prompts=3,
    ),
    "laptop": Size(),
}

# How every method is trained, with an adapter on the upper half of the layers
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_length": 1024,  # all texts are shorter
}
ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")

# What is trained: Eq. 5, for which the reward is log π_r, or the loss of DPO, for which it is log π_r − log π_base
OBJECTIVES: dict[str, dict[str, Any]] = {
    "eq5": {"beta": 0.01},
    "dpo-0.03": {"beta": 0.03, "reference": "base"},
    "dpo-0.1": {"beta": 0.1, "reference": "base"},
    "dpo-0.3": {"beta": 0.3, "reference": "base"},
}
MARGIN = "dpo-0.1"  # also used as a reward model

# What is tried on the dev prompts: sixteen settings per method
ALPHAS = (0.5, 1.0, 2.0, 4.0)
TEMPERATURES = (1.0, 0.7, 0.5, 0.3)
SHARPENED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25)
WEIGHTS = (0.0, 1.0, 2.0, 4.0)  # of the reward in ARGS
TOP_K = 10  # candidates that ARGS scores at each step, as in its paper
ROLLOUT_TOP_K = 3  # candidates that Transfer-Q makes rollouts for at each step

# The guided methods that are tried on the dev prompts of each task, in addition to the base and DPO
TRIED = {
    "sentiment": ["Eq. 5, Eq. 7", "Eq. 5, ratio", "DPO loss, Eq. 7", "DPO loss, ratio", "ARGS"],
    "detox": ["Eq. 5, Eq. 7", "DPO loss, ratio"],
}

# The settings (strength and temperature) for the test prompts, chosen on the dev prompts
FINAL: dict[str, dict[str, Any]] = {
    "sentiment": {
        "Eq. 5, Eq. 7": [(0.25, 1.0), (0.5, 1.0), (1.0, 1.0)],
        "Eq. 5, ratio": [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0)],
        "DPO loss, ratio": [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0)],
        "DPO": ["dpo-0.03", "dpo-0.1", "dpo-0.3"],
        "best of n": ["reward model", "classifier"],
        "SMC": [0.5, 1.0],
        "base, sharpened": [0.7, 0.5, 0.3],
        "ARGS": [(1.0, 1.0), (4.0, 1.0)],
        "Transfer-Q": 4.0,
    },
    "detox": {
        "Eq. 5, Eq. 7": [(0.25, 1.0), (0.5, 1.0), (1.0, 1.0)],
        "DPO loss, ratio": [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0)],
        "DPO": ["dpo-0.03", "dpo-0.1", "dpo-0.3"],
        "best of n": ["reward model"],  # the classifier of whole answers reads chats
        "base, sharpened": [0.7, 0.5, 0.3],
    },
    "harmlessness": {
        "Eq. 5, Eq. 7": [(0.25, 1.0), (0.5, 1.0), (1.0, 1.0)],
        "DPO loss, ratio": [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0)],
        "DPO": [],  # its run at β = 0.1 is the ratio at α = 1
        "best of n": ["reward model"],
        "base, sharpened": [0.7, 0.5, 0.3],
    },
}

WEAK = (0.5, 1.0, 2.0)  # strengths of the weak reward model

# Two objectives: the weight of the first, and the strength that they share
WEIGHTINGS = (0.0, 0.25, 0.5, 0.75, 1.0)
STRENGTHS_OF_TWO = (1.0, 2.0)

# Steering by a sentence: how users might put it. All were written before the first answer was sampled, and none was
# left out afterwards.
SENTENCES = {
    "sentiment": (
        "You are a cheerful person who sees the good side of everything.",
        "Answer with great enthusiasm and delight.",
        "Be very positive, warm and full of praise.",
        "You love everything that you are asked about.",
        "Sound happy and optimistic in every answer.",
    ),
    "brevity": (
        "Answer in as few words as possible.",
        "Be extremely brief.",
        "Keep every answer very short.",
        "You are a person of few words.",
        "Reply with one short phrase.",
    ),
}
SENTENCE_STRENGTHS = (0.5, 1.0, 2.0, 3.0, 4.0)  # 1 is prompting
# As many; by its card, the adapter is as far from the base at a quarter to a half of these.
PUBLISHED_STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
