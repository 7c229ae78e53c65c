"""Tokenised preference pairs: where their responses begin and end, and how many are left out for which reason."""

import json
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names, is_conversational
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import remove_none_values

from ..hub.scoring import length_to_end
from .columns import PROMPT_LENGTH, SIDES
from .config import AutoregressiveRewardConfig

_IS_EMPTY = "genarm_is_empty"
_IS_IDENTICAL = "genarm_is_identical"
_CONTENT = "genarm_content"


@dataclass
class PairCounts:
    """
    Counts what became of the pairs of a dataset.

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
            With a response that has no token except its end. Kept.
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


class DataCollatorForPairs(DataCollatorForPreference):
    """Adds the lengths of the prompts, `(batch_size,)`, to the batches of TRL's collator of preference pairs."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        batch[PROMPT_LENGTH] = torch.tensor([example[PROMPT_LENGTH] for example in examples])
        return batch


def with_boundaries(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    ends: set[int],
    length_column: str | None,
    version: str,
) -> dict[str, Any]:
    """
    Finds where the responses of a pair begin and end, and drops what a chat template writes after the end.

    The prompt is tokenised separately, and ends where its tokens first differ from those of a text: a token that joins
    the end of the prompt and the beginning of a response belongs to the response. Where there is no prompt, or a chat
    template refuses to write it alone, the tokens that both texts begin with are the prompt.

    Args:
        example (`dict[str, Any]`):
            The pair, as texts and as tokens.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The one that made those tokens.
        ends (set of `int`):
            The tokens that end a response.
        length_column (`str`, *optional*):
            The column for the length of the pair.
        version (`str`):
            The version of this package, so that `datasets` doesn't use what another version has cached.

    Returns:
        The columns to add.
    """
    texts = [_tokens(example[side]) for side in SIDES]
    prompt_ids = _prompt_ids(example, tokenizer)
    start = _shared_length(*texts) if prompt_ids is None else min(_shared_length(ids, prompt_ids) for ids in texts)
    if is_conversational(example):
        lengths = [length_to_end(ids, start, ends) for ids in texts]
        tails = [ids[length:] for ids, length in zip(texts, lengths, strict=True)]
        # What a template writes after an end is the same for every response.
        if tails[0] == tails[1]:
            texts = [ids[:length] for ids, length in zip(texts, lengths, strict=True)]

    def is_empty(ids: list[int]) -> bool:
        own = [token for token in ids[start:] if token not in ends]
        return len(own) < 3 and not str(tokenizer.decode(own)).strip()  # a space of the prompt may have merged into it

    # Without a known prompt, a text that is the beginning of the other one has no empty response.
    return _columns(texts, start, length_column, prompt_ids is not None and any(map(is_empty, texts)))


def with_shared_start(example: dict[str, Any], length_column: str | None) -> dict[str, Any]:
    """Adds the same columns to given tokens, which don't change; what both texts begin with is the prompt."""
    texts = [_tokens(example[side]) for side in SIDES]
    start = example[PROMPT_LENGTH] if PROMPT_LENGTH in example else _shared_length(*texts)
    return _columns(texts, start, length_column)


def _columns(texts: list[list[int]], start: int, length_column: str | None, is_empty: bool = False) -> dict[str, Any]:
    """Returns the columns of a pair: its tokens and lengths, and what it is counted by."""
    chosen_ids, rejected_ids = texts
    # Batches of similar lengths are made by the length of the whole pair.
    length = {} if length_column is None else {length_column: len(chosen_ids) + len(rejected_ids)}
    return {
        **dict(zip(SIDES, texts, strict=True)),
        PROMPT_LENGTH: start,
        **length,
        _IS_EMPTY: is_empty,
        _IS_IDENTICAL: chosen_ids == rejected_ids,
        _CONTENT: hash((tuple(chosen_ids), tuple(rejected_ids))),
    }


