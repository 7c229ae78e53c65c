"""Pictures of tokens for terminals, in 24-bit ANSI colours that are read on black and on white."""

import re
import shutil
from collections.abc import Sequence
from typing import Any

from ..arguments import as_number, as_whole_number
from .tokens import TokenText, cells, scale_ends, scale_limit, shade, visible, wrap

_GAP = "   "
_WIDEST = 10_000  # columns
# Shares of the scale from which on letters are coloured, and then what is behind them. Below, tokens look like any text
# in this terminal, whose background is not known, so that colours can't be mixed with it.
_LETTERS, _BEHIND = 1 / 6, 1 / 2


def to_ansi(
    texts: Sequence[TokenText], width: int | None = None, limit: float | None = None, has_colors: bool = True
) -> str:
    """
    Draws texts side by side, as text with the escape codes of colours.

    Args:
        texts (list of [`TokenText`]):
            The texts.
        width (`int`, *optional*):
            Columns of the terminal. Defaults to those that it reports.
        limit (`float`, *optional*):
            The value at which colours are full. Defaults to what suits these texts.
        has_colors (`bool`, *optional*, defaults to `True`):
            Whether to write escape codes.

    Raises:
        TypeError: if the width is no whole number, or the limit no number.
        ValueError: if the width is less than 1 or more than 10,000, or the limit is not positive.
    """
    width = shutil.get_terminal_size().columns if width is None else as_width(width)
    limit = scale_limit(texts) if limit is None else as_number("limit", limit, "the value at which colours are full")
    if not limit > 0:
        raise ValueError(f"`limit` is {limit}, but must be positive: it is the value at which colours are full.")
    column = max((width - len(_GAP) * (len(texts) - 1)) // max(len(texts), 1), 8)
    columns = []
    for text in texts:
        lines = wrap(text.tokens, column)
        title = visible(text.title)[:column]
        drawn = ["".join(_colored(part, token.value, limit) for part, token in line) for line in lines]
        free = [column - sum(cells(part) for part, _ in line) for line in lines]
        head = [f"\033[1m{title}\033[0m" + " " * (column - cells(title))] if any(x.title for x in texts) else []
        columns.append(head + [line + " " * rest for line, rest in zip(drawn, free, strict=True)])
    n_lines = max(map(len, columns), default=0)
    padded = [lines + [" " * column] * (n_lines - len(lines)) for lines in columns]
    rows = [_GAP.join(row).rstrip(" ") for row in zip(*padded, strict=True)]
    measure = ", ".join(dict.fromkeys(text.measure for text in texts if text.measure))
    marks = sorted(end * share for end in scale_ends(texts, limit) for share in (_LETTERS, _BEHIND))
    scale = " ".join(_colored(f" {x:+.2g} ", x, limit) for x in marks)
    picture = "\n".join([*([f"{measure}  {scale}"] if measure else []), *rows])
    return picture if has_colors else re.sub(r"\033\[[\d;]*m", "", picture)


def as_width(value: Any) -> int:
    """Returns the width of a terminal, and refuses what can't be one, as for [`to_ansi`]."""
    return as_whole_number("width", value, f"a number of columns, from 1 to {_WIDEST:,}", most=_WIDEST)


def _colored(text: str, value: float, limit: float) -> str:
    (red, green, blue), share = shade(value, limit)
    if share < _LETTERS:
        return text
    if share < _BEHIND:
        return f"\033[38;2;{red};{green};{blue}m{text}\033[0m"
    return f"\033[38;2;0;0;0;48;2;{red};{green};{blue}m{text}\033[0m"
