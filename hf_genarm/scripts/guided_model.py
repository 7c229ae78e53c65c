"""A base and the reward models that steer it, as the commands that write text take them."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..decoding.kl_control import check_target_kl
from ..decoding.processor import GenARMLogitsProcessor
from ..decoding.strength import check_alpha
from ..demo import DEMO_MODEL_ID, demo_model


@dataclass
class GuidanceArguments:
    """
    What is steered, by what, and how strongly.

    Parameters:
        arm (list of `str`):
            Hub ids or folders of reward models.
        base (`str`, *optional*):
            Hub id or folder of the model that is steered. Defaults to the one that the examples run on.
        alpha (list of `float`, *optional*):
            The strength of all reward models, or one for each. Defaults to what they recommend, or else 1.
        reference (`str`, *optional*, defaults to `"auto"`):
            `"base"` steers by what reward models have learned, their log-probability less that of the base; `"none"` by
            Eq. 7; `"auto"` as they recommend, or else were trained.
        target_kl (`float`, *optional*):
            The mean divergence per token, in nats, that each text is held at.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Of the weights of the base; `"auto"` is what its checkpoint has.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the Hub.

    Raises:
        ValueError: if there are not as many strengths as reward models, or one is no number.
    """

    arm: list[str] = field(
        metadata={"help": "Hub id or folder of a reward model. Repeatable.", "action": "extend"},
    )
    base: str | None = field(
        default=None,
        metadata={"help": f"Hub id or folder of the model that is steered. Defaults to {DEMO_MODEL_ID}."},
    )
    alpha: list[float] | None = field(
        default=None,
        metadata={
            "help": "Strength of all, or one for each. Defaults to what they recommend, or else 1.",
            "nargs": "+",
        },
    )
    reference: Literal["auto", "base", "none"] = field(
        default="auto",
        metadata={"help": "'base' steers by what was learned, less the base's log-prob; 'auto' as reward models say."},
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "Mean divergence per token, in nats, that each text is held at."}
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "Of the weights of the base; 'auto' is what its checkpoint has."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code from the Hub."})

    def __post_init__(self) -> None:
        if self.alpha is not None:
            strengths: Any = check_alpha(self.alpha[0] if len(self.alpha) == 1 else self.alpha, len(self.arm))
            self.alpha = strengths  # one for each
        if self.target_kl is not None:
            check_target_kl(self.target_kl)


def load_guided(args: GuidanceArguments, device: torch.device) -> tuple[Any, Any, GenARMLogitsProcessor]:
    """
    The base, its tokenizer, and the processor that steers it.

    Raises:
        ValueError: if one of the models can't be loaded.
    """
    path = args.base or demo_model()
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    try:
        # First what is small, and fails early
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **options)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype, **options)
        model.to(device).eval()
    except OSError as error:
        raise ValueError(
            f"`{path}` can't be loaded. Name the Hub id or folder of a causal LM: `--base`. {error}"
        ) from error
    try:
        processor = GenARMLogitsProcessor.from_pretrained(
            args.arm,
            base_model=model,
            alpha=args.alpha,
            reference=None if args.reference == "none" else args.reference,
            target_kl=args.target_kl,
            tokenizer=tokenizer,
            **options,
        )
    except OSError as error:
        raise ValueError(
            f"`{', '.join(args.arm)}` can't be loaded. Name Hub ids or folders of reward models: `--arm`. {error}"
        ) from error
    return model, tokenizer, processor
