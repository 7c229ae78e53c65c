"""The settings that reward models recommend, used where the user gives none."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..hub.base_weights import has_weights
from ..hub.compatibility import lacking_tokens
from ..hub.info import RewardInfo
from ..hub.reward_model import AutoregressiveRewardModel
from ..hub.sentence import DEFAULT_STRENGTH
from ..hub.sharing import shares_weights

logger = logging.get_logger(__name__)


def recommended_alpha(infos: Sequence[RewardInfo]) -> list[float]:
    """Returns the strength that each reward model recommends, or else 1, for a sentence 1.5."""
    defaults = [1.0 if x.sentence is None else DEFAULT_STRENGTH for x in infos]
    return [
        default if x.recommended is None else x.recommended["alpha"] for x, default in zip(infos, defaults, strict=True)
    ]


def recommended_temperature(infos: Sequence[RewardInfo]) -> float | None:
    """Returns the temperature of `generate` that reward models recommend; `None` if they don't agree on one."""
    temperatures = {None if x.recommended is None else x.recommended["temperature"] for x in infos}
    return temperatures.pop() if len(temperatures) == 1 else None


def wanted_reference(infos: Sequence[RewardInfo], names: Sequence[str]) -> str | None:
    """
    Returns the reference that reward models recommend, or else were trained with: `"base"` or `None`.

    Raises:
        ValueError: if they differ, since there is one reference for all.
    """
    wanted = [(x.recommended or {"reference": x.reference})["reference"] for x in infos]
    if len(set(wanted)) > 1:
        listed = ", ".join(f"{x!r} for `{name}`" for x, name in zip(wanted, names, strict=True))
        raise ValueError(
            f"The reward models are used with different references ({listed}), but there is one for all. Choose it: "
            '`reference="base"` or `reference=None`.'
        )
    return wanted[0]


def recommended_reference(
    arms: Sequence[AutoregressiveRewardModel],
    names: Sequence[str],
    base_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    reward_tokenizers: Sequence[PreTrainedTokenizerBase | None],
) -> Any:
    """
    Returns the [`base_reference`] if reward models recommend a reference, or else were trained with one, or if their
    tokens are other strings than those of the base; `None` if not.

    Raises:
        ValueError: if they differ, since there is one reference for all.
    """
    own = with_tokens_of(tokenizer, reward_tokenizers)
    wanted = wanted_reference([arms[index].info for index in own], [names[index] for index in own]) if own else "base"
    if wanted is None and len(own) < len(arms):
        raise ValueError(
            f"The tokens of some of {', '.join(f'`{name}`' for name in names)} are not those of the base, and rewards "
            "of strings are contrasts, but the others are used without a reference, and there is one for all. Choose "
            'it: `reference="base"` or `reference=None`.'
        )
    return None if wanted is None else base_reference(arms, names, base_model, own, reward_tokenizers)


def with_tokens_of(
    tokenizer: PreTrainedTokenizerBase | None, reward_tokenizers: Sequence[PreTrainedTokenizerBase | None]
) -> list[int]:
    """Returns which reward models have the tokens of the base, under the same ids or others."""
    return [index for index, x in enumerate(reward_tokenizers) if tokenizer is None or not lacking_tokens(tokenizer, x)]


def base_reference(
    arms: Sequence[AutoregressiveRewardModel],
    names: Sequence[str],
    base_model: PreTrainedModel | None,
    own: Sequence[int],
    reward_tokenizers: Sequence[PreTrainedTokenizerBase | None],
) -> Any:
    """
    Returns `"base"`, which for rewards of strings is the model that each was trained from; or the model that a reward
    model with the tokens of the base was trained from, if that is not the base. `own` is from [`with_tokens_of`].

    Raises:
        ValueError: if there are several such models, or the only one is unknown or has other ids.
    """
    if not own or (base_model is not None and all(_is_on(arms[index], base_model) for index in own)):
        return "base"
    if len(arms) > 1:
        raise ValueError(
            f"Not all of {', '.join(f'`{name}`' for name in names)} were trained on the base, so that their rewards "
            "are contrasts with different models, but there is one reference for all. Choose it: pass `reference`."
        )
    if reward_tokenizers[0] is not None:
        raise ValueError(
            f"The rewards of `{names[0]}` are contrasts with the model that it was trained from, whose ids are not "
            "those of the base, so that it can't be the reference. Choose one: pass `reference`, `None` for none."
        )
    return arms[0].reference


def _is_on(arm: AutoregressiveRewardModel, base_model: PreTrainedModel) -> bool:
    is_around_it = isinstance(arm.model, PeftModel) or arm.info.sentence is not None
    if is_around_it and shares_weights(arm.model, base_model):
        return True
    return bool(has_weights(base_model, arm.info.base_weights))


def log_recommended_settings(arms: Sequence[AutoregressiveRewardModel], names: Sequence[str], taken: set[str]) -> None:
    """
    Logs once which settings are taken from a `genarm_config.json`, with the sampling that they were measured with.

    Args:
        arms (sequence of [`AutoregressiveRewardModel`]), names (sequence of `str`):
            The reward models.
        taken (set of `str`):
            The settings that the user has left open, of `"alpha"` and `"reference"`.
    """
    for arm, name in zip(arms, names, strict=True):
        setting = arm.info.recommended
        if setting is None or not taken:
            continue
        values = " and ".join(f"`{key}={setting[key]!r}`" for key in ("alpha", "reference") if key in taken)
        sampling = "do_sample=True, top_k=0"
        if setting["temperature"] != 1:
            sampling += f", temperature={setting['temperature']:g}"
        # As a warning, because that is visible by default; temperature can be set in `generate` only.
        logger.warning_once(
            f"Using {values}, the setting that `{name}` recommends; it was measured with `{sampling}` in `generate`."
        )
