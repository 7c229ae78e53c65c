"""Preference pairs from files or the Hub, read from any columns as `prompt`, `chosen` and `rejected`."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils import logging
from trl.data_utils import maybe_extract_prompt

from .shared_arguments import PairArguments

_FILES = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_COLUMNS_OF_THE_TRAINER = ("margin", "tools", "chat_template_kwargs")  # in addition to the pairs


def load_pairs(args: PairArguments, split: str) -> Dataset:
    """
    Reads one split as `prompt`, `chosen` and `rejected`, text or messages, with `margin`, `tools` and
    `chat_template_kwargs` if there are any.

    Dialogues in the text format of HH-RLHF become messages. A missing prompt is what both responses begin with.

    Raises:
        ValueError: if the dataset can't be read, lacks the columns, or a row is not a pair.
    """
    dataset = _load(args.dataset, split, args.dataset_config, args.dataset_data_dir)
    wanted = args.response_columns or [args.chosen_column, args.rejected_column]
    missing = {*wanted, *([args.preferred_column] if args.preferred_column else [])} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"`{args.dataset}` has the columns {sorted(dataset.column_names)}, but not {sorted(missing)}. Name yours "
            "with `--chosen_column` and `--rejected_column`, or with `--response_columns` and `--preferred_column`."
        )
    has_prompts = args.prompt_column in dataset.column_names
    texts = [*wanted, args.prompt_column] if has_prompts else wanted

    def pair_of(example: dict[str, Any], row: int) -> dict[str, Any]:
        for name in texts:
            if not isinstance(example[name], str | list):
                raise ValueError(
                    f"`{name}` is {example[name]!r} in row {row + 1} of `{args.dataset}`, but must be a text or a list "
                    "of messages. Leave such rows out, or write what is meant."
                )
        first, second = (example[name] for name in wanted)
        if isinstance(first, str) != isinstance(second, str):
            raise ValueError(
                f"`{wanted[0]}` and `{wanted[1]}` are a text and a list of messages in row {row + 1} of "
                f"`{args.dataset}`, but must be of one kind. Write both as messages."
            )
        if args.preferred_column is not None and _prefers_second(example[args.preferred_column], row, args):
            first, second = second, first
        pair = {"chosen": first, "rejected": second}
        if has_prompts:
            prompt = example[args.prompt_column]
            if isinstance(prompt, str):
                prompt = args.prompt_template.replace("{prompt}", prompt)
            return {"prompt": prompt, **pair}
        if isinstance(first, str) and _TURN.match(first) and _TURN.match(second):
            pair = {"chosen": messages_of(first), "rejected": messages_of(second)}
        return maybe_extract_prompt(pair) if first and second else {"prompt": first[:0], **pair}

    others = [x for x in dataset.column_names if x not in _COLUMNS_OF_THE_TRAINER]
    with _quiet():
        return dataset.map(pair_of, with_indices=True, remove_columns=others)


def load_prompts(name: str, split: str) -> list:
    """
    Reads the different prompts of a dataset or a file, texts or lists of messages, in their order.

    Raises:
        ValueError: if it can't be read, or has no prompts of one kind.
    """
    dataset = _load(name, split, what="prompt")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`{name}` has the columns {sorted(dataset.column_names)}, but not `prompt`. Rename yours: texts or lists "
            "of messages."
        )
    prompts = list({json.dumps(prompt): prompt for prompt in dataset["prompt"]}.values())
    kinds = {type(prompt) for prompt in prompts}
    if kinds not in ({str}, {list}):
        raise ValueError(
            f"The prompts of `{name}` are of the types {sorted(x.__name__ for x in kinds)}, but must be all texts or "
            "all lists of messages."
        )
    return prompts


def _load(name: str, split: str, config: str | None = None, data_dir: str | None = None, what: str = "pair") -> Dataset:
    if not name.strip():
        raise ValueError(f"The name of the {what}s is {name!r}, but must be a Hub id, a folder or a file.")
    path = Path(name)
    kinds = [_FILES[suffix[1:]] for suffix in path.suffixes if suffix[1:] in _FILES]
    if path.is_file() and not kinds:
        raise ValueError(
            f"`{name}` can't be read: the ending of a file of {what}s is one of {', '.join(_FILES)}. Convert it."
        )
    if path.is_file() and re.split(r"[\[+]", split)[0] != "train":
        raise ValueError(
            f"The split `{split}` of `{name}` was chosen, but a file has only one split, `train`. Give a folder "
            f"with a file for each split (`train.jsonl`, `{split}.jsonl`)"
            + (", or hold pairs out with `--test_size`." if what == "pair" else ".")
        )
    try:
        with _quiet():
            if path.is_file():
                options = {"sep": "\t"} if ".tsv" in path.suffixes else {}
                return load_dataset(kinds[-1], data_files=str(path), split=split, **options)
            return load_dataset(name, config, data_dir=data_dir, split=split)
    except StopIteration as error:  # what is raised where there is nothing to read
        raise ValueError(f"`{name}` is empty, but {what}s are to be read from it.") from error
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).rstrip(".")
        if not path.exists():
            reason = f"there is no such file or folder here, and on the Hub: {reason}"
        raise ValueError(
            f"`{name}` can't be read: {reason}. Give a Hub id, a folder, or a "
            f"file of {what}s ({', '.join(_FILES)}) with one {what} in each row."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Turns off the progress bars of `datasets`, and its log, which repeats the error that it raises."""
    verbosity, has_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            enable_progress_bars()


def _prefers_second(label: Any, row: int, args: PairArguments) -> bool:
    if label not in (0, 1):
        raise ValueError(
            f"`{args.preferred_column}` is {label!r} in row {row + 1} of `{args.dataset}`, but must be 0 where the "
            f"first of {args.response_columns} is preferred and 1 where it is the second. Write it so."
        )
    return bool(label)


def messages_of(dialogue: str) -> list[dict[str, str]]:
    """Splits a dialogue of HH-RLHF into messages: one text with `Human:` or `Assistant:` before each turn."""
    parts = _TURN.split(dialogue)[1:]
    return [{"role": _ROLES[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


def public_name(dataset: str) -> str:
    """Returns the Hub id of a dataset, or the name of a file or folder without its path on this machine."""
    return Path(dataset).name if Path(dataset).exists() else dataset


def hold_out(pairs: Dataset, size: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    Splits pairs into those to train on and those to evaluate on, by prompts, so that none is in both.

    Args:
        pairs ([`~datasets.Dataset`]):
            The pairs, with a column `prompt`.
        size (`float`):
            Share of the pairs, or if it is 1 or more their number, that is held out; a few more, if a prompt has
            several.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order in which prompts are held out. The same pairs are always split in the same way.

    Raises:
        ValueError: if one of the two parts is empty.
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
    if not kept or not held_out:
        raise ValueError(
            f"Of {len(pairs)} pairs with {len(prompts)} prompts, `test_size` {size:g} leaves "
            f"{len(kept)} to train on and {len(held_out)} to evaluate on, and no prompt can be in both parts. Choose "
            "another one, or 0 to hold none out."
        )
    return pairs.select(kept), pairs.select(sorted(held_out))
