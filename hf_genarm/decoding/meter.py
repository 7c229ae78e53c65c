"""Measures what any method does to the base while it generates: one processor before it, and one after."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..functional import kl_divergence


def answer_lengths(answers: Tensor, end_token_ids: Collection[int]) -> Tensor:
    """Returns how many tokens of each row are the answer, its end token included; `(batch_size,)`."""
    ended = torch.isin(answers, torch.tensor(list(end_token_ids), device=answers.device)).long()
    return (ended.cumsum(dim=1) - ended == 0).sum(dim=1)


class Meter:
    """Measures the exact divergence from the base at each step, and the base's log-probability of each token."""

    def __init__(self) -> None:
        self._divergences: list[Tensor] = []
        self._log_probs: list[Tensor] = []
        self._base: Tensor | None = None  # of the step that has no token yet

    def around(self, processors: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
        meter = self

        class Before(LogitsProcessor):
            supports_continuous_batching = False

            def __call__(self, input_ids, scores):
                meter._settle(input_ids[:, -1])
                meter._base = scores.float().log_softmax(dim=-1)
                return scores

        class After(LogitsProcessor):
            supports_continuous_batching = False

            def __call__(self, input_ids, scores):
                assert meter._base is not None
                meter._divergences.append(kl_divergence(scores.float().log_softmax(dim=-1), meter._base))
                return scores

        return [Before(), *processors, After()]

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
