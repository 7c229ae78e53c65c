"""What commands steer with: the base, the processor, and the temperature that reward models recommend."""

from collections.abc import Sequence

from ..decoding.assembly import assemble, load_reward_models
from ..decoding.processor import GenARMLogitsProcessor
from ..hub.base_model import Base
from ..hub.loading import info_of
from ..hub.reward_model import AutoregressiveRewardModel
from .arguments import GuidanceArguments


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
    model, tokenizer = base.model, base.tokenizer
    try:
        arms, _ = load_reward_models(args.arm, model, tokenizer, trust_remote_code=args.trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"`{', '.join(args.arm)}` can't be loaded. Name Hub ids or folders of reward models: `--arm`. {error}"
        ) from error
    arms += [AutoregressiveRewardModel.from_sentence(sentence, model, tokenizer) for sentence in args.sentence]
    reference = None if args.reference == "none" else args.reference
    parts = assemble(arms, args.names, model, tokenizer, args.alpha, reference)
    processor = GenARMLogitsProcessor(**vars(parts), target_kl=args.target_kl)
    processor._machine.rewards.log_engines(args.names)  # as `from_pretrained` does
    return base, processor


def recommended_temperature(reward_models: Sequence[str]) -> float | None:
    """Returns the temperature that reward models recommend, Hub ids or folders; `None` if they don't agree on one."""
    settings = [info_of(name).recommended for name in reward_models]
    temperatures = {None if setting is None else setting["temperature"] for setting in settings}
    return temperatures.pop() if len(temperatures) == 1 else None
