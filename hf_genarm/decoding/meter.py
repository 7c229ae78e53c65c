"""Measures what any method does to the base while it generates: one processor before it, and one after."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..functional import kl_divergence


def answer_lengths(answers: Tensor, end_token_ids: Collection[int]) -> Tensor:
    """Returns how many tokens of each row are the answer, its end token included; `(batch_size,)`."""
    ended = torch.isin(answers, torch.tensor(list(end_token_ids), device=answers.device)).long()
    return (ended.cumsum(dim=1) - ended == 0).sum(dim=1)


class _Observer(LogitsProcessor):
    """Calls a function with texts and scores, and returns the scores as they are."""

    supports_continuous_batching = False

    def __init__(self, function: Callable[[Tensor, Tensor], None]):
        self._function = function

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._function(input_ids, scores)
        return scores


class Meter:
    """Measures the exact divergence from the base at each step, and the base's log-probability of each token."""

    def __init__(self) -> None:
        self._divergences: list[Tensor] = []
        self._log_probs: list[Tensor] = []
        self._base: Tensor | None = None  # of the step that has no token yet

    def around(self, processors: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
        """Returns processors together with those that measure what they do."""
        return [_Observer(self._before), *processors, _Observer(self._after)]

    def _before(self, input_ids: Tensor, scores: Tensor) -> None:
        self._settle(input_ids[:, -1])
        self._base = scores.float().log_softmax(dim=-1)

    def _after(self, input_ids: Tensor, scores: Tensor) -> None:
        assert self._base is not None
        self._divergences.append(kl_divergence(scores.float().log_softmax(dim=-1), self._base))

    def _settle(self, tokens: Tensor) -> None:
        if self._base is not None:
            self._log_probs.append(self._base.gather(1, tokens[:, None])[:, 0])

    def read(self, answers: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """
        Returns what was measured for some answers.

        Args:
            answers (`torch.LongTensor` of shape `(batch_size, max_length)`):
                The tokens that were generated.
            lengths (`torch.LongTensor` of shape `(batch_size,)`):
                Their [`answer_lengths`].

        Returns:
            Two `torch.Tensor` of shape `(batch_size,)`, sums over the answer in nats: the divergence of the method's
            next-token distributions from those of the base, and the log-probability of the answer under the base.
        """
        self._settle(answers[:, -1])
        written = torch.arange(answers.shape[1], device=answers.device) < lengths[:, None]
        sums = [(torch.stack(x, dim=1) * written).sum(dim=1) for x in (self._divergences, self._log_probs)]
        return sums[0], sums[1]
