"""Trains every method on equal terms: the same pairs in the same number of steps, LoRA rank and learning rate."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer

from .bench import Bench
from .settings import ADAPTER, TARGETS, TRAINING


def adapter_config(n_layers: int, task_type: str = "CAUSAL_LM") -> LoraConfig:
    """Returns the adapter of every method."""
    return LoraConfig(
        **ADAPTER,
        target_modules=list(TARGETS),
        layers_to_transform=list(range(n_layers // 2, n_layers)),  # the backward pass stops there
        modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
        task_type=task_type,
    )


def arguments(folder: Path, seed: int) -> dict[str, Any]:
    """Returns the training arguments of every method."""
    return TRAINING | {
        "output_dir": str(folder),
        "seed": seed,
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train_arm(bench: Bench, pairs: Dataset, folder: Path, seed: int, model_path: str | None = None, **loss: Any):
    """Trains a reward model. `loss` are fields of [`AutoregressiveRewardConfig`]; with `reference="base"` it is DPO."""
    model = AutoModelForCausalLM.from_pretrained(model_path or bench.model_path, dtype=torch.float32)
    trainer = AutoregressiveRewardTrainer(
        model=model,
        args=AutoregressiveRewardConfig(**(arguments(folder, seed) | loss)),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(bench.model_path),
        peft_config=adapter_config(model.config.num_hidden_layers),
    )
    trainer.train()
    trainer.save_model(str(folder))


def train_trajectory_reward_model(bench: Bench, pairs: Dataset, folder: Path, seed: int) -> None:
    """Trains a classifier of whole answers."""
    torch.manual_seed(seed)  # of the head
    model = AutoModelForSequenceClassification.from_pretrained(bench.model_path, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = bench.tokenizer.pad_token_id
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**arguments(folder, seed)),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(bench.model_path),
        peft_config=adapter_config(model.config.num_hidden_layers, "SEQ_CLS"),
    )
    trainer.train()
    trainer.save_model(str(folder))
