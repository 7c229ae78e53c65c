"""The one way from reward models to the arguments of a processor, for all callers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import refuse_no_tokenizer
from ..hub.compatibility import tokenizers_to_align
from ..hub.placement import warn_of_other_devices
from ..hub.reward_model import AutoregressiveRewardModel, find_tokenizer
from .likely_mistakes import refuse_hidden_text
from .recommended import log_recommended_settings, recommended_alpha, recommended_reference
from .strength import Alpha


@dataclass
class Assembly:
    """
    Holds the arguments of a [`GenARMLogitsProcessor`], in fields with the same names.

    Parameters:
        reward_model (list of [`AutoregressiveRewardModel`]):
            The reward models.
        alpha (`float`, list of `float`, `torch.Tensor` or callable):
            Their strengths.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The base.
        reference (`"base"`, [`~transformers.PreTrainedModel`] or another, *optional*):
            The model that they are contrasted with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of the base.
        reward_tokenizer (list of [`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of each reward model, `None` where its ids are those of the base; `None` instead of a list if
            all ids are, and the tokenizer of the base isn't known.
    """

    reward_model: list[AutoregressiveRewardModel]
    alpha: Alpha
    base_model: PreTrainedModel | None
    reference: Any
    tokenizer: PreTrainedTokenizerBase | None
    reward_tokenizer: list[PreTrainedTokenizerBase | None] | None


def assemble(
    reward_models: Sequence[AutoregressiveRewardModel],
    names: Sequence[str],
    base_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    alpha: Alpha | None = None,
    reference: Any = "auto",
) -> Assembly:
    """
    Aligns tokenizers, and fills in the settings that are not given, as the reward models recommend; this is logged.

    Args:
        reward_models (sequence of [`AutoregressiveRewardModel`]), names (sequence of `str`):
            The reward models, and their names in messages.
        base_model ([`~transformers.PreTrainedModel`], *optional*), tokenizer \
        ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The base and its tokenizer.
        alpha (`float`, list of `float`, `torch.Tensor` or callable, *optional*):
            Strengths. Defaults to what the reward models recommend, or else 1.
        reference (`"auto"`, `"base"`, [`~transformers.PreTrainedModel`] or another, *optional*, defaults to `"auto"`):
            `"auto"` is what the reward models recommend, or else were trained with.

    Raises:
        ValueError: if the reward models recommend different references, or the one that they recommend is not known.
    """
    is_auto = isinstance(reference, str) and reference == "auto"
    left_open = {x for x, is_open in (("alpha", alpha is None), ("reference", is_auto)) if is_open}
    log_recommended_settings(reward_models, names, left_open)
    aligned = tokenizers_to_align(reward_models, names, base_model, tokenizer)
    to_align = None if tokenizer is None and not any(aligned) else aligned
    return Assembly(
        reward_model=list(reward_models),
        alpha=recommended_alpha([x.info for x in reward_models]) if alpha is None else alpha,
        base_model=base_model,
        reference=recommended_reference(reward_models, names, base_model, tokenizer, aligned) if is_auto else reference,
        tokenizer=tokenizer,
        reward_tokenizer=to_align,
    )


def load_reward_models(
    names: Sequence[str],
    base_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    **kwargs: Any,
) -> tuple[list[AutoregressiveRewardModel], PreTrainedTokenizerBase | None]:
    """
    Loads reward models where the base is, and the tokenizer of the base unless it is given.

    Args:
        names (sequence of `str`):
            Hub ids or folders.
        base_model ([`~transformers.PreTrainedModel`], *optional*), tokenizer \
        ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The base and its tokenizer.
        **kwargs:
            Passed to [`~AutoregressiveRewardModel.from_pretrained`].

    Returns:
        The reward models, and the tokenizer of the base, `None` if there is none.

    Raises:
        TypeError: if the base is not a model, or the tokenizer is not a tokenizer.
    """
    refuse_no_tokenizer("tokenizer", tokenizer)
    known: dict[str, Any] = {}
    if base_model is not None:
        refuse_hidden_text(base_model)  # also what is not a model, such as an id
        if tokenizer is None:  # looked up once, as it takes a minute where the Hub can't be reached
            access = {name: kwargs[name] for name in ("token", "trust_remote_code") if name in kwargs}
            tokenizer = find_tokenizer(str(base_model.name_or_path), **access)
        known["base_tokenizer"] = tokenizer
    reward_models = [AutoregressiveRewardModel.from_pretrained(name, base_model, **known, **kwargs) for name in names]
    warn_of_other_devices([x.model for x in reward_models], names, base_model)
    return reward_models, tokenizer


def names_of(given: Any) -> list[str]:
    """
    Returns the Hub ids or folders that a user gives, one or several, as a list.

    Raises:
        TypeError: if it is something else.
        ValueError: if there are none.
    """
    names = list(given) if isinstance(given, list | tuple) else [given]
    wrong = [x for x in names if not isinstance(x, str | os.PathLike)]
    if wrong:
        raise TypeError(
            f"`pretrained_model_name_or_path` has {wrong[0]!r:.80}, but must be a Hub id or a folder, or a list of "
            "them. Pass models that are loaded to the class itself: `GenARMLogitsProcessor(reward_model)`."
        )
    if not names:
        raise ValueError("`pretrained_model_name_or_path` is an empty list, but at least one reward model is needed.")
    return [str(x) for x in names]
