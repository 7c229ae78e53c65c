"""Pictures of tokens for terminals, in 24-bit ANSI colours."""

import shutil
from collections.abc import Sequence
from typing import Any

from ..arguments import as_whole_number
from .tokens import Token, TokenText, cells, scale_ends, scale_limit, shade, visible, wrap

_GAP = "   "
_WIDEST = 10_000  # columns


def to_ansi(texts: Sequence[TokenText], width: int | None = None) -> str:
    """
    Draws texts side by side, as text with the escape codes of colours.

    Args:
        texts (list of [`TokenText`]):
            The texts.
        width (`int`, *optional*):
            Columns of the terminal. Defaults to those that it reports.

    Raises:
        TypeError: if the width is no whole number.
        ValueError: if it is less than 1 or more than 10,000.
    """
    width = shutil.get_terminal_size().columns if width is None else as_width(width)
    limit = scale_limit(texts)
    column = max((width - len(_GAP) * (len(texts) - 1)) // max(len(texts), 1), 8)
    columns = []
    for text in texts:
        lines = wrap(text.tokens, column)
        title = visible(text.title)[:column]
        drawn = ["".join(_colored(part, token, limit) for part, token in line) for line in lines]
        free = [column - sum(cells(part) for part, _ in line) for line in lines]
        head = [f"\033[1m{title}\033[0m" + " " * (column - cells(title))] if any(x.title for x in texts) else []
        columns.append(head + [line + " " * rest for line, rest in zip(drawn, free, strict=True)])
    n_lines = max(map(len, columns), default=0)
    padded = [lines + [" " * column] * (n_lines - len(lines)) for lines in columns]
    rows = [_GAP.join(row).rstrip(" ") for row in zip(*padded, strict=True)]
    measure = ", ".join(dict.fromkeys(text.measure for text in texts if text.measure))
    ends = " ".join(_colored(f" {x:+.2g} ", Token("", x), limit) for x in scale_ends(texts, limit))
    return "\n".join([*([f"{measure}  {ends}"] if measure else []), *rows])


def as_width(value: Any) -> int:
    """Returns the width of a terminal, and refuses what can't be one, as for [`to_ansi`]."""
    return as_whole_number("width", value, f"a number of columns, from 1 to {_WIDEST:,}", most=_WIDEST)


def _colored(text: str, token: Token, limit: float) -> str:
    color, share = shade(token.value, limit)
    if share < 0.02:
        return text
    # Light colours under black text, which are read on black and on white terminals.
    red, green, blue = (round(255 - 0.75 * share * (255 - x)) for x in color)
    return f"\033[30;48;2;{red};{green};{blue}m{text}\033[0m"
