"""A small line chart as SVG."""

import itertools
import math
from collections.abc import Sequence
from html import escape

from ..viewing.tokens import BLUE, ORANGE

_WIDTH, _HEIGHT = 600, 80


def chart(values: Sequence[float], label: str) -> str:
    """
    Values as bars, and their running mean as a line.

    Args:
        values (list of `float`):
            None of them negative.
        label (`str`):
            What they are.
    """
    values = [x if math.isfinite(x) else 0.0 for x in values]
    if not values:
        return ""
    top, step = max(*values, 1e-6), _WIDTH / len(values)
    means = [total / n for n, total in enumerate(itertools.accumulate(values), start=1)]
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{_HEIGHT * (1 - x / top):.1f}" width="{0.8 * step:.1f}" '
        f'height="{_HEIGHT * x / top:.1f}"/>'
        for i, x in enumerate(values)
    )
    line = " ".join(f"{(i + 0.4) * step:.1f},{_HEIGHT * (1 - x / top):.1f}" for i, x in enumerate(means))
    blue, orange = ("rgb({},{},{})".format(*color) for color in (BLUE, ORANGE))
    return (
        f'<div class="genarm-legend">{escape(label)}: mean {means[-1]:.2f}, highest {top:.2f}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}" '
        f'style="width: 100%; max-width: {_WIDTH}px; height: {_HEIGHT}px">'
        f'<g fill="{blue}" fill-opacity=".5">{bars}</g>'
        f'<polyline points="{line}" fill="none" stroke="{orange}" stroke-width="2" vector-effect="non-scaling-stroke"/>'
        "</svg>"
    )
