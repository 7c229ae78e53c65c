"""Pictures of tokens for papers, drawn with matplotlib."""

from collections.abc import Sequence
from typing import Any

from .tokens import TokenText, cells, scale_ends, scale_limit, shade, visible, wrap

_COLUMN, _GAP = 52, 4  # characters
_FONT, _CELL, _LINE = 9, 0.602, 1.7  # points; width of a character and height of a line, in font sizes


def draw(texts: Sequence[TokenText], ax: Any = None) -> Any:
    """
    Draws texts side by side.

    Args:
        texts (list of [`TokenText`]):
            The texts.
        ax ([`~matplotlib.axes.Axes`], *optional*):
            Where to draw. Defaults to a new figure of the right size.

    Returns:
        [`~matplotlib.axes.Axes`]; `ax.figure.savefig("tokens.pdf")` writes it.
    """
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    limit = scale_limit(texts)
    wrapped = [wrap(text.tokens, _COLUMN) for text in texts]
    n_lines = max(map(len, wrapped), default=1) + 3  # titles above, and the legend below
    width = len(texts) * (_COLUMN + _GAP) - _GAP
    if ax is None:
        _, ax = plt.subplots(figsize=(width * _CELL * _FONT / 72, n_lines * _LINE * _FONT / 72), layout="constrained")
    ax.set(xlim=(0, width), ylim=(n_lines, 0))
    ax.axis("off")

    def write(x: float, y: float, text: str, value: float = float("nan"), **kwargs: Any) -> None:
        color, share = shade(value, limit)
        if share:
            rgb = [part / 255 for part in color]
            ax.add_patch(Rectangle((x, y - 0.45), cells(text), 0.9, color=rgb, alpha=0.6 * share, linewidth=0))
        # A dollar sign in a token begins no formula.
        ax.text(x, y, text, family="monospace", fontsize=_FONT, va="center", parse_math=False, **kwargs)

    for index, (text, lines) in enumerate(zip(texts, wrapped, strict=True)):
        left = index * (_COLUMN + _GAP)
        write(left, 0.5, visible(text.title), weight="bold")
        for row, line in enumerate(lines):
            x = left
            for part, token in line:
                write(x, row + 1.5, part, token.value)
                x += cells(part)
    x = 0
    measure = ", ".join(dict.fromkeys(text.measure for text in texts if text.measure))
    ends = [(f" {x:+.2g} ", x) for x in scale_ends(texts, limit)]
    for label, value in ((f"{measure}  ", float("nan")), *ends):
        write(x, n_lines - 0.5, label, value)
        x += cells(label)
    return ax
