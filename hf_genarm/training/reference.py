"""The model that training starts from, which rewards are contrasted with."""

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
    What a model was before it is trained: for an adapter the model without it, else a copy that is kept.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            What is to be trained, before the first step.
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.

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
        """The starting point of `model`, as the trainer has wrapped it; without dropout, and without gradients."""
        with torch.no_grad():
            if self._copy is not None:
                yield self._copy
                return
            with self._accelerator.unwrap_model(model).disable_adapter(), evaluating(model):
                yield model
