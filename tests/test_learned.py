"""What a training has learned: in numbers, in the last lines of the command, in its picture; and its default rate."""

import json
import math
import shlex

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from helpers import LORA, ROOT, run, write
from pairs import CHOSEN, PROMPTS, REJECTED, STANDARD, conversational
from peft import LoraConfig
from scipy.stats import binomtest
from transformers import EvalPrediction, TrainerCallback

from hf_genarm import AutoregressiveRewardConfig, GuidanceWarning, RewardInfo, cli
from hf_genarm.scripts import plots, train
from hf_genarm.scripts.arguments import ARGUMENTS
from hf_genarm.scripts.parser import Parser
from hf_genarm.training.config import adapter_learning_rate
from hf_genarm.training.learned import learned
from hf_genarm.training.metrics import preference_metrics, wilson_interval


@pytest.mark.parametrize(("right", "n"), [(0, 1), (5, 5), (0, 7), (3, 5), (79, 136), (50_000, 50_000)])
def test_the_interval_is_that_of_wilson(right, n):
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson_interval(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_five_of_five_are_no_certainty():
    rewards = np.array([[1.0, 0.0]] * 5)
    metrics = preference_metrics(EvalPrediction(predictions=rewards, label_ids=(np.full((5, 2), 4), rewards / 2)))
    for name in ("pair_accuracy", "contrast_accuracy", "length_matched_accuracy"):
        # (1 + z² / 2n ± z² / 2n) / (1 + z² / n)
        assert metrics[f"{name}_low"] == pytest.approx(1 / (1 + 1.96**2 / 5), abs=1e-4)
        assert metrics[f"{name}_high"] == 1


def test_what_was_learned_does_not_depend_on_how_it_is_measured(make_trainer):
    """An adapter, evaluated as a reward without a reference and as a contrast with its base."""
    measured = []
    for reference in (None, "base"):
        torch.manual_seed(0)
        adapter = LoraConfig(**LORA, init_lora_weights=False)
        pairs = Dataset.from_dict(STANDARD)
        trainer = make_trainer(peft_config=adapter, eval_dataset=pairs, reference=reference, beta=0.3)
        trainer.evaluate()
        measured.append(learned(trainer.reward_info))
        rewards = trainer.predict(trainer.eval_dataset).predictions
    assert measured[0].n_pairs == 3
    assert vars(measured[0]) == pytest.approx(vars(measured[1]), rel=1e-3)
    nats = math.sqrt(np.mean(((rewards[:, 0] - rewards[:, 1]) / 0.3) ** 2))
    assert nats > 0.1
    assert measured[1].nats == pytest.approx(nats, rel=1e-5)


def test_nothing_was_learned_by_comparison_with_nothing(make_trainer):
    trainer = make_trainer(eval_dataset=Dataset.from_dict(STANDARD))
    assert learned(trainer.reward_info) is None
    trainer.evaluate()
    assert "pair_accuracy" in trainer.reward_info.metrics
    assert learned(trainer.reward_info) is None


def test_an_adapter_that_can_not_be_seen_is_warned_about(make_trainer):
    for learning_rate, is_seen in ((1e-7, False), (0.3, True)):
        trainer = make_trainer(
            peft_config=LoraConfig(**LORA),
            eval_dataset=Dataset.from_dict(STANDARD),
            reference="base",
            learning_rate=learning_rate,
            max_steps=6,
        )
        trainer.train()
        trainer.evaluate()
        assert (learned(trainer.reward_info).nats > 0.5) == is_seen
        if is_seen:
            trainer.save_model()
        else:
            with pytest.warns(GuidanceWarning, match="too little .* after 6 steps at a learning rate of 1e-07"):
                trainer.save_model()


# --- the default learning rate ---


def test_fewer_steps_are_longer():
    assert [adapter_learning_rate(n) for n in (16, 256, 4096)] == pytest.approx([1e-3, 1e-3 / 2**0.5, 5e-4])


@pytest.mark.parametrize(
    ("options", "n_steps"),
    [
        ({"num_train_epochs": 3, "per_device_train_batch_size": 2}, 6),
        ({"num_train_epochs": 1.5, "per_device_train_batch_size": 1}, 5),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, 4),
        ({"max_steps": 2}, 2),
    ],
)
def test_the_rate_of_an_adapter_is_that_of_its_steps(make_trainer, options, n_steps):
    rates = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = make_trainer(peft_config=LoraConfig(**LORA), learning_rate=None, lr_scheduler_type="constant", **options)
    trainer.add_callback(Rates())
    trainer.train()
    assert trainer.state.global_step == n_steps
    assert rates == pytest.approx([1e-3 * (16 / n_steps) ** (1 / 8)] * n_steps)


def test_the_rate_is_chosen_for_one_trainer(make_trainer, tmp_path):
    """The arguments of the user stay as they are; what is given is used, and all weights have the rate of TRL."""
    assert AutoregressiveRewardConfig(str(tmp_path)).learning_rate is None
    assert make_trainer(learning_rate=None).args.learning_rate == 1e-4
    given = make_trainer(peft_config=LoraConfig(**LORA), learning_rate=0.5)
    assert given.args.learning_rate == 0.5
    stream = Dataset.from_dict(STANDARD).to_iterable_dataset()
    chosen = make_trainer(stream, peft_config=LoraConfig(**LORA), learning_rate=None, max_steps=16)
    assert chosen.args.learning_rate == pytest.approx(1e-3)


