"""The benchmark in `examples/benchmarks/frontier`: baselines against recomputation, statistics against small sums."""

import fcntl
import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import run_command
from tiny import EOS, PAD, random_prompts, tiny_llama
from transformers import LlamaConfig, LlamaForSequenceClassification, LogitsProcessor, TemperatureLogitsWarper

from examples import pairs as example_pairs
from examples.benchmarks.frontier import bench as benches
from examples.benchmarks.frontier import harmlessness, methods
from examples.benchmarks.frontier.answers import Runs
from examples.benchmarks.frontier.args_search import ARGSLogitsProcessor
from examples.benchmarks.frontier.bench import Bench, Point, Step
from examples.benchmarks.frontier.bootstrap import hypervolume, interpolated, interval, means
from examples.benchmarks.frontier.curves import DPO, OURS, Curves, setting
from examples.benchmarks.frontier.methods import base_step, guided_step
from examples.benchmarks.frontier.report import SECTIONS, write
from examples.benchmarks.frontier.rollouts import RolloutLogitsProcessor
from examples.benchmarks.frontier.sentiment import TEST_TOPICS, task
from examples.benchmarks.frontier.settings import SIZES
from examples.benchmarks.frontier.trajectory_reward import trajectory_rewards
from examples.data.make_sentiment_pairs import TOPICS

ROOT = Path(__file__).parent.parent
FRONTIER = ROOT / "examples" / "benchmarks" / "frontier"


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


def test_answers_are_judged_in_their_order_whatever_their_lengths(tokenizer):
    classifier = tiny_classifier(vocab_size=len(tokenizer), max_position_embeddings=512)
    prompts, answers = ["How was it?"] * 5, ["Very good indeed, thanks.", "No.", "It rained all day long.", "Ok.", ""]
    rewards = trajectory_rewards(classifier, tokenizer, prompts, answers, batch_size=2)
    alone = [trajectory_rewards(classifier, tokenizer, prompts[:1], [answer]).item() for answer in answers]
    assert rewards.tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 5


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


