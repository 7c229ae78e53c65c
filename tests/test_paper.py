"""The benchmark in `examples/benchmarks/paper`: its baselines against recomputation, its statistics by hand."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import run_command
from tiny import EOS, PAD, random_prompts, tiny_llama
from transformers import LlamaConfig, LlamaForSequenceClassification, LogitsProcessor, TemperatureLogitsWarper

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "examples" / "benchmarks" / "paper"


@pytest.fixture(autouse=True)
def paper_modules(monkeypatch):
    for folder in ("examples", "examples/data", "model_cards", "examples/benchmarks/paper"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def tiny_classifier(seed: int = 3, **sizes) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    config = tiny_llama(**sizes).config.to_dict() | {"num_labels": 1, "initializer_range": 0.4}
    return LlamaForSequenceClassification(LlamaConfig(**config)).eval()


class Recorder(LogitsProcessor):
    def __init__(self, processor):
        self.processor, self.calls = processor, []

    def __call__(self, input_ids, scores):
        result = self.processor(input_ids, scores)
        self.calls.append((input_ids, scores, result))
        return result


# --- baselines ---


def test_args_scores_candidates_as_a_reward_model_that_reads_each_of_them_from_scratch():
    from args_search import ARGSLogitsProcessor

    base, classifier, k, weight = tiny_llama(), tiny_classifier(), 5, 3.0
    prompts = random_prompts(3, 6)
    prompts[1, :2] = PAD
    mask = (prompts != PAD).long()
    recorder = Recorder(ARGSLogitsProcessor(classifier, weight, k))
    for _ in range(2):  # the second call starts over with the same object
        torch.manual_seed(0)
        base.generate(prompts, attention_mask=mask, logits_processor=[recorder], do_sample=True, max_new_tokens=5)
    assert len(recorder.calls) == 10
    spread = []
    for input_ids, scores, result in recorder.calls:
        for row in range(3):
            if EOS in input_ids[row, 6:]:
                continue
            text = input_ids[row, mask[row].argmax() :]
            log_probs, candidates = scores[row].log_softmax(dim=-1).topk(k)
            with torch.no_grad():
                texts = [torch.cat([text, token[None]])[None] for token in candidates]
                rewards = torch.stack([classifier(one).logits[0, 0] for one in texts])
            spread.append(rewards.std().item())
            expected = torch.full_like(scores[row], -torch.inf)
            expected[candidates] = log_probs + weight * rewards
            torch.testing.assert_close(result[row], expected, atol=1e-4, rtol=1e-4)
    assert min(spread) > 0.01


def test_rollouts_value_a_token_by_the_reward_of_the_answer_that_follows(tokenizer):
    from rollouts import RolloutLogitsProcessor
    from trajectory_reward import trajectory_rewards

    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    base, classifier = tiny_llama(**sizes), tiny_classifier(**sizes)
    policy = tiny_llama(1, **sizes)
    questions, k, weight = ["How was the train?", "And the food?"], 4, 2.0
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    length = inputs.input_ids.shape[1]
    processor = RolloutLogitsProcessor(policy, classifier, tokenizer, questions, length, 3, weight, k)
    answers = []
    policy_generate = policy.generate

    def generate(texts, **kwargs):
        output = policy_generate(texts, **kwargs)
        answers.append((texts, output))
        return output

    policy.generate = generate
    recorder = Recorder(processor)
    torch.manual_seed(0)
    base.generate(
        **inputs,
        logits_processor=[recorder],
        do_sample=True,
        max_new_tokens=3,
        suppress_tokens=[tokenizer.eos_token_id],
    )
    # Two rollouts; the third token completes the answers.
    assert len(answers) == 2
    input_ids, scores, result = recorder.calls[2]
    answers.append((None, torch.cat([input_ids.repeat_interleave(k, 0), scores.topk(k).indices.view(-1, 1)], 1)))
    for (_, scores, result), (texts, output) in zip(recorder.calls, answers, strict=True):
        log_probs, candidates = scores.log_softmax(dim=-1).topk(k)
        if texts is not None:
            assert torch.equal(texts[:, -1], candidates.flatten())
            assert torch.equal(output[:, : texts.shape[1]], texts)
        for row in range(2 * k):
            ids = output[row, length:].tolist()
            ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
            reward = trajectory_rewards(classifier, tokenizer, [questions[row // k]], [tokenizer.decode(ids)])
            expected = log_probs.flatten()[row] + weight * reward.item()
            assert result[row // k, candidates.flatten()[row]] == pytest.approx(expected.item(), abs=1e-4)
        assert (result > -torch.inf).sum() == 2 * k


def test_the_meter_measures_what_a_closed_form_says():
    from hf_genarm.decoding.meter import Meter

    base, prompts = tiny_llama(), random_prompts(2, 4)
    meter = Meter()
    torch.manual_seed(0)
    output = base.generate(
        prompts, logits_processor=meter.around([TemperatureLogitsWarper(0.5)]), do_sample=True, max_new_tokens=6
    )
    answers = output[:, 4:]
    lengths = torch.full((2,), 3)
    kl, log_prob = meter.read(answers, lengths)
    log_probs = base(output).logits.log_softmax(dim=-1)[:, 3:6]
    sharp = (2 * log_probs).log_softmax(dim=-1)
    expected = (sharp.exp() * (sharp - log_probs)).sum(dim=-1).sum(dim=-1)
    assert (expected > 0.1).all()
    torch.testing.assert_close(kl, expected, atol=1e-4, rtol=1e-4)
    taken = log_probs.gather(2, answers[:, :3, None])[..., 0].sum(dim=-1)
    torch.testing.assert_close(log_prob, taken, atol=1e-4, rtol=1e-4)


# --- statistics ---


def test_win_rates_count_every_pair_of_answers_and_half_of_the_ties():
    from intervals import win_rates

    # 2 > 1, 2 = 2, 0 < 1, 0 < 2: (1 + 0.5) / 4
    assert win_rates(np.array([[2.0, 0.0]]), np.array([[1.0, 2.0]])) == pytest.approx([0.375])


def test_length_matched_differences_leave_out_what_has_no_match():
    from intervals import length_matched

    scores, words = np.array([[3.0, 9.0], [5.0, 5.0]]), np.array([[10.0, 20.0], [50.0, 50.0]])
    other, other_words = np.array([[1.0], [0.0]]), np.array([[12.0], [10.0]])
    assert length_matched(scores, words, other, other_words) == pytest.approx([2.0])


def test_holm_by_hand():
    from intervals import holm

    # 3 × 0.01, then max(0.03, 2 × 0.02), then max(0.04, 1 × 0.03)
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])


def test_hypervolume_by_hand():
    from intervals import hypervolume

    # Three steps over (0, 0): 3 × 1 + 2 × 1 + 1 × 1; the fourth point is dominated, the fifth below the reference
    points = np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [1.0, 1.0], [-1.0, 5.0]])
    assert hypervolume(points, np.zeros(2)) == pytest.approx(6.0)


def test_intervals_cover_and_p_values_tell_a_difference_from_none():
    from intervals import interval, p_value

    rng = np.random.default_rng(1)
    samples = rng.normal(0.3, 1.0, (200, 100))
    covered = [low <= 0.3 <= high for _, low, high in map(interval, samples)]
    assert 0.88 <= np.mean(covered) <= 0.98
    assert p_value(samples.ravel()[:400]) < 0.001
    assert p_value(np.tile([1.0, -1.0], 100)) > 0.5


def test_there_is_no_number_where_there_is_nothing_to_compare():
    from intervals import cell
    from weak_to_strong import _ratio

    gap = np.array([0.4, 0.5, 0.6] * 9)
    assert _ratio(gap / 2, gap).startswith("0.50 [0.50, 0.50")
    assert _ratio(gap, gap - gap) == _ratio(gap, gap - 0.5) == "no gap"
    assert (cell(gap), cell(gap[:0])) == ("0.50 [0.47, 0.53]", "")


def test_looping_and_empty_answers_are_degenerate():
    from judges import is_degenerate

    assert is_degenerate("")
    assert is_degenerate("it is a great great great great day")
    assert is_degenerate("so very good and so very good, so very good and more so very good")
    assert not is_degenerate("A train ride is long, and the seats of a train are hard, but the view is fine.")


def test_perplexity_is_over_tokens_and_not_over_answers():
    from judges import perplexity

    answers = [[{"n_tokens": 3, "base_log_prob": -3.0}], [{"n_tokens": 1, "base_log_prob": -3.0}]]
    assert perplexity(answers) == pytest.approx(math.exp(6 / 4))


def test_halves_of_real_pairs_share_no_prompt(tmp_path):
    from real_pairs import halves

    dialogue = "\n\nHuman: Question {}?\n\nAssistant: {}"
    pairs = [{"chosen": dialogue.format(n // 2, n), "rejected": dialogue.format(n // 2, "no")} for n in range(20)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    first, second = halves(SimpleNamespace(size=SimpleNamespace(n_hh_pairs=16)), str(path))
    assert len(first) == len(second) == 8
    assert not {repr(prompt) for prompt in first["prompt"]} & {repr(prompt) for prompt in second["prompt"]}


def test_no_prompt_is_in_two_splits():
    from prompts import MORE_TOPICS, dev_prompts, sentiment_pairs, test_prompts

    splits = [
        dev_prompts(36),
        test_prompts(360),
        {pair["prompt"][0]["content"] for pair in sentiment_pairs(333)},
    ]
    assert len(set(MORE_TOPICS)) == len(MORE_TOPICS)
    assert [len(set(split)) for split in splits][:2] == [36, 360]
    assert not set(splits[0]) & set(splits[1]) | set(splits[0]) & splits[2] | set(splits[1]) & splits[2]


# --- the whole run ---


@pytest.mark.slow
def test_smoke_run_writes_every_section_and_does_nothing_twice(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    dialogue = "\n\nHuman: What is {}?\n\nAssistant: {}"
    rows = [
        {"chosen": dialogue.format(n, f"It is {n} and no more."), "rejected": dialogue.format(n, "Who knows?")}
        for n in range(16)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-W", "error::RuntimeWarning", PAPER / "run.py", "--size", "smoke"]
    command += ["--output", tmp_path / "kept", "--report", tmp_path / "new" / "report", "--hh-dataset", pairs]
    run_command(*command)
    report = (tmp_path / "new" / "report" / "RESULTS.md").read_text()
    assert report.startswith("**A smoke run")
    assert "nan" not in report
    assert "not run" not in report
    titles = [
        "Rewards of all methods",
        "Time of a token",
        "Weak to strong",
        "Two objectives",
        "Ablations",
        "Real pairs",
    ]
    assert all(f"## {title}" in report for title in titles)
    figures = {path.name for path in (tmp_path / "new" / "report" / "figures").iterdir()}
    assert figures == {"headline.png", "frontier.png", "weak_to_strong.png", "pareto.png"}
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*/answers/*")}
    assert len(kept) > 40

    (removed,) = (tmp_path / "kept").glob("*/answers/test-genarm-seed0.jsonl")
    lines = removed.read_text()
    removed.unlink()
    run_command(*command)
    assert removed.read_text() == lines
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path != removed)
    # The timing is kept, too, so that the report is the same.
    assert (tmp_path / "new" / "report" / "RESULTS.md").read_text() == report


def test_an_experiment_that_can_not_run_is_reported_as_not_run(capfd):
    import run as benchmark
    import settings

    bench = SimpleNamespace(size=settings.SIZES["smoke"], training=None, measuring=None)
    experiments = benchmark.Experiments(bench, ["real_pairs"], "no.jsonl")
    experiments.run()
    (text,) = experiments.sections()
    assert text.startswith("## real_pairs: not run\n\n`no.jsonl` can't be read: there is no such file")
    said = capfd.readouterr().err
    assert "`real_pairs` can't be run: `no.jsonl`" in said
    assert "Traceback" not in said


def test_a_failure_costs_one_experiment(monkeypatch, capfd, tmp_path):
    import run as benchmark
    from bench import Step

    def fails(partial):
        raise RuntimeError("out of\nmemory")

    failing = SimpleNamespace(steps=lambda bench: [Step(tmp_path / "answers", 1.0, fails)], section=None)
    working = SimpleNamespace(steps=lambda bench: [], section=lambda bench: "## It works")
    monkeypatch.setattr(benchmark, "EXPERIMENTS", {"one": failing, "other": working})
    experiments = benchmark.Experiments(None, ["one", "other"], "")
    experiments.run()
    assert experiments.sections() == ["## one: not run\n\nRuntimeError: out of memory", "## It works"]
    assert "Traceback" in capfd.readouterr().err


def test_a_report_that_can_not_be_written_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    import run as benchmark

    (tmp_path / "file").write_text("")
    arguments = ["run.py", "--output", str(tmp_path / "kept"), "--report", str(tmp_path / "file")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert "can't be the folder of the results" in capsys.readouterr().err
    assert not list((tmp_path / "kept").iterdir())


def test_the_key_knows_settings_data_and_weights(monkeypatch):
    import run as benchmark
    import settings

    monkeypatch.setenv("HF_GENARM_SMOKE", "1")
    size = settings.SIZES["smoke"]
    keys = [benchmark.key(size), benchmark.key(replace(size, n_epochs=2)), benchmark.key(replace(size, n_pairs=3))]
    monkeypatch.setattr(settings, "ALPHAS", (1.0, 3.0))
    keys.append(benchmark.key(size))
    monkeypatch.setitem(settings.TRAINING, "learning_rate", 1.0)
    keys.append(benchmark.key(size))
    monkeypatch.setattr(benchmark, "dev_prompts", lambda n: ["another prompt"])
    keys.append(benchmark.key(size))
    monkeypatch.setattr(benchmark, "demo_model", lambda: str(ROOT / "model_cards" / "arm-smollm2-135m-brevity"))
    keys.append(benchmark.key(size))
    assert len(set(keys)) == len(keys)
    assert benchmark.key(size) == keys[-1]
