"""The starting point of training: the model as it was before, with which rewards are contrasted."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.nn import Module
from transformers import PreTrainedModel

from ..hub.sharing import is_plain
from .prefix_sharing import evaluating


class StartingPoint:
    """
    Keeps a model as it was before training: for an adapter the model without it, otherwise a copy.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, before the first step.
        accelerator ([`~accelerate.Accelerator`]):
            The accelerator of the trainer.

    Raises:
        ValueError: if a copy would be needed, and can't be made.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, accelerator: Accelerator):
        self._accelerator = accelerator
        self._copy: Any = None
        if isinstance(model, PeftModel):
            return
        if not all(is_plain(x) for x in model.parameters()) or accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
            raise ValueError(
                "`reference` is 'base', and all weights are to be trained, so that a copy of the model must be kept, "
                "but its weights are quantised or spread over processes. Train an adapter: `peft_config=LoraConfig()`."
            )
        self._copy = accelerator.prepare_model(copy.deepcopy(model).requires_grad_(False).eval(), evaluation_mode=True)

    @contextmanager
    def __call__(self, model: Module) -> Iterator[Module]:
        """Yields the starting point of `model`, which the trainer may have wrapped, without dropout and gradients."""
        with torch.no_grad():
            if self._copy is not None:
                yield self._copy
                return
            with self._accelerator.unwrap_model(model).disable_adapter(), evaluating(model):
                yield model
