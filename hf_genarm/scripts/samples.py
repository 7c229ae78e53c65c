"""Samples while training: a few prompts, answered with and without guidance at each evaluation."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from ..decoding.processor import GenARMLogitsProcessor
from ..hub.sharing import without_adapter
from .prompts import last_text, left_padded, token_ids

logger = logging.get_logger(__name__)


@dataclass
class SampleArguments:
    """Chooses how many samples to log while training, and how long they are."""

    log_samples: int = field(
        default=0,
        metadata={
            "help": "Number of held-out prompts that are answered with and without guidance at each evaluation, and "
            "logged as a table to TensorBoard, trackio or Weights & Biases. It takes time, which is printed."
        },
    )
    samples_max_new_tokens: int = field(default=48, metadata={"help": "Length of their answers."})


class SamplesCallback(TrainerCallback):
    r"""
    A [`~transformers.TrainerCallback`] that logs greedy answers with guidance at $\alpha = 1$ and without.

    They are in a table named `samples` that grows with each evaluation, so that it shows when guidance starts to work,
    and when it breaks. Like TRL's [`~trl.LogCompletionsCallback`], it is added to an existing trainer.

    Args:
        trainer ([`AutoregressiveRewardTrainer`]):
            The trainer, of an adapter, since without one there is no base to steer.
        prompts (list of `str` or of messages):
            The prompts.
        max_new_tokens (`int`, *optional*, defaults to 48):
            Length of the longest answer.

    Raises:
        ValueError: if no adapter is trained, or the weights are spread over processes.
    """

    def __init__(self, trainer: Any, prompts: list, max_new_tokens: int = 48):
        if not isinstance(trainer.model, PeftModel) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                f"`log_samples` is {len(prompts)}, but samples need an adapter, on a base that each process holds "
                "completely. Train with `--use_peft`, without FSDP and DeepSpeed, or leave `log_samples` at 0."
            )
        self._trainer, self._prompts, self._max_new_tokens = trainer, prompts, max_new_tokens
        self.rows: list[tuple] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or state.global_step in {row[0] for row in self.rows}:
            return
        start = time.monotonic()
        model = self._trainer.model
        was_training, _ = model.training, model.eval()
        try:
            self._answer(model, state.global_step)
        finally:
            model.train(was_training)
        table = pd.DataFrame(self.rows, columns=["step", "prompt", "unguided", "guided"])
        self._log(args.report_to, table, state.global_step)
        print(f"Samples of step {state.global_step} took {time.monotonic() - start:.1f} s.")

    @torch.no_grad()
    def _answer(self, model: PeftModel, step: int) -> None:
        network: Any = without_adapter(model)
        tokenizer: Any = self._trainer.processing_class
        processor = GenARMLogitsProcessor(model, base_model=network, reference=self._trainer.args.reference)
        for prompt in self._prompts:
            inputs = left_padded(tokenizer, [token_ids(tokenizer, prompt)], network.device)
            options = {"do_sample": False, "max_new_tokens": self._max_new_tokens}
            answers = [
                network.generate(**inputs, logits_processor=processors, **options)[0, inputs["input_ids"].shape[1] :]
                for processors in ([], [processor])
            ]
            question = last_text(prompt)
            self.rows.append((step, question, *(tokenizer.decode(x, skip_special_tokens=True) for x in answers)))

    def _log(self, report_to: list[str], table: pd.DataFrame, step: int) -> None:
        if "wandb" in report_to:
            import wandb

            wandb.log({"samples": wandb.Table(dataframe=table)})
        if "trackio" in report_to:
            import trackio

            trackio.log({"samples": trackio.Table(dataframe=table)})
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("samples", _markdown(table[table["step"] == step]), step)


def sample_prompts(pairs: Dataset | None, n_prompts: int) -> list:
    """
    Takes the first different prompts of held-out pairs.

    Raises:
        ValueError: if there are none.
    """
    if pairs is None or "prompt" not in pairs.column_names:
        raise ValueError(
            f"`log_samples` is {n_prompts}, but there are no held-out pairs with a column `prompt` to take them from. "
            "Leave `test_size` at its default, or name a `dataset_test_split`."
        )
    different = {json.dumps(prompt): prompt for prompt in pairs["prompt"]}
    return list(different.values())[:n_prompts]


def _markdown(table: pd.DataFrame) -> str:
    """Returns a Markdown table in which all characters that would break it are escaped."""
    rows = [table.columns, ["---"] * len(table.columns), *table.values.tolist()]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
