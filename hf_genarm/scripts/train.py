"""
Trains an autoregressive reward model on preference pairs.

    hf-genarm train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset pairs.jsonl --output_dir my-arm

Any argument of `AutoregressiveRewardConfig` and of TRL's `ModelConfig` can be given, here or in a file: `--config
recipe.yaml`. An adapter is trained unless `--no_use_peft` is given. Some pairs are held out, to measure what the reward
model has learned for its card.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..demo import loadable_name
from ..files import make_output_dir, refuse_overwriting
from ..hub.info import INFO_NAME
from ..hub.loading import ADAPTER_CONFIG
from ..training.config import AutoregressiveRewardConfig
from ..training.trainer import AutoregressiveRewardTrainer
from .arguments import PairArguments
from .pairs import hold_out, load_pairs, public_name
from .plots import plot_training
from .samples import SampleArguments, SamplesCallback, sample_prompts

logger = logging.get_logger(__name__)

HELD_OUT = 0.1


@dataclass
class ModelArguments(ModelConfig):
    """Changes the defaults of TRL's arguments of a model to an adapter on a causal LM."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a causal LM.", "aliases": ["--model"]})
    use_peft: bool = field(default=True, metadata={"help": "Whether to train an adapter instead of all weights."})
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "The task type of the adapter."})


@dataclass
class OutputArguments:
    """Chooses whether earlier results may be overwritten."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether `output_dir` may have a reward model already, which is overwritten."}
    )


ARGUMENTS = (PairArguments, AutoregressiveRewardConfig, ModelArguments, SampleArguments, OutputArguments)


def main(
    pair_args: PairArguments,
    training_args: AutoregressiveRewardConfig,
    model_args: ModelArguments,
    sample_args: SampleArguments,
    output_args: OutputArguments,
) -> None:
    output_dir = str(training_args.output_dir)
    make_output_dir(output_dir)
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is not None and not os.path.isdir(checkpoint):
        raise ValueError(f"`resume_from_checkpoint` is {checkpoint!r}, but there is no such folder.")
    if checkpoint is None and not output_args.overwrite_output_dir:
        refuse_overwriting(output_dir, (INFO_NAME, ADAPTER_CONFIG, "model.safetensors"))
    train_pairs = load_pairs(pair_args, pair_args.dataset_train_split)
    test_pairs = None
    if pair_args.dataset_test_split is not None:
        test_pairs = load_pairs(pair_args, pair_args.dataset_test_split)
    elif pair_args.test_size != 0:
        train_pairs, test_pairs = hold_out(train_pairs, pair_args.test_size or HELD_OUT)
    model_args.model_name_or_path = loadable_name(model_args.model_name_or_path)
    check_model(model_args, training_args.trust_remote_code)

    given: Any = training_args.model_init_kwargs or {}  # `RewardConfig` has made it a dict
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **given,
    }
    if training_args.dataset_name is None:
        training_args.dataset_name = public_name(str(pair_args.dataset))

    trainer = AutoregressiveRewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_pairs,
        eval_dataset=test_pairs,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if sample_args.log_samples:
        prompts = sample_prompts(test_pairs, sample_args.log_samples)
        trainer.add_callback(SamplesCallback(trainer, prompts, sample_args.samples_max_new_tokens))
    trainer.train(resume_from_checkpoint=checkpoint)
    if test_pairs is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.save_model()
    if trainer.is_world_process_zero():
        plot_training(trainer.state.log_history, os.path.join(output_dir, "training.png"))
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.print(f"The reward model is in {output_dir}.")
    trainer.accelerator.end_training()


def check_model(args: ModelArguments, trust_remote_code: bool) -> None:
    """
    Reads the config of the model, before its weights are loaded.

    Raises:
        ValueError: if there is none.
    """
    try:
        AutoConfig.from_pretrained(
            args.model_name_or_path, revision=args.model_revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{args.model_name_or_path}` can't be loaded. Name the Hub id or folder of a causal LM: `--model`. {error}"
        ) from error
