"""What the config and the card of a reward model report was measured with the weights next to them."""

import warnings
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from pairs import CHOSEN, PROMPTS, REJECTED, STANDARD
from peft import LoraConfig
from transformers import TrainerCallback

from hf_genarm import GuidanceWarning, RewardInfo

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
# What is trained is the opposite of what is measured, so that the first checkpoint is the best.
OPPOSITE = {"prompt": PROMPTS, "chosen": REJECTED, "rejected": CHOSEN}


def reported(folder):
    return RewardInfo.load(Path(folder, "genarm_config.json"))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "LoRA"])
def test_after_the_best_checkpoint_is_loaded(make_trainer, peft_config):
    trainer = make_trainer(
        OPPOSITE,
        eval_dataset=Dataset.from_dict(STANDARD),
        peft_config=peft_config,
        eval_strategy="epoch",
        save_strategy="epoch",
        num_train_epochs=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_mean_margin",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_global_step == 1 < trainer.state.global_step
    trainer.save_model()
    info = reported(trainer.args.output_dir)
    scores = {logs["step"]: logs for logs in trainer.state.log_history if "eval_rms_margin" in logs}
    assert abs(scores[1]["eval_mean_margin"] - scores[3]["eval_mean_margin"]) > 1e-3
    metrics = trainer.evaluate()
    assert info.metrics["mean_margin"] == pytest.approx(metrics["eval_mean_margin"], abs=1e-5)
    assert info.metrics["pair_accuracy"] == metrics["eval_pair_accuracy"]
    assert info.reward_scale == pytest.approx(metrics["eval_rms_margin"] / 0.05, rel=1e-4)
    results = ModelCard.load(Path(trainer.args.output_dir, "README.md")).data.eval_results
    shown = {result.metric_type: result.metric_value for result in results}
    assert shown["pair_accuracy"] == pytest.approx(metrics["eval_pair_accuracy"], abs=1e-4)


def test_of_checkpoints_and_weights_that_were_not_measured(make_trainer):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    options = {"per_device_train_batch_size": 1, "max_steps": 9, "save_steps": 1, "eval_steps": 2}
    trainer = make_trainer(eval_dataset=Dataset.from_dict(STANDARD), eval_strategy="steps", **options)
    trainer.add_callback(Interrupt())
    trainer.train()
    folder = Path(trainer.args.output_dir)
    (measured,) = [logs for logs in trainer.state.log_history if "eval_rms_margin" in logs]
    assert reported(folder / "checkpoint-2").metrics["rms_margin"] == measured["eval_rms_margin"]
    for step in (1, 3):
        info = reported(folder / f"checkpoint-{step}")
        assert info.metrics == {}
        assert info.reward_scale is None
    with pytest.warns(GuidanceWarning, match=r"at step 2, and the weights are those of step 3.*`trainer.evaluate\(\)`"):
        trainer.save_model()
    assert reported(folder).metrics == {}
    trainer.evaluate()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuidanceWarning)
        trainer.save_model()
    assert reported(folder).metrics


def test_of_weights_that_are_trained_again(make_trainer):
    trainer = make_trainer(eval_dataset=Dataset.from_dict(STANDARD), max_steps=1)
    trainer.train()
    trainer.evaluate()
    assert trainer.reward_info.metrics
    trainer.train()  # to the same step
    assert trainer.reward_info.metrics == {}
