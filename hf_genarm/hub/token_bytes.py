"""The bytes that each token stands for: what texts of different tokenizers have in common."""

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# How byte-level tokenizers write bytes: each as one printable character
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_SPACE = "▁"  # in the tokens of SentencePiece
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_AT_ONCE = 512


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """
    Returns the bytes of each token: those of `decode(ids)` are the bytes of its tokens, one after the other.

    This is so for byte-level tokenizers (of GPT-2, Llama 3, Qwen; also those converted from tiktoken) and for those of
    SentencePiece (of Llama 2, Gemma, T5), in which `▁` is a space and `<0x0A>` a byte. Every token is compared with
    what `decode` returns for it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        `list[bytes | None]`: by id; `None` for special tokens, which are no text, and for ids without a token.

    Raises:
        ValueError: if a token decodes to something else.
    """
    vocab = {token: index for token, index in tokenizer.get_vocab().items() if index >= 0}
    added = tokenizer.added_tokens_decoder
    is_byte_level = all(index in added or _BYTE_OF.keys() >= set(token) for token, index in vocab.items())
    result: list[bytes | None] = [None] * (max(vocab.values(), default=-1) + 1)
    for token, index in vocab.items():
        if index not in added:
            result[index] = _of_byte_level(token) if is_byte_level else _of_sentencepiece(token)
        elif not added[index].special:
            result[index] = token.encode()
    _compare_with_decode(tokenizer, result)
    return result


def _of_byte_level(token: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in token)


def _of_sentencepiece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def _compare_with_decode(tokenizer: PreTrainedTokenizerBase, known: Sequence[bytes | None]) -> None:
    """Refuses a tokenizer that decodes a token in another way."""
    indices = [index for index, x in enumerate(known) if x is not None]
    # A letter before each token, since some tokenizers drop the space at the beginning of a text, and since bytes that
    # are no character alone would become one together.
    letter = next((index for index in indices if (known[index] or b"").isalpha()), None)
    for start in range(0, len(indices), _AT_ONCE):
        part = indices[start : start + _AT_ONCE]
        if not _decodes_to(tokenizer, part, known, letter):
            index = next(
                x for x in (*part, part[-1]) if x == part[-1] or not _decodes_to(tokenizer, [x], known, letter)
            )
            ids = [index] if letter is None else [letter, index]
            raise ValueError(
                f"The bytes of the tokens of `{tokenizer.name_or_path}` are not known: `decode({ids})` is "
                f"{tokenizer.decode(ids)!r}, and not the text of its tokens {tokenizer.convert_ids_to_tokens(ids)}. "
                "Rewards are carried from one tokenizer to another by bytes, which byte-level and SentencePiece "
                "tokenizers show. Use a reward model with the tokenizer of the base, or a base with such a tokenizer."
            )


def _decodes_to(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], known: Sequence[bytes | None], letter: int | None
) -> bool:
    read = [x for index in ids for x in ([index] if letter is None else [letter, index])]
    decoded = tokenizer.decode(read, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    before = "" if letter is None else (known[letter] or b"").decode()
    expected = "".join(before + (known[index] or b"").decode(errors="replace") for index in ids)
    return _comparable(str(decoded)) == _comparable(expected)


def _comparable(text: str) -> str:
    """Returns a text in which bytes that are no character look the same, however many they are."""
    return re.sub("�+", "�", text)


def spelled(known: Sequence[bytes | None] | Mapping[int, bytes], ids: Sequence[int]) -> bytes:
    """Returns the bytes of some tokens, one after the other; special tokens have none."""
    return b"".join(known[index] or b"" for index in ids)


def spaces_after_special_tokens(tokenizer: PreTrainedTokenizerBase, known: Sequence[bytes | None]) -> bool:
    """Returns whether a tokenizer writes a space, which is not there, before a text that follows a special token."""
    special = next((index for index in tokenizer.all_special_ids if tokenizer.eos_token_id in (None, index)), None)
    if special is None:
        return False
    text = f"{tokenizer.convert_ids_to_tokens(special)}a"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:1] == [special] and spelled(known, ids) == b" a"
