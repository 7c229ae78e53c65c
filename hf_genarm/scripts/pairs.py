"""Preference pairs from files or the Hub, in whatever columns they come, as `prompt`, `chosen` and `rejected`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from trl.data_utils import maybe_extract_prompt

_FILES = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass
class PairArguments:
    """
    Where preference pairs are, and what their columns mean.

    Parameters:
        dataset (`str`):
            Hub id or folder of a dataset, or a JSON, JSONL, CSV, TSV or Parquet file, which may be compressed.
        dataset_config, dataset_data_dir (`str`, *optional*):
            Name and `data_dir` as for `datasets.load_dataset`.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            The split to train on.
        dataset_test_split (`str`, *optional*):
            The split to evaluate on. Without one, pairs are held out.
        test_size (`float`, *optional*):
            Share of the pairs, or if it is 1 or more their number, that is held out; no prompt is in both parts.
        prompt_column, chosen_column, rejected_column (`str`, *optional*):
            Names of the columns, if they are not `prompt`, `chosen` and `rejected`.
        prompt_template (`str`, *optional*):
            What prompts that are text are put into, with `{prompt}` in their place.
        response_columns (list of `str`, *optional*):
            Names of two columns of responses, of which `preferred_column` says which one is preferred.
        preferred_column (`str`, *optional*):
            Name of a column that is 0 if the first of `response_columns` is preferred, and 1 if it is the second.
    """

    dataset: str | None = field(default=None, metadata={"help": "Hub id or folder of a dataset, or a file of pairs."})
    dataset_config: str | None = field(default=None, metadata={"help": "Name of its configuration."})
    dataset_data_dir: str | None = field(default=None, metadata={"help": "`data_dir` as for `load_dataset`."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Without one, pairs are held out."}
    )
    test_size: float | None = field(
        default=None,
        metadata={"help": "Share (below 1) or number of the pairs to hold out; no prompt is in both parts."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts, if there is one."})
    chosen_column: str = field(default="chosen", metadata={"help": "Column of the chosen responses."})
    rejected_column: str = field(default="rejected", metadata={"help": "Column of the rejected responses."})
    prompt_template: str = field(
        default="{prompt}", metadata={"help": "What prompts that are text are put into, in place of `{prompt}`."}
    )
    response_columns: list[str] | None = field(
        default=None, metadata={"help": "Two columns of responses, instead of chosen and rejected."}
    )
    preferred_column: str | None = field(
        default=None, metadata={"help": "Column that says which of the two is preferred, 0 or 1."}
    )

    def __post_init__(self) -> None:
        if (self.response_columns is None) != (self.preferred_column is None) or (
            self.response_columns is not None and len(self.response_columns) != 2
        ):
            raise ValueError(
                f"`response_columns` is {self.response_columns} and `preferred_column` is {self.preferred_column!r}, "
                "but they go together: two columns of responses, and the one that says which of them is preferred."
            )


def load_pairs(args: PairArguments, split: str) -> Dataset:
    """
    Reads one split as `prompt`, `chosen` and `rejected`, text or messages.

    Dialogues in the text format of HH-RLHF become messages. What responses without a prompt share is their prompt.

    Raises:
        ValueError: if no dataset is given, or it lacks the columns.
    """
    if args.dataset is None:
        raise ValueError("No dataset is given. Name one with `--dataset`: a Hub id, a folder or a file.")
    path = Path(args.dataset)
    kinds = [_FILES[suffix[1:]] for suffix in path.suffixes if suffix[1:] in _FILES]
    if path.is_file() and kinds:
        options = {"sep": "\t"} if ".tsv" in path.suffixes else {}
        dataset = load_dataset(kinds[-1], data_files=str(path), split="train", **options)
    else:
        dataset = load_dataset(args.dataset, args.dataset_config, data_dir=args.dataset_data_dir, split=split)

    wanted = args.response_columns or [args.chosen_column, args.rejected_column]
    missing = {*wanted, *([args.preferred_column] if args.preferred_column else [])} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"`{args.dataset}` has the columns {sorted(dataset.column_names)}, but not {sorted(missing)}. Name yours "
            "with `--chosen_column` and `--rejected_column`, or with `--response_columns` and `--preferred_column`."
        )

    def pair_of(example: dict[str, Any]) -> dict[str, Any]:
        first, second = (example[name] for name in wanted)
        if args.preferred_column and example[args.preferred_column] == 1:
            first, second = second, first
        pair = {"chosen": first, "rejected": second}
        if args.prompt_column in example:
            prompt = example[args.prompt_column]
            if isinstance(prompt, str):
                prompt = args.prompt_template.replace("{prompt}", prompt)
            return {"prompt": prompt, **pair}
        if isinstance(first, str) and _TURN.match(first) and _TURN.match(second):
            pair = {"chosen": messages_of(first), "rejected": messages_of(second)}
        return maybe_extract_prompt(pair)

    margin = {"margin"} & set(dataset.column_names)
    return dataset.map(pair_of, remove_columns=[x for x in dataset.column_names if x not in margin])


def messages_of(dialogue: str) -> list[dict[str, str]]:
    """Messages of a dialogue of HH-RLHF, which is one text with `Human:` or `Assistant:` before each turn."""
    parts = _TURN.split(dialogue)[1:]
    return [{"role": _ROLES[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def hold_out(pairs: Dataset, size: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    Splits pairs into those to train on and those to evaluate on, by prompts, so that none is in both.

    Args:
        pairs ([`~datasets.Dataset`]):
            With a column `prompt`.
        size (`float`):
            Share of the pairs, or if it is 1 or more their number, that is held out; a few more, if a prompt has
            several.
        seed (`int`, *optional*, defaults to 0):
            Of the order in which prompts are drawn. The same pairs are always split in the same way.
    """
    wanted = size if size >= 1 else size * len(pairs)
    by_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(pairs["prompt"]):
        by_prompt.setdefault(repr(prompt), []).append(index)
    prompts = sorted(by_prompt)
    held_out: list[int] = []
    for at in np.random.default_rng(seed).permutation(len(prompts)):
        if len(held_out) >= wanted:
            break
        held_out += by_prompt[prompts[at]]
    kept = sorted(set(range(len(pairs))) - set(held_out))
    return pairs.select(kept), pairs.select(sorted(held_out))
