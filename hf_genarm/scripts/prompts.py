"""Prompts: reading them from a JSONL file, and turning them into tokens of a base."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMPLETION = "completion"


def read_rows(path: str, column: str) -> list[dict[str, Any]]:
    """
    Reads rows with a text or a list of messages in one column; their other columns are kept unchanged.

    Raises:
        ValueError: if the file can't be read, or a row is not a prompt.
    """
    try:
        # Not `splitlines`, which also splits within texts, at characters that separate paragraphs
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ValueError(f"`{path}` can't be read: {reason}. Name a JSONL file: `--prompts`.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Line {number} of `{path}` is not JSON: {error}. Write one object in each line."
            ) from error
        if not _is_unicode(row):
            raise ValueError(
                f"Line {number} of `{path}` has half a character, which can't be written. Correct its text."
            )
        if not isinstance(row, dict):
            raise ValueError(f"Line {number} of `{path}` is {line[:80]}, but must be an object with a `{column}`.")
        if column not in row:
            raise ValueError(
                f"Line {number} of `{path}` has {sorted(row)}, but no `{column}`. Name the column of the prompts with "
                "`--prompt_column`."
            )
        _check(row[column], f"`{column}` in line {number} of `{path}`")
        if COMPLETION in row:
            raise ValueError(
                f"Line {number} of `{path}` has a `{COMPLETION}`, which is where the answer goes. Rename the column."
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"`{path}` is empty, but prompts are to be read from it.")
    return rows


def _is_unicode(row: Any) -> bool:
    """Returns whether all characters are whole: a text that is cut within an emoji ends in half of a surrogate pair."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(prompt: Any, what: str) -> None:
    is_chat = isinstance(prompt, list) and all(
        isinstance(x, dict) and isinstance(x.get("role"), str) and isinstance(x.get("content"), str) for x in prompt
    )
    if not prompt or not (is_chat or isinstance(prompt, str)):
        shown = json.dumps(prompt, ensure_ascii=False)[:80]
        raise ValueError(
            f"{what} is {shown}, but must be a text or a list of messages with `role` and `content`, and not empty."
        )


def token_ids(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """
    Returns the tokens of a prompt. Messages go through the chat template, up to where the answer begins.

    Raises:
        ValueError: if there are messages, but no chat template.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of `{tokenizer.name_or_path}` has no chat template, but prompts are messages. Use a chat "
            "model as `--base`, or write prompts as text."
        )
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def left_padded(tokenizer: Any, ids: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Pads the tokens of prompts: `input_ids` and `attention_mask` for `generate`, each `(n_prompts, longest)`."""
    width = max(map(len, ids))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([[pad or 0] * (width - len(row)) + row for row in ids], device=device),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device),
    }


def last_text(prompt: str | list[dict[str, str]]) -> str:
    """Returns the text of a prompt, or of its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def completion_of(prompt: str | list[dict[str, str]], text: str) -> str | list[dict[str, str]]:
    """Returns an answer as text or as a message, like its prompt: a row of a prompt-completion dataset has one kind."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
