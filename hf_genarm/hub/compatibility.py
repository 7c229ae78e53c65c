"""Checks that a reward model fits a base: the same tokens, and the same chat template."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .info import GuidanceWarning, RewardInfo, chat_template_fingerprint, tokenizer_fingerprint
from .kv_cache import embeddings_of, input_embeddings, n_embeddings
from .reward_model import AutoregressiveRewardModel
from .sharing import is_plain, shares_weights


def tokenizers_to_align(
    reward_models: Sequence[AutoregressiveRewardModel],
    names: Sequence[str],
    base_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[PreTrainedTokenizerBase | None]:
    """
    Returns the tokenizer of each reward model, `None` where its ids are those of the base, and warns of differences.

    Args:
        reward_models (sequence of [`AutoregressiveRewardModel`]), names (sequence of `str`):
            The reward models.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The base.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of the base.

    Raises:
        ValueError: if a reward model doesn't share the embeddings of the base, and their tokens can't be compared.
    """
    tokenizers: list[PreTrainedTokenizerBase | None] = []
    for arm, name in zip(reward_models, names, strict=True):
        # Ids that index the same embeddings are the same ids.
        is_shared = base_model is not None and shares_weights(arm.model, base_model)
        if base_model is None:
            is_same = tokenizer is None or arm.tokenizer is None  # taken for granted, as the processor documents
        else:
            is_same = (
                is_shared or _has_embeddings_of(arm, base_model) or _has_same_ids(arm, name, base_model, tokenizer)
            )
        tokenizers.append(None if is_same else arm.tokenizer)
        if tokenizer is not None and (is_same or not lacking_tokens(tokenizer, arm.tokenizer)):
            _warn_of_differences(arm.info, name, tokenizer, is_shared)
    return tokenizers


def other_tokenizer(
    reward_model: Any, base_model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer that a reward model has, unless its ids are those of the base."""
    own = reward_model.tokenizer if isinstance(reward_model, AutoregressiveRewardModel) else None
    if own is None or base_model is None:
        return None if own is None or tokenizer_fingerprint(own) == tokenizer_fingerprint(tokenizer) else own
    is_same = shares_weights(reward_model.model, base_model) or _has_embeddings_of(reward_model, base_model)
    return None if is_same or has_same_ids(reward_model, n_embeddings(base_model), tokenizer) else own


