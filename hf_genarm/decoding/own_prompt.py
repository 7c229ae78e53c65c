"""The prompt that one model reads in place of the base's, and what its texts are known by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .line import Line, Padding


@dataclass(frozen=True, eq=False)
class OwnPrompt:
    """
    Holds what one model reads before the answer.

    Parameters:
        input_ids, attention_mask (`torch.LongTensor` of shape `(n_requests, length)`):
            Its tokens, in ids of the model's own tokenizer, and which of them are not padding, on the host.
        answer_start (`int`):
            Where the answer begins in the texts of the base.
        on_devices (`dict`):
            Copies of both for each text, by device.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_start: int = 0
    on_devices: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def fits(self, input_ids: Tensor) -> bool:
        """Returns whether it can come before the answers in texts of the base `(batch_size, length)`."""
        return len(input_ids) % len(self.input_ids) == 0 and input_ids.shape[1] >= self.answer_start

    def text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        translate: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Returns the texts of this model, and their mask.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
                Those of the base. The rows of a request, for beams or several returned sequences, follow each other.
            translate (callable, *optional*):
                Returns the answer, given with its mask, in ids of this model, if they are not those of the base.
        """
        answer, mask = input_ids[:, self.answer_start :], attention_mask[:, self.answer_start :]
        if translate is not None:
            answer = translate(answer, mask)
        own_ids, own_mask = self._on(input_ids.device, len(input_ids))
        return torch.cat([own_ids, answer], dim=1), torch.cat([own_mask, mask], dim=1)

    def line(self, base: Line) -> Line:
        """Returns what the texts of this model are known by, given those of the base."""
        key = id(self.on_devices), self.answer_start
        if key not in base.variants:
            base.variants[key] = _OwnLine(base, self)
        return base.variants[key]

    def _on(self, device: torch.device, n_rows: int) -> tuple[Tensor, Tensor]:
        """Returns tokens and mask of each text on a device, where they are kept."""
        key = device, n_rows
        if key not in self.on_devices:
            repeats = n_rows // len(self.input_ids)
            ids, mask = (x.repeat_interleave(repeats, dim=0) for x in (self.input_ids, self.attention_mask))
            self.on_devices.clear()
            self.on_devices[key] = ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        return self.on_devices[key]


class _OwnLine(Line):
    """Stands for texts that begin with other prompts than those of the base, and continue as these do."""

    def __init__(self, base: Line, prompt: OwnPrompt):
        super().__init__(base.input_ids)
        self._base, self._prompt = base, prompt
        self.is_continuation = base.is_continuation

    @property
    def length(self) -> int:
        return self._base.length + self._n_more

    @property
    def padding(self) -> Padding:
        is_padded = bool((self._prompt.attention_mask == 0).any()) or self._base.padding.is_present
        return Padding(is_present=is_padded)

    @property
    def _n_more(self) -> int:
        """How many columns they have more than the texts of the base."""
        return self._prompt.input_ids.shape[1] - self._prompt.answer_start

    def _on_host(self, length: int) -> tuple[Tensor, Tensor | None]:
        of_base, start = length - self._n_more, self._prompt.answer_start
        answers = self._base.ids(of_base)[:, start:], self._base.mask(of_base)[:, start:]
        repeats = len(answers[0]) // len(self._prompt.input_ids)
        own = self._prompt.input_ids, self._prompt.attention_mask
        ids, mask = (
            torch.cat([x.repeat_interleave(repeats, dim=0), y], dim=1) for x, y in zip(own, answers, strict=True)
        )
        return ids, mask
