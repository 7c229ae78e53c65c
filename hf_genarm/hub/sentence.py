"""A sentence as a reward model: how prompts ask for what it says."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..arguments import shown

logger = logging.get_logger(__name__)

# At 1 a sentence steers as it does in a prompt; beyond 3 texts break.
DEFAULT_STRENGTH = 1.5


def check_sentence(name: str, sentence: Any) -> str:
    """
    Returns a sentence that a user gives.

    Raises:
        TypeError: if it is not text.
        ValueError: if it is empty.
    """
    if not isinstance(sentence, str):
        raise TypeError(f'`{name}` is {shown(sentence)}, but must be a text that asks for something, like "Be kind."')
    if not sentence.strip():
        raise ValueError(f'`{name}` is {sentence!r}, which asks for nothing. Give a text, like "Be kind."')
    return sentence


def with_sentence(
    prompt: str | Sequence[Mapping[str, Any]],
    sentence: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
) -> Any:
    """
    Returns a prompt that also asks for what a sentence says.

    Args:
        prompt (`str` or list of messages):
            A plain text, which follows the sentence and a blank line; or a chat, whose system message gets the sentence
            at its end, or is the sentence if there was none. If the template of the tokenizer has no system messages,
            the first message of the user begins with it.
        sentence (`str`):
            The sentence.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer whose chat template the chat goes through.
        chat_template (`str`, *optional*):
            Another template than that of the tokenizer.

    Returns:
        `str` or list of messages, as the prompt was.

    Raises:
        ValueError: if there is no message that could get the sentence.
    """
    if isinstance(prompt, str):
        return in_text(prompt, sentence)
    has_system_messages = _has_system_messages(tokenizer, chat_template)
    if not has_system_messages:
        logger.info_once(
            f"The chat template of `{tokenizer.name_or_path}` has no system messages: sentences are put before the "
            "first message of the user."
        )
    return in_chat(prompt, sentence, has_system_messages)


def in_text(prompt: str, sentence: str) -> str:
    """Returns a plain text that follows a sentence and a blank line."""
    return f"{sentence}\n\n{prompt}"


def in_chat(prompt: Sequence[Mapping[str, Any]], sentence: str, has_system_messages: bool) -> list[Any]:
    """
    Returns a chat that also asks for what a sentence says, as [`with_sentence`] puts it there.

    Raises:
        ValueError: if there is no message that could get the sentence.
    """
    first, *others = prompt
    if has_system_messages:
        if first["role"] != "system":
            return [{"role": "system", "content": sentence}, *prompt]
        return [{**first, "content": _joined(first["content"], sentence)}, *others]
    at = next((index for index, message in enumerate(prompt) if message["role"] == "user"), None)
    if at is None:
        raise ValueError(
            f"The chat {shown(prompt)} has no message of the user, and the chat template has no system messages, so "
            "that the sentence has no place. Add a message of the user."
        )
    return [*prompt[:at], {**prompt[at], "content": _joined(sentence, prompt[at]["content"])}, *prompt[at + 1 :]]


def _joined(before: Any, after: Any) -> Any:
    """Joins two contents of a message, each of them a text or a list of parts."""
    if isinstance(before, str) and isinstance(after, str):
        return f"{before}\n\n{after}"
    return [part for x in (before, after) for part in ([{"type": "text", "text": x}] if isinstance(x, str) else x)]


def _has_system_messages(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> bool:
    """Returns whether a chat template writes system messages, instead of refusing or dropping them."""
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    try:
        return "Be kind." in str(tokenizer.apply_chat_template(chat, chat_template=chat_template, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError):
        return False
