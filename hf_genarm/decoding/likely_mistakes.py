"""Settings that work against guidance, and texts that it can't serve: checked when a run begins."""

import warnings
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..hub.compatibility import PromptFormat
from ..hub.info import GuidanceWarning
from ..hub.kv_cache import CACHE, network_of, uncompiled
from .lockstep import LockstepLM
from .strings.string_rewards import StringRewards
from .texts import Text


class LikelyMistakes:
    """
    Warns once of each setting that works against guidance, and refuses prompts that reward models can't read.

    Args:
        base ([`~transformers.PreTrainedModel`], *optional*):
            The model to be steered.
        prompt_format ([`PromptFormat`], *optional*):
            What the reward model was trained on, chats or plain text. A prompt of the other kind is warned about.
    """

    def __init__(self, base: PreTrainedModel | None = None, prompt_format: PromptFormat | None = None) -> None:
        self._base = base
        self._prompt_format = prompt_format
        self._given: set[str] = set()

    def __call__(self, text: Text, reward_models: Sequence[LockstepLM | StringRewards]) -> None:
        """
        Checks the settings and the texts of a call.

        Args:
            text ([`Text`]):
                What the processor was called with.
            reward_models (sequence of [`LockstepLM`] or [`StringRewards`]):
                All reward models.

        Raises:
            ValueError: if the base model has read more than the text.
        """
        if text.step is not None:
            _refuse_hidden_prompts(text)
        if self._base is not None and self._base.training:
            self._warn("The base model is in training mode: dropout makes its text random. Call `model.eval()`.")
        for index, reward_model in enumerate(reward_models):
            if reward_model.model.training:
                self._warn(
                    f"Reward model {index} is in training mode: dropout makes its rewards random. Call `.eval()` on it."
                )
        penalty = None if self._base is None else self._base.generation_config.repetition_penalty
        if penalty not in (None, 1.0):
            self._warn(
                f"The generation config of the base model has `repetition_penalty={penalty}`, which acts on the logits "
                "of the base alone, before guidance, and can undo it. Set it to 1.0: "
                "`model.generation_config.repetition_penalty = 1.0`."
            )
        trained_on = self._prompt_format
        if text.is_prompt and trained_on is not None:
            is_chat = _all_contain(text.input_ids, trained_on.generation_prompt_ids)
            if trained_on.is_chat and not is_chat:
                self._warn(
                    "A prompt is not in the chat template, but the reward model was trained on chats, and its rewards "
                    "for other text mean little. Write prompts as messages: "
                    "`tokenizer.apply_chat_template(..., add_generation_prompt=True)`."
                )
            elif is_chat and not trained_on.is_chat:
                self._warn(
                    "The prompts are in the chat template, but the reward model was trained on plain text, and its "
                    "rewards for chats mean little. Write prompts as plain text, or train it on messages."
                )

    def _warn(self, message: str) -> None:
        if message not in self._given:
            self._given.add(message)
            warnings.warn(message, GuidanceWarning, stacklevel=2)


def refuse_hidden_text(base_model: PreTrainedModel | PeftModel) -> None:
    """
    Refuses a base whose text is more than what logits processors are called with.

    Args:
        base_model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to be steered, which may be compiled.

    Raises:
        TypeError: if it is not a language model that generates.
        ValueError: if it is an encoder-decoder, or has an adapter that puts virtual tokens before the text.
    """
    model, network = uncompiled(base_model), network_of(base_model, "base_model")
    if not network.can_generate():
        raise TypeError(
            f"`base_model` is a `{type(network).__name__}`, which has no `generate`, but must be a causal LM. Load it "
            "with `AutoModelForCausalLM`."
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"The base model has an adapter of the kind {model.active_peft_config.peft_type.value}, which puts virtual "
            "tokens before the text, where a processor that watches the base can't see them. Make it without "
            "`base_model`, and give it the mask: `processor.attention_mask = inputs['attention_mask']`."
        )
    if network.config.is_encoder_decoder:
        raise ValueError(
            f"The base model is a `{type(network).__name__}`, whose encoder reads the prompt. A reward model sees "
            "only what logits processors see, the decoder's tokens. Guidance needs a decoder-only base model."
        )


def _refuse_hidden_prompts(text: Text) -> None:
    """Refuses texts of which the base has read more than the tokens that `generate` was given."""
    run = text.run
    if run.n_hidden:
        raise ValueError(
            f"The base model has read {run.n_hidden + run.prompt_length} tokens, but `generate` was given "
            f"{run.prompt_length}: the others are only in its `{CACHE}` or `inputs_embeds`, where the reward "
            "model can't read them. Pass the whole text as `input_ids`; what is in the cache is not computed again."
        )
    if run.other_inputs:
        raise ValueError(
            f"The base model reads {', '.join(f'`{name}`' for name in run.other_inputs)} in addition to tokens, which "
            "the reward model can't see. Guide the model on text alone."
        )


def _all_contain(input_ids: Tensor, pattern: list[int]) -> bool:
    """Returns whether each row has these tokens somewhere, one after the other."""
    if input_ids.shape[1] < len(pattern):
        return False
    windows = input_ids.unfold(1, len(pattern), 1)  # (batch_size, positions, len(pattern))
    return bool((windows == torch.tensor(pattern, device=input_ids.device)).all(dim=-1).any(dim=-1).all())
