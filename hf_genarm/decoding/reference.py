"""The model that reward models are contrasted with while text is generated."""

from typing import Literal

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..hub.kv_cache import network_of
from ..hub.limits import is_read_otherwise_by_generate
from ..hub.sharing import twin
from .lockstep import LockstepLM
from .step_watch import StepWatch
from .texts import Text


class Reference:
    """
    Returns the next-token log-probabilities of a reference.

    If that is the base, they come from its own passes, before any processor. Only text that the base has not read, such
    as a draft, takes a pass of a model around the same weights.

    Args:
        model (`"base"`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reference.
        watch ([`StepWatch`], *optional*):
            The watch of the base; needed for `"base"`.
    """

    def __init__(self, model: Literal["base"] | PreTrainedModel | PeftModel, watch: StepWatch | None):
        self._watch = watch if model == "base" else None
        self._lockstep = None if model == "base" else LockstepLM(model, "reference")
        # Reward models read a text as in training. If `generate` reads it otherwise, its logits can't be the reference.
        self._keeps_logits = watch is not None and not is_read_otherwise_by_generate(network_of(watch.model))
        if self._watch is not None and self._keeps_logits:
            self._watch.keep_logits()

    def reset(self) -> None:
        """Forgets what has been read, and what the base was like."""
        if self._watch is not None:
            self._lockstep = None
        elif self._lockstep is not None:
            self._lockstep.reset()

    def release(self) -> None:
        """Gives back the memory of its cache."""
        if self._lockstep is not None:
            self._lockstep.release()

    def read_ahead(self, text: Tensor, attention_mask: Tensor, n_logits: int) -> None:
        """Reads drafts in one pass, as reward models do, unless the base reads them itself."""
        if self._watch is None and self._lockstep is not None and self._lockstep.has_cache:
            self._lockstep(text, attention_mask, n_logits)

    def log_probs(self, text: Text, attention_mask: Tensor, scores: Tensor) -> Tensor:
        """
        Returns the log-probabilities of what follows some texts.

        Args:
            text ([`Text`]):
                The texts so far.
            attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
                Their mask.
            scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
                The scores of the base, for their shape and device.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`.

        Raises:
            ValueError: if it has another vocabulary than the base.
        """
        logits = None
        if self._watch is not None and self._keeps_logits and text.step is not None:
            logits = text.step.base_logits(text.input_ids.shape[1])
        if logits is None:
            if self._lockstep is None and self._watch is not None:
                self._lockstep = LockstepLM(twin(self._watch.model), "reference")
            assert self._lockstep is not None
            logits = self._lockstep(text.input_ids, attention_mask)
        if logits.shape[-1] != scores.shape[-1]:
            raise ValueError(
                f"The reference scores {logits.shape[-1]} tokens, but the base model has {scores.shape[-1]}. Use one "
                "with the tokenizer of the base model."
            )
        return logits.to(scores.device).float().log_softmax(dim=-1)
