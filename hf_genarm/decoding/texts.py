"""The texts that a processor is called with: which run they belong to, and what is remembered about them."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import shown
from .line import Line
from .step import Run, Step
from .step_watch import StepWatch

Key = tuple[int, int]


def text_keys(input_ids: Tensor, n_requests: int = 1) -> list[Key]:
    """
    Returns what distinguishes the rows of `input_ids`, `(batch_size, length)`: their request, and their tokens in any
    integer dtype. The rows of a request, for beams or several returned sequences, follow each other.
    """
    repeats = max(len(input_ids) // n_requests, 1)
    return [(index // repeats, hash(row.numpy().tobytes())) for index, row in enumerate(input_ids.long().cpu())]


@dataclass
class _Call:
    """Holds what is remembered for the texts of one call; their tokens are read once other texts are looked for."""

    line: Line | None
    length: int
    n_requests: int
    values: Any
    rows: dict[Key, int] | None = None

    def rows_by_key(self) -> dict[Key, int]:
        """Returns the row of each text."""
        if self.line is not None:
            keys = text_keys(self.line.ids(self.length), self.n_requests)
            self.line, self.rows = None, {key: row for row, key in enumerate(keys)}
        assert self.rows is not None
        return self.rows


class RecentTexts:
    """Remembers values for the texts of the last calls, by their tokens. Older ones are dropped."""

    KEPT_CALLS = 256

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque(maxlen=self.KEPT_CALLS)

    def record(self, line: Line, length: int, values: Any, n_requests: int = 1) -> None:
        """Remembers a value for each text of a call, a list or a tensor with one for each row."""
        self._calls.append(_Call(line, length, n_requests, values))

    def find(self, line: Line, length: int, n_requests: int = 1) -> list[tuple[Any, int] | None]:
        """Returns for each text the latest values that it is among, and its row in them."""
        for call in reversed(self._calls):
            if call.line is line and call.length == length and call.n_requests == n_requests:
                return [(call.values, row) for row in range(len(line.input_ids))]
        keys = text_keys(line.ids(length), n_requests)
        found: list[tuple[Any, int] | None] = [None] * len(keys)
        for call in reversed(self._calls):
            rows = call.rows_by_key()
            found = [
                (call.values, rows[key]) if known is None and key in rows else known
                for key, known in zip(keys, found, strict=True)
            ]
            if None not in found:
                break
        return found


@dataclass
class Text:
    """
    Holds what is known about the texts of a call.

    Parameters:
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            Their tokens.
        run ([`Run`]):
            The run that they belong to.
        n_new (list of `int`):
            The number of tokens that each of them has beyond its prompt.
        line ([`Line`]):
            What they are known by.
        step ([`Step`], *optional*):
            The pass of the base that has read them, or the texts that they continue; `None` if the base is not watched.
        base_mask (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            Which tokens are not padding for the base, if that is known.
        is_drafted (`bool`):
            Whether the base has read drafts beyond them in its first pass.
        is_new (`bool`):
            Whether the last call was about another run, so that what was cached is useless.
    """

    input_ids: Tensor
    run: Run
    n_new: list[int]
    line: Line
    step: Step | None = None
    base_mask: Tensor | None = None
    is_drafted: bool = False
    is_new: bool = False

    @property
    def prompts(self) -> Tensor:
        """The longest prompts that all of them have, on the host, `(batch_size, prompt_length)`."""
        return self.line.ids(self.input_ids.shape[1] - max(self.n_new))

    @property
    def answer_start(self) -> int:
        """The number of columns before what was added to the prompts, also if a run inside of another adds drafts."""
        run = self.run
        return self.input_ids.shape[1] - max(self.n_new) if run.outer is None else run.root.prompt_length

    @property
    def is_prompt(self) -> bool:
        """Whether nothing has been generated yet."""
        return not any(self.n_new)


class TextReader:
    """
    Finds the run that the texts of a call belong to.

    In `generate`, it is known from what the base reads. If the base is not watched, as in a custom decoding loop, it is
    found by the tokens: a text continues an earlier one if it is that text and one more token.

    Args:
        watch ([`StepWatch`], *optional*):
            The watch of the base.

    Attributes:
        run ([`Run`], *optional*):
            The run of the last call.
    """

    def __init__(self, watch: StepWatch | None):
        self._watch = watch
        self.run: Run | None = None
        self._earlier = RecentTexts()  # runs and lengths of prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Text:
        """
        Reads the texts that a processor is called with.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`), scores (`torch.Tensor` of shape \
            `(batch_size, vocab_size)`):
                The arguments of the processor.

        Raises:
            TypeError: if they are not tensors of ids and of scores.
            ValueError: if they have another shape, no rows, or different numbers of rows.
        """
        _refuse_no_tensors(input_ids, scores)
        if len(input_ids) != len(scores):
            raise ValueError(
                f"`input_ids` has {len(input_ids)} rows, but `scores` has {len(scores)}. Give one text for each."
            )
        text = self._read(input_ids)
        # What was drafted before the first pass of the base is part of the run.
        continues = text.is_drafted and self.run is not None and self.run.is_custom_loop
        text.is_new = (self.run is None or text.run.root is not self.run.root) and not continues
        self.run = text.run
        return text

    def begin_with_drafts(self, input_ids: Tensor) -> None:
        """Begins a run whose first tokens are drafted before the base has read anything of it."""
        self.run = Run(input_ids, is_custom_loop=True)

    def _read(self, input_ids: Tensor) -> Text:
        length, step = input_ids.shape[1], None if self._watch is None else self._watch.step_of(input_ids)
        mask = None if step is None else step.mask_of(input_ids)
        is_drafted = step is not None and step.is_first and length < step.input_ids.shape[1]
        if step is None or mask is None or (length < step.run.prompt_length and not is_drafted):
            return self._read_unwatched(input_ids, step)
        run, line = step.run, step.line
        if run.is_over:  # drafts of the next call, or a loop, which begin with the same tokens
            return self._read_unwatched(input_ids, step, mask)
        step.end()
        if is_drafted:  # its first pass read drafts, too
            run.prompt_length = min(run.prompt_length, length)
        if len(input_ids) == 1:  # drafts may follow
            self._earlier.record(line, length, [(run, run.prompt_length)])
        if run.outer is not None or run.drafts_itself:
            # For drafts, `generate` infers a mask in which pad tokens that were generated count as padding.
            mask = run.root.mask_of(input_ids)
            line = Line(input_ids, mask)
        return Text(input_ids, run, [length - run.prompt_length] * len(input_ids), line, step, mask, is_drafted)

    def _read_unwatched(self, input_ids: Tensor, step: Step | None, mask: Tensor | None = None) -> Text:
        """Reads drafts, or texts of a custom loop, which the base has not prepared, with their mask if it is known."""
        length = input_ids.shape[1]
        if step is not None and step.run.n_hidden and torch.equal(input_ids, step.input_ids):
            return Text(input_ids, step.run, [0] * len(input_ids), step.line, step)
        line = Line(input_ids)
        found = self._earlier.find(line, length - 1)
        earlier = [None if known is None else known[0][known[1]] for known in found]
        # A loop that continues what `generate` has written is another run.
        earlier = [None if known is None or known[0].is_over else known for known in earlier]
        run = next((known[0] for known in earlier if known is not None), None) or Run(input_ids, is_custom_loop=True)
        values = [(run, length) if known is None else known for known in earlier]
        self._earlier.record(line, length, values)
        mask = mask if run.is_custom_loop else run.mask_of(input_ids)
        line = line if mask is None else Line(input_ids, mask)
        return Text(input_ids, run, [length - prompt_length for _, prompt_length in values], line, None, mask)


def _refuse_no_tensors(input_ids: Any, scores: Any) -> None:
    for name, value, shape, is_right in (
        ("input_ids", input_ids, "(batch_size, length)", _is_integer),
        ("scores", scores, "(batch_size, vocab_size)", torch.is_floating_point),
    ):
        kind = f"a tensor of {'integers' if name == 'input_ids' else 'real numbers'} of shape {shape}"
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided or not is_right(value):
            given = f"of {value.dtype}" if isinstance(value, Tensor) else shown(value)
            raise TypeError(f"`{name}` is {given}, but must be {kind}, as `generate` passes it.")
        if value.ndim != 2 or len(value) == 0:
            raise ValueError(f"`{name}` has shape {tuple(value.shape)}, but must be {kind}, with one row at least.")


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
