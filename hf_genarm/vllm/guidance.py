"""Eq. 7 for the batch of an engine: requests with strengths of their own, whose rows come and go."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..decoding.kl_control import controlled_scale
from ..functional import guided_product
from .loading import ServedLM
from .requests import Wish


@dataclass
class Reading:
    """
    A guided request in a step.

    Parameters:
        wish ([`Wish`]):
            What it asks for; the object stands for the request.
        text (list of `int`):
            Its tokens, drafts included.
        prompt_length (`int`):
            How many of them are the prompt.
        rows (sequence of `int`):
            Rows of the logits that predict what follows its last tokens, in order; several if it ends in drafts.
    """

    wish: Wish
    text: list[int]
    prompt_length: int
    rows: Sequence[int]


class Guidance:
    """
    Guides rows of logits.

    Args:
        reward_models (sequence of [`ServedLM`]):
            The reward models.
        reference (`"base"` or [`ServedLM`], *optional*):
            What they are contrasted with.
    """

    # Texts whose divergence so far is remembered, for requests that are interrupted.
    KEPT_TEXTS = 65536

    def __init__(self, reward_models: Sequence[ServedLM], reference: Literal["base"] | ServedLM | None = None):
        self._models, self._reference = reward_models, reference
        self._missing: OrderedDict[Hashable, float] = OrderedDict()
        no_tokens = [x.no_tokens for x in reward_models if x.no_tokens is not None]
        self._no_tokens = torch.stack(no_tokens).any(dim=0) if no_tokens else None

    def release(self, wish: Wish) -> None:
        """Frees what is held for a request."""
        for model in self._models:
            model.release(wish)
        if isinstance(self._reference, ServedLM):
            self._reference.release(wish)

    def __call__(self, logits: Tensor, readings: Sequence[Reading]) -> Tensor:
        """
        Args:
            logits (`torch.FloatTensor` of shape `(n_rows, vocab_size)`):
                Of the served model. The rows of the requests are changed in place.
            readings (sequence of [`Reading`]):
                The guided requests of this step.

        Returns:
            `torch.FloatTensor` of shape `(n_rows, vocab_size)`: the logits.
        """
        if not readings:
            return logits
        rows = torch.tensor([row for x in readings for row in x.rows], device=logits.device)
        scores = logits[rows]
        if self._no_tokens is not None:  # nothing is lost: a text never has them
            self._no_tokens = self._no_tokens.to(scores.device)
            scores = scores.masked_fill(self._no_tokens, float("-inf"))
        strengths = [
            torch.tensor([[x.wish.alpha[index]] for x in readings for _ in x.rows], device=scores.device)
            for index in range(len(self._models))
        ]
        rewards = [self._rewards(index, readings, scores) for index in range(len(self._models))]
        reference = None
        if self._reference == "base":
            reference = scores.log_softmax(dim=-1)
        elif self._reference is not None:
            texts = {x.wish: x.text for x in readings}
            reference = self._reference.log_probs(texts, [len(x.rows) for x in readings]).to(scores.device)
        is_scaled = any(x.wish.target_kl is not None for x in readings)
        scale = partial(self._scale, readings) if is_scaled else None
        product = guided_product(scores, rewards, strengths, reference, scale=scale)
        product.refuse_empty_rows()
        logits[rows] = product.log_probs.to(logits.dtype)
        return logits

    def _rewards(self, index: int, readings: Sequence[Reading], scores: Tensor) -> Tensor:
        """Log-probabilities of a reward model for all rows; anything where its strength is 0, and it isn't run."""
        wanted = [x for x in readings if x.wish.alpha[index]]
        if not wanted:
            return torch.zeros_like(scores)
        log_probs = self._models[index].log_probs({x.wish: x.text for x in wanted}, [len(x.rows) for x in wanted])
        if len(wanted) == len(readings):
            return log_probs.to(scores.device)
        is_wanted = torch.tensor([bool(x.wish.alpha[index]) for x in readings for _ in x.rows], device=scores.device)
        return torch.zeros_like(scores).masked_scatter(is_wanted[:, None], log_probs.to(scores.device))

    def _scale(
        self, readings: Sequence[Reading], scores: Tensor, rewards: list[Tensor], strengths: list[Any]
    ) -> Tensor:
        """What strengths are multiplied with, `(n, 1)`: 1 for requests without a set divergence."""
        scale = torch.ones(len(scores), 1, device=scores.device)
        firsts = [0, *(torch.tensor([len(x.rows) for x in readings]).cumsum(0).tolist())]
        held = [(x, first) for x, first in zip(readings, firsts, strict=False) if x.wish.target_kl is not None]
        # What a token may spend depends on those before it, drafts too.
        for offset in range(max(len(x.rows) for x, _ in held)):
            turn = [(x, first + offset) for x, first in held if offset < len(x.rows)]
            at = [row for _, row in turn]
            lengths = [len(x.text) - len(x.rows) + 1 + offset for x, _ in turn]
            before = [self._find(x, length - 1) for (x, _), length in zip(turn, lengths, strict=True)]
            target = torch.tensor([x.wish.target_kl for x, _ in turn], device=scores.device)
            factor, after = controlled_scale(
                scores[at],
                [x[at] for x in rewards],
                [x[at] for x in strengths],
                target,
                torch.tensor(before, device=scores.device),
            )
            scale[at] = factor[:, None]
            for (x, _), length, missing in zip(turn, lengths, after.tolist(), strict=True):
                self._missing[_key(x, length)] = missing
        while len(self._missing) > self.KEPT_TEXTS:
            self._missing.popitem(last=False)
        return scale

    def _find(self, reading: Reading, length: int) -> float:
        return self._missing.get(_key(reading, length), 0.0) if length >= reading.prompt_length else 0.0


def _key(reading: Reading, length: int) -> Hashable:
    """Keyed by the text and not by the request, so that one that was interrupted finds it again."""
    wish = reading.wish
    return wish.alpha, wish.target_kl, reading.prompt_length, hash(tuple(reading.text[:length]))