def _has_embeddings_of(reward_model: AutoregressiveRewardModel, base_model: PreTrainedModel) -> bool:
    if input_embeddings(reward_model.model) is None or input_embeddings(base_model) is None:
        return False
    own, others = embeddings_of(reward_model.model), embeddings_of(base_model)
    if own.shape != others.shape or not is_plain(own) or not is_plain(others):
        return False
    step = max(1, len(own) // 1024)
    return torch.equal(own[::step].to(torch.bfloat16).cpu(), others[::step].to(torch.bfloat16).cpu())


def _has_same_ids(
    reward_model: AutoregressiveRewardModel,
    name: str,
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> bool:
    vocab_size = n_embeddings(base_model)
    if tokenizer is not None and reward_model.tokenizer is None and reward_model.info.tokenizer is not None:
        same_size = n_embeddings(reward_model.model) == vocab_size
        if same_size and reward_model.info.tokenizer == tokenizer_fingerprint(tokenizer):
            return True
    if tokenizer is None or reward_model.tokenizer is None:
        lacking = f"the base (`{base_model.name_or_path}`)" if tokenizer is None else f"the reward model (`{name}`)"
        way_out = "Pass `tokenizer`" if tokenizer is None else "Save its tokenizer in its folder"
        raise ValueError(
            f"No tokenizer of {lacking} was found, and `{name}` doesn't share its embeddings, so that the same ids may "
            f"be other tokens. {way_out}. If their tokens are the same ones under the same ids, give the models to the "
            "class itself: `GenARMLogitsProcessor(reward_model, base_model=...)`."
        )
    return has_same_ids(reward_model, vocab_size, tokenizer)


def lacking_tokens(tokenizer: PreTrainedTokenizerBase, reward_tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Returns the regular tokens of a base that a reward model doesn't have, whatever their ids are."""
    if reward_tokenizer is None:
        return []
    return sorted(
        tokenizer.get_vocab().keys() - reward_tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    )


def has_same_ids(reward_model: AutoregressiveRewardModel, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a reward model has as many embeddings as the base, and the same tokens under the same ids."""
    own = reward_model.tokenizer
    same_size = n_embeddings(reward_model.model) == vocab_size
    return own is not None and same_size and tokenizer_fingerprint(own) == tokenizer_fingerprint(tokenizer)


def _warn_of_differences(info: RewardInfo, name: str, tokenizer: PreTrainedTokenizerBase, shares_weights: bool) -> None:
    """
    Warns if a reward model was trained with another chat template than the base has, or with other tokens for the same
    embeddings. Both can be right, when tokens were added or a template was replaced on purpose.
    """
    known = info.tokenizer is not None and shares_weights
    if known and info.tokenizer != tokenizer_fingerprint(tokenizer):
        warnings.warn(
            f"`{name}` is an adapter on the weights of the base, but was trained with another tokenizer than "
            f"`{tokenizer.name_or_path}`. Tokens whose ids differ get wrong rewards.",
            GuidanceWarning,
            stacklevel=5,
        )
    if info.chat_template not in (None, chat_template_fingerprint(tokenizer)):
        warnings.warn(
            f"`{name}` was trained with another chat template than that of the tokenizer of the base "
            f"(`{tokenizer.name_or_path}`), so its rewards are for prompts of another form. Set "
            "`tokenizer.chat_template` to the one that it was trained with.",
            GuidanceWarning,
            stacklevel=5,
        )


@dataclass(frozen=True)
class PromptFormat:
    """
    Holds how the prompts that a reward model was trained on can be recognised.

    Parameters:
        is_chat (`bool`):
            Whether they were in the chat template, or plain text.
        generation_prompt_ids (list of `int`):
            The tokens that prompts in the template have, and plain ones don't.
    """

    is_chat: bool
    generation_prompt_ids: list[int]


def prompt_format(info: RewardInfo, tokenizer: PreTrainedTokenizerBase) -> PromptFormat | None:
    """Returns the format that a reward model was trained on; `None` if it is unknown, or can't be recognised."""
    added = generation_prompt(tokenizer)
    if info.is_for_chats is None or added is None:
        return None
    return PromptFormat(info.is_for_chats, tokenizer(added, add_special_tokens=False)["input_ids"])


def generation_prompt(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """
    Returns the text that the chat template adds as a generation prompt.

    `None` if there is no template, or it adds nothing, refuses a chat of one question, or writes its end in two ways.
    """
    if tokenizer.chat_template is None:
        return None
    chat = chat_of("?")
    try:
        question, prompted = (
            str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=is_added))
            for is_added in (False, True)
        )
    except (TemplateError, TypeError, ValueError, KeyError):  # it only serves a warning
        return None
    added = prompted.removeprefix(question)
    return added if added and added != prompted else None


def chat_of(question: str) -> list[dict[str, str]]:
    """Returns a question as the messages that a chat template takes."""
    return [{"role": "user", "content": question}]


def as_trained(
    question: str, tokenizer: PreTrainedTokenizerBase, infos: Sequence[RewardInfo]
) -> str | list[dict[str, str]]:
    """
    Returns a question in the form that reward models were trained on, for commands that take a single text.

    It is a message if the base has a chat template, unless all reward models were trained on plain text. What already
    is a text or a message, as in a file of prompts, stays what it is.

    Args:
        question (`str`):
            The question.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the base.
        infos (sequence of [`RewardInfo`]):
            What is known about the reward models.
    """
    trained_on = {info.is_for_chats for info in infos}
    return question if tokenizer.chat_template is None or trained_on == {False} else chat_of(question)
