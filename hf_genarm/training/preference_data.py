"""Tokenised preference pairs: where their responses begin and end, and which of them are left out, counted."""

import sys
import warnings
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational, maybe_extract_prompt

from ..hub.end_of_turn import length_to_end
from .config import AutoregressiveRewardConfig


@dataclass
class PairCounts:
    """
    What became of the pairs of a dataset.

    Parameters:
        n_pairs (`int`):
            Pairs in the dataset.
        too_long (`int`):
            Longer than `max_length`, and left out.
        truncated (`int`):
            Longer than `max_length`, and cut to it.
        identical (`int`):
            The same tokens in chosen and rejected, and left out: there is nothing to learn from them.
        empty (`int`):
            With a response that has no token besides its end. Kept.
        duplicate (`int`):
            The same as an earlier pair. Kept.
    """

    n_pairs: int
    too_long: int = 0
    truncated: int = 0
    identical: int = 0
    empty: int = 0
    duplicate: int = 0

    def __str__(self) -> str:
        found = {
            "longer than `max_length` and left out": self.too_long,
            "longer than `max_length` and cut": self.truncated,
            "with identical chosen and rejected, left out": self.identical,
            "with an empty response, kept": self.empty,
            "a repetition of another pair, kept": self.duplicate,
        }
        return f"of {self.n_pairs} pairs, " + "; ".join(f"{n} {what}" for what, n in found.items() if n)


def with_boundaries(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, ends: set[int]
) -> dict[str, list[int] | int]:
    """
    Adds `prompt_length` and `is_empty`, and drops what a chat template writes after the end of a response.

    The prompt is what the tokens of the prompt alone share with those of both texts: a token that is made of the end of
    the prompt and the beginning of a response belongs to the response. Where there is none, it is what the texts share.
    """
    texts = [example["chosen_ids"], example["rejected_ids"]]
    if "prompt_length" in example:
        texts.append(texts[0][: example["prompt_length"]])
    elif "prompt" not in example and is_conversational(example):
        example = maybe_extract_prompt(dict(example))
    prompt = None if "prompt_length" in example else example.get("prompt")
    if isinstance(prompt, str):
        texts.append(tokenizer(prompt)["input_ids"])
    elif prompt is not None:
        options = {"tools": example.get("tools"), **(example.get("chat_template_kwargs") or {})}
        encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, **options)
        texts.append(encoded["input_ids"])
    start = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False)))
    chosen_ids, rejected_ids = (ids[: length_to_end(ids, start, ends)] for ids in texts[:2])

    def is_empty(ids: list[int]) -> bool:
        own = [token for token in ids[start:] if token not in ends]
        return len(own) < 3 and not tokenizer.decode(own).strip()  # a space of the prompt may have merged into it

    return {
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "prompt_length": start,
        # Where the prompt is not known, one response may just begin the other.
        "is_empty": len(texts) > 2 and (is_empty(chosen_ids) or is_empty(rejected_ids)),
    }


def truncate(example: dict[str, Any], max_length: int, mode: str) -> dict[str, list[int] | int]:
    """
    Cuts both texts of a pair at their ends, or first as much as it takes of the start of the prompt, the same in both.
    """
    sides = ("chosen_ids", "rejected_ids")
    too_many = max(len(example[side]) for side in sides) - max_length
    first = 0 if mode == "keep_start" else min(too_many, example["prompt_length"])
    ids = {side: example[side][first : first + max_length] for side in sides}
    return {**ids, "prompt_length": min(example["prompt_length"] - first, max_length)}


def describe(example: dict[str, Any]) -> dict[str, Any]:
    """Adds `length`, for batches of similar lengths, and what is counted."""
    chosen_ids, rejected_ids = example["chosen_ids"], example["rejected_ids"]
    return {
        "length": len(chosen_ids) + len(rejected_ids),
        "is_identical": chosen_ids == rejected_ids,
        "content": hash((tuple(chosen_ids), tuple(rejected_ids))),
    }


def prepare_pairs(
    dataset: Dataset | IterableDataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    ends: set[int],
    args: AutoregressiveRewardConfig,
) -> tuple[Dataset | IterableDataset, PairCounts | None]:
    """
    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            With `chosen_ids` and `rejected_ids`.
        name (`str`):
            What it is called in messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Made those ids.
        ends (set of `int`):
            The tokens that end a response.
        args ([`AutoregressiveRewardConfig`]):
            Its `max_length` and `truncation_mode` are heeded.

    Returns:
        The dataset with `prompt_length`, without pairs that are too long or identical, and the [`PairCounts`], which
        are unknown for a stream.

    Raises:
        ValueError: if no pair is left.
    """
    options: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        options = {"num_proc": args.dataset_num_proc, "desc": f"Finding the responses of {name} dataset"}
    dataset = dataset.map(with_boundaries, fn_kwargs={"tokenizer": tokenizer, "ends": ends}, **options)
    limit = args.max_length if args.max_length is not None else sys.maxsize

    def is_long(example: dict[str, Any]) -> bool:
        return max(len(example["chosen_ids"]), len(example["rejected_ids"])) > limit

    def cut(example: dict[str, Any]) -> dict[str, Any]:
        return truncate(example, limit, args.truncation_mode) if is_long(example) else {}

    drops = args.truncation_mode == "drop"
    if isinstance(dataset, IterableDataset):

        def is_usable(example: dict[str, Any]) -> bool:
            why = "is longer than `max_length`" if drops and is_long(example) else None
            if example["chosen_ids"] == example["rejected_ids"]:
                why = "has identical chosen and rejected"
            if why is not None:  # can't be counted before the stream is read; Python shows it once
                warnings.warn(f"A pair of the {name} stream {why}; such pairs are skipped.", stacklevel=1)
            return why is None

        return (dataset if drops else dataset.map(cut)).filter(is_usable), None

    counts = PairCounts(len(dataset))
    long = [max(len(a), len(b)) > limit for a, b in zip(dataset["chosen_ids"], dataset["rejected_ids"], strict=True)]
    if drops:
        counts.too_long = sum(long)
        dataset = dataset.select([index for index, is_too_long in enumerate(long) if not is_too_long])
        if len(dataset) == 0:
            raise ValueError(
                f"No pair of the {name} dataset is within `max_length={args.max_length}` tokens. Raise it, or cut the "
                "texts: `truncation_mode='keep_end'`."
            )
    elif any(long):
        counts.truncated = sum(long)
        dataset = dataset.map(cut, **{**options, "desc": f"Truncating {name} dataset"})
    dataset = dataset.map(describe, **{**options, "desc": f"Counting {name} dataset"})
    counts.identical = sum(dataset["is_identical"])
    counts.empty = sum(dataset["is_empty"])
    counts.duplicate = len(dataset) - len(set(dataset["content"]))
    if counts.identical == len(dataset):
        raise ValueError(f"Chosen and rejected are identical in all {len(dataset)} pairs of the {name} dataset.")
    kept = [index for index, is_identical in enumerate(dataset["is_identical"]) if not is_identical]
    dataset = dataset.select(kept).remove_columns(["is_identical", "is_empty", "content"])
    if counts != PairCounts(counts.n_pairs):
        warnings.warn(f"In the {name} dataset, {counts}.", stacklevel=2)
    return dataset, counts
