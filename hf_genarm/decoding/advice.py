"""What the running `generate` call does that works against guidance, or that guidance can't serve."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
)

from ..hub.compatibility import GuidanceWarning
from .step import RunningGeneration


class Advice:
    """
    Warns once of each setting that works against guidance, and refuses base models that hide the prompt from it.

    Args:
        generation_prompt_ids (list of `int`, *optional*):
            Tokens with which a chat template asks for an answer, if the reward model was trained on chats. A prompt
            without them is warned about.
    """

    def __init__(self, generation_prompt_ids: list[int] | None = None) -> None:
        self._generation_prompt_ids = generation_prompt_ids or []
        self._given: set[str] = set()

    def __call__(
        self, generation: RunningGeneration, input_ids: Tensor, attention_mask: Tensor, is_prompt: bool
    ) -> None:
        """
        Args:
            generation ([`RunningGeneration`]):
                The `generate` call that runs the processor.
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
                What the processor was called with.
            attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
                What the reward models are about to see.
            is_prompt (`bool`):
                Whether nothing has been generated yet.

        Raises:
            ValueError: if the base model sees another mask, is an encoder-decoder, or the prompt contains images.
        """
        decoding = generation.variables
        model, config = decoding.get("self"), decoding.get("generation_config")
        # Drafts of an assistant decide nothing.
        if isinstance(model, PreTrainedModel) and isinstance(config, GenerationConfig) and not config.is_assistant:
            _refuse_hidden_prompts(model, input_ids)
            _refuse_another_text(decoding, input_ids, attention_mask)
            if model.training:
                self._warn("The base model is in training mode: dropout makes its text random. Call `model.eval()`.")
        for processor in generation.processors:
            if isinstance(processor, TopKLogitsWarper) and processor.top_k == 50:
                self._warn(
                    "`generate` keeps only the 50 likeliest tokens of the guided distribution (`top_k=50`, its default "
                    "when sampling). Pass `top_k=0` to sample from all of it."
                )
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                self._warn(
                    f"`repetition_penalty={processor.penalty}` acts on the logits of the base model alone, before "
                    "guidance, and can undo it. Set it to 1.0 in the generation config or in `generate`."
                )
        if is_prompt and self._generation_prompt_ids and not _all_contain(input_ids, self._generation_prompt_ids):
            self._warn(
                "A prompt is not in the chat template, but the reward model was trained on chats, and knows little of "
                "other text. Use `tokenizer.apply_chat_template(..., add_generation_prompt=True)`."
            )

    def _warn(self, message: str) -> None:
        if message not in self._given:
            self._given.add(message)
            warnings.warn(message, GuidanceWarning, stacklevel=2)


def _refuse_hidden_prompts(model: PreTrainedModel, input_ids: Tensor) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"The base model is a `{type(model).__name__}`, whose encoder reads the prompt. A reward model sees "
            "only what logits processors see, the decoder's tokens. Guidance needs a decoder-only base model."
        )
    image_token_id = getattr(model.config, "image_token_id", None)
    if image_token_id is not None and (input_ids == image_token_id).any():
        raise ValueError(
            "The prompt contains images, which the reward model can't see. Guide the model on text prompts only."
        )


def _all_contain(input_ids: Tensor, pattern: list[int]) -> bool:
    if input_ids.shape[1] < len(pattern):
        return False
    windows = input_ids.unfold(1, len(pattern), 1)  # (batch_size, positions, len(pattern))
    return bool((windows == input_ids.new_tensor(pattern)).all(dim=-1).any(dim=-1).all())


def _refuse_another_text(decoding: Mapping[str, Any], input_ids: Tensor, attention_mask: Tensor) -> None:
    """Compares the padding and the length of what base and reward model read."""
    model_kwargs = decoding.get("model_kwargs", {})
    if "attention_mask" in model_kwargs:
        base_mask = model_kwargs["attention_mask"]
        if base_mask is None:  # which is how `generate` keeps a mask of ones
            base_mask = torch.ones_like(attention_mask)
        length = min(base_mask.shape[1], input_ids.shape[1])
        if not torch.equal(base_mask[:, :length].to(attention_mask.device).bool(), attention_mask[:, :length].bool()):
            raise ValueError(
                "The reward model would take other tokens for padding than the base model does. Give the processor the "
                "mask that `generate` gets (`processor.attention_mask = inputs['attention_mask']`), and pass one to "
                "`generate` if the prompts are padded."
            )
    cache = model_kwargs.get("past_key_values")
    if isinstance(cache, Cache) and not all(cache.is_linear):
        read = int(cache.get_seq_length())
        passed = decoding.get("candidate_input_ids", input_ids).shape[1]
        if read > passed:
            raise ValueError(
                f"The base model has read {read} tokens, but `generate` was given {passed}: the others are only in its "
                "`past_key_values`, where the reward model can't read them. Pass the whole text as `input_ids`; "
                "what is in the cache is not computed again."
            )
