"""The page: a prompt, sliders for sentences and adapters, two answers side by side, and what guidance did to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from ..decoding.recommended import recommended_alpha, recommended_temperature, wanted_reference
from ..hub.info import RewardInfo
from ..hub.sentence import DEFAULT_STRENGTH
from ..viewing.tokens import visible
from .answers import Answer, Settings, Visitor
from .drawing import SIDES, answers, facts, panel, tokens
from .models import Models
from .script import script_of

MAX_NEW_TOKENS = 256
TEMPERATURE = 0.7  # at the beginning, as in the quickstart: at 1, small models also write what they find unlikely
MAX_SENTENCES = 4
VISIT = 3600  # seconds without activity after which a visitor's state is dropped
DOCS = "https://hf-genarm.github.io/hf_genarm"

EXAMPLES = [
    "What did you think of the hotel? Answer in two sentences.",
    "Describe a rainy Monday.",
    "Should I learn to play the piano?",
    "How do I get over a bad day at work?",
]
REFERENCES = [("minus the base", "base"), ("as it is", "none")]
MEASURES = [("what guidance changed", "change"), ("divergence", "kl")]

CSS = """
#desk { display: grid; grid-template: "prompt steering" auto "answers steering" 1fr / 3fr 2fr; align-items: start; }
#question { grid-area: prompt; } #steering { grid-area: steering; } #answers { grid-area: answers; }
#question, #steering, #answers { min-width: 0 !important; }
@media (max-width: 768px) { #desk { grid-template: "prompt" "steering" "answers" / 1fr; } }
#answers .html-container, #picture .html-container { padding: 0; }
.answer { min-height: 9em; padding: .8em 1em; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-secondary); white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; }
#asked { min-height: 1.8em; }
#asked .meta-text-center { transform: none; }  /* the place in the queue, next to the question */
#unguided, #guided, .answer { height: 100%; }
.answer b { display: block; font-size: .85em; opacity: .75; margin-bottom: .3em; }
.facts { border-collapse: collapse; font-size: .9em; border: none !important; }
.facts tr, .facts td, .facts th { border: none !important; }
.facts td, .facts th { padding: .2em 1em .2em 0 !important; text-align: left; font-weight: 400; }
.facts td + td { white-space: nowrap; }
.facts th { opacity: .75; }
/* The track of a strength is filled from 0 on, in the middle, so that a reward that is off looks off. */
.strength input[type=range] { --low: min(50%, var(--range_progress)); --high: max(50%, var(--range_progress));
  --track: linear-gradient(to right, var(--neutral-200) var(--low), var(--slider-color) var(--low) var(--high),
  var(--neutral-200) var(--high)); }
