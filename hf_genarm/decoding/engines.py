"""Generation engines that drop logits processors: with a guided one among them, they are stopped."""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

from transformers import GenerationMixin, LogitsProcessor


def refuse_continuous_batching(processor_class: type[LogitsProcessor]) -> None:
    """
    Makes `generate_batch`, and `generate(cache_implementation="paged")` which calls it, raise where they are given a
    processor of this class. Both ignore user processors, and would return unguided text without a word.

    Only `generate_batch` is wrapped: nothing else runs any code of ours.
    """
    generate_batch: Callable = GenerationMixin.generate_batch

    @functools.wraps(generate_batch)
    def checked(self: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
        # `generate` keeps the processors to itself, so they are read from the frame that calls.
        caller = sys._getframe(1)
        given = caller.f_locals.get("logits_processor") if caller.f_code.co_name == "generate" else None
        if _contains(kwargs.get("logits_processor"), processor_class) or _contains(given, processor_class):
            raise NotImplementedError(
                f"`{processor_class.__name__}` can't guide continuous batching (`generate_batch` or "
                "`cache_implementation='paged'`): that engine ignores logits processors, so its text is unguided. "
                "Use `generate` with another cache."
            )
        return generate_batch(self, *args, **kwargs)

    GenerationMixin.generate_batch = checked


def _contains(processors: Iterable | None, processor_class: type) -> bool:
    return processors is not None and any(isinstance(processor, processor_class) for processor in processors)
