"""Whether a reward model fits a base model: the same tokens, and the same chat template."""

import warnings
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cache import embeddings_of
from .info import RewardInfo, chat_template_fingerprint, tokenizer_fingerprint
from .reward_model import AutoregressiveRewardModel
from .sharing import shares_weights
from .warning import GuidanceWarning


def tokenizers_to_align(
    reward_models: Sequence[AutoregressiveRewardModel],
    names: Sequence[str],
    base_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[PreTrainedTokenizerBase | None]:
    """
    The tokenizer of each reward model, `None` where its ids are those of the base. Warns of differences under the same
    ids.

    Args:
        reward_models (sequence of [`AutoregressiveRewardModel`]), names (sequence of `str`):
            The reward models.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The base.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            That of the base.
    """
    tokenizers: list[PreTrainedTokenizerBase | None] = []
    for arm, name in zip(reward_models, names, strict=True):
        # Ids that index the same embeddings are the same ids.
        is_shared = base_model is not None and shares_weights(arm.model, base_model)
        is_same = is_shared or (base_model is not None and has_same_ids(arm, len(embeddings_of(base_model)), tokenizer))
        tokenizers.append(None if is_same else arm.tokenizer)
        _warn_of_differences(arm.info, name, tokenizer, is_shared)
    return tokenizers


def has_same_ids(reward_model: AutoregressiveRewardModel, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a reward model has as many embeddings as the base, and the same tokens under the same ids."""
    own = reward_model.tokenizer
    same_size = len(embeddings_of(reward_model.model)) == vocab_size
    return own is not None and same_size and tokenizer_fingerprint(own) == tokenizer_fingerprint(tokenizer)


def _warn_of_differences(info: RewardInfo, name: str, tokenizer: PreTrainedTokenizerBase, shares_weights: bool) -> None:
    """
    Warns if a reward model was trained with other tokens under the same embeddings, or another chat template, than the
    base has. Both can be right, when tokens were added or a template was replaced on purpose.
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


def generation_prompt_ids(info: RewardInfo, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens with which the chat template asks for an answer, if the reward model was trained on chats."""
    if info.chat_template is None or tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "?"}]
    question, asked = (
        str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=is_asked))
        for is_asked in (False, True)
    )
    return tokenizer(asked.removeprefix(question), add_special_tokens=False)["input_ids"]