.dark .strength input[type=range] { --neutral-200: var(--neutral-600); }
.strength input[type=range]::-webkit-slider-runnable-track { background: var(--track) !important; }
.strength input[type=range]::-moz-range-track { background: var(--track) !important; }
.strength input[type=range]::-moz-range-progress { background: none !important; }
"""


def build_page(models: Models, sentences: Sequence[str] = ()) -> gr.Blocks:
    """
    Builds the page. The first sentence, or else the first adapter, is on at the beginning.

    Args:
        models ([`Models`]):
            The models that answer.
        sentences (sequence of `str`, *optional*):
            Sentences that are on the page at the beginning.

    Raises:
        ValueError: if there are more sentences than there is room for.
    """
    if len(sentences) > MAX_SENTENCES:
        raise ValueError(f"`sentence` has {len(sentences)} sentences, but the page has room for {MAX_SENTENCES}.")
    arms = [models.reward_model(name) for name in models.adapters]
    first_sentences = [*sentences, *[""] * (MAX_SENTENCES - len(sentences))]
    first_strengths = [0.0] * (MAX_SENTENCES + len(arms))
    first_temperature, first_reference = TEMPERATURE, "base"
    if sentences:
        first_strengths[0] = DEFAULT_STRENGTH
    elif arms:
        (first_strengths[MAX_SENTENCES],) = recommended_alpha([arms[0].info])
        first_temperature = recommended_temperature([arms[0].info]) or TEMPERATURE
        first_reference = wanted_reference([arms[0].info], models.adapters[:1]) or "none"

    def arrive() -> Visitor:
        visitor = Visitor(Settings())
        steer(visitor, first_temperature, 0.0, *first_strengths, 0.0)
        return visitor

    def steer(visitor: Visitor, temperature: float, target_kl: float, *strengths: float) -> None:
        """Takes over what acts from the next token on."""
        settings, values = visitor.settings, [float(x) for x in strengths]
        names = [*models.adapters, *([visitor.own] if visitor.own else [])]
        settings.temperature, settings.target_kl = float(temperature), float(target_kl)
        settings.sentence_strengths = values[:MAX_SENTENCES]
        settings.strengths = dict(zip(names, values[MAX_SENTENCES:], strict=False))

    def ask(visitor: Visitor, prompt: str, seed: float, n_tokens: float, reference: str, *others: Any) -> tuple:
        """Takes a question, and clears the answer to the one before."""
        settings = visitor.settings
        settings.sentences = list(others[:MAX_SENTENCES])
        steer(visitor, *others[MAX_SENTENCES:])
        settings.seed, settings.max_new_tokens, settings.reference = int(seed or 0), int(n_tokens), reference
        try:
            answer = Answer(models, prompt, settings)
        except (ValueError, OSError) as error:
            raise refusal(error) from error
        visitor.ask(answer)
        choices = [*MEASURES, *((f"reward: {x}", x) for x in answer.titles)]
        return (
            gr.HTML(f"“{escape(visible(prompt.strip()))}”", visible=True),
            *map(panel, SIDES),
            "",
            "",
            "",
            gr.Dropdown(choices, visible=True),
        )

    def write(visitor: Visitor, measure: str) -> Iterator[tuple]:
        """Writes the answer that waits, until the visitor asks something else."""
        done, visitor.asked = visitor.asked, None
        if done is None:
            return
        visitor.answer, visitor.shown = done, None
        try:
            for frame in done.frames():
                if visitor.answer is not done:
                    return
                drawn = gr.skip()
                if frame.table is not None:
                    visitor.shown = frame, frame.table
                    drawn = draw(visitor, measure)
                yield *answers(models, frame), drawn, facts(models, done, frame)
        except (ValueError, OSError) as error:
            raise refusal(error) from error

    def finish(visitor: Visitor, measure: str) -> tuple:
        """Shows scores and script of an answer that is complete, or was stopped."""
        done = visitor.answer
        frame = None if done is None else done.result()
        if done is None or frame is None or frame.table is None:
            return (gr.skip(),) * 5
        visitor.shown = frame, frame.table
        written, scores = answers(models, frame), done.scores(frame)
        if visitor.answer is not done:
            return (gr.skip(),) * 5
        return *written, draw(visitor, measure), facts(models, done, frame, scores), script_of(models, done)

    def stop(visitor: Visitor) -> Any:
        """Stops the answer; one that still waits is not shown any more, and writes nothing when its turn comes."""
        is_waiting = visitor.asked is not None
        visitor.leave()
        return gr.HTML(visible=not is_waiting)

    def draw(visitor: Visitor, measure: str) -> str:
        if visitor.answer is None or visitor.shown is None:
            return ""
        return tokens(models, visitor.answer, *visitor.shown, measure)

    def add(text: str, *texts: str) -> list[Any]:
        """Shows a sentence with its slider in the first place that is free."""
        free = next((slot for slot, other in enumerate(texts) if not other.strip()), None)
        if free is None:
            raise refusal(f"There is room for {MAX_SENTENCES} sentences. Remove one, or edit it.")
        if not text.strip():
            return [gr.skip()] * (1 + 3 * MAX_SENTENCES)
        shown = [gr.Group(visible=True), text.strip(), DEFAULT_STRENGTH]
        return ["", *(x for slot in range(MAX_SENTENCES) for x in (shown if slot == free else [gr.skip()] * 3))]

    def load(visitor: Visitor, name: str) -> tuple[Any, str]:
        name = name.strip()
        try:
            if name in models.adapters:
                raise ValueError(f"`{name}` is on the page already: move its slider.")
            arm = models.reward_model(name)
        except (ValueError, OSError) as error:
            raise refusal(error) from error
        visitor.own = name
        info = arm.info
        about = info.description or info.objective or info.sentence or "It does not record what it rewards."
        slider = gr.Slider(visible=True, label=models.title(name), value=0.0)
        return slider, f'<div class="answer"><b>{escape(visible(name))}</b>{escape(visible(about))}</div>'

    with gr.Blocks(title="hf_genarm: steer while it writes", analytics_enabled=False) as page:
        visitor = gr.State(arrive, time_to_live=VISIT, delete_callback=Visitor.leave)
        gr.Markdown(
            "## Steer while it writes\nThe same model answers twice, by the same random numbers: unguided, and guided "
            "by what you choose. Move a slider while it writes: it acts from the next token on.\n\n"
            f"Base: {models.about} · [How it works]({DOCS}/concepts/) · [Which strength?]({DOCS}/strength/) · "
            f"[In your code]({DOCS}/quickstart/)",
            elem_id="intro",
        )
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="question"):
                prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, value=EXAMPLES[0], elem_id="prompt")
                gr.Examples(EXAMPLES, prompt)
            with gr.Column(elem_id="steering"):
                new = gr.Textbox(
                    label="Steer by a sentence",
                    info="No training is needed. Strength 1 is what the sentence does in a prompt. Edits act from the "
                    f"next answer on. [More]({DOCS}/strength/)",
                    placeholder="Answer like a pirate.",
                    submit_btn="Add",
                    elem_id="new",
                )
                first = zip(first_sentences, first_strengths, strict=False)
                slots = [_sentence(slot, text, strength) for slot, (text, strength) in enumerate(first)]
                with gr.Group():
                    adapters = zip(models.adapters, arms, first_strengths[MAX_SENTENCES:], strict=True)
                    strengths = [
                        _strength(models.title(name), value, f"strength-{index}", info=_recommended(arm.info))
                        for index, (name, arm, value) in enumerate(adapters)
                    ]
                    own = _strength("", 0.0, "strength-own", visible=False)
                with gr.Accordion("More settings", open=False):
                    temperature = gr.Slider(
                        0.1, 1.5, first_temperature, step=0.1, label="temperature", elem_id="temperature"
                    )
                    target_kl = gr.Slider(
                        0, 2, 0.0, step=0.05, label="target KL", info="nats per token; 0: strengths are not scaled"
                    )
                    seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**31, elem_id="seed")
                    n_tokens = gr.Slider(8, MAX_NEW_TOKENS, 64, step=8, label="tokens", elem_id="tokens")
                    reference = gr.Radio(
                        [(title + (" (recommended)" if x == first_reference else ""), x) for title, x in REFERENCES],
                        value=first_reference,
                        label="reward",
                        info="Minus the base, only what an adapter has learned counts; as it is, its whole "
                        "log-probability does, as in Eq. 7 of the paper. It acts from the next answer on. "
                        f"[More]({DOCS}/strength/#eq-7-or-a-reference)",
                        elem_id="reference",
                    )
            with gr.Column(elem_id="answers"):
                with gr.Row():
                    run = gr.Button("Answer", variant="primary", elem_id="run", min_width=120)
                    halt = gr.Button("Stop", elem_id="stop", min_width=120)
                asked = gr.HTML(elem_id="asked")
                with gr.Row():
                    sides = []
                    for side in SIDES:
                        with gr.Column(min_width=240):
                            sides.append(gr.HTML(panel(side), elem_id=side))
                numbers = gr.HTML(elem_id="facts")
        measure = gr.Dropdown(MEASURES, value="change", label="Tokens coloured by", visible=False, elem_id="measure")
        picture = gr.HTML(elem_id="picture")
        with gr.Accordion("Show me the code", open=False):
            code = gr.Code(language="python", label="the guided answer as a script", elem_id="code")
        with gr.Accordion("Another adapter or sentence", open=False):
            name = gr.Textbox(label="Hub id" + (" or folder" if models.takes_folders else ""), elem_id="own")
            fetch = gr.Button("Load", elem_id="load")
            about = gr.HTML(elem_id="about")

        texts, live = [x.text for x in slots], [temperature, target_kl, *(x.strength for x in slots), *strengths, own]
        written, scored = [*sides, picture, numbers], [*sides, picture, numbers, code]
        asking = gr.on(
            [run.click, prompt.submit],
            ask,
            [visitor, prompt, seed, n_tokens, reference, *texts, *live],
            [asked, *scored, measure],
            show_progress="hidden",
            trigger_mode="multiple",
            api_visibility="private",
        )
        # One answer at a time for all visitors. What is asked while it is written waits, and its place is shown.
        in_turn = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        writing = asking.success(
            write,
            [visitor, measure],
            written,
            show_progress="minimal",
            show_progress_on=asked,
            trigger_mode="always_last",
            **in_turn,
        )
        writing.then(finish, [visitor, measure], scored, show_progress="minimal", show_progress_on=numbers, **in_turn)
        halt.click(stop, visitor, asked, queue=False, show_progress="hidden", api_visibility="private")
        for slider in live:
            slider.change(
                steer,
                [visitor, *live],
                queue=False,
                show_progress="hidden",
                trigger_mode="always_last",
                api_visibility="private",
            )
        new.submit(
            add,
            [new, *texts],
            [new, *(part for slot in slots for part in (slot.group, slot.text, slot.strength))],
            show_progress="hidden",
            api_visibility="private",
        )
        for slot in slots:
            slot.remove.click(
                lambda: (gr.Group(visible=False), "", 0.0),
                None,
                [slot.group, slot.text, slot.strength],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
        measure.change(draw, [visitor, measure], picture, queue=False, show_progress="hidden", api_visibility="private")
        fetch.click(load, [visitor, name], [own, about], api_visibility="private")
    return page.queue(max_size=32)


@dataclass
class Slot:
    """Holds the parts of the page that belong to one sentence."""

    group: gr.Group
    text: gr.Textbox
    strength: gr.Slider
    remove: gr.Button


def _sentence(slot: int, text: str, strength: float) -> Slot:
    with gr.Group(visible=bool(text)) as group:
        remove = gr.Button("Remove", render=False)
        sentence = gr.Textbox(text, label="sentence", max_lines=4, buttons=[remove], elem_id=f"sentence-{slot}")
        slider = _strength("strength", strength, f"sentence-strength-{slot}")
    return Slot(group, sentence, slider, remove)


def _strength(label: str, value: float, elem_id: str, **kwargs: Any) -> gr.Slider:
    return gr.Slider(
        -3, 3, value, step=0.05, label=label, buttons=[], elem_id=elem_id, elem_classes="strength", **kwargs
    )


def _recommended(info: RewardInfo) -> str | None:
    """Returns in words how an adapter recommends to use it, if it does."""
    setting = info.recommended
    return None if setting is None else f"recommended: {setting['alpha']:g} at temperature {setting['temperature']:g}"


def refusal(error: Exception | str) -> gr.Error:
    """Returns an error as a message on the page, which stays until it is closed. Only queued events can show it."""
    return gr.Error(str(error), duration=None, print_exception=False)
