"""Which columns of a prompt are padding: a logits processor is never told, so it is given, inferred or asked for."""

import torch
from torch import Tensor


class PromptMask:
    """
    The attention mask of whatever `input_ids` a `generate` call passes to its logits processors.

    Without an explicit mask, the leading run of pad tokens in a row is left padding. Where the tokens alone can't tell
    padding from text, it raises instead of guessing.

    Args:
        pad_token_id (`int`, *optional*):
            The token that pads prompts on the left. `None` means that prompts are never padded.
        bos_token_id (`int`, *optional*):
            The token that a text may really start with; where it is also the pad token, inference is refused.
        attention_mask (`torch.LongTensor` of shape `(n_prompts, prompt_length)`, *optional*):
            The mask of the prompts of the coming `generate` calls, as passed to `generate`. It is repeated for several
            returns and for beams, and checked to belong to the prompts that it was first used with.
    """

    def __init__(self, pad_token_id: int | None, bos_token_id: int | None, attention_mask: Tensor | None):
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.attention_mask = attention_mask

    @property
    def attention_mask(self) -> Tensor | None:
        return self._attention_mask

    @attention_mask.setter
    def attention_mask(self, attention_mask: Tensor | None) -> None:
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError(
                    f"`attention_mask` has shape {tuple(attention_mask.shape)}, but it must have two dimensions, "
                    "(n_prompts, prompt_length). Pass the one that the tokenizer returned."
                )
            if not attention_mask[:, -1].all():
                raise ValueError(
                    "`attention_mask` ends in 0: the prompts are padded on the right, so that generation would go on "
                    "from padding. Pad on the left: `tokenizer.padding_side = 'left'`."
                )
        self._attention_mask = attention_mask
        self._prompts: Tensor | None = None  # those that the mask belongs to, once seen

    def __call__(self, input_ids: Tensor, is_prompt: bool) -> Tensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
                The prompts and what has been generated so far.
            is_prompt (`bool`):
                Whether nothing has been generated yet.

        Returns:
            `torch.LongTensor` of shape `(batch_size, length)`: 1 for tokens, 0 for padding.

        Raises:
            ValueError: if the mask can't be inferred, or the one given belongs to other prompts.
        """
        if input_ids.shape[1] == 0:
            raise ValueError(
                "`generate` passed no prompt tokens to its logits processors, as it does with `inputs_embeds` alone: "
                "the reward model can't read the prompt. Pass `input_ids` (beside `inputs_embeds` if need be)."
            )
        if self._attention_mask is None:
            return self._infer(input_ids, is_prompt)
        return self._expand(input_ids, self._attention_mask)

    def _infer(self, input_ids: Tensor, is_prompt: bool) -> Tensor:
        if self.pad_token_id is None:
            return torch.ones_like(input_ids)
        is_pad = input_ids == self.pad_token_id
        leading = is_pad.long().cumprod(dim=-1)
        if leading.any() and self.pad_token_id == self.bos_token_id:
            raise self._ambiguous("start with the pad token, which is the bos token too")
        if leading[:, 0].all():
            raise self._ambiguous("all start with the pad token")
        if is_prompt and len(input_ids) > 1 and is_pad[:, -1].any():
            raise self._ambiguous("end with the pad token, as if padded on the right (`padding_side='left'` is right)")
        return 1 - leading

    def _ambiguous(self, what: str) -> ValueError:
        return ValueError(
            f"Prompts {what} (id {self.pad_token_id}), and the tokens alone can't tell padding from text. Give the "
            "processor the mask that `generate` gets: `processor.attention_mask = inputs['attention_mask']`."
        )

    def _expand(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(input_ids.device, input_ids.dtype)
        n_prompts, length = mask.shape
        batch_size, new_tokens = len(input_ids), input_ids.shape[1] - length
        repeats = batch_size // n_prompts  # several returns, beams
        if batch_size == n_prompts * repeats and new_tokens >= 0:
            mask = mask.repeat_interleave(repeats, dim=0)
            prompts = input_ids[:, :length] * mask  # whatever stands under padding makes no difference
            if self._prompts is None and new_tokens == 0:
                self._prompts = prompts[::repeats].clone()
            if self._prompts is not None and torch.equal(prompts, self._prompts.repeat_interleave(repeats, dim=0)):
                return torch.cat([mask, mask.new_ones(batch_size, new_tokens)], dim=1)
        raise ValueError(
            f"`attention_mask` has shape {(n_prompts, length)} and belongs to other prompts than the `input_ids` of "
            f"shape {tuple(input_ids.shape)}. Set `processor.attention_mask` to the mask of these prompts or to `None`."
        )
