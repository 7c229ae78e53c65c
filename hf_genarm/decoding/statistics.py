"""What guidance did to each token: kept by the tokens of a text, and read for finished sequences."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_tensor
from ..functional import GuidedProduct, kl_divergence
from ..viewing.tokens import token_texts
from .guided_tokens import GuidedTokens
from .line import Line
from .step import Run
from .texts import Key, Text, text_keys


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
        while len(self._runs) > 1 and sum(x.n_texts for x in self._runs.values()) > self.KEPT_TOKENS:
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
            per_row = alpha if isinstance(alpha, Tensor) else torch.full_like(base[:, :1], alpha)
            values[f"alpha_{index}"] = per_row.expand(len(base), 1)[:, 0]
            log_probs[f"reward_log_prob_{index}"] = reward
        for name, distribution in (("likeliest_before", base), ("likeliest_after", guided)):
            values[name] = torch.stack(distribution.topk(self.N_LIKELIEST), dim=-1)
        n_prompts = text.run.root.n_prompts
        has_beams = n_prompts is None or len(text.input_ids) > n_prompts
        of_run.record(text, values, log_probs, has_beams)

    def read(self, sequences: Tensor, titles: Sequence[str | None] = ()) -> GuidedTokens:
        """
        Returns one row for each token that was guided, as columns for a `pandas.DataFrame` that draw themselves.

        Args:
            sequences (`torch.LongTensor` of shape `(n_sequences, length)`):
                What `generate` returned.
            titles (sequence of `str`, *optional*):
                What each reward model rewards, where that is known.

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
        return GuidedTokens(columns, texts, likeliest, titles)

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


@dataclass
class _Entry:
    """
    Holds what was recorded in one call, on the device until it is read.

    Parameters:
        line ([`Line`], *optional*), length (`int`):
            The texts; no line once they are read.
        values (`dict[str, torch.Tensor]`, *optional*):
            What guidance does to the next token of each, until it is read.
        log_probs (`dict[str, torch.Tensor]`, *optional*):
            Log-probabilities of all tokens, `(n_rows, vocab_size)`, until it is known which one was taken.
        of_beams (`dict[str, torch.Tensor]`, *optional*), likeliest (`torch.LongTensor`, *optional*):
            Those of the likeliest tokens of beams, `(n_rows, N_LIKELY_ENDS)`, and the ids of these tokens.
        rows (`dict[Key, int]`):
            The row of each text, once they are read.
    """

    line: Line | None
    length: int
    values: dict[str, Tensor] | None
    log_probs: dict[str, Tensor] | None
    of_beams: dict[str, Tensor] | None = None
    likeliest: Tensor | None = None
    rows: dict[Key, int] = field(default_factory=dict)


