"""The parts of the page that are plain HTML: the two answers, their tokens in colours, a table and a chart."""

import itertools
import math
from collections.abc import Sequence
from html import escape

from ..decoding.guided_tokens import GuidedTokens, name_of
from ..viewing.html import to_html
from ..viewing.tokens import BLUE, ORANGE, Token, TokenText, token_texts, visible
from .answers import Answer, Frame
from .models import Models

SIDES = ("unguided", "guided")
CHART_WIDTH, CHART_HEIGHT = 600, 80


def panel(side: str, text: str = "") -> str:
    """Returns the box of one answer."""
    return f'<div class="answer"><b>{side}</b><span>{escape(visible(text))}</span></div>'


def answers(models: Models, frame: Frame) -> list[str]:
    """Returns the boxes of both answers."""
    texts = [str(models.tokenizer.decode(ids, skip_special_tokens=True)) for ids in frame.ids]
    return [panel(side, text) for side, text in zip(SIDES, texts, strict=True)]


def tokens(models: Models, answer: Answer, frame: Frame, table: GuidedTokens, measure: str) -> str:
    """
    Draws both texts in the colours of a measure, and the divergence of each token of the guided one as a chart.

    Args:
        models ([`Models`]):
            The models that have answered.
        answer ([`Answer`]):
            The answer.
        frame ([`Frame`]):
            The texts.
        table ([`GuidedTokens`]):
            Statistics of them. Tokens that it doesn't have, as no reward was on, have no colour.
        measure (`str`):
            The title of a reward, or `"change"` or `"kl"`, also what is drawn for a reward that was never on.
    """
    column, name = measure, name_of(measure)
    if measure in answer.titles:
        column, name = f"reward_log_prob_{answer.titles.index(measure)}", f"{measure}, nats"
    if column not in table:
        column, name = "change", name_of("change")
    known = table.tokens(column)
    texts = []
    for row, (side, ids) in enumerate(zip(SIDES, frame.ids, strict=True)):
        plain = enumerate(token_texts(models.tokenizer, ids), start=answer.prompt_length)
        texts.append(TokenText([known.get((row, place), Token(text)) for place, text in plain], name, side))
    kl = [token.value for (row, _), token in table.tokens("kl").items() if row == 1]
    return to_html(texts) + chart(kl, "divergence of each token, and its mean, nats")


def facts(models: Models, answer: Answer, frame: Frame, scores: list[list[float]] | None = None) -> str:
    """Returns a table of the speed and, once they are known, the scores of both texts by each reward."""
    n_tokens = [len(ids) for ids in frame.ids]
    speed = max(n_tokens) / frame.seconds if frame.seconds else 0.0
    rows = [
        ("tokens", *map(str, n_tokens)),
        ("tokens per second", f"{models.unguided_speed:.1f} alone", f"{speed:.1f}, both together"),
    ]
    for title, values in zip(answer.titles, scores or [], strict=False):
        rows.append((f"{title}, minus the base, nats", *(f"{value:+.2f}" for value in values)))
    head = "".join(f"<th>{x}</th>" for x in ("", *SIDES))
    body = "".join("<tr>" + "".join(f"<td>{escape(visible(x))}</td>" for x in row) + "</tr>" for row in rows)
    return f'<table class="facts"><tr>{head}</tr>{body}</table>'


def chart(values: Sequence[float], label: str) -> str:
    """
    Draws a chart as SVG: values as bars, and their running mean as a line.

    Args:
        values (list of `float`):
            The values, none of them negative.
        label (`str`):
            What they measure.
    """
    values = [x if math.isfinite(x) else 0.0 for x in values]
    if not values:
        return ""
    top, step = max(*values, 1e-6), CHART_WIDTH / len(values)
    means = [total / n for n, total in enumerate(itertools.accumulate(values), start=1)]
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{CHART_HEIGHT * (1 - x / top):.1f}" width="{0.8 * step:.1f}" '
        f'height="{CHART_HEIGHT * x / top:.1f}"/>'
        for i, x in enumerate(values)
    )
    line = " ".join(f"{(i + 0.4) * step:.1f},{CHART_HEIGHT * (1 - x / top):.1f}" for i, x in enumerate(means))
    blue, orange = ("rgb({},{},{})".format(*color) for color in (BLUE, ORANGE))
    return (
        f'<div class="genarm-legend">{escape(label)}: mean {means[-1]:.2f}, highest {top:.2f}</div>'
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}" style="width: 100%; max-width: {CHART_WIDTH}px; height: {CHART_HEIGHT}px">'
        f'<g fill="{blue}" fill-opacity=".5">{bars}</g>'
        f'<polyline points="{line}" fill="none" stroke="{orange}" stroke-width="2" vector-effect="non-scaling-stroke"/>'
        "</svg>"
    )
