"""Which columns of a text are padding: as the base reads it, or if that is not watched, as the user gives it."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..arguments import as_tensor, as_whole_number
from .texts import Text


class PromptMask:
    """
    Returns the attention mask of the texts that a processor is called with.

    In `generate` it is the mask of the base. Elsewhere it is the given one. If none is given, all tokens are text, and
    a text that could be padded is an error.

    Args:
        pad_token_id (`int`, *optional*):
            The token that pads prompts. `None` means that prompts are never padded.
        attention_mask (`torch.LongTensor` of shape `(n_prompts, prompt_length)`, *optional*):
            The mask of the prompts. It is repeated for several returned sequences and for beams, and checked to belong
            to the prompts that it was first used with.
    """

    def __init__(self, pad_token_id: int | None, attention_mask: Any = None):
        rule = "the id of a token, or `None` if prompts are not padded"
        self.pad_token_id = (
            None if pad_token_id is None else as_whole_number("pad_token_id", pad_token_id, rule, least=-1)
        )
        self.attention_mask = attention_mask

    @property
    def attention_mask(self) -> Tensor | None:
        return self._attention_mask

    @attention_mask.setter
    def attention_mask(self, attention_mask: Any) -> None:
        self._attention_mask = None if attention_mask is None else _check(attention_mask)
        self._on_host = None if self._attention_mask is None else self._attention_mask.to("cpu", torch.long)
        self._prompts: Tensor | None = None  # the first prompts that the mask was used with, to which it belongs

    def copy(self) -> "PromptMask":
        """Returns a copy with the same mask, which can be used with other prompts."""
        return PromptMask(self.pad_token_id, self._attention_mask)

    def __call__(self, text: Text) -> Tensor:
        """
        Returns the mask of some texts.

        Returns:
            `torch.LongTensor` of shape `(batch_size, length)`: 1 for tokens, 0 for padding.

        Raises:
            ValueError: if the mask is not known, or the one given belongs to other prompts or is not that of the base.
        """
        if text.input_ids.shape[1] == 0:
            raise ValueError(
                "`generate` passed no prompt tokens to its logits processors, as it does with `inputs_embeds` alone: "
                "the reward model can't read the prompt. Pass `input_ids` (together with `inputs_embeds` if need be)."
            )
        if text.base_mask is None:
            if self._attention_mask is None:
                self._refuse_ambiguous(text)
                return torch.ones_like(text.input_ids)
            text.line = text.line.masked(self._expand(text))
            assert text.line.attention_mask is not None
            return text.line.attention_mask
        if text.line.padding.is_on_the_right:
            raise _padded_on_the_right("The mask of `generate`")
        key = ("attention_mask", len(text.input_ids))
        if self._attention_mask is not None and text.run.agreed.get(key) is not self._attention_mask:
            if not torch.equal(self._expand(text), text.line.mask(text.input_ids.shape[1])):
                raise ValueError(
                    "`processor.attention_mask` marks other tokens as padding than the base model does. Pass the same "
                    "one to `generate`, or set `processor.attention_mask` to `None`: that of `generate` is then used."
                )
            text.run.agreed[key] = self._attention_mask
        return text.base_mask

    def _refuse_ambiguous(self, text: Text) -> None:
        """Refuses a text that could be padded."""
        is_pad = text.line.ids(text.input_ids.shape[1]) == (-1 if self.pad_token_id is None else self.pad_token_id)
        if is_pad[:, 0].any():
            raise self._ambiguous("starts")
        if text.is_prompt and len(is_pad) > 1 and is_pad[:, -1].any():
            raise self._ambiguous("ends")

    def _ambiguous(self, where: str) -> ValueError:
        return ValueError(
            f"A text {where} with the pad token (id {self.pad_token_id}), and tokens alone don't show whether that is "
            "padding. Make the processor with `base_model`, so that it knows the mask of `generate`, or pass the mask: "
            "`processor.attention_mask = inputs['attention_mask']`. Prompts must be padded on the left "
            "(`padding_side='left'`)."
        )

    def _expand(self, text: Text) -> Tensor:
        """Extends the given mask to the rows of the prompts and to the tokens that follow, on the host."""
        assert self._on_host is not None
        input_ids, mask = text.line.ids(text.input_ids.shape[1]), self._on_host
        (n_prompts, length), repeats = mask.shape, len(input_ids) // len(mask)
        if repeats * n_prompts == len(input_ids) > 0 and input_ids.shape[1] >= length:
            mask = mask.repeat_interleave(repeats, dim=0)
            prompts = input_ids[:, :length] * mask  # padded tokens make no difference
            if self._prompts is None:
                self._prompts = prompts[::repeats].clone()
            if torch.equal(prompts, self._prompts.repeat_interleave(repeats, dim=0)):
                return torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - length)], dim=1)
        raise ValueError(
            f"`attention_mask` has shape {(n_prompts, length)} and belongs to other prompts than the `input_ids` of "
            f"shape {tuple(input_ids.shape)}. Set `processor.attention_mask` to the mask of these prompts or to `None`."
        )


def pad_token_id_of(special_tokens: PreTrainedTokenizerBase | GenerationConfig) -> int | None:
    """Returns the token that pads prompts: as in `generate` the (first) eos token, if no other is named."""
    if special_tokens.pad_token_id is not None:
        return special_tokens.pad_token_id
    eos_token_id = special_tokens.eos_token_id
    return eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id


def _check(attention_mask: Any) -> Tensor:
    rule = "the mask of the prompts, 1 for tokens and 0 for padding"
    mask = as_tensor("attention_mask", attention_mask, rule)
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"`attention_mask` has other values than 0 and 1, but must be {rule}.")
    if mask.ndim != 2 or mask.numel() == 0:
        raise ValueError(
            f"`attention_mask` has shape {tuple(mask.shape)}, but it must have two dimensions, (n_prompts, "
            "prompt_length), and neither may be 0. Pass the one that the tokenizer returned."
        )
    if not mask[:, -1].all():
        raise _padded_on_the_right("`attention_mask`")
    return mask


def _padded_on_the_right(what: str) -> ValueError:
    return ValueError(
        f"{what} ends in 0: prompts are padded on the right, so that generation would continue padding. Pad on the "
        "left: `tokenizer.padding_side = 'left'`."
    )
