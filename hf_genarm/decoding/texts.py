"""The texts that a processor is asked about: to which run they belong, and what is remembered about them."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .step import Run, Step, StepWatch


def text_keys(input_ids: Tensor, n_requests: int = 1) -> list[tuple[int, int]]:
    """
    What tells the rows of `input_ids` apart, `(batch_size, length)`: their request, and their tokens. The rows of a
    request, for beams or several returns, follow each other.
    """
    repeats = max(len(input_ids) // n_requests, 1)
    return [(index // repeats, hash(row.numpy().tobytes())) for index, row in enumerate(input_ids.cpu())]


class Recent:
    """What was noted about the texts of the last calls, by their tokens. Older notes are forgotten."""

    KEPT_CALLS = 256

    def __init__(self) -> None:
        self._calls: deque[dict[tuple[int, int], Any]] = deque(maxlen=self.KEPT_CALLS)

    def note(self, keys: Sequence[tuple[int, int]], values: Sequence[Any]) -> None:
        self._calls.append(dict(zip(keys, values, strict=True)))

    def find(self, key: tuple[int, int], default: Any = None) -> Any:
        return next((call[key] for call in reversed(self._calls) if key in call), default)


@dataclass
class Text:
    """
    What is known about the texts of a call.

    Parameters:
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            Their tokens.
        run ([`Run`]):
            To which they belong.
        n_new (list of `int`):
            The number of tokens that each of them has beyond its prompt.
        step ([`Step`], *optional*):
            The pass of the base that has read them, or what they go on from; `None` where nobody said.
        base_mask (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            Which tokens the base has not taken for padding, as far as it is known.
        is_drafted (`bool`):
            Whether the base has read drafts beyond them in its first pass.
        is_new (`bool`):
            Whether the call before was about another run, so that what was cached is of no use.
    """

    input_ids: Tensor
    run: Run
    n_new: list[int]
    step: Step | None = None
    base_mask: Tensor | None = None
    is_drafted: bool = False
    is_new: bool = False

    @property
    def prompts(self) -> Tensor:
        """What all of them began with at the least, `(batch_size, prompt_length)`."""
        return self.input_ids[:, : self.input_ids.shape[1] - max(self.n_new)]

    @property
    def is_prompt(self) -> bool:
        return not any(self.n_new)


class TextReader:
    """
    Finds out to which run the texts of a call belong: by what `generate` has told the base, and where that is not
    known, as in a loop by hand, by the tokens. A text is then taken to go on if it is an earlier one and one token.

    Args:
        watch ([`StepWatch`], *optional*):
            Of the base.
    """

    def __init__(self, watch: StepWatch | None):
        self._watch = watch
        self._run: Run | None = None  # that of the last call
        self._earlier = Recent()  # runs and lengths of prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Text:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`), scores (`torch.Tensor` of shape \
            `(batch_size, vocab_size)`):
                What the processor is called with.

        Raises:
            ValueError: if their numbers of rows differ.
        """
        if len(input_ids) != len(scores):
            raise ValueError(
                f"`input_ids` has {len(input_ids)} rows, but `scores` has {len(scores)}. Give one text for each."
            )
        text = self._read(input_ids)
        # What was drafted before the first pass of the base is part of the run.
        goes_on = text.is_drafted and self._run is not None and self._run.is_by_hand
        text.is_new = text.run is not self._run and not goes_on
        self._run = text.run
        return text

    def begin(self, input_ids: Tensor) -> None:
        """Says that drafts follow, before the base has read anything of a new run."""
        self._run = Run(input_ids, is_by_hand=True)

    def _read(self, input_ids: Tensor) -> Text:
        length, step = input_ids.shape[1], None if self._watch is None else self._watch.step
        mask = None if step is None else step.mask_of(input_ids)
        is_drafted = step is not None and step.is_first and length < step.input_ids.shape[1]
        if step is None or mask is None or (length < step.run.prompt_length and not is_drafted):
            return self._unread(input_ids, step)
        run = step.run
        if is_drafted:  # its first pass went over drafts, too
            run.prompt_length = min(run.prompt_length, length)
        if len(input_ids) == 1:  # drafts may follow
            self._earlier.note(text_keys(input_ids), [(run, run.prompt_length)])
        return Text(input_ids, run, [length - run.prompt_length] * len(input_ids), step, mask, is_drafted)

    def _unread(self, input_ids: Tensor, step: Step | None) -> Text:
        """Drafts, or texts of which nobody has told the base."""
        length = input_ids.shape[1]
        if step is not None and step.run.n_hidden and torch.equal(input_ids, step.input_ids):
            return Text(input_ids, step.run, [0] * len(input_ids), step)
        earlier = [self._earlier.find(key) for key in text_keys(input_ids[:, :-1])]
        run = next((known[0] for known in earlier if known is not None), None) or Run(input_ids, is_by_hand=True)
        notes = [(run, length) if known is None else known for known in earlier]
        self._earlier.note(text_keys(input_ids), notes)
        mask = None if run.is_by_hand else run.mask_of(input_ids)
        return Text(input_ids, run, [length - prompt_length for _, prompt_length in notes], None, mask)
