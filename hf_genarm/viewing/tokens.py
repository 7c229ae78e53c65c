"""The parts of a picture of a text: its tokens as text, a number for each, and one scale for all."""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

# Okabe and Ito's blue and vermilion, which colour-blind people can distinguish.
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)

# Tokens of context with which a token is decoded; a character has at most four bytes.
_CONTEXT = 8


@dataclass(frozen=True)
class Token:
    """
    Holds one token of a picture.

    Parameters:
        text (`str`):
            What it adds to the text.
        value (`float`):
            What it is coloured by: blue above 0, orange below. NaN for no colour.
        notes (`tuple[tuple[str, str], ...]`):
            What else is known about it, as names and values.
    """

    text: str
    value: float = math.nan
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TokenText:
    """
    Holds one text of a picture.

    Parameters:
        tokens (list of [`Token`]):
            Its tokens.
        measure (`str`):
            What they are coloured by, in a few words.
        title (`str`, *optional*):
            Its title, above it.
    """

    tokens: list[Token] = field(default_factory=list)
    measure: str = ""
    title: str = ""


def token_texts(tokenizer: Any, ids: Sequence[int], first: int = 0) -> list[str]:
    """
    Returns what each token adds to the text, special tokens included.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Their tokenizer. Without one, ids are written as numbers.
        ids (list of `int`):
            The tokens.
        first (`int`, *optional*, defaults to 0):
            The index of the first token that is returned; those before it are context.
    """
    if tokenizer is None:
        return [f"⟨{x}⟩" for x in ids[first:]]
    texts = []
    for end in range(first, len(ids)):
        start = max(end - _CONTEXT, 0)
        before, after = (
            tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for stop in (end, end + 1)
        )
        shared = next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), len(before))
        texts.append(after[shared:])
    return texts


def visible(text: str) -> str:
    """
    Replaces control characters by visible ones: unchecked tokens may hold escape sequences of terminals, or turn the
    direction of what follows. Newlines stay.
    """
    return "".join(x if x == "\n" else _visible(x) for x in text)


def _visible(character: str) -> str:
    if character == "\t":
        return "  "
    bidirectional = unicodedata.bidirectional(character)
    turns = bidirectional in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return "�" if turns or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") else character


def scale_limit(texts: Iterable[TokenText]) -> float:
    """Returns the value at which colours are full: 95 % of all values are at most this, so that no outlier decides."""
    values = sorted(abs(x.value) for text in texts for x in text.tokens if math.isfinite(x.value))
    return max(values[math.ceil(0.95 * len(values)) - 1], 1e-6) if values else 1.0


def scale_ends(texts: Iterable[TokenText], limit: float) -> tuple[float, ...]:
    """Returns the ends of the scale besides 0: the lower, the upper, or both, as there are values on these sides."""
    values = [x.value for text in texts for x in text.tokens]
    low, high = any(x < 0 for x in values), any(x > 0 for x in values)
    return (-limit,) * low + (limit,) * high


def shade(value: float, limit: float) -> tuple[tuple[int, int, int], float]:
    """Returns the colour of a value, and how full it is, from 0 to 1."""
    share = 0.0 if math.isnan(value) else min(abs(value) / limit, 1.0)
    return BLUE if value > 0 else ORANGE, share


def wrap(tokens: Sequence[Token], width: int) -> list[list[tuple[str, Token]]]:
    """
    Splits a text into lines for a font of fixed width, each a list of parts of tokens with their tokens.

    Lines break before words; only words that are longer than a line are split.
    """
    lines: list[list[tuple[str, Token]]] = [[]]
    used = 0
    for word in _words(tokens):
        length = sum(cells(part) for part, _ in word)
        if used and used + length > width:
            lines.append([])
            used = 0
            word = [(word[0][0].lstrip(" "), word[0][1]), *word[1:]]
        for part, token in word:
            for piece in part.splitlines(keepends=True):
                text = piece.rstrip("\n")
                while text:
                    cut = max(_fitting(text, width - used), 0 if used else 1)
                    lines[-1].append((text[:cut], token))
                    used += cells(text[:cut])
                    text = text[cut:]
                    if text:
                        lines.append([])
                        used = 0
                if piece.endswith("\n"):
                    lines[-1].append(("⏎", token))
                    lines.append([])
                    used = 0
    return lines


def cells(text: str) -> int:
    """Returns how many columns a text takes in a font of fixed width."""
    return sum(
        0 if unicodedata.combining(x) else 2 if unicodedata.east_asian_width(x) in ("W", "F") else 1 for x in text
    )


def _words(tokens: Sequence[Token]) -> list[list[tuple[str, Token]]]:
    words: list[list[tuple[str, Token]]] = []
    for token in tokens:
        text = visible(token.text)
        if not words or text[:1].isspace() or words[-1][-1][0].endswith("\n"):
            words.append([])
        words[-1].append((text, token))
    return words


def _fitting(text: str, width: int) -> int:
    """Returns how many characters of a text fit into a width."""
    fitting = 0
    while fitting < len(text) and cells(text[: fitting + 1]) <= width:
        fitting += 1
    return fitting