def _prompt_ids(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Returns the tokens of the prompt by itself, made as [`~trl.RewardTrainer`] makes those of the texts."""
    if not is_conversational(example):
        return tokenizer(example["prompt"])["input_ids"] if "prompt" in example else None
    prompt = example["prompt"] if "prompt" in example else _shared_messages(example["chosen"], example["rejected"])
    if not prompt:
        return None
    tools = example.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **example.get("chat_template_kwargs", {}),
        "add_generation_prompt": True,
        "continue_final_message": False,
    }
    try:
        encoded: Any = tokenizer.apply_chat_template(prompt, return_dict=True, **options)
    except TemplateError:
        return None
    return encoded["input_ids"]


def _shared_messages(chosen: list[dict], rejected: list[dict]) -> list[dict]:
    """Returns the messages that both texts begin with; the last message of a text is never one of them."""
    # Arrow adds the fields of all other messages in the column, as None.
    pairs = zip(remove_none_values(chosen[:-1]), remove_none_values(rejected[:-1]), strict=False)
    return chosen[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))]


def _shared_length(one: list[int], other: list[int]) -> int:
    """Returns the number of tokens that both texts begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _tokens(ids: Iterable[Any]) -> list[int]:
    """Returns token ids as integers of Python: a dataset may return an array."""
    return list(map(int, ids))


def truncate(example: dict[str, Any], max_length: int, mode: str) -> dict[str, list[int] | int]:
    """
    Cuts the texts of a pair to a length.

    Both are cut at their ends. With `keep_end`, tokens of the prompt are removed first, as many from both texts.
    """
    too_many = max(len(example[side]) for side in SIDES) - max_length
    first = 0 if mode == "keep_start" else min(too_many, example[PROMPT_LENGTH])
    ids = {side: example[side][first : first + max_length] for side in SIDES}
    return {**ids, PROMPT_LENGTH: min(example[PROMPT_LENGTH] - first, max_length)}


def prepare_pairs(
    dataset: Dataset | IterableDataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    ends: set[int],
    args: AutoregressiveRewardConfig,
    is_tokenized: bool,
    n_positions: float,
) -> tuple[Dataset | IterableDataset, PairCounts | None]:
    """
    Finds the responses of all pairs, leaves out what can't be learned from, and counts it.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The pairs, with `chosen_ids` and `rejected_ids`. If they were prepared before, prompts keep their lengths.
        name (`str`):
            What it is called in messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The one that made those ids.
        ends (set of `int`):
            The tokens that end a response.
        args ([`AutoregressiveRewardConfig`]):
            The arguments of the trainer.
        is_tokenized (`bool`):
            Whether those ids were given, and not made from the texts.
        n_positions (`float`):
            The number of tokens that the model has positions for.

    Returns:
        The dataset with `genarm_prompt_length`, without pairs that are too long or identical, and the [`PairCounts`],
        which are unknown for a stream.

    Raises:
        ValueError: if no pair is left, or a text is longer than the model can read.
    """
    options: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        options = {"num_proc": args.dataset_num_proc, "desc": f"Finding the responses of {name} dataset"}
    # If the data have a column of lengths, it is used as it is.
    has_lengths = args.length_column_name in get_dataset_column_names(dataset)
    kwargs: dict[str, Any] = {"length_column": None if has_lengths else args.length_column_name}
    if is_tokenized:
        dataset = dataset.map(with_shared_start, fn_kwargs=kwargs, **options)
    else:
        kwargs |= {"tokenizer": tokenizer, "ends": ends, "version": version("hf_genarm")}
        dataset = dataset.map(with_boundaries, fn_kwargs=kwargs, **options)
    dataset = dataset.with_format(None)
    limit = args.max_length if args.max_length is not None else sys.maxsize

    def is_long(example: dict[str, Any]) -> bool:
        return max(len(example[side]) for side in SIDES) > limit

    def cut(example: dict[str, Any]) -> dict[str, Any]:
        if not is_long(example):
            return {}
        cut: dict[str, Any] = truncate(example, limit, args.truncation_mode)
        return _columns([cut[side] for side in SIDES], cut[PROMPT_LENGTH], kwargs["length_column"], example[_IS_EMPTY])

    def refuse_beyond_table(longest: float, what: str) -> None:
        if longest > n_positions:
            raise ValueError(
                f"{what}, but the model has positions for {n_positions} tokens. `max_length` is {args.max_length}: set "
                f"it to {n_positions} or less."
            )

    drops = args.truncation_mode == "drop"
    if isinstance(dataset, IterableDataset):
        refuse_beyond_table(limit, f"Texts of the {name} stream may be longer")

        def is_usable(example: dict[str, Any]) -> bool:
            why = "is longer than `max_length`" if drops and is_long(example) else None
            if example[_IS_IDENTICAL]:
                why = "has identical chosen and rejected"
            if why is not None:  # can't be counted before the stream is read; Python shows it once
                warnings.warn(f"A pair of the {name} stream {why}; such pairs are skipped.", stacklevel=1)
            return why is None

        stream = (dataset if drops else dataset.map(cut)).filter(is_usable)
        return stream.remove_columns([_IS_EMPTY, _IS_IDENTICAL, _CONTENT]), None

    counts = PairCounts(len(dataset))
    lengths = [max(len(a), len(b)) for a, b in zip(dataset["chosen_ids"], dataset["rejected_ids"], strict=True)]
    long = [length > limit for length in lengths]
    kept = [min(x, limit) for x in lengths if x <= limit or not drops]
    refuse_beyond_table(max(kept, default=0), f"A text of the {name} dataset has {max(kept, default=0)} tokens")
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
    is_identical = dataset[_IS_IDENTICAL]
    counts.identical, counts.empty = sum(is_identical), sum(dataset[_IS_EMPTY])
    counts.duplicate = len(dataset) - len(set(dataset[_CONTENT]))
    if counts.identical == len(dataset):
        raise ValueError(
            f"Chosen and rejected are identical in all {len(dataset)} pairs of the {name} dataset, but only "
            "differences are learned. Check what the columns `chosen` and `rejected` were made of."
        )
    dataset = dataset.select([index for index, is_same in enumerate(is_identical) if not is_same])
    dataset = dataset.remove_columns([_IS_EMPTY, _IS_IDENTICAL, _CONTENT])
    if counts != PairCounts(counts.n_pairs):
        warnings.warn(f"In the {name} dataset, {counts}.", stacklevel=2)
    return dataset, counts
