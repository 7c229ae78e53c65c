"""The `generate` call that is running: a logits processor is told of nothing, so it is read from the call's frames."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn
from transformers import LogitsProcessorList


@dataclass(frozen=True)
class RunningGeneration:
    """
    One turn of a decoding loop of `generate`.

    Args:
        processors ([`~transformers.LogitsProcessorList`]):
            What acts on the logits: an object that lives exactly as long as the `generate` call.
        variables (mapping):
            The variables of the decoding loop.
    """

    processors: LogitsProcessorList
    variables: Mapping[str, Any]

    @classmethod
    def of_processor(cls) -> "RunningGeneration":
        """Of the `generate` call that runs the logits processor that asks; empty if other code calls it."""
        frame: FrameType | None = sys._getframe(1)
        for _ in range(4):  # the processor itself, and what decorates it
            caller = frame.f_locals.get("self") if frame else None
            if frame and isinstance(caller, LogitsProcessorList):
                return cls(caller, frame.f_back.f_locals if frame.f_back else {})
            frame = frame.f_back if frame else None
        return cls(LogitsProcessorList(), {})

    @staticmethod
    def prompt_length() -> int | None:
        """Of the outermost `generate` call that is running: drafts are made in calls of their own."""
        frame: FrameType | None = sys._getframe(1)
        length = None
        while frame:
            if frame.f_code.co_name == "generate" and "input_ids_length" in frame.f_locals:
                length = frame.f_locals["input_ids_length"]
            frame = frame.f_back
        return length

    @classmethod
    def of_forward(cls) -> "RunningGeneration":
        """Of the decoding loop that calls the `forward` of a model that asks; empty if other code calls it."""
        frame: FrameType | None = sys._getframe(2)
        while frame and frame.f_code.co_filename == nn.modules.module.__file__:  # `Module.__call__`
            frame = frame.f_back
        variables = frame.f_locals if frame else {}
        processors = variables.get("logits_processor")
        return cls(processors if isinstance(processors, LogitsProcessorList) else LogitsProcessorList(), variables)
