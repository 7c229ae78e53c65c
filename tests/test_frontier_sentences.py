"""Steering by a sentence in `examples/benchmarks/frontier`: what its answers are samples of, and the tables of it."""

import pandas as pd
import pytest
import torch
from transformers import set_seed

from examples.benchmarks.frontier.bench import Bench, Point
from examples.benchmarks.frontier.curves import ADAPTER, BOTH, BRIEF, SENTENCE, TRAINED, Curves
from examples.benchmarks.frontier.report import trained_adapters
from examples.benchmarks.frontier.sentences import PUBLISHED, answerer, steps, strengths, task
from examples.benchmarks.frontier.settings import PUBLISHED_STRENGTHS, SENTENCE_STRENGTHS, SENTENCES, SIZES
from examples.benchmarks.frontier.tables import by_sentence, by_strength
from hf_genarm.scripts.prompts import left_padded, token_ids


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_GENARM_SMOKE", "1")
    return Bench(tmp_path)


def test_at_strength_one_answers_are_those_of_prompting(bench):
    of, sentence = task(SIZES["smoke"]), SENTENCES["brevity"][0]
    prompts, points = of.test[:3], [Point(1.0)] * 3
    set_seed(0)
    answers = answerer(bench, of, sentence, None)(prompts, points)

    def tokens(*messages):
        return [token_ids(bench.tokenizer, [*messages, *chat]) for chat in of.asked(prompts)]

    inputs = left_padded(bench.tokenizer, tokens({"role": "system", "content": sentence}), bench.model.device)
    set_seed(0)
    output = bench.model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=of.size.max_new_tokens)
    output = output[:, inputs["input_ids"].shape[1] :]
    assert [row["text"] for row in answers] == bench.tokenizer.batch_decode(output, skip_special_tokens=True)
    # Fluency is what the base finds likely after the prompt alone.
    for row, prompt, answer in zip(answers, tokens(), output.tolist(), strict=True):
        answer = answer[: row["n_tokens"]]
        with torch.no_grad():
            log_probs = bench.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = sum(log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer))
        assert row["base_log_prob"] == pytest.approx(expected, abs=2e-3)
        assert row["kl"] > 0
        assert row["sentence"] == sentence


def test_methods_have_as_many_settings_and_both_have_half_strengths(bench):
    assert len(PUBLISHED_STRENGTHS) == len(SENTENCE_STRENGTHS)
    assert strengths(Point(2.0), "Be kind.", PUBLISHED) == [1.0, PUBLISHED_STRENGTHS[2] / 2]
    assert strengths(Point(2.0), None, PUBLISHED) == strengths(Point(2.0), "Be kind.", None) == [2.0]
    of = task(SIZES["smoke"])
    names = [step.about["method"] for step in steps(bench, of)]
    assert {name: names.count(name) for name in names} == {"base": 1, SENTENCE: 2, ADAPTER: 1, BOTH: 2, BRIEF: 2}
    work = [step.path.name for step in steps(bench, of)]
    assert len(set(work)) == len(work)


def answers_of(method, seed, strength, rewards, sentence=None):
    about = {"split": "test", "method": method, "seed": seed, "strength": strength, "temperature": 1.0}
    measures = {"kl": strength, "base_log_prob": -4.0, "n_tokens": 2, "words": 1.0, "ended": 1.0, "text": "a b"}
    rows = [about | measures | {"prompt": i, "reward": x, "second": x} for i, x in enumerate(rewards)]
    return [row | {"sentence": sentence} for row in rows]


def test_tables_by_strength_are_paired_and_have_a_row_for_each_sentence():
    rows = answers_of("base", 0, 0.0, [0.0, 0.2])
    for seed, shift in enumerate((0.0, 0.4)):
        rows += answers_of(SENTENCE, seed, 1.0, [0.1 + shift, 0.3 + shift], f"Sentence {seed}.")
        rows += answers_of(SENTENCE, seed, 2.0, [0.2 + shift, 0.4 + shift], f"Sentence {seed}.")
    curves = Curves(pd.DataFrame(rows))
    _, _, base, one, two = by_strength(curves, SENTENCE, "reward", ".2f").splitlines()
    assert base.startswith("| base | 0.10 [0.00, 0.20] | -0.30 [-0.50, -0.10] | 0.0 [0.0, 0.0] | 7.4 ")
    assert one.startswith("| α = 1 | 0.40 [0.10, 0.70] |  | 1.0 ")
    assert "| +0.10 [+0.10, +0.10] |" in two  # the same for all prompts and sentences
    lines = by_sentence(curves, SENTENCE, "reward", ["Sentence 0.", "Sentence 1."], ".2f").splitlines()
    assert lines[2:] == ["| Sentence 0. | 0.20 | 0.30 |", "| Sentence 1. | 0.60 | 0.70 |"]


def test_only_answers_of_trained_adapters_to_the_same_prompts_are_compared():
    rows = pd.DataFrame(answers_of("DPO loss, ratio", 0, 1.0, [0.1, 0.2, 0.3]) + answers_of("ARGS", 0, 1.0, [0.1]))
    dev = rows.assign(split="dev")
    found = trained_adapters(pd.concat([rows, dev]), 2)
    assert list(found["method"]) == [TRAINED] * 2
    assert list(found["reward"]) == [0.1, 0.2]
