"""What is measured on held-out pairs, and which of it the card reports."""

import copy
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import LORA
from pairs import STANDARD
from peft import LoraConfig
from tiny import tiny_llama
from transformers import EvalPrediction

from hf_genarm.training.metrics import PreferenceMetrics, preference_metrics
from hf_genarm.training.preference_data import PairCounts
from hf_genarm.training.prefix_sharing import PairBatch


@pytest.fixture
def pairs():
    return Dataset.from_dict(STANDARD)


def is_measurement(name):
    return not name.endswith(("_runtime", "_per_second", "_time"))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA, init_lora_weights=False)], ids=["full", "LoRA"])
@pytest.mark.parametrize("option", [{"batch_eval_metrics": True}, {"eval_do_concat_batches": False}])
def test_metrics_batch_by_batch(make_trainer, pairs, option, peft_config):
    """However the Trainer hands the pairs over, the metrics are those of all of them."""
    metrics = []
    for options in ({}, option):
        torch.manual_seed(0)
        options = {"peft_config": copy.deepcopy(peft_config), "per_device_eval_batch_size": 2, **options}
        metrics.append(make_trainer(eval_dataset=pairs, **options).evaluate())
    for name, value in metrics[0].items():
        if is_measurement(name):
            assert metrics[1][name] == pytest.approx(value, rel=1e-6), name
    assert metrics[1]["eval_n_pairs"] == 3
    assert ("eval_contrast_accuracy" in metrics[1]) == (peft_config is not None)


def test_metrics_do_not_remember_the_last_evaluation():
    rng = np.random.default_rng(0)
    rewards, lengths = rng.normal(size=(6, 2)), rng.integers(1, 9, size=(6, 2))
    metrics = PreferenceMetrics()
    for _ in range(2):
        for first in (0, 2, 4):
            batch = [torch.tensor(x[first : first + 2]) for x in (rewards, lengths)]
            result = metrics(EvalPrediction(predictions=batch[0], label_ids=(batch[1],)), compute_result=first == 4)
            assert (result == {}) == (first < 4)
        assert result == preference_metrics(EvalPrediction(predictions=rewards, label_ids=(lengths,)))


def test_the_card_reports_the_first_of_several_sets(make_trainer, pairs):
    several = {"one": pairs.select([0, 1]), "two": pairs}
    for sets in (several, DatasetDict(several)):
        trainer = make_trainer(eval_dataset=sets, beta=0.2)
        assert trainer.reward_info.metrics == {}
        metrics = trainer.evaluate()
        info = trainer.reward_info
        assert metrics["eval_one_rms_margin"] != pytest.approx(metrics["eval_two_rms_margin"])
        assert info.metrics["n_pairs"] == 2
        for name, value in info.metrics.items():
            assert value == metrics[f"eval_one_{name}"]
        assert info.reward_scale == pytest.approx(metrics["eval_one_rms_margin"] / 0.2)


def test_without_evaluation_data_the_card_reports_what_is_evaluated(make_trainer, pairs):
    trainer = make_trainer()
    for data, key in ((pairs.select([0, 1]), "eval"), ({"one": pairs, "two": pairs.select([0, 1])}, "eval_one")):
        metrics = trainer.evaluate(data)
        assert trainer.reward_info.metrics["rms_margin"] == metrics[f"{key}_rms_margin"]
        assert trainer.reward_info.metrics["n_pairs"] == len(data["one"] if isinstance(data, dict) else data)


def test_the_card_reports_evaluations_in_training(make_trainer, pairs):
    trainer = make_trainer(eval_dataset=pairs, eval_strategy="epoch", num_train_epochs=2)
    trainer.train()
    measured = [logs for logs in trainer.state.log_history if "eval_rms_margin" in logs]
    assert measured[0]["eval_rms_margin"] != measured[1]["eval_rms_margin"]
    assert trainer.reward_info.metrics["rms_margin"] == measured[1]["eval_rms_margin"]


@pytest.mark.parametrize("several", [False, True])
def test_metrics_of_other_data_stay_out_of_the_card(make_trainer, pairs, several):
    """Neither their metrics nor what was left out of them is reported as the trainer's own."""
    long = Dataset.from_dict({name: [*column, column[0] * 9] for name, column in STANDARD.items()})
    with pytest.warns(UserWarning, match="1 longer than `max_length` and left out"):
        trainer = make_trainer(eval_dataset={"one": long} if several else long, max_length=60)
    name, prefix = ("one", "eval_one") if several else ("eval", "eval")
    own = trainer.evaluate()
    info, counts = trainer.reward_info, dict(trainer.pair_counts)
    assert counts[name] == PairCounts(4, too_long=1)
    assert own[f"{prefix}_dropped_too_long"] == 0.25
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "In the .* dataset")
        for other in (pairs.select([0]), {"other": pairs.select([0])}, trainer.train_dataset):
            metrics = trainer.evaluate(other)
            key = "eval_other" if isinstance(other, dict) else "eval"
            assert metrics[f"{key}_n_pairs"] == len(other["other"] if isinstance(other, dict) else other)
            assert metrics[f"{key}_dropped_too_long"] == 0
            assert trainer.pair_counts == counts
            assert trainer.reward_info == info
        # The very data of the trainer: nothing is prepared, or counted, again.
        again = trainer.evaluate(trainer.eval_dataset)
    assert trainer.pair_counts == counts
    assert {key: value for key, value in again.items() if is_measurement(key)} == {
        key: value for key, value in own.items() if is_measurement(key)
    }


# --- with a reference ---


def test_the_base_has_no_dropout(make_trainer, tokenizer):
    """Its rewards are what the adapter is compared with, not a part of what is trained."""
    model = tiny_llama(vocab_size=len(tokenizer), attention_dropout=0.5)
    trainer = make_trainer(model=model, peft_config=LoraConfig(**LORA), reference="base", disable_dropout=False)
    trainer.model.train()
    inputs = trainer.data_collator(list(trainer.train_dataset))
    losses = {float(trainer.compute_loss(trainer.model, dict(inputs)).detach()) for _ in range(4)}
    assert len(losses) > 1  # the adapter itself is trained with dropout
    rewards = trainer._base_rewards(trainer.model, trainer_pairs(inputs))
    for _ in range(4):
        assert torch.equal(trainer._base_rewards(trainer.model, trainer_pairs(inputs)), rewards)
    assert all(module.training for module in trainer.model.modules())


def trainer_pairs(inputs):
    return PairBatch(inputs["input_ids"], inputs["attention_mask"], inputs["genarm_prompt_length"])
