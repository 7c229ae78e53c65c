"""The arguments for a base and the reward models that steer it, and how all commands load them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..decoding.kl_control import check_target_kl
from ..decoding.processor import GenARMLogitsProcessor
from ..decoding.strength import check_alpha
from ..hub.base_model import Base, load_base


@dataclass(kw_only=True)
class BaseArguments:
    """
    Chooses the model that is steered, its device and its dtype.

    Parameters:
        base (`str`, *optional*):
            Hub id or folder. Defaults to the base that the reward models name.
        device (`str`, *optional*):
            A device of PyTorch. Defaults to the one that `accelerate` chooses.
        device_map (`str`, *optional*):
            As for `from_pretrained`, instead of `device`: `"auto"` spreads the layers over all devices.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Of the weights; `"auto"` is that of the checkpoint.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the Hub.
    """

    base: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the base model. Defaults to the one that the reward models name."},
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Where to put it: 'cuda', 'cuda:1', 'mps', 'xpu', 'cpu', … Chosen by default."},
    )
    device_map: str | None = field(
        default=None, metadata={"help": "Instead of a device: 'auto' spreads the layers over all devices."}
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "Of the weights of the base; 'auto' is that of its checkpoint."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code from the Hub."})

    def load(self, reward_models: Sequence[str], announce: bool = True, revision: str | None = None) -> Base:
        """
        Loads the base, and prints one line with its name, its device and its dtype.

        Args:
            reward_models (sequence of `str`):
                Hub ids or folders of the reward models, which name the default.
            announce (`bool`, *optional*, defaults to `True`):
                Whether to print the line.
            revision (`str`, *optional*):
                Revision of the reward models.
        """
        base = load_base(
            self.base,
            reward_models,
            device=self.device,
            device_map=self.device_map,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            reward_model_revision=revision,
        )
        if announce:
            print(f"Base: {base}", flush=True)
        return base


@dataclass
class GuidanceArguments(BaseArguments):
    """
    Chooses what is steered, by which reward models, and how strongly.

    Parameters:
        arm (list of `str`):
            Hub ids or folders of reward models.
        alpha (list of `float`, *optional*):
            The strength of all reward models, or one for each. Defaults to what they recommend, or else 1.
        reference (`str`, *optional*, defaults to `"auto"`):
            `"base"` steers by what reward models have learned, their log-probability minus that of the base; `"none"`
            by Eq. 7; `"auto"` as they recommend, or else were trained.
        target_kl (`float`, *optional*):
            The mean divergence per token, in nats, that each text is held at.
        base, device, device_map, dtype, trust_remote_code:
            As for [`BaseArguments`].

    Raises:
        ValueError: if there are not as many strengths as reward models, or one is not a number.
    """

    arm: list[str] = field(
        metadata={"help": "Hub id or folder of a reward model. Repeatable.", "action": "extend"},
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
        metadata={"help": "'base' steers by log-probs minus those of the base; 'auto' as reward models recommend."},
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "Mean divergence per token, in nats, that each text is held at."}
    )

    def __post_init__(self) -> None:
        if self.alpha is not None:
            strengths: Any = check_alpha(self.alpha[0] if len(self.alpha) == 1 else self.alpha, len(self.arm))
            self.alpha = strengths  # one for each
        if self.target_kl is not None:
            check_target_kl(self.target_kl)


def load_guided(args: GuidanceArguments, announce: bool = True) -> tuple[Base, GenARMLogitsProcessor]:
    """
    Loads the base, and the processor that steers it.

    Args:
        args ([`GuidanceArguments`]):
            What to load.
        announce (`bool`, *optional*, defaults to `True`):
            Whether to print which base it is.

    Raises:
        ValueError: if one of the models can't be loaded.
    """
    base = args.load(args.arm, announce)
    try:
        processor = GenARMLogitsProcessor.from_pretrained(
            args.arm,
            base_model=base.model,
            alpha=args.alpha,
            reference=None if args.reference == "none" else args.reference,
            target_kl=args.target_kl,
            tokenizer=base.tokenizer,
            trust_remote_code=args.trust_remote_code,
        )
    except OSError as error:
        raise ValueError(
            f"`{', '.join(args.arm)}` can't be loaded. Name Hub ids or folders of reward models: `--arm`. {error}"
        ) from error
    return base, processor
