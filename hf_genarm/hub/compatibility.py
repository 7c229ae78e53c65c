"""Whether a reward model fits a base model: the same tokens, and the same chat template."""

import warnings
from typing import TYPE_CHECKING

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .info import RewardInfo, chat_template_fingerprint, tokenizer_fingerprint

if TYPE_CHECKING:
    from .reward_model import AutoregressiveRewardModel


class GuidanceWarning(UserWarning):
    """A setting that works against guidance. `warnings.simplefilter("ignore", GuidanceWarning)` switches these off."""


def has_same_ids(
    reward_model: "AutoregressiveRewardModel",
    base_model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
) -> bool:
    """Whether ids and numbers of logits are the same, so that nothing has to be aligned."""
    own = reward_model.tokenizer
    sizes = {len(model.get_input_embeddings().weight) for model in (reward_model.model, base_model)}
    return own is not None and len(sizes) == 1 and tokenizer_fingerprint(own) == tokenizer_fingerprint(tokenizer)


def warn_of_differences(info: RewardInfo, name: str, tokenizer: PreTrainedTokenizerBase, shares_weights: bool) -> None:
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
            stacklevel=3,
        )
    if info.chat_template not in (None, chat_template_fingerprint(tokenizer)):
        warnings.warn(
            f"`{name}` was trained with another chat template than that of the tokenizer of the base "
            f"(`{tokenizer.name_or_path}`), so its rewards are for prompts of another form. Set "
            "`tokenizer.chat_template` to the one that it was trained with.",
            GuidanceWarning,
            stacklevel=3,
        )


def generation_prompt_ids(info: RewardInfo, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens with which the chat template asks for an answer, if the reward model was trained on chats."""
    if info.chat_template is None or tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "?"}]
    question = tokenizer.apply_chat_template(chat, tokenize=False)
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(asked.removeprefix(question), add_special_tokens=False)["input_ids"]
