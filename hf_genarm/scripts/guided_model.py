"""What commands steer with: the base, and the processor of reward models and sentences."""

from ..decoding.assembly import assemble, load_reward_models
from ..decoding.processor import GenARMLogitsProcessor
from ..hub.base_model import Base
from ..hub.reward_model import AutoregressiveRewardModel
from .shared_arguments import GuidanceArguments


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
