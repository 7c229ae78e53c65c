"""Tokens that a reward model has drafted, from when they are written until the base has verified them."""

import torch
from torch import Tensor

from .line import Line, is_beginning
from .step import Step
from .step_watch import StepWatch


class Draft:
    """
    Holds one draft, and answers the calls of a processor that need no product because of it.

    Args:
        watch ([`StepWatch`]):
            The watch of the base.
        writer (`int`):
            Index of the reward model that writes it.
        exponent (`float`):
            The factor of the log-probabilities of the reward model from which drafts are drawn.

    Attributes:
        text (`torch.LongTensor` of shape `(1, length)`, *optional*):
            All tokens, drafts included, once it is written.
        line ([`Line`], *optional*):
            What they are known by.
    """

    def __init__(self, watch: StepWatch, writer: int, exponent: float):
        self.writer = writer
        self._watch, self._exponent = watch, exponent
        self._before = watch.step  # the pass that verifies it is the next one
        self._step: Step | None = None
        self._is_read = False
        self.text: Tensor | None = None
        self.line: Line | None = None

    def close(self, line: Line, ends: bool, is_greedy: bool) -> None:
        """
        Ends the writing of the draft, which goes to the base next.

        Args:
            line ([`Line`]):
                The text, drafts included.
            ends (`bool`):
                Whether nothing can follow.
            is_greedy (`bool`):
                Whether a token is accepted if and only if it is the likeliest that the processor returns.
        """
        self.text, self.line, self._is_greedy = line.input_ids, line, is_greedy
        self._usable_length = line.length - ends
        self._watch.expect(line)

    def scores_without_product(self, input_ids: Tensor, scores: Tensor) -> Tensor | None:
        """
        Returns sharpened scores, to draw the next draft from; the scores as they are, for a text that is never
        continued; `None` if the product is needed.
        """
        if self.text is None:
            return scores * self._exponent
        is_useless = input_ids.shape[1] > self._usable_length and self._is_verifying(input_ids, self.text)
        return scores if is_useless else None

    def text_to_read(self, input_ids: Tensor) -> Tensor | None:
        """
        Returns the whole draft when its verification begins: models that have not written it can then read it in one
        pass. Otherwise `None`.
        """
        if self.text is None or self._is_read or not self._is_verifying(input_ids, self.text):
            return None
        self._is_read = True
        return self.text

    def record(self, input_ids: Tensor, guided: Tensor) -> None:
        """Records what the processor returns for a text, which may reject a token of the draft."""
        text, length = self.text, input_ids.shape[1]
        if guided.device.type != "cpu":  # the work that this saves takes less time than to wait for the token
            return
        if text is None or not self._is_greedy or length >= text.shape[1] or not self._is_verifying(input_ids, text):
            return
        if guided.argmax() != text[0, length]:
            self._usable_length = min(self._usable_length, length)

    def _is_verifying(self, input_ids: Tensor, text: Tensor) -> bool:
        """Returns whether a call is about this draft, and not about another text that begins with the same tokens."""
        step = self._watch.step_of(input_ids)
        is_new = self._step is None and step is not None and step is not self._before
        if is_new and step is not None and step.input_ids.shape == text.shape:
            is_own = step.line is self.line or torch.equal(step.input_ids, text)
            self._step = step if is_own else None
        if step is None or step is not self._step:
            return False
        return is_beginning(input_ids, text) or torch.equal(input_ids, text[:, : input_ids.shape[1]])