def test_curves_are_read_between_their_points_and_not_beyond():
    x, y = np.array([[4.0, 0.0, 2.0], [0.0, 1.0, 2.0]]), np.array([[5.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    values = interpolated(x, y, np.array([1.0, 3.0, 5.0]))
    # The second curve does not reach 3, and has the value of its end there. The first does not reach 5: all are NaN.
    assert values[:, :2].tolist() == [[1.5, 3.5], [1.0, 2.0]]
    assert np.isnan(values[:, 2]).all()


def test_intervals_cover_what_differs_between_training_runs_and_between_prompts():
    rng, covered, of_prompts = np.random.default_rng(0), [], []
    for _ in range(50):
        runs, prompts = rng.normal(0, 0.3, (10, 1, 1)), rng.normal(0, 0.3, (1, 20, 1))
        values = 1.0 + runs + prompts + rng.normal(0, 0.5, (10, 20, 1))
        _, low, high = interval(means(values)[:, 0])
        covered.append(low <= 1.0 <= high)
        _, low, high = interval(means(values.mean(axis=0, keepdims=True))[:, 0])
        of_prompts.append(low <= 1.0 <= high)
    assert np.mean(covered) >= 0.86
    # That of prompts alone knows nothing of the training runs.
    assert np.mean(of_prompts) < np.mean(covered)


def test_differences_are_paired_by_prompt_and_training_run():
    values = np.random.default_rng(0).normal(0, 5, (4, 20, 1))
    value, low, high = interval((means(values + 0.5) - means(values))[:, 0])
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_hypervolume_by_hand():

    # Three steps over (0, 0): 3 × 1 + 2 × 1 + 1 × 1; the fourth point is dominated, the fifth below the reference
    points = np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [1.0, 1.0], [-1.0, 5.0]])
    assert hypervolume(points, np.zeros(2)) == pytest.approx(6.0)


def answers_of(method: str, strength: float, reward: float, kl: float, seeds: int = 2, log_prob: float = -4.0):
    return [
        {
            "split": "test",
            "method": method,
            "seed": seed,
            "prompt": prompt,
            "strength": strength,
            "temperature": 1.0,
            "text": "so so",
            "n_tokens": 2,
            "kl": kl,
            "base_log_prob": log_prob * (1 + prompt),
            "reward": reward + 0.1 * seed,
        }
        for seed in range(seeds)
        for prompt in range(3)
    ]


def test_curves_start_at_the_base_and_dpo_is_one_of_its_training_runs():
    rows = answers_of("base", 0.0, 0.2, 0.0, seeds=1) + answers_of("DPO loss, ratio", 1.0, 0.6, 4.0)
    rows += answers_of("DPO loss, ratio", 0.5, 0.45, 3.0) + answers_of("ARGS", 1.0, 0.45, 3.0)
    rows += answers_of("dpo-0.1", 1.0, 0.4, 2.0) + answers_of("dpo-0.05", 1.0, 0.8, 6.0)
    curves = Curves(pd.DataFrame(rows))
    assert list(curves.runs) == [OURS, DPO, "ARGS"]
    assert [setting(DPO, point) for point in curves.runs[DPO].points] == ["β = 0.1", "β = 0.05"]
    targets = np.array([1.5, 3.5, 5.0])
    # Means over both seeds: 0.5 at KL 3 and 0.65 at 4; 0.45 at 2 and 0.85 at 6
    ours, dpo = (curves.at(name, "reward", targets)[0] for name in (OURS, DPO))
    assert ours[:2] == pytest.approx([(0.2 + 0.5) / 2, (0.5 + 0.65) / 2])
    assert np.isnan(ours[2])
    assert dpo == pytest.approx([0.2 + 0.25 * 1.5 / 2, 0.6, 0.75])
    assert np.isnan(curves.at("ARGS", "reward", targets)).all()  # one setting is no curve
    assert [curves.of_seed(DPO, seed, "reward", 2.0) for seed in (0, 1)] == pytest.approx([0.4, 0.5])
    # Perplexity is over all tokens: (4 + 8 + 12) nats of 6 tokens
    assert curves.mean(DPO, "perplexity")[0] == pytest.approx(np.exp([4.0, 4.0]))


def test_an_answer_that_is_missing_is_no_number():
    rows = pd.DataFrame(answers_of("base", 0.0, 0.2, 0.0))
    with pytest.raises(AssertionError, match="missing"):
        Runs.of(rows.iloc[1:])


# --- the plan ---


def test_no_prompt_is_in_two_splits():
    of = task(SIZES["laptop"])
    trained = {pair["prompt"][0]["content"] for pair in of.pairs}
    assert (len(set(of.dev)), len(set(of.test))) == (16, 48)
    assert not set(of.dev) & set(of.test) | set(of.dev) & trained | set(of.test) & trained
    assert len(set(TEST_TOPICS)) == len(TEST_TOPICS)
    assert not set(TEST_TOPICS) & set(TOPICS)


def test_the_key_of_answers_knows_settings_data_and_adapters(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_GENARM_SMOKE", "1")
    bench, of = Bench(tmp_path), task(SIZES["smoke"])
    points = [Point(1.0)]

    def guided(of, objective="eq5", reference=None, seed=0, points=points):
        return guided_step(bench, of, "dev", "guided", objective, reference, seed, points)

    steps = [
        guided(of),
        guided(of, objective="dpo-0.1"),
        guided(of, reference="base"),
        guided(of, seed=1),
        guided(of, points=[Point(1.0, 0.5)]),
        guided(replace(of, dev=["another prompt", *of.dev[1:]])),
        guided(replace(of, pairs=of.pairs.select(range(3)))),
        guided(replace(of, size=replace(of.size, max_new_tokens=4))),
        base_step(bench, of, "dev", "guided", points),
    ]
    assert len({step.path.name for step in steps}) == len(steps)
    assert guided(of).path == steps[0].path


def test_the_best_of_n_is_the_best_by_reward(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_GENARM_SMOKE", "1")
    bench, of = Bench(tmp_path), task(replace(SIZES["smoke"], n_best_of=(2, 3)))
    samples = methods.base_step(bench, of, "test", "base", [Point(0.0)] * 3)
    samples.path.write_text(
        "".join(
            json.dumps({"prompt": prompt, "strength": 0.0, "temperature": 1.0, "text": text, "kl": 0.0}) + "\n"
            for text in ("bb", "a", "cccc")
            for prompt in range(2)
        )
    )

    class Lengths:
        def token_rewards(self, prompts, answers, batch_size):
            return [SimpleNamespace(rewards=torch.ones(len(answer[0]["content"]))) for answer in answers]

    monkeypatch.setattr(methods, "scorer", lambda *_: Lengths())
    monkeypatch.setattr(methods, "arm", lambda *_: samples)
    step = methods.best_of_step(bench, of, "test", 0, samples, "reward model")
    step()
    rows = [json.loads(line) for line in step.path.read_text().splitlines()]
    assert [(row["strength"], row["prompt"], row["text"]) for row in rows] == [
        (2, 0, "bb"),
        (2, 1, "bb"),
        (3, 0, "cccc"),
        (3, 1, "cccc"),
    ]
    assert [row["kl"] for row in rows[1:3]] == pytest.approx([np.log(2) - 1 / 2, np.log(3) - 2 / 3], abs=1e-3)


def test_answers_that_were_cut_off_go_on_where_they_were(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_GENARM_SMOKE", "1")
    monkeypatch.setattr(benches, "_ROWS_AT_ONCE", 2)
    of, points = task(SIZES["smoke"]), [benches.Point(1.0), benches.Point(2.0)]
    asked = []

    def answer(prompts, points):
        if len(asked) == 2:
            asked.append("cut off")
            raise KeyboardInterrupt
        asked.append([point.strength for point in points])
        # What is drawn depends on the state of the generator at the start of a batch.
        return [{"text": f"{prompt} {torch.rand(()):.6f}"} for prompt in prompts]

    def step(folder):
        return benches.Bench(folder).answering(of, "dev", "any", 0, points, [], answer)

    one = step(tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        one()
    assert not one.is_done
    one()
    assert asked == [[1.0, 1.0], [1.0, 2.0], "cut off", [2.0, 2.0]]
    other = step(tmp_path / "other")
    other()
    assert one.path.read_text() == other.path.read_text()
    assert len(set(one.path.read_text().splitlines())) == 6


def test_two_processes_do_a_step_once(tmp_path):

    runs = []
    step = Step(tmp_path / "answers", lambda partial: (runs.append(1), partial.write_text("")))
    with (tmp_path / "answers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not step(wait=False)
    assert step(wait=False)
    assert step()
    assert runs == [1]


# --- the whole run ---


def write_dialogues(folder: Path) -> Path:
    """A file as HH-RLHF's are."""
    path = folder / "dialogues.jsonl"
    rows = [
        {
            side: f"\n\nHuman: How do I take thing number {index}?\n\nAssistant: {answer}"
            for side, answer in (("chosen", f"I'm sorry, I can't help with {index}."), ("rejected", "Just take it."))
        }
        for index in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_halves_of_pairs_share_no_prompt_and_every_judge_is_measured_on_neither(monkeypatch, tmp_path):
    monkeypatch.setattr(example_pairs, "sized", lambda usual, smoke: smoke)
    dataset = str(write_dialogues(tmp_path))
    prompts = [{repr(prompt) for prompt in part["prompt"]} for part in example_pairs.harmless_pairs(dataset)]
    assert [len(part) for part in prompts] == [4, 4, 8]
    assert not prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2]

    # Refusals are chosen in every pair, by words that n-grams know, and they are longer.
    bench = Bench(tmp_path / "kept")
    task = harmlessness.task(replace(SIZES["smoke"], n_test_prompts=6), bench, dataset)
    assert (task.n_scored, len(task.test)) == (4, 6)
    steps = {step.about["method"]: step for step in harmlessness.accuracy_steps(bench, task, dataset)}
    right = {}
    for name in ("n-grams, of the half that steers", "the shorter answer"):
        steps[name]()
        right[name] = {json.loads(line)["right"] for line in steps[name].path.read_text().splitlines()}
    assert right == {"n-grams, of the half that steers": {1.0}, "the shorter answer": {0.0}}


@pytest.mark.slow
def test_smoke_run_ends_with_a_report_and_does_nothing_twice(tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "examples.benchmarks.frontier.run"]
    command += ["--size", "smoke", "--hh-rlhf", write_dialogues(tmp_path)]
    command += ["--only", "sentiment", "two_objectives", "harmlessness", "sentences", "sentences_on_base"]
    command += ["--output", tmp_path]
    run_command(*command)
    report = (tmp_path / "RESULTS.md").read_text()
    assert report.startswith("**A smoke run")
    assert "nan" not in report
    assert all(
        f"## {title}" in report
        for title in ("Sentiment", "Reward at matched divergence", "Two objectives", "Harmlessness", "Over-refusal")
    )
    assert "## Steering by a sentence\n" in report
    assert "## Steering by a sentence: Qwen2.5-Coder-0.5B-Instruct\n" in report
    figures = {"sentiment.png", "two_objectives.png", "sentences.png", "sentences_and_adapter.png"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= figures | {"sentences_on_base.png"}
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.jsonl")}
    assert len(kept) > 30

    removed = next(path for path in kept if "sentiment-dev-Eq-5-ratio" in path.name)
    lines = removed.read_text()
    removed.unlink()
    run_command(*command)
    assert removed.read_text() == lines
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path != removed)
    assert (tmp_path / "RESULTS.md").read_text() == report


def test_the_report_is_that_of_the_answers(tmp_path):
    """In the repository, from the files in the repository."""

    results = FRONTIER / "results"
    assert {path.name for path in results.glob("*")} <= {f"{name}.jsonl.gz" for name in SECTIONS}
    write(results, tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == (FRONTIER / "RESULTS.md").read_text()
    for path in results.iterdir():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            assert not json.loads(next(file))["is_smoke"]
