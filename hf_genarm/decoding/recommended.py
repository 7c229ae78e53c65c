"""The setting that reward models say is best, where the user names none."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import logging

from ..hub.base_weights import has_weights
from ..hub.info import RewardInfo
from ..hub.reward_model import AutoregressiveRewardModel
from ..hub.sharing import shares_weights

logger = logging.get_logger(__name__)


def recommended_alpha(infos: Sequence[RewardInfo]) -> list[float]:
    """The strength that each reward model recommends, or else 1."""
    return [1.0 if x.recommended is None else x.recommended["alpha"] for x in infos]


def wanted_reference(infos: Sequence[RewardInfo], names: Sequence[str]) -> str | None:
    """
    `"base"` or `None`, as reward models recommend, or else were trained.

    Raises:
        ValueError: if they differ, as one reference serves all.
    """
    wanted = [(x.recommended or {"reference": x.reference})["reference"] for x in infos]
    if len(set(wanted)) > 1:
        said = ", ".join(f"{x!r} for `{name}`" for x, name in zip(wanted, names, strict=True))
        raise ValueError(
            f"The reward models are used with different references ({said}), but one serves all. Choose it: "
            '`reference="base"` or `reference=None`.'
        )
    return wanted[0]


def recommended_reference(
    arms: Sequence[AutoregressiveRewardModel],
    names: Sequence[str],
    base_model: PreTrainedModel | None,
    reward_tokenizers: Sequence[Any] | None,
) -> Any:
    """
    The [`base_reference`] if reward models recommend one, or else were trained with it; `None` if they don't.

    Raises:
        ValueError: if they differ, as one reference serves all.
    """
    if wanted_reference([x.info for x in arms], names) is None:
        return None
    return base_reference(arms, names, base_model, reward_tokenizers)


def base_reference(
    arms: Sequence[AutoregressiveRewardModel],
    names: Sequence[str],
    base_model: PreTrainedModel | None,
    reward_tokenizers: Sequence[Any] | None,
) -> Any:
    """
    `"base"`, or the model that a reward model was trained from where that is another one.

    Raises:
        ValueError: if there are several, as one reference serves all, it is not known, or has other tokens.
    """
    if base_model is not None and all(_is_on(arm, base_model) for arm in arms):
        return "base"
    if len(arms) > 1:
        raise ValueError(
            f"Not all of {', '.join(f'`{name}`' for name in names)} were trained on the base, so that their rewards "
            "are contrasts with different models, but one reference serves all. Choose it: pass `reference`."
        )
    if reward_tokenizers is not None and reward_tokenizers[0] is not None:
        raise ValueError(
            f"The rewards of `{names[0]}` are less those of the model that it was trained from, whose tokens are not "
            "those of the base, and a reference has those. Choose it: pass `reference`, `None` for none."
        )
    return arms[0].reference


def _is_on(arm: AutoregressiveRewardModel, base_model: PreTrainedModel) -> bool:
    if isinstance(arm.model, PeftModel) and shares_weights(arm.model, base_model):
        return True
    return bool(has_weights(base_model, arm.info.base_weights))


def say_what_is_recommended(arms: Sequence[AutoregressiveRewardModel], names: Sequence[str], taken: set[str]) -> None:
    """
    Says once what is taken from a `genarm_config.json`, and at which temperature to sample, which only `generate` sets.

    Args:
        arms (sequence of [`AutoregressiveRewardModel`]), names (sequence of `str`):
            The reward models.
        taken (set of `str`):
            Which of `"alpha"` and `"reference"` the user has left open.
    """
    for arm, name in zip(arms, names, strict=True):
        setting = arm.info.recommended
        if setting is None or not taken:
            continue
        values = " and ".join(f"`{key}={setting[key]!r}`" for key in ("alpha", "reference") if key in taken)
        sampling = "do_sample=True, top_k=0"
        if setting["temperature"] != 1:
            sampling += f", temperature={setting['temperature']:g}"
        # Said where it is seen, as transformers does with what it sets itself.
        logger.warning_once(
            f"Using {values}, the setting that `{name}` recommends; it was measured with `{sampling}` in `generate`."
        )
