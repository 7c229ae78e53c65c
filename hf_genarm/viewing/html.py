"""Pictures of tokens for notebooks and pages: one piece of HTML and CSS, without scripts and without a network."""

from collections.abc import Sequence
from html import escape

from .tokens import Token, TokenText, scale_ends, scale_limit, shade, visible

# Over any background; text stays readable on black and on white.
_FULLEST = 0.6

# The notes of a token appear in space that is kept free below the texts, so that they never cover any text.
_STYLE = """<style>
.genarm { container-type: inline-size; font-size: 1rem; color: inherit; }
.genarm-body { position: relative; }
.genarm-texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17em, 100%), 1fr)); gap: 1.2em; }
.genarm-title { font-weight: 600; margin-bottom: .3em; }
.genarm-text { line-height: 1.8; white-space: pre-wrap; overflow-wrap: anywhere; }
.genarm-token { border-radius: .2em; padding: .12em 0; cursor: default; outline-offset: 1px; }
.genarm-token:hover, .genarm-token:focus { outline: 2px solid currentcolor; }
.genarm-note { display: none; position: absolute; left: 0; right: 0; top: calc(100% + .4em); font-size: .85em;
  line-height: 1.6; grid-template-columns: fit-content(40%) 1fr; column-gap: 1em; }
.genarm-room { height: calc(var(--notes) * 1.4em + .8em); }
@container (max-width: 32em) { .genarm-room { height: calc(var(--notes) * 2.8em + .8em); } }
.genarm-token:hover .genarm-note, .genarm-token:focus .genarm-note { display: grid; }
.genarm:has(.genarm-token:hover) .genarm-token:focus:not(:hover) .genarm-note { display: none; }
.genarm-key { opacity: .75; }
.genarm-legend { display: flex; flex-wrap: wrap; gap: .3em .7em; align-items: center; font-size: .85em;
  margin: .2em 0 .8em; }
.genarm-bar { width: 8em; height: .8em; border-radius: .2em; }
.genarm-hint { opacity: .75; }
</style>"""


def to_html(texts: Sequence[TokenText], limit: float | None = None) -> str:
    """
    Draws texts as HTML.

    Args:
        texts (list of [`TokenText`]):
            The texts, side by side, or below each other where there is no room.
        limit (`float`, *optional*):
            The value at which colours are full. Defaults to what suits these texts.
    """
    limit = limit or scale_limit(texts)
    n_notes = max((len(token.notes) for text in texts for token in text.tokens), default=0)
    room = f'<div class="genarm-room" style="--notes: {n_notes}"></div>' if n_notes else ""
    body = "".join(_text(text, limit) for text in texts)
    legend = _legend(texts, limit, n_notes > 0)
    picture = f'<div class="genarm-body">{legend}<div class="genarm-texts">{body}</div></div>'
    return f'{_STYLE}<div class="genarm">{picture}{room}</div>'


def _text(text: TokenText, limit: float) -> str:
    title = f'<div class="genarm-title">{escape(visible(text.title))}</div>' if text.title else ""
    tokens = "".join(_token(token, limit) for token in text.tokens)
    return f'<div>{title}<div class="genarm-text" dir="auto">{tokens}</div></div>'


def _token(token: Token, limit: float) -> str:
    (red, green, blue), share = shade(token.value, limit)
    color = f' style="background: rgba({red},{green},{blue},{_FULLEST * share:.2f})"' if share else ""
    # A newline alone has no background to be pointed at.
    text = escape(visible(token.text).replace("\n", "⏎\n" if token.notes else "\n"))
    if not token.notes:
        return f'<span class="genarm-token"{color}>{text}</span>'
    rows = "".join(
        f'<span class="genarm-key">{escape(visible(name))}</span><span>{escape(visible(value))}</span>'
        for name, value in token.notes
    )
    return f'<span class="genarm-token" tabindex="0"{color}>{text}<span class="genarm-note">{rows}</span></span>'


def _legend(texts: Sequence[TokenText], limit: float, has_notes: bool) -> str:
    stops = [("0", "transparent")]
    for end in scale_ends(texts, limit):
        (red, green, blue), _ = shade(end, limit)
        stop = (f"{end:+.2g}".replace("-", "−"), f"rgba({red},{green},{blue},{_FULLEST})")
        stops = [stop, *stops] if end < 0 else [*stops, stop]
    hint = '<span class="genarm-hint">Point at a token, or tap it, for more.</span>' if has_notes else ""
    measure = escape(", ".join(dict.fromkeys(text.measure for text in texts if text.measure)))
    bar = ""
    if len(stops) > 1:
        gradient = ", ".join(color for _, color in stops)
        bar = (
            f'<span>{stops[0][0]}</span><span class="genarm-bar" style="background: linear-gradient(to right, '
            f'{gradient})"></span><span>{stops[-1][0]}</span>'
        )
    return f'<div class="genarm-legend"><span>{measure}</span>{bar}{hint}</div>' if measure or bar or hint else ""
