"""What guidance did to each token: kept by the tokens of a text, and read for finished sequences."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_tensor
from ..functional import GuidedProduct, kl_divergence
from ..viewing.tokens import token_texts
from .guided_tokens import GuidedTokens
from .step import Run
from .texts import Text, text_keys

Key = tuple[int, int]


class Statistics:
    r"""
    Keeps, for each text that a processor was called with, what it did to the next token.

    Texts are distinguished by their run, their request and their tokens, so that the order of calls and of rows makes
    no difference. What is kept about rejected drafts and abandoned beams is never read.

    Args:
        n_rewards (`int`):
            Number of reward models.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of the base model, to show tokens as text.
        more (sequence of `str`, *optional*):
            Names of more columns, as [`~Statistics.record`] gets them.
    """

    # Likeliest tokens that are kept of each distribution
    N_LIKELIEST = 3
    # Texts of earlier runs that are kept until they are read, counted in tokens
    KEPT_TOKENS = 16_384

    def __init__(self, n_rewards: int, tokenizer: Any = None, more: Sequence[str] = ()):
        self._n_rewards, self._tokenizer, self._more = n_rewards, tokenizer, list(more)
        self._names: dict[int, str] = {}  # tokens as text
        self._runs: dict[Run, _RunStatistics] = {}
        self._has_forgotten = False

    def clear(self) -> None:
        """Forgets all that was recorded."""
        self._runs, self._has_forgotten = {}, False

    def record(
        self,
        text: Text,
        n_requests: int,
        product: GuidedProduct,
        indices: Sequence[int],
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        """
        Records what guidance does to the next token of some texts.

        Args:
            text ([`Text`]):
                The texts.
            n_requests (`int`):
                The number of requests whose strengths differ.
            product ([`~hf_genarm.functional.GuidedProduct`]):
                What guidance does to their next token.
            indices (sequence of `int`):
                Which reward models it has, in order.
            more (mapping of `str` to `torch.Tensor` of shape `(batch_size,)`, *optional*):
                More columns.
        """
        of_run = self._runs.setdefault(text.run, _RunStatistics(n_requests))
        while len(self._runs) > 1 and sum(len(x.of_text) for x in self._runs.values()) > self.KEPT_TOKENS:
            del self._runs[next(iter(self._runs))]
            self._has_forgotten = True
        base, guided = (x.float().log_softmax(dim=-1) for x in (product.scores, product.log_probs))
        possible = guided > -torch.inf
        values = {
            "kl": kl_divergence(guided, base),
            "entropy": -(guided.exp() * guided.where(possible, 0.0)).sum(dim=-1),
            "base_entropy": -(base.exp() * base.where(base > -torch.inf, 0.0)).sum(dim=-1),
            "top_token_changed": guided.argmax(dim=-1) != base.argmax(dim=-1),
            "log_z": product.log_z,
            **(more or {}),
        }
        log_probs = {"base_log_prob": base, "guided_log_prob": guided}
        for index, reward, alpha in zip(indices, product.rewards, product.strengths, strict=True):
            values[f"alpha_{index}"] = torch.as_tensor(alpha, device=base.device).expand(len(base), 1)[:, 0]
            log_probs[f"reward_log_prob_{index}"] = reward
        for name, distribution in (("likeliest_before", base), ("likeliest_after", guided)):
            values[name] = torch.stack(distribution.topk(self.N_LIKELIEST), dim=-1)
        n_prompts = text.run.root.n_prompts
        has_beams = n_prompts is None or len(text.input_ids) > n_prompts
        of_run.record(text.input_ids, {name: value.tolist() for name, value in values.items()}, log_probs, has_beams)

    def read(self, sequences: Tensor) -> GuidedTokens:
        """
        Returns one row for each token that was guided, as columns for a `pandas.DataFrame` that draw themselves.

        Args:
            sequences (`torch.LongTensor` of shape `(n_sequences, length)`):
                What `generate` returned.

        Raises:
            TypeError: if they are no tokens.
            ValueError: if they are of another shape, or what was kept about a sequence has been forgotten.
        """
        rule = "the tokens that `generate` returned, a tensor of integers of shape (n_sequences, length)"
        sequences = as_tensor("sequences", sequences, f"{rule}; of an output with more, pass `output.sequences`")
        if sequences.ndim != 2 or sequences.is_floating_point():
            raise ValueError(
                f"`sequences` has shape {tuple(sequences.shape)} of {sequences.dtype}, but must be {rule}."
            )
        names = ["sequence", "position", "token", "base_log_prob", "guided_log_prob"]
        names += [f"{what}_{index}" for index in range(self._n_rewards) for what in ("reward_log_prob", "alpha")]
        names += ["kl", "log_z", "entropy", "base_entropy", "top_token_changed", *self._more]
        columns: dict[str, list[Any]] = {name: [] for name in names}
        texts: list[str | None] = []
        likeliest = []
        runs = list(reversed(self._runs.values()))
        by_run = [run.read(sequences) for run in runs]
        for index in range(len(sequences)):
            # Of several runs with the same beginning, the one that wrote its end, most of it, and the latest
            rows = max((of_sequence[index] for of_sequence in by_run), key=_reach, default=[])
            if not rows and self._has_forgotten:
                raise ValueError(
                    f"Nothing is kept about sequence {index}. Of earlier `generate` calls, {self.KEPT_TOKENS} tokens "
                    "are kept: read the statistics of a call before more text is generated."
                )
            ids = sequences[index].tolist()
            as_text = token_texts(self._tokenizer, ids, rows[0]["position"]) if rows else []
            end = len(ids) - self._n_after_the_end(ids)
            for row in rows:
                texts.append(as_text[row["position"] - rows[0]["position"]] if row["position"] < end else None)
                likeliest.append((self._named(row["likeliest_before"]), self._named(row["likeliest_after"])))
                for name, column in columns.items():
                    default = 0.0 if name.startswith("alpha_") else float("nan")
                    column.append(({"sequence": index} | row).get(name, default))
        return GuidedTokens(columns, texts, likeliest)

    def _n_after_the_end(self, ids: list[int]) -> int:
        """Counts the pads that `generate` adds where a text has ended before the others: the last token, repeated."""
        if self._tokenizer is None or ids[-1] not in self._tokenizer.all_special_ids:
            return 0
        return next((n for n, (x, y) in enumerate(itertools.pairwise(reversed(ids))) if x != y), len(ids) - 1)

    def _named(self, likeliest: list[list[float]]) -> list[tuple[str, float]]:
        """Returns tokens as text with their probabilities, for pairs of log-probability and id."""
        for _, token in likeliest:
            if token not in self._names:
                self._names[int(token)] = token_texts(self._tokenizer, [int(token)])[0]
        return [(self._names[int(token)], math.exp(x)) for x, token in likeliest]


def _reach(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """Returns where the last of some rows is, and their number."""
    return (rows[-1]["position"] if rows else 0), len(rows)


class _RunStatistics:
    """Holds what was recorded in one run."""

    # Drafts are tried before it is known which of their tokens are taken; with several rows there are no drafts.
    KEPT_LENGTHS = 64
    # A beam that ends is never continued in a later call. Its end token is among the likeliest ones.
    N_LIKELY_ENDS = 64

    def __init__(self, n_requests: int):
        self._n_requests = n_requests
        self.of_text: dict[Key, dict[str, Any]] = {}
        # Log-probabilities of all tokens, until it is known which one was taken: by length, the row of each text
        self._pending: dict[int, tuple[dict[Key, int], dict[str, Tensor]]] = {}
        # Those of the likeliest tokens of beams, `(n_rows, N_LIKELY_ENDS)`, with the ids of these tokens
        self._of_beams: dict[int, tuple[dict[Key, int], dict[str, Tensor], Tensor]] = {}

    def record(
        self, input_ids: Tensor, columns: dict[str, list[Any]], log_probs: dict[str, Tensor], has_beams: bool
    ) -> None:
        """Records values for each text, and the log-probabilities of all tokens until one of them is taken."""
        n_texts, length = input_ids.shape
        texts = text_keys(input_ids, self._n_requests)
        self._settle(input_ids)
        for row, text in enumerate(texts):
            self.of_text[text] = {name: column[row] for name, column in columns.items()}
        self._pending = {x: y for x, y in self._pending.items() if n_texts == 1 and abs(x - length) < self.KEPT_LENGTHS}
        rows = {text: row for row, text in enumerate(texts)}
        self._pending[length] = (rows, log_probs)
        if has_beams:
            guided = log_probs["guided_log_prob"]
            likeliest = guided.topk(min(self.N_LIKELY_ENDS, guided.shape[-1])).indices
            kept = {name: value.gather(1, likeliest) for name, value in log_probs.items()}
            self._of_beams[length] = (rows, kept, likeliest)

    def read(self, sequences: Tensor) -> list[list[dict[str, Any]]]:
        """Returns for each sequence a row for each token that was recorded here."""
        rows: list[list[dict[str, Any]]] = [[] for _ in sequences]
        for position in range(1, sequences.shape[1]):
            self._settle(sequences[:, : position + 1])
            for index, text in enumerate(text_keys(sequences[:, :position], self._n_requests)):
                recorded = self.of_text.get(text)
                if recorded is not None:
                    token = int(sequences[index, position])
                    taken = recorded.get(f"token {token}") or self._end_of_a_beam(position, text, token)
                    rows[index].append({"position": position, "token": token} | recorded | taken)
        return rows

    def _end_of_a_beam(self, length: int, text: Key, token: int) -> dict[str, float]:
        """Returns the log-probabilities of a token that no later text has, if it was among the likeliest."""
        rows, log_probs, likeliest = self._of_beams.get(length, ({}, {}, None))
        if likeliest is None or text not in rows:
            return {}
        places = (likeliest[rows[text]] == token).nonzero()[:1, 0].tolist()
        return {name: float(value[rows[text], place]) for place in places for name, value in log_probs.items()}

    def _settle(self, input_ids: Tensor) -> None:
        """Keeps the log-probabilities of the tokens that were taken."""
        rows, log_probs = self._pending.get(input_ids.shape[1] - 1, ({}, {}))
        for index, text in enumerate(text_keys(input_ids[:, :-1], self._n_requests) if rows else []):
            if text in rows:
                token = int(input_ids[index, -1])
                taken = {name: float(value[rows[text], token]) for name, value in log_probs.items()}
                self.of_text[text][f"token {token}"] = taken
