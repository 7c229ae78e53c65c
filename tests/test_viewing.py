"""Pictures of tokens: the tables stay tables, what is drawn is what they hold, and tokens can't do harm."""

import copy
import json
import pickle
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pandas
import pytest
import torch
from helpers import generate
from support import ARM, ASSISTANT, BASE, ONE
from tiny import tiny_llama

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.decoding.line import Line
from hf_genarm.decoding.statistics import Statistics
from hf_genarm.decoding.step import Run
from hf_genarm.decoding.texts import Text
from hf_genarm.functional import guided_product
from hf_genarm.viewing.picture import Picture
from hf_genarm.viewing.tokens import Token, TokenText, cells, scale_limit, token_texts, visible, wrap

matplotlib.use("Agg")

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

ROOT = Path(__file__).parent.parent

HOSTILE = [
    "<script>alert(1)</script>",
    '" onmouseover="x',
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnp.exe",
    "$\\frac{1}{2}$",
    "&lt;",
]


class Page(HTMLParser):
    """What a browser makes of a picture: its elements, and the text outside of notes and styles."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append((tag, dict(attributes).get("class")))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if ("style", None) not in self._open and not any(name == "genarm-note" for _, name in self._open):
            self.text += data


def without_colors(ansi):
    return re.sub(r"\033\[[\d;]*m", "", ansi)


@pytest.fixture
def arm(tokenizer):
    return AutoregressiveRewardModel(tiny_llama(0, vocab_size=len(tokenizer)), tokenizer)


@pytest.fixture
def guided(tokenizer):
    base, reward = (tiny_llama(seed, vocab_size=len(tokenizer)) for seed in (3, 4))
    processor = GenARMLogitsProcessor(AutoregressiveRewardModel(reward, tokenizer), 0.8, base_model=base)
    processor.keeps_statistics = True
    inputs = tokenizer("What is the weather like", return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    output = base.generate(**inputs, logits_processor=[processor], do_sample=False, max_new_tokens=12)
    return processor.statistics(output), output, inputs["input_ids"].shape[1]


def test_statistics_stay_a_table(guided):
    table, output, start = guided
    assert isinstance(table, dict)
    assert table == dict(table)
    frame = pandas.DataFrame(table)
    assert list(frame.columns) == list(table)
    assert frame["token"].tolist() == output[0, start:].tolist()
    assert json.loads(json.dumps(table)) == dict(table)
    for copied in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert copied == table
        assert copied.to_html() == table.to_html()


def test_token_rewards_stay_a_list_of_records(arm):
    rows = arm.token_rewards(["How was it?"] * 2, ["Fine.", "It was late."])
    assert isinstance(rows, list)
    assert rows[0] in rows[:1]
    assert list(asdict(rows[0])) == ["text", "input_ids", "offsets", "rewards"]
    assert pandas.DataFrame(rows)["text"].tolist() == ["Fine.", "It was late."]
    assert Page(rows[1].to_html()).text.endswith("It was late.∎")
    assert arm.token_rewards([], []) == []
    assert Page(arm.token_rewards([], []).to_html()).text == ""


def test_the_tokens_of_statistics_are_the_text(guided, tokenizer):
    table, output, start = guided
    (drawn,) = table.token_texts()
    assert "".join(token.text for token in drawn.tokens) == tokenizer.decode(output[0, start:])
    change = [x - y for x, y in zip(table["guided_log_prob"], table["base_log_prob"], strict=True)]
    assert [token.value for token in drawn.tokens] == change
    assert len(set(change)) > 5
    assert [token.value for token in table.by("kl").token_texts()[0].tokens] == table["kl"]
    with pytest.raises(ValueError, match="'fun', but must be 'change' or one of sequence"):
        table.by("fun")


def test_the_likeliest_tokens_are_those_of_the_distributions(guided, tokenizer):
    """Recomputed from scratch for the first token."""
    table, output, start = guided
    base, reward = (tiny_llama(seed, vocab_size=len(tokenizer)) for seed in (3, 4))
    with torch.no_grad():
        before, reward = (model(output[:, :start]).logits[0, -1].log_softmax(-1) for model in (base, reward))
    after = (before + 0.8 * reward).softmax(-1)
    notes = dict(table.token_texts()[0].tokens[0].notes)
    for name, probabilities in (("before", before.exp()), ("after", after)):
        top = probabilities.topk(3)
        expected = [(tokenizer.decode([x]), f"{p:.2f}") for x, p in zip(top.indices, top.values, strict=True)]
        assert re.findall(r"“(.*?)” ([\d.]+)", notes[f"likeliest {name}"], flags=re.DOTALL) == expected
    assert notes["likeliest before"] != notes["likeliest after"]


def test_several_sequences_and_no_tokenizer():
    processor = GenARMLogitsProcessor([ARM, ASSISTANT], [0.8, -0.3], base_model=BASE)
    processor.keeps_statistics = True
    output = generate(BASE, [processor], ONE, do_sample=True, top_k=0, num_return_sequences=2)
    table = processor.statistics(output.sequences)
    texts = table.token_texts()
    assert [text.title for text in texts] == ["sequence 0", "sequence 1"]
    assert texts[0].tokens[0].text == f"⟨{table['token'][0]}⟩"
    assert "reward 1" in dict(texts[0].tokens[0].notes)


def test_what_generate_pads_with_is_not_drawn(tokenizer):
    """A text that ended two tokens ago, in a batch with longer ones: its end stands there once."""
    table = Statistics(1, tokenizer)
    ids = torch.tensor([[5, 6, 40, 2, 2, 2]])
    uniform = torch.zeros(1, len(tokenizer)).log_softmax(-1)
    run = Run(ids[:, :2])
    for length in range(2, 7):
        text = Text(ids[:, :length], run, [length - 2], Line(ids[:, :length]))
        table.record(text, 1, guided_product(uniform, [uniform], [1.0]), [0])
    drawn = table.read(ids)
    assert len(drawn["token"]) == 4
    assert "".join(token.text for token in drawn.token_texts()[0].tokens) == tokenizer.decode([40]) + "<eos>"


def test_characters_of_several_tokens_and_spaces(tokenizer):
    ids = tokenizer("<eos>It was warm é 😀\n today")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts).replace("�", "") == "<eos>It was warm é 😀\n today"
    assert token_texts(tokenizer, ids, first=4) == texts[4:]


def test_hostile_tokens_are_text():
    texts = [TokenText([Token(x, 1.0, ((x, x),)) for x in HOSTILE], "<b>measure</b>", "<i>title</i>")]
    page = Page(Picture(texts).to_html())
    assert {tag for tag, _ in page.elements} == {"style", "div", "span"}
    assert {name for _, attributes in page.elements for name in attributes} == {"class", "style", "tabindex", "dir"}
    assert "<script>alert(1)</script>" in page.text
    assert "<i>title</i>" in page.text
    ansi = Picture(texts).to_ansi(width=400)
    assert "\033" not in without_colors(ansi)
    for harmful in ("\x07", "\x1b", "\u202e"):
        assert harmful not in without_colors(ansi) + page.text
    assert "http" not in Picture(texts).to_html()
    Picture(texts).plot().figure.canvas.draw()  # a formula would not be parsed


def test_one_scale_for_texts_side_by_side(arm):
    left, right = arm.token_rewards(["How?"] * 2, ["Fine.", "It was warm and the sun was cold."])
    both = left.beside(right, titles=["unguided", "guided"])
    assert [text.title for text in both.token_texts()] == ["unguided", "guided"]
    limit = scale_limit(both.token_texts())
    assert limit != scale_limit(left.token_texts())
    assert f"−{limit:.2g}" in Page(both.to_html()).text
    full = [(token.value, token.value <= -limit) for text in both.token_texts() for token in text.tokens]
    assert sum(is_full for _, is_full in full) == both.to_html().count("213,94,0,0.60")
    with pytest.raises(ValueError, match="`titles` has 1 entries, but there are 2 texts"):
        left.beside(right, titles=["unguided"])


def test_an_outlier_does_not_decide_the_scale():
    values = [0.1 * x for x in range(40)] + [1000.0, float("nan")]
    assert scale_limit([TokenText([Token("x", value) for value in values])]) == pytest.approx(3.8)
    assert scale_limit([TokenText([Token("x")])]) == 1.0


@pytest.mark.parametrize(("width", "error"), [(0, ValueError), (2**70, ValueError), (1.5, TypeError), ("a", TypeError)])
def test_widths_that_no_terminal_has(width, error):
    with pytest.raises(error, match=r"`width` is .*, but must be a number of columns, from 1 to 10,000"):
        Picture([]).to_ansi(width)


@pytest.mark.parametrize("width", [10, 24, 80])
def test_terminal_form(width, guided):
    table, _, _ = guided
    ansi = table.beside(table, titles=["unguided", "guided"]).to_ansi(width)
    lines = without_colors(ansi).splitlines()[1:]
    assert lines[0].split() == ["unguided", "guided"] or width == 10
    assert all(cells(line) <= max(width, 19) for line in lines)  # two columns of 8 at the least
    assert "48;2;" in ansi


def test_colours_of_a_terminal_are_on_a_given_scale():
    """Small values look like any text, whatever the background; a pipe gets none at all."""
    values = (0.05, -0.05, 0.4, -0.6, 1.4, 1.6, -9.0, float("nan"))
    picture = Picture([TokenText([Token(f"{index} ", value) for index, value in enumerate(values)], "nats")])
    scale, text = picture.to_ansi(80, limit=3.0).splitlines()
    assert "48;2;" in picture.to_ansi(80), "On a scale of their own, small values would be as full as large ones."
    assert without_colors(scale).split() == ["nats", "-1.5", "-0.5", "+0.5", "+1.5"]
    drawn = re.findall(r"(?:\033\[([\d;]*)m)?(\d) (?:\033\[0m)?", text + " ")
    blue, orange = "0;114;178", "213;94;0"
    letters, behind = "38;2;{}", "38;2;0;0;0;48;2;{}"
    colors = ["", "", "", letters.format(orange), letters.format(blue), behind.format(blue), behind.format(orange), ""]
    assert [color for color, _ in drawn] == colors
    assert picture.to_ansi(80, 3.0, has_colors=False) == without_colors(picture.to_ansi(80, 3.0))


def test_lines_break_before_words_and_within_long_ones():
    tokens = [Token("It"), Token(" un"), Token("believ"), Token("able\n"), Token("漢字漢字漢字"), Token(" x")]
    lines = ["".join(part for part, _ in line) for line in wrap(tokens, 10)]
    assert lines == ["It", "unbelievab", "le⏎", "漢字漢字漢", "字 x"]


def test_plot(guided, tmp_path):
    table, _, _ = guided
    ax = table.plot()
    drawn, written = "".join(text.get_text() for text in ax.texts), table.token_texts()[0].tokens
    assert drawn.startswith(visible("".join(token.text for token in written[:5])))
    assert len(ax.patches) > 5
    ax.figure.savefig(tmp_path / "tokens.pdf")
    assert table.plot(ax) is ax
    matplotlib.pyplot.close("all")


# --- with the real model ---


@pytest.mark.slow
def test_the_picture_of_the_readme(tmp_path):
    command = [sys.executable, "-m", "examples.tokens", "--output", str(tmp_path / "tokens.png")]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "48;2;" in printed
    assert (tmp_path / "tokens.png").read_bytes()[:4] == b"\x89PNG"
