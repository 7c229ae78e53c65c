"""Tokens that a reward model has drafted, from when they are written until the base has verified them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .reference import Reference
from .rewards import NextTokenRewards
from .step import Step, StepWatch


class Draft:
    """
    What a processor returns at once because of a draft.

    Args:
        watch ([`StepWatch`]):
            Of the base.
        index (`int`):
            Which reward model writes it.
        exponent (`float`):
            What the log-probabilities of the reward model are multiplied with, to draw drafts.
    """

    def __init__(self, watch: StepWatch, index: int, exponent: float):
        self._watch, self._index, self._exponent = watch, index, exponent
        self._before = watch.step  # the pass that verifies it is the next one
        self._step: Step | None = None
        self._text: Tensor | None = None

    def close(self, text: Tensor, ends: bool, decides: bool) -> None:
        """
        Says that it is written, and goes to the base.

        Args:
            text (`torch.LongTensor` of shape `(1, length)`):
                All tokens, drafts included.
            ends (`bool`):
                Whether nothing can follow.
            decides (`bool`):
                Whether a token is taken if and only if it is the likeliest that the processor returns.
        """
        self._text, self._decides = text, decides
        self._usable_length = text.shape[1] - ends

    def scores_of(self, input_ids: Tensor, scores: Tensor) -> Tensor | None:
        """
        Sharpened scores, to draw the next draft from; scores as they are, for a text that is never gone on with;
        `None` if the processor is needed.
        """
        if self._text is None:
            return scores * self._exponent
        is_useless = input_ids.shape[1] > self._usable_length and self._verifies(input_ids, self._text)
        return scores if is_useless else None

    def read_by_others(
        self,
        input_ids: Tensor,
        mask: Tensor,
        indices: Iterable[int],
        rewards: NextTokenRewards,
        reference: Reference | None,
    ) -> None:
        """
        When the processor is first called about it, the models that have not written it read it in one pass.

        Args:
            input_ids, mask (`torch.LongTensor` of shape `(1, length)`):
                What the processor is called with.
            indices (iterable of `int`):
                The reward models that are needed.
            rewards ([`NextTokenRewards`]), reference ([`Reference`], *optional*):
                Of the processor.
        """
        text = self._text
        if text is None or self._step is not None or not self._verifies(input_ids, text):
            return
        n_drafts = text.shape[1] - mask.shape[1]
        mask = torch.cat([mask, mask.new_ones(1, n_drafts)], dim=1)
        for index in set(indices) - {self._index}:
            rewards.read_ahead(index, text, mask, n_drafts + 1)
        if reference is not None:
            reference.read_ahead(text, mask, n_drafts + 1)

    def note(self, input_ids: Tensor, guided: Tensor) -> None:
        """Takes note of what the processor returns, which may reject a token."""
        text, length = self._text, input_ids.shape[1]
        if text is None or not self._decides or length >= text.shape[1] or not self._verifies(input_ids, text):
            return
        if guided.argmax() != text[0, length]:
            self._usable_length = min(self._usable_length, length)

    def _verifies(self, input_ids: Tensor, text: Tensor) -> bool:
        """Whether the processor is called about this draft, and not about another text that begins alike."""
        step = self._watch.step
        if self._step is None and step is not self._before and step is not None and torch.equal(step.input_ids, text):
            self._step = step
        return step is not None and step is self._step and torch.equal(input_ids, text[:, : input_ids.shape[1]])
