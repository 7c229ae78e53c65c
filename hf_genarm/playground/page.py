"""The page: a prompt, sliders, two answers side by side, and the effect of guidance on each token."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from ..decoding.guided_tokens import GuidedTokens, name_of
from ..decoding.recommended import recommended_alpha, wanted_reference
from ..viewing.html import to_html
from ..viewing.tokens import BLUE, ORANGE, Token, TokenText, token_texts, visible
from .answers import Answer, Frame, Settings
from .models import Models, title_of
from .script import script_of

MAX_NEW_TOKENS = 256
VISIT = 3600  # seconds without activity after which a visitor's state is dropped
SIDES = ("unguided", "guided")
CHART_WIDTH, CHART_HEIGHT = 600, 80

EXAMPLES = [
    "What did you think of the hotel? Answer in two sentences.",
    "Describe a rainy Monday.",
    "Should I learn to play the piano?",
    "How do I get over a bad day at work?",
]

CSS = """
.answer { min-height: 9em; padding: .8em 1em; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-secondary); white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; }
.answer b { display: block; font-size: .85em; opacity: .75; margin-bottom: .3em; }
.facts { border-collapse: collapse; font-size: .9em; border: none !important; }
.facts tr, .facts td, .facts th { border: none !important; }
.facts td, .facts th { padding: .2em 1em .2em 0 !important; text-align: left; font-weight: 400; }
.facts td + td { white-space: nowrap; }
.facts th { opacity: .75; }
"""


@dataclass
class Visitor:
    """Holds the state of one open page."""

    settings: Settings
    own: str | None = None
    answer: Answer | None = None
    last: tuple[Answer, Frame, GuidedTokens] | None = field(default=None, repr=False)

    def leave(self) -> None:
        if self.answer is not None:
            self.answer.stop()


def build_page(models: Models) -> gr.Blocks:
    """
    Builds the page.

    Args:
        models ([`Models`]):
            The models that answer.
    """
    arms = [models.reward_model(name) for name in models.adapters]
    titles = [title_of(name, arm) for name, arm in zip(models.adapters, arms, strict=True)]
    measures = [("what guidance changed", "change"), ("divergence", "kl")]
    measures += [(f"reward: {title}", f"reward_log_prob_{index}") for index, title in enumerate(titles)]
    # At first only one reward model is on, with the settings that it recommends.
    first = [arms[0].info]
    first_strengths = [*recommended_alpha(first), *[0.0] * len(arms[1:])]
    first_reference = wanted_reference(first, models.adapters[:1]) or "none"

    def arrive() -> Visitor:
        return Visitor(Settings(dict(zip(models.adapters, first_strengths, strict=True))))

    def answer(
        visitor: Visitor, prompt: str, seed: float, n_tokens: float, reference: str, measure: str, *live: float
    ) -> Iterator[tuple]:
        set_live(visitor, *live)
        settings = visitor.settings
        settings.seed, settings.max_new_tokens, settings.reference = int(seed or 0), int(n_tokens), reference
        try:
            done = visitor.answer = Answer(models, prompt, settings)
            drawn = gr.skip()
            for frame in done.frames():
                if frame.table is not None:
                    visitor.last = (done, frame, frame.table)
                    drawn = draw(visitor, measure)
                yield (*texts_of(models, frame), drawn, facts(models, frame, None), gr.skip())
                drawn = gr.skip()
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        finally:
            visitor.answer = None
        yield (
            *texts_of(models, frame),
            draw(visitor, measure),
            facts(models, frame, done.scores(frame)),
            script_of(models, done),
        )

    def draw(visitor: Visitor, measure: str) -> str:
        if visitor.last is None:
            return ""
        done, frame, table = visitor.last
        kl = [token.value for (row, _), token in table.tokens("kl").items() if row == 1]
        texts = colored(models, done, frame, table, measure if measure in table else "change")
        return to_html(texts) + chart(kl, "divergence of each token, and its mean, nats")

    def set_live(visitor: Visitor, temperature: float, target_kl: float, *strengths: float) -> None:
        names = [*models.adapters, *([visitor.own] if visitor.own else [])]
        settings = visitor.settings
        settings.temperature, settings.target_kl = float(temperature), float(target_kl)
        settings.strengths = {name: float(value) for name, value in zip(names, strengths, strict=False)}

    def stop(visitor: Visitor) -> None:
        visitor.leave()

    def load(visitor: Visitor, name: str) -> tuple[Any, str, Any]:
        name = name.strip()
        try:
            if name in models.adapters:
                raise ValueError(f"`{name}` is on the page already: move its slider.")
            arm = models.reward_model(name)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        visitor.own = name
        about = arm.info.description or arm.info.objective or "It does not record what it rewards."
        slider = gr.Slider(visible=True, label=title_of(name, arm), value=0.0)
        choices = [*measures, (f"reward: {title_of(name, arm)}", f"reward_log_prob_{len(titles)}")]
        card = f'<div class="answer"><b>{escape(visible(name))}</b>{escape(visible(about))}</div>'
        return slider, card, gr.Dropdown(choices=choices)

    with gr.Blocks(title="hf_genarm: steer while it writes", analytics_enabled=False) as page:
        visitor = gr.State(arrive, time_to_live=VISIT, delete_callback=Visitor.leave)
        gr.Markdown(
            "## Steer while it writes\nThe same model answers twice, by the same random numbers: without guidance, and "
            "guided by reward models. Move a slider while it writes: it acts from the next token on."
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, value=EXAMPLES[0], elem_id="prompt")
                gr.Examples(EXAMPLES, prompt)
                with gr.Row():
                    run = gr.Button("Answer", variant="primary", elem_id="run", min_width=120)
                    halt = gr.Button("Stop", elem_id="stop", min_width=120)
                with gr.Row():
                    sides = []
                    for side in SIDES:
                        with gr.Column(min_width=240):
                            sides.append(gr.HTML(panel(side, ""), elem_id=side))
                numbers = gr.HTML(elem_id="facts")
            with gr.Column(scale=2, min_width=300):
                strengths = [
                    gr.Slider(-3, 3, first_strengths[index], step=0.05, label=title, elem_id=f"strength-{index}")
                    for index, title in enumerate(titles)
                ]
                own = gr.Slider(-3, 3, 0.0, step=0.05, visible=False, elem_id="strength-own")
                temperature = gr.Slider(0.1, 1.5, 1.0, step=0.1, label="temperature", elem_id="temperature")
                target_kl = gr.Slider(
                    0, 2, 0.0, step=0.05, label="target KL", info="nats per token; 0: strengths are not scaled"
                )
                with gr.Row():
                    seed = gr.Number(
                        0, label="seed", precision=0, minimum=0, maximum=2**31, min_width=90, elem_id="seed"
                    )
                    n_tokens = gr.Slider(8, MAX_NEW_TOKENS, 64, step=8, label="tokens", min_width=160, elem_id="tokens")
                reference = gr.Radio(
                    [("log-probability", "none"), ("minus that of the base", "base")],
                    value=first_reference,
                    label="reward",
                    info="acts from the next answer on",
                )
        measure = gr.Dropdown(measures, value="change", label="Tokens coloured by", elem_id="measure")
        tokens = gr.HTML(elem_id="picture")
        with gr.Accordion("Show me the code", open=False):
            code = gr.Code(language="python", label="the guided answer as a script", elem_id="code")
        with gr.Accordion("Another adapter", open=False):
            name = gr.Textbox(label="Hub id" + (" or folder" if models.takes_folders else ""), elem_id="own")
            fetch = gr.Button("Load", elem_id="load")
            about = gr.HTML(elem_id="about")

        live = [temperature, target_kl, *strengths, own]
        outputs = [*sides, tokens, numbers, code]
        inputs = [visitor, prompt, seed, n_tokens, reference, measure, *live]
        gr.on(
            [run.click, prompt.submit],
            answer,
            inputs,
            outputs,
            concurrency_limit=1,
            show_progress="hidden",
            api_visibility="private",
        )
        halt.click(stop, visitor, queue=False, api_visibility="private")
        for slider in live:
            slider.change(
                set_live,
                [visitor, *live],
                queue=False,
                show_progress="hidden",
                trigger_mode="always_last",
                api_visibility="private",
            )
        measure.change(draw, [visitor, measure], tokens, queue=False, show_progress="hidden", api_visibility="private")
        fetch.click(load, [visitor, name], [own, about, measure], api_visibility="private")
    return page.queue(max_size=32)


def panel(side: str, text: str) -> str:
    """Returns the box of one answer."""
    return f'<div class="answer"><b>{side}</b><span>{escape(visible(text))}</span></div>'


def texts_of(models: Models, frame: Frame) -> list[str]:
    """Returns the boxes of both answers."""
    texts = [str(models.tokenizer.decode(ids, skip_special_tokens=True)) for ids in frame.ids]
    return [panel(side, text) for side, text in zip(SIDES, texts, strict=True)]


def colored(models: Models, answer: Answer, frame: Frame, table: GuidedTokens, measure: str) -> list[TokenText]:
    """Returns both texts with the colours of a measure; tokens that no reward model has scored have none."""
    known = table.tokens(measure)
    texts = []
    for row, (side, ids) in enumerate(zip(SIDES, frame.ids, strict=True)):
        plain = enumerate(token_texts(models.tokenizer, ids), start=answer.prompt_length)
        texts.append(TokenText([known.get((row, place), Token(text)) for place, text in plain], name_of(measure), side))
    return texts


def facts(models: Models, frame: Frame, scores: dict[str, list[float]] | None) -> str:
    """Returns a table of the speed and, once they are known, the scores of both texts by each reward model."""
    n_tokens = [len(ids) for ids in frame.ids]
    speed = max(n_tokens) / frame.seconds if frame.seconds else 0.0
    rows = [
        ("tokens", *map(str, n_tokens)),
        ("tokens per second", f"{models.unguided_speed:.1f} alone", f"{speed:.1f}, both together"),
    ]
    for name, values in (scores or {}).items():
        title = title_of(name, models.reward_model(name))
        rows.append((f"{title}, minus that of the base, nats", *(f"{value:+.2f}" for value in values)))
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