# --- the command ---


def options_of_a_run(base_folder, tmp_path, columns=None):
    path = write(tmp_path, "jsonl", columns or conversational(True))
    given = ["--model", base_folder, "--dataset", path, "--dataset_test_split", "train", "--report_to", "none"]
    return [*given, "--max_steps", 4, "--per_device_train_batch_size", 1, "--output_dir", tmp_path / "my arm"]


@pytest.fixture
def figures(monkeypatch):
    """The axes of all figures that are drawn."""
    drawn = []

    def kept(figure, axes, path):
        drawn.append(axes)
        saved(figure, axes, path)

    saved = plots._save
    monkeypatch.setattr(plots, "_save", kept)
    return drawn


def test_the_last_lines_of_a_training(base_folder, tmp_path, capsys, figures):
    options = options_of_a_run(base_folder, tmp_path)
    run("train", *options, "--learning_rate", 0.1)
    *_, share, nats, following = capsys.readouterr().out.strip().splitlines()
    info = RewardInfo.load(tmp_path / "my arm" / "genarm_config.json")
    assert info.reference == "base"
    right = info.metrics["pair_accuracy"] * 3
    assert f"{right:g} of 3 held-out pairs" in share
    interval = binomtest(round(right), 3).proportion_ci(method="wilson")
    assert f"[{interval.low:.2f}, {interval.high:.2f}]" in share
    assert f"{info.reward_scale:.2g} nats" in nats
    program, command, *arguments = shlex.split(following[following.index("hf-genarm") :])
    assert (program, command) == ("hf-genarm", "tune")
    (parsed,) = Parser(ARGUMENTS["tune"], "hf-genarm tune").read(arguments)
    assert (parsed.arm, parsed.prompts) == (str(tmp_path / "my arm"), str(tmp_path / "pairs.jsonl"))

    # Also a short run has a point for each step.
    (axes,) = figures
    for axis, name in zip(axes, ("loss", "learned accuracy"), strict=True):
        assert axis.get_ylabel() == name
        lines = {line.get_label(): list(line.get_xdata()) for line in axis.get_lines()}
        assert lines["training"] == [1, 2, 3, 4]
    logs = json.loads((tmp_path / "my arm" / "trainer_state.json").read_text())["log_history"]
    accuracy = next(line for line in figures[0][1].get_lines() if line.get_label() == "training")
    assert list(accuracy.get_ydata()) == [x["accuracy"] for x in logs if "accuracy" in x]


@pytest.mark.parametrize(
    ("options", "reference"),
    [([], "base"), (["--reference", "none"], None), (["--reference", "base"], "base"), (["--no_use_peft"], None)],
)
def test_an_adapter_is_contrasted_with_its_base(base_folder, tmp_path, capsys, options, reference):
    run("train", *options_of_a_run(base_folder, tmp_path), "--learning_rate", 0.1, *options)
    assert RewardInfo.load(tmp_path / "my arm" / "genarm_config.json").reference == reference
    measured = "What it has learned prefers" in capsys.readouterr().out
    assert measured == ("--no_use_peft" not in options)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "recipes").glob("*_[lhf]*.yaml")), ids=lambda x: x.stem)
def test_recipes_of_the_paper_have_its_objective(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    (_, args, *_) = Parser(train.ARGUMENTS, "hf-genarm train").read(["--config", str(path), "--output_dir", "arm"])
    assert args.reference is None
    assert not args.is_reference_open
    assert args.learning_rate == recipe["learning_rate"]


def test_an_unknown_reference_in_a_recipe_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("reference: bass\n", encoding="utf-8")
    needed = ["--model", "m", "--dataset", "d", "--output_dir", "o"]
    with pytest.raises(cli.UsageError, match="`reference` is 'bass'"):
        Parser(train.ARGUMENTS, "hf-genarm train").read([*needed, "--config", str(recipe)])


# --- chat or plain ---


def test_plain_pairs_for_a_chat_model_are_warned_about(base_folder, tmp_path):
    with pytest.warns(GuidanceWarning, match="The pairs are plain text, and .* is a chat model"):
        run("train", *options_of_a_run(base_folder, tmp_path, STANDARD), "--learning_rate", 0.1)
    assert RewardInfo.load(tmp_path / "my arm" / "genarm_config.json").is_for_chats is False


def test_texts_in_the_chat_template_are_chats(base_folder, tmp_path, tokenizer):
    """Written by the user, and given as plain text."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    columns = {"prompt": prompts, "chosen": CHOSEN, "rejected": REJECTED}
    run("train", *options_of_a_run(base_folder, tmp_path, columns), "--learning_rate", 0.1)
    assert RewardInfo.load(tmp_path / "my arm" / "genarm_config.json").is_for_chats is True