class _RunStatistics:
    """Holds what was recorded in one run."""

    # Drafts are tried before it is known which of their tokens are taken; with several rows there are no drafts.
    KEPT_LENGTHS = 64
    # A beam that ends is never continued in a later call. Its end token is among the likeliest ones.
    N_LIKELY_ENDS = 64
    # After how many calls their values are read from the device
    N_UNREAD = 64

    def __init__(self, n_requests: int):
        self._n_requests = n_requests
        self.of_text: dict[Key, dict[str, Any]] = {}
        self._unread: list[_Entry] = []
        # What was taken after the texts of an entry: for some of its rows, tokens and their log-probabilities
        self._taken: list[tuple[_Entry, Sequence[int], Tensor, dict[str, Tensor]]] = []
        self._pending: dict[int, _Entry] = {}  # by length
        self._of_beams: dict[int, _Entry] = {}

    @property
    def n_texts(self) -> int:
        """The number of texts that something is kept about."""
        return len(self.of_text) + sum(len(x.line.input_ids) for x in self._unread if x.line is not None)

    def record(self, text: Text, values: dict[str, Tensor], log_probs: dict[str, Tensor], has_beams: bool) -> None:
        """Records values for each text, and the log-probabilities of all tokens until one of them is taken."""
        n_texts, length = text.input_ids.shape
        self._take(text.line, length, text.input_ids)
        entry = _Entry(text.line, length, values, log_probs)
        self._unread.append(entry)
        self._pending = {x: y for x, y in self._pending.items() if n_texts == 1 and abs(x - length) < self.KEPT_LENGTHS}
        self._pending[length] = entry
        if has_beams:
            guided = log_probs["guided_log_prob"]
            entry.likeliest = guided.topk(min(self.N_LIKELY_ENDS, guided.shape[-1])).indices
            entry.of_beams = {name: value.gather(1, entry.likeliest) for name, value in log_probs.items()}
            self._of_beams[length] = entry
        if len(self._unread) >= self.N_UNREAD:
            self._read_from_device()

    def read(self, sequences: Tensor) -> list[list[dict[str, Any]]]:
        """Returns for each sequence a row for each token that was recorded here."""
        rows: list[list[dict[str, Any]]] = [[] for _ in sequences]
        line = Line(sequences)
        for position in range(1, sequences.shape[1]):
            self._take(line, position + 1, sequences)
        self._read_from_device()
        ids = line.ids(sequences.shape[1])
        for position in range(1, sequences.shape[1]):
            for index, text in enumerate(text_keys(ids[:, :position], self._n_requests)):
                recorded = self.of_text.get(text)
                if recorded is not None:
                    token = int(ids[index, position])
                    taken = recorded.get(f"token {token}") or self._end_of_a_beam(position, text, token)
                    rows[index].append({"position": position, "token": token} | recorded | taken)
        return rows

    def _end_of_a_beam(self, length: int, text: Key, token: int) -> dict[str, float]:
        """Returns the log-probabilities of a token that no later text has, if it was among the likeliest."""
        entry = self._of_beams.get(length)
        if entry is None or entry.likeliest is None or entry.of_beams is None or text not in entry.rows:
            return {}
        row = entry.rows[text]
        places = (entry.likeliest[row] == token).nonzero()[:1, 0].tolist()
        return {name: float(value[row, place]) for place in places for name, value in entry.of_beams.items()}

    def _take(self, line: Line, length: int, input_ids: Tensor) -> None:
        """Keeps the log-probabilities of the last tokens of texts, where they follow texts that were recorded."""
        before = self._pending.get(length - 1)
        if before is None or before.log_probs is None:
            return
        log_probs, tokens = before.log_probs, input_ids[:, length - 1 : length].long()
        if before.line is line:
            rows: Sequence[int] = range(len(tokens))
        else:
            rows_of = before.rows if before.line is None else self._rows_of(before.line, length - 1)
            keys = text_keys(line.ids(length - 1), self._n_requests)
            pairs = [(rows_of[key], index) for index, key in enumerate(keys) if key in rows_of]
            if not pairs:
                return
            rows = [row for row, _ in pairs]
            device = next(iter(log_probs.values())).device
            of, to = torch.tensor(pairs).to(device, non_blocking=True).unbind(1)
            tokens = tokens.to(device)[to]
            log_probs = {name: value[of] for name, value in log_probs.items()}
        taken = {name: value.gather(1, tokens)[:, 0] for name, value in log_probs.items()}
        self._taken.append((before, rows, tokens[:, 0], taken))

    def _rows_of(self, line: Line, length: int) -> dict[Key, int]:
        return {key: row for row, key in enumerate(text_keys(line.ids(length), self._n_requests))}

    def _read_from_device(self) -> None:
        """Reads what was recorded since the last time, in few copies."""
        for entry in self._unread:
            if entry.line is not None:
                entry.rows, entry.line = self._rows_of(entry.line, entry.length), None
        columns = _lists([entry.values or {} for entry in self._unread])
        for entry, values in zip(self._unread, columns, strict=True):
            for text, row in entry.rows.items():
                self.of_text[text] = {name: column[row] for name, column in values.items()}
            entry.values = None
        taken = _lists([{"token": tokens} | values for _, _, tokens, values in self._taken])
        for (entry, rows, *_), values in zip(self._taken, taken, strict=True):
            text_of = {row: text for text, row in entry.rows.items()}
            tokens = values.pop("token")
            for index, row in enumerate(rows):
                if row in text_of:
                    of_token = {name: column[index] for name, column in values.items()}
                    self.of_text[text_of[row]][f"token {int(tokens[index])}"] = of_token
        self._unread, self._taken = [], []


def _lists(calls: Sequence[dict[str, Tensor]]) -> list[dict[str, list[Any]]]:
    """Returns the values of some calls as lists, in one copy from the device for each kind of values."""
    tensors = [(index, name, value) for index, call in enumerate(calls) for name, value in call.items()]
    lists: list[dict[str, list[Any]]] = [{} for _ in calls]
    for dtype in dict.fromkeys(value.dtype for _, _, value in tensors):
        own = [x for x in tensors if x[2].dtype == dtype]
        flat = torch.cat([value.flatten() for _, _, value in own]).cpu()
        for (index, name, value), part in zip(own, flat.split([value.numel() for *_, value in own]), strict=True):
            lists[index][name] = part.view(value.shape).tolist()
    return lists
