"""The columns of preference data: which of them are read, and checks of what is in them."""

import json
import math
import operator
import warnings
from collections.abc import Iterable
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names

from ..hub.compatibility import generation_prompt
from ..hub.info import GuidanceWarning

SIDES = ("chosen_ids", "rejected_ids")
# The names of columns that are added begin with `genarm_`; any other may be one of the user's.
PROMPT_LENGTH = "genarm_prompt_length"

_TEXTS = ("prompt", "chosen", "rejected")
_READ = {*_TEXTS, "margin", "tools", "chat_template_kwargs"}
# TRL takes these for texts of another kind of data.
_OF_OTHER_KINDS = ("messages", "completion")
_ARE_PROMPTS = {
    *("question", "query", "instruction", "instructions", "input", "inputs", "system", "system_prompt", "context"),
    *("history", "conversation", "conversations", "dialogue", "messages", "user", "post"),
}
# How many pairs are looked at for a warning.
_FIRST = 16


def check_pairs(dataset: Any, name: str, vocab_size: int) -> tuple[Dataset | IterableDataset, bool, bool]:
    """
    Refuses data that are not preference pairs: in a dataset at once, in a stream when they are read.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The pairs.
        name (`str`):
            What the dataset is called in messages.
        vocab_size (`int`):
            Number of tokens of the model.

    Returns:
        The dataset without columns that TRL would misread, whether it holds messages, and whether it holds tokens.

    Raises:
        TypeError: if it is not a dataset.
        ValueError: if it is empty, lacks a column, or a pair of it is malformed.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"The {name} dataset is a `{type(dataset).__name__}`, but must be a `datasets.Dataset` or an "
            "`IterableDataset`. Pass one split: `load_dataset(…, split='train')`, or `Dataset.from_list(pairs)`."
        )
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty, but training needs pairs. Check its split and its filters.")
    columns = get_dataset_column_names(dataset)
    is_tokenized = any({f"chosen_{ids}", f"rejected_{ids}"} <= set(columns) for ids in ("ids", "input_ids"))
    if not is_tokenized and not {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            f"The {name} dataset has the columns {sorted(columns)}, but preference data need `chosen` and "
            "`rejected` (text or messages), with or without `prompt`. Rename yours: "
            "`dataset.rename_columns({'better': 'chosen', 'worse': 'rejected'})`."
        )
    is_chat = isinstance(first.get("chosen"), list)
    options: dict[str, Any] = {"name": name, "is_chat": is_chat, "vocab_size": vocab_size if is_tokenized else None}
    if isinstance(dataset, Dataset):
        for index, pair in enumerate(dataset):
            refuse_malformed(pair, index, **options)
    else:
        refuse_malformed(first, 0, **options)
        dataset = dataset.map(refuse_malformed, with_indices=True, fn_kwargs=options)
    if not is_tokenized:
        _warn_of_unread(dataset, name)
        dataset = dataset.remove_columns([column for column in _OF_OTHER_KINDS if column in columns])
    return dataset, is_chat, is_tokenized


def is_in_template(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, is_tokenized: bool) -> bool:
    """Returns whether the first pair, of texts or tokens, was written in the chat template before."""
    added, pair = generation_prompt(tokenizer), next(iter(dataset))
    if added is None:
        return False
    if is_tokenized:
        return added in str(tokenizer.decode(pair["chosen_ids" if "chosen_ids" in pair else "chosen_input_ids"]))
    return any(added in str(pair.get(column)) for column in ("prompt", "chosen"))


def _warn_of_unread(dataset: Dataset | IterableDataset, name: str) -> None:
    """
    Warns of columns that look like a part of the prompt and are not read, and of prompts that are in the answers, too.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs of texts.
        name (`str`):
            What the dataset is called in messages.
    """
    pairs = list(islice(dataset, _FIRST))
    has_prompt = all("prompt" in pair or pair["chosen"][:1] == pair["rejected"][:1] for pair in pairs)
    unread = set()
    for pair in pairs:
        read = "\n".join(_strings([pair.get(column) for column in _TEXTS]))
        for column in pair.keys() - _READ:
            texts = [text for text in _strings(pair[column]) if text.strip() and text not in read]
            looks_like_it = column.lower() in _ARE_PROMPTS or (not has_prompt and any(" " in x for x in texts))
            if texts and looks_like_it:
                unread.add(column)
    if unread:
        warnings.warn(
            f"The {name} dataset has the columns {sorted(unread)}, which are not read: the text before an answer comes "
            "from `prompt`, or from what `chosen` and `rejected` begin with. Put theirs into `prompt`, as "
            f"`dataset.rename_column({sorted(unread)[0]!r}, 'prompt')` does, or drop them: "
            f"`dataset.remove_columns({sorted(unread)})`.",
            GuidanceWarning,
            stacklevel=2,
        )
    prompts = [pair["prompt"] for pair in pairs if isinstance(pair.get("prompt"), str)]
    repeats = [
        bool(prompt.strip()) and all(pair[side].startswith(prompt.strip()) for side in ("chosen", "rejected"))
        for prompt, pair in zip(prompts, pairs, strict=False)
    ]
    if repeats and all(repeats):
        warnings.warn(
            f"All answers of the {name} dataset begin with their `prompt`, which is put before them again. If they "
            "are whole texts, drop the column: `dataset.remove_columns('prompt')`.",
            GuidanceWarning,
            stacklevel=2,
        )


def refuse_malformed(
    pair: dict[str, Any], index: int, name: str, is_chat: bool, vocab_size: int | None
) -> dict[str, Any]:
    """
    Refuses a pair if a column of it has something in it that can't be trained on.

    Args:
        pair (`dict[str, Any]`):
            The pair.
        index (`int`):
            Its number in the dataset.
        name (`str`):
            What the dataset is called in messages.
        is_chat (`bool`):
            Whether the first pair consists of messages.
        vocab_size (`int`, *optional*):
            Number of tokens of the model, if the pair consists of tokens.

    Returns:
        Nothing to change, as `datasets` expects of a function that is mapped.

    Raises:
        ValueError: if it is malformed.
    """
    problem = _problem_of_texts(pair, is_chat) if vocab_size is None else _problem_of_tokens(pair, vocab_size)
    problem = problem or _problem_of_margin(pair) or _problem_of_template(pair)
    if problem is not None:
        raise ValueError(f"In pair {index} of the {name} dataset, {problem}")
    return {}


def _problem_of_texts(pair: dict[str, Any], is_chat: bool) -> str | None:
    """Returns what is wrong with prompt and answers, if anything."""
    columns = [column for column in _TEXTS if column in pair]
    for column in columns:
        if (problem := _problem_of_text(pair[column], column)) is not None:
            return f"`{column}` {problem}"
    kinds = {column: "a list of messages" if isinstance(pair[column], list) else "text" for column in columns}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"`{column}` is {kind}" for column, kind in kinds.items())
        return (
            f"{found}, but they must all be of one kind. Make messages of texts: `[{{'role': 'user', 'content': "
            "prompt}]` and `[{'role': 'assistant', 'content': answer}]`; where the messages begin with the prompt, "
            "drop the other: `dataset.remove_columns('prompt')`."
        )
    if isinstance(pair["chosen"], list) != is_chat:
        first = "messages" if is_chat else "text"
        return f"`chosen` is {kinds['chosen']}, but that of pair 0 is {first}. Use one format for the whole dataset."
    if is_chat and "prompt" in pair and all(pair[x][0] in (pair["prompt"][0], pair["prompt"][-1]) for x in columns[1:]):
        return (
            f"`chosen` and `rejected` begin with the message {str(pair['chosen'][0])[:80]} of `prompt`, which would be "
            "read twice. If they are whole chats, drop the column: `dataset.remove_columns('prompt')`."
        )
    return None


def _problem_of_text(value: Any, column: str) -> str | None:
    """Returns what is wrong with a text or a list of messages, if anything."""
    rule = "but must be text, or a list of messages with `role` and `content`."
    if isinstance(value, str):
        return None
    if value is None:
        return f"is None, {rule} Leave such pairs out: `dataset.filter(lambda pair: pair['{column}'] is not None)`."
    if isinstance(value, dict):
        return f"is a dict with the keys {list(value)}, {rule} Put a single message into a list: `[message]`."
    if not isinstance(value, list):
        return f"is {str(value)[:80]}, of the type `{type(value).__name__}`, {rule} Convert it: `str(…)`."
    if not value:
        return f"is an empty list, {rule} Leave such pairs out, or the column `prompt` if there are no prompts."
    for message in value:
        if not isinstance(message, dict):
            return (
                f"is a list of `{type(message).__name__}`, {rule} Join a list of texts; tokens belong into "
                "`chosen_ids` and `rejected_ids`."
            )
        given = {key: entry for key, entry in message.items() if entry is not None}
        if "from" in given and "value" in given and "role" not in given:
            return (
                f"has messages with `from` and `value`, {rule} Convert them: "
                "`[{'role': {'human': 'user', 'gpt': 'assistant'}.get(m['from'], m['from']), 'content': m['value']} "
                f"for m in pair['{column}']]`."
            )
        # A message that calls tools may have no content.
        has_content = isinstance(given.get("content"), str | list) or ("content" not in given and len(given) > 1)
        if not isinstance(given.get("role"), str) or not has_content:
            return f"has the message {str(message)[:80]}, {rule} Rename its keys, or leave the pair out."
    return None


def _problem_of_tokens(pair: dict[str, Any], vocab_size: int) -> str | None:
    """Returns what is wrong with given tokens, if anything."""
    columns = SIDES if SIDES[0] in pair and SIDES[1] in pair else ("chosen_input_ids", "rejected_input_ids")
    lengths = []
    for column in columns:
        ids, rule = pair[column], f"but must be a list of token ids from 0 to {vocab_size - 1}."
        try:
            ids = [operator.index(token) for token in ids]
        except TypeError:
            return f"`{column}` is {str(pair[column])[:80]}, {rule} Put texts into `chosen` and `rejected`."
        if not ids or not 0 <= min(ids) <= max(ids) < vocab_size:
            found = f"the ids {min(ids)} to {max(ids)}" if ids else "no ids"
            return f"`{column}` has {found}, {rule} Make them with the tokenizer of the model."
        lengths.append(len(ids))
    length = pair.get(PROMPT_LENGTH, 0)
    if not isinstance(length, int) or not 0 <= length <= min(lengths):
        return f"`{PROMPT_LENGTH}` is {length!r}, but must be from 0 to {min(lengths)}, the shorter text's length."
    return None


def _problem_of_margin(pair: dict[str, Any]) -> str | None:
    """Returns what is wrong with the margin, if anything."""
    margin = pair.get("margin", 0.0)
    try:
        is_number = not isinstance(margin, str) and math.isfinite(margin)
    except (TypeError, ValueError, OverflowError):
        is_number = False
    if not is_number:
        return (
            f"`margin` is {margin!r}, but must be a finite number. Leave such pairs out, or the column: "
            "`dataset.remove_columns('margin')`."
        )
    return None


def _problem_of_template(pair: dict[str, Any]) -> str | None:
    """Returns what is wrong with the inputs of a chat template that are not messages, if anything."""
    tools = pair.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        return f"`tools` is {str(tools)[:80]}, but must be a list of tools, or one in JSON. Correct it, or use None."
    if not isinstance(tools, list | None):
        return f"`tools` is {str(tools)[:80]}, but must be a list of tools, or one in JSON. Correct it, or use None."
    if not isinstance(pair.get("chat_template_kwargs", {}), dict):
        given = str(pair["chat_template_kwargs"])[:80]
        return f"`chat_template_kwargs` is {given}, but must be a dict. Use an empty one where there are none."
    return None


def _strings(value: Any) -> Iterable[str]:
    """Yields the texts in a value, in its lists and in its messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        parts = [value[key] for key in value if key != "role"] if isinstance(value, dict) else value
        for part in parts:
            yield from _strings(part)
