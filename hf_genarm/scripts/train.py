"""
Trains an autoregressive reward model on preference pairs.

    hf-genarm train --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset pairs.jsonl --output_dir my-arm

Any argument of `AutoregressiveRewardConfig` and of TRL's `ModelConfig` can be given, here or in a file: `--config
recipe.yaml`. An adapter is trained unless `--no_use_peft` is given, and its reward is its log-probability minus that of
the base unless `--reference none` is given. Some pairs are held out, to measure what the reward model has learned; the
last lines report it, with the command that comes next.
"""

import os
import shlex
import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..demo import loadable_name
from ..files import make_output_dir, refuse_overwriting
from ..hub.base_model import refuse_file
from ..hub.info import INFO_NAME, GuidanceWarning, RewardInfo
from ..hub.loading import ADAPTER_CONFIG
from ..training.config import AutoregressiveRewardConfig
from ..training.learned import learned
from ..training.trainer import AutoregressiveRewardTrainer
from .pairs import hold_out, load_pairs, public_name
from .plots import plot_training
from .samples import SampleArguments, SamplesCallback, sample_prompts
from .shared_arguments import PairArguments

logger = logging.get_logger(__name__)

HELD_OUT = 0.1


@dataclass
class ModelArguments(ModelConfig):
    """Changes the defaults of TRL's arguments of a model to an adapter on a causal LM."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a causal LM.", "aliases": ["--model"]})
    use_peft: bool = field(default=True, metadata={"help": "Whether to train an adapter instead of all weights."})
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "The task type of the adapter."})


@dataclass
class TrainArguments(AutoregressiveRewardConfig):
    """Changes the defaults of the trainer to those of the command: an adapter is contrasted with its base."""

    reference: str | None = field(
        default="auto",
        metadata={
            "help": "'base' makes the reward a contrast with the base: the loss of DPO. 'none' is Eq. 5 of the paper. "
            "'auto' is 'base' for an adapter, and 'none' if all weights are trained.",
            "choices": ("auto", "base", "none"),
        },
    )
    logging_steps: float = field(
        default=0.02,
        metadata={"help": "Log every X steps, or if it is below 1, as often as this share of all steps."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether a reward model in `output_dir` may be overwritten."}
    )

    def __post_init__(self) -> None:
        #: Whether `reference` depends on what is trained, which other arguments say
        self.is_reference_open = self.reference == "auto"
        if self.reference in ("auto", "none"):
            self.reference = None
        super().__post_init__()


ARGUMENTS = (PairArguments, TrainArguments, ModelArguments, SampleArguments)


def main(
    pair_args: PairArguments,
    training_args: TrainArguments,
    model_args: ModelArguments,
    sample_args: SampleArguments,
) -> None:
    output_dir = str(training_args.output_dir)
    make_output_dir(output_dir)
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is not None and not os.path.isdir(checkpoint):
        raise ValueError(f"`resume_from_checkpoint` is {checkpoint!r}, but there is no such folder.")
    if checkpoint is None and not training_args.overwrite_output_dir:
        refuse_overwriting(output_dir, (INFO_NAME, ADAPTER_CONFIG, "model.safetensors"))
    train_pairs = load_pairs(pair_args, pair_args.dataset_train_split)
    test_pairs = None
    if pair_args.dataset_test_split is not None:
        test_pairs = load_pairs(pair_args, pair_args.dataset_test_split)
    elif pair_args.test_size != 0:
        train_pairs, test_pairs = hold_out(train_pairs, pair_args.test_size or HELD_OUT)
    model_args.model_name_or_path = loadable_name(model_args.model_name_or_path)
    check_model(model_args, training_args.trust_remote_code)
    if training_args.is_reference_open and model_args.use_peft:
        training_args.reference = "base"

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
    warn_of_plain_text(trainer, model_args.model_name_or_path)
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
        picture = os.path.join(output_dir, "training.png")
        plot_training(trainer.state.log_history, picture, is_contrast=training_args.reference == "base")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.print(f"The reward model is in {output_dir}.")
    trainer.accelerator.print(report(trainer.reward_info, output_dir, pair_args))
    trainer.accelerator.end_training()


def warn_of_plain_text(trainer: AutoregressiveRewardTrainer, model: str) -> None:
    """Warns if a chat model is trained on texts that are not chats: questions to it are, in most programs."""
    if trainer.processing_class.chat_template is not None and not trainer.reward_info.is_for_chats:
        warnings.warn(
            f"The pairs are plain text, and `{model}` is a chat model. The reward model will be one for plain text, "
            "and other commands will use it so. If it is for chats, write `prompt`, `chosen` and `rejected` as "
            'messages: `[{"role": "user", "content": …}]`.',
            GuidanceWarning,
            stacklevel=2,
        )


def report(info: RewardInfo, folder: str, pair_args: PairArguments) -> str:
    """Returns what was learned, and the command that comes next, in one line each."""
    what = learned(info)
    if what is None:
        lines = ["What it has learned was not measured: there are no held-out pairs, or no base to compare with."]
    else:
        unit = "nats per token" if info.loss.get("length_normalized") else "nats"
        n_right = f"{what.share * what.n_pairs:g} of {what.n_pairs}"
        lines = [
            f"What it has learned prefers the chosen answer in {n_right} held-out pairs: {what.share:.2f} "
            f"[{what.low:.2f}, {what.high:.2f}], a 95 % interval; chance is 0.50.",
            f"It moves the two answers of a pair {what.nats:.2g} {unit} apart (root mean square).",
        ]
    prompts = ["--prompts", pair_args.dataset if pair_args.prompt_column == "prompt" else "prompts.jsonl"]
    if pair_args.dataset_test_split is not None:
        prompts += ["--prompts_split", pair_args.dataset_test_split]
    command = ["hf-genarm", "tune", "--arm", folder, *prompts, "--scorer", "my_scorer:reward"]
    return "\n".join([*lines, f"Next, find the strength, with your own function as the scorer: {shlex.join(command)}"])


def check_model(args: ModelArguments, trust_remote_code: bool) -> None:
    """
    Reads the config of the model, before its weights are loaded.

    Raises:
        ValueError: if there is none.
    """
    refuse_file("--model", args.model_name_or_path)
    try:
        AutoConfig.from_pretrained(
            args.model_name_or_path, revision=args.model_revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{args.model_name_or_path}` can't be loaded. Name the Hub id or folder of a causal LM: `--model`. {error}"
        ) from error
