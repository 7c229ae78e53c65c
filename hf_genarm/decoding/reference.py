"""The model that reward models are contrasted with while text is generated."""

from typing import Literal

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..hub.causality import take_as_causal
from ..hub.kv_cache import network_of
from ..hub.limits import is_read_otherwise_by_generate
from ..hub.sharing import twin
from .fusion.joint_pass import FusedLM, Fusion
from .line import Line
from .lockstep import LockstepLM
from .own_prompt import OwnPrompt
from .step_watch import StepWatch
from .texts import Text


class Reference:
    """
    Returns the next-token log-probabilities of a reference.

    If that is the base, they come from its own passes, before any processor. Only text that the base has not read, such
    as a draft, or an answer to another prompt, is read by a model around the same weights.

    Args:
        model (`"base"`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reference.
        watch ([`StepWatch`], *optional*):
            The watch of the base; needed for `"base"`.
    """

    def __init__(self, model: Literal["base"] | PreTrainedModel | PeftModel, watch: StepWatch | None):
        self._watch = watch if model == "base" else None
        self._lockstep = None if model == "base" else LockstepLM(model, "reference")
        self._is_tested = False  # whether the base is causal, once other modules around it are made
        # Reward models read a text as in training. If `generate` reads it otherwise, its logits can't be the reference.
        self._keeps_logits = watch is not None and not is_read_otherwise_by_generate(network_of(watch.model))
        if self._watch is not None and self._keeps_logits:
            self._watch.keep_logits()

    def reset(self) -> None:
        """Forgets what has been read, and what the base was like."""
        if self._lockstep is not None:
            self._lockstep.reset()
        if self._watch is not None:
            self._lockstep = None

    def release(self) -> None:
        """Gives back the memory of its cache."""
        if self._lockstep is not None:
            self._lockstep.release()

    def read_ahead(
        self, text: Tensor, attention_mask: Tensor, line: Line, n_logits: int, prompt: OwnPrompt | None
    ) -> None:
        """Reads drafts in one pass, as reward models do, unless the base reads them itself."""
        if (self._watch is None or prompt is not None) and self._model(prompt).has_cache:
            self._logits(text, attention_mask, line, prompt, n_logits)

    def log_probs(self, text: Text, attention_mask: Tensor, scores: Tensor, prompt: OwnPrompt | None = None) -> Tensor:
        """
        Returns the log-probabilities of what follows some texts.

        Args:
            text ([`Text`]):
                The texts so far.
            attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
                Their mask.
            scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
                The scores of the base, for their shape and device.
            prompt ([`OwnPrompt`], *optional*):
                What the reference reads in place of the base's prompt.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`.

        Raises:
            ValueError: if it has another vocabulary than the base.
        """
        logits = None
        if self._watch is not None and self._keeps_logits and text.step is not None and prompt is None:
            logits = text.step.base_logits(text.input_ids.shape[1])
        if logits is None:
            logits = self._logits(text.input_ids, attention_mask, text.line, prompt)
        if logits.shape[-1] != scores.shape[-1]:
            raise ValueError(
                f"The reference scores {logits.shape[-1]} tokens, but the base model has {scores.shape[-1]}. Use one "
                "with the tokenizer of the base model."
            )
        return logits.to(scores.device).float().log_softmax(dim=-1)

    def _model(self, prompt: OwnPrompt | None) -> LockstepLM:
        """Returns the model that reads what the base has not read; in the passes of the base, if all of it is other."""
        if self._lockstep is None:
            assert self._watch is not None
            base = twin(self._watch.model)
            if self._is_tested:
                take_as_causal(base)
            self._lockstep = LockstepLM(base, "reference") if prompt is None else FusedLM(base, Fusion.on(self._watch))
            self._is_tested = True
        return self._lockstep

    def _logits(
        self, input_ids: Tensor, attention_mask: Tensor, line: Line, prompt: OwnPrompt | None, n_logits: int = 1
    ) -> Tensor:
        """Returns the logits that follow the text of the reference, given that of the base."""
        model = self._model(prompt)
        if isinstance(model, FusedLM):
            model.own_prompt = prompt
        if prompt is not None:
            input_ids, attention_mask = prompt.text(input_ids, attention_mask)
            line = prompt.line(line)
        return model(input_ids, attention_mask, n_logits, line)
