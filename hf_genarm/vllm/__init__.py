"""
Guidance in [vLLM](https://docs.vllm.ai), where each request chooses its strengths: a logits processor for both of its
model runners, given by its name, `--logits-processors hf_genarm.vllm:GenARM`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .logits_processor import GenARM

__all__ = ["GenARM"]


def __getattr__(name: str) -> Any:
    if name != "GenARM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .logits_processor import GenARM  # the only part that needs vLLM, and everything else can be used without

    return GenARM
