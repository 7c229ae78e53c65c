"""Trains every method on equal terms: the same pairs in the same number of steps, LoRA rank and learning rate."""

import sys
from pathlib import Path
from typing import Any

import torch
from bench import Bench
from datasets import Dataset
from peft import LoraConfig
from settings import ADAPTER, OBJECTIVE, TARGETS, TRAINING
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer


def adapter_config(n_layers: int, task_type: str = "CAUSAL_LM", **changes: Any) -> LoraConfig:
    settings = ADAPTER | changes
    return LoraConfig(
        **settings,
        lora_alpha=2 * settings["r"],
        target_modules=list(TARGETS),
        layers_to_transform=list(range(n_layers // 2, n_layers)),  # the backward pass stops there
        modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
        task_type=task_type,
    )


def arguments(bench: Bench, folder: Path, seed: int) -> dict[str, Any]:
    return {
        **TRAINING,
        "output_dir": str(folder),
        "seed": seed,
        "num_train_epochs": bench.size.n_epochs,
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _train(
    trainer_class, config, model, bench: Bench, pairs: Dataset, task_type: str = "CAUSAL_LM", **adapter: Any
) -> Trainer:
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(bench.model_path),
        peft_config=adapter_config(model.config.num_hidden_layers, task_type, **adapter),
    )
    # The trainers print their logs; the run has one progress bar.
    print(file=sys.stderr)
    trainer.train()
    trainer.model.save_pretrained(config.output_dir)
    return trainer


def train_arm(
    bench: Bench,
    pairs: Dataset,
    folder: Path,
    seed: int = 0,
    model_path: str | None = None,
    adapter: dict[str, Any] | None = None,
    **changes: Any,
) -> None:
    """Trains as for the headline, but for the arguments of [`AutoregressiveRewardConfig`] in `changes`."""
    config = AutoregressiveRewardConfig(**(arguments(bench, folder, seed) | OBJECTIVE | changes))
    model = AutoModelForCausalLM.from_pretrained(model_path or bench.model_path, dtype=torch.float32)
    trainer = _train(AutoregressiveRewardTrainer, config, model, bench, pairs, **(adapter or {}))
    trainer.reward_info.save(folder)


def train_dpo(bench: Bench, pairs: Dataset, folder: Path, beta: float, seed: int = 0) -> None:
    config = DPOConfig(**arguments(bench, folder, seed), beta=beta)
    model = AutoModelForCausalLM.from_pretrained(bench.model_path, dtype=torch.float32)
    _train(DPOTrainer, config, model, bench, pairs)


def train_trajectory_reward_model(bench: Bench, pairs: Dataset, folder: Path, seed: int = 0) -> None:
    config = RewardConfig(**arguments(bench, folder, seed))
    torch.manual_seed(seed)  # of the head
    model = AutoModelForSequenceClassification.from_pretrained(bench.model_path, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = bench.tokenizer.pad_token_id
    _train(RewardTrainer, config, model, bench, pairs, task_type="SEQ_CLS")
