"""The preference pairs and prompts of the examples: sentiment, brevity, and the harmlessness of HH-RLHF."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, load_dataset

from examples.small import sized
from hf_genarm.scripts.pairs import PairArguments, hold_out, load_pairs

DATA = Path(__file__).parent / "data" / "sentiment"
HH_RLHF = "Anthropic/hh-rlhf"

_N_TEST_PAIRS, _N_PAIRS_OF_HALF = 236, 440  # of HH-RLHF


def training_pairs(n_pairs: int | None = None) -> Dataset:
    """The pairs that differ most in sentiment; all of them by default."""
    pairs = load_dataset("json", data_files=str(DATA / "train.jsonl"), split="train")
    pairs = pairs.map(lambda pair: {"gap": pair["chosen_score"] - pair["rejected_score"]}).sort("gap", reverse=True)
    return pairs.select(range(min(n_pairs or len(pairs), sized(len(pairs), 4))))


def held_out_prompts(n_prompts: int | None = None) -> list[str]:
    """Prompts whose topics are not in the training data, evenly over the topics and templates."""
    test = load_dataset("json", data_files=str(DATA / "test.jsonl"), split="train")
    prompts = list(dict.fromkeys(pair["prompt"][0]["content"] for pair in test))
    n_prompts = min(n_prompts or len(prompts), sized(len(prompts), 4))
    return prompts[:: len(prompts) // n_prompts][:n_prompts]


def shorter_is_chosen(split: str) -> Dataset:
    """The answers of the sentiment pairs, with those of fewer words as chosen; pairs within 3 words are left out."""
    pairs = load_dataset("json", data_files=str(DATA / f"{split}.jsonl"), split="train")
    pairs = pairs.filter(lambda pair: abs(_n_words(pair["chosen"]) - _n_words(pair["rejected"])) > 3)
    pairs = pairs.select(range(sized(len(pairs), 8)))

    def order(pair: dict) -> dict:
        shorter, longer = sorted((pair["chosen"], pair["rejected"]), key=_n_words)
        return {"chosen": shorter, "rejected": longer}

    return pairs.map(order)


def _n_words(answer: list[dict[str, str]]) -> int:
    return len(answer[0]["content"].split())


class HarmlessPairs(NamedTuple):
    """Three parts that share no prompt: `half` trains the reward model, `other` its judge, `test` measures both."""

    half: Dataset
    other: Dataset
    test: Dataset


@cache
def harmless_pairs(dataset: str) -> HarmlessPairs:
    """The parts of a data set: `HH_RLHF`, another Hub id, or a file with `chosen` and `rejected`."""
    rest, test = hold_out(harmless_dialogues(dataset), sized(_N_TEST_PAIRS, 8))
    halves = hold_out(rest, 0.5)
    return HarmlessPairs(*(half.select(range(min(len(half), sized(_N_PAIRS_OF_HALF, 4)))) for half in halves), test)


@cache
def harmless_dialogues(dataset: str) -> Dataset:
    """All pairs of a data set; of HH-RLHF, the test split of harmless-base."""
    if dataset == HH_RLHF:
        return load_pairs(PairArguments(dataset, dataset_data_dir="harmless-base"), "test")
    return load_pairs(PairArguments(dataset), "train")


def opening_turns(pairs: Dataset) -> list[str]:
    """The prompts that are a single turn of the user."""
    return list(dict.fromkeys(pair["prompt"][0]["content"] for pair in pairs if len(pair["prompt"]) == 1))
