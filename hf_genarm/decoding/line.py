"""Texts that grow: what distinguishes them without reading their tokens from the device they are on."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

_KNOWN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class Padding(NamedTuple):
    """
    Holds where the texts of a batch are padded.

    Parameters:
        n_columns (`int`):
            The number of leading columns that are padding in all rows.
        is_present (`bool`):
            Whether there is any padding.
        is_on_the_right (`bool`):
            Whether a row ends in it.
    """

    n_columns: int = 0
    is_present: bool = False
    is_on_the_right: bool = False


class Line:
    """
    Stands for a batch of texts that only grow: of two lengths of a line, the shorter is the beginning of the longer,
    padding included.

    So texts of one line need not be compared. Those of different lines are compared by their tokens on the host, which
    are read from the device when they are needed, and at most once for each length.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            The texts so far.
        attention_mask (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            Their mask; `None` if nothing is padding.
        origin ([`Line`], *optional*):
            An earlier line of the same run, which is padded in the same columns.

    Attributes:
        is_continuation (`bool`):
            Whether it continues the prompts of another line.
        variants (`dict`):
            The lines of the same answers after other prompts.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None = None, origin: "Line | None" = None):
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.is_continuation = origin is not None
        self._origin, self._padding = origin, None if attention_mask is not None else Padding()
        self._host: tuple[Tensor, Tensor | None] | None = None
        self.variants: dict[Any, Line] = {}

    @property
    def length(self) -> int:
        """The number of columns so far."""
        return self.input_ids.shape[1]

    def extend(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Makes the texts longer."""
        if input_ids.shape[1] > self.length:
            self.input_ids, self.attention_mask = input_ids, attention_mask

    def first(self, length: int) -> "Line":
        """Returns a line of the first columns alone."""
        mask = None if self.attention_mask is None else self.attention_mask[:, :length]
        line = Line(self.input_ids[:, :length].contiguous(), mask, self)
        line._host = None if self._host is None else (self.ids(length), self.mask(length))
        return line

    def ids(self, length: int) -> Tensor:
        """Returns the tokens of the first columns on the host, `(batch_size, length)`, padding included."""
        return self._on_host(length)[0][:, :length]

    def tokens(self, length: int) -> Tensor:
        """
        Returns what distinguishes texts, on the host, `(batch_size, length)`: the tokens after the leading columns of
        padding, and -1 for padding, which is alike whatever its ids are.
        """
        columns = slice(self.padding.n_columns, self.padding.n_columns + length)
        ids, mask = self._on_host(columns.stop)
        return ids[:, columns] if mask is None else ids[:, columns].masked_fill(mask[:, columns] == 0, -1)

    def mask(self, length: int) -> Tensor:
        """Returns the mask of the first columns on the host, `(batch_size, length)`."""
        ids, mask = self._on_host(length)
        return torch.ones_like(ids[:, :length]) if mask is None else mask[:, :length]

    def masked(self, mask: Tensor) -> "Line":
        """Returns the same texts with a mask `(batch_size, length)`, which is on the host."""
        line = Line(self.input_ids, mask.to(self.input_ids.device, non_blocking=True))
        line._host = self._on_host(self.length)[0], mask
        return line

    @property
    def padding(self) -> Padding:
        """Where the texts are padded."""
        if self._padding is None and self._origin is not None:
            self._padding = self._origin.padding
        elif self._padding is None:
            mask = self._on_host(self.length)[1]
            assert mask is not None
            is_text = mask != 0
            n_columns = int(is_text.any(dim=0).int().argmax())
            self._padding = Padding(n_columns, not bool(is_text.all()), not bool(is_text[:, -1].all()))
        return self._padding

    def _on_host(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Returns tokens and mask on the host, of so many columns or more."""
        if self._host is None or self._host[0].shape[1] < length:
            if self.attention_mask is None:
                self._host = self.input_ids.to("cpu", torch.long, copy=True), None
            else:  # both in one copy
                mask = self.attention_mask.to(self.input_ids.device, torch.long)
                ids, mask = torch.stack([self.input_ids.long(), mask]).cpu().unbind()
                self._host = ids, mask
        return self._host


def is_beginning(part: Tensor, whole: Tensor) -> bool:
    """Returns whether a tensor is the leading columns of another, in the same memory, without reading either."""
    if part is whole:
        return True
    is_alike = part.dtype == whole.dtype and part.device == whole.device and len(part) == len(whole)
    if not is_alike or part.shape[1] > whole.shape[1] or part.stride() != whole.stride():
        return False
    return part.data_ptr() == whole.data_ptr()


class CacheMark:
    """
    Recognises a cache that nothing has touched since a pass: its rows were not exchanged, nor its end dropped.

    Either would put other tensors in its place, or change its counter of tokens.

    Args:
        cache ([`~transformers.Cache`], *optional*):
            The cache as a pass has left it.
    """

    def __init__(self, cache: Any):
        parts = _parts_of(cache)
        self._parts = None if parts is None else [(weakref.ref(x), version) for x, version in parts]

    def is_on(self, cache: Any) -> bool:
        """Returns whether it is the same cache in the same state; `False` if that is not known."""
        parts = _parts_of(cache)
        if self._parts is None or parts is None or len(parts) != len(self._parts):
            return False
        pairs = zip(parts, self._parts, strict=True)
        return all(x is own() and version == own_version for (x, version), (own, own_version) in pairs)


def _parts_of(cache: Any) -> list[tuple[Tensor, int]] | None:
    """Returns the keys of a cache, and how often their number was changed in place; `None` if it has others."""
    layers = [x for x in getattr(cache, "layers", ()) if getattr(x, "keys", None) is not None]
    if not layers or any(type(x) not in _KNOWN_LAYERS for x in layers):
        return None
    counters = [getattr(x, "cumulative_length", None) for x in layers]
    if any(isinstance(x, Tensor) and x.is_inference() for x in counters):  # those count no changes
        return None
    versions = [x._version if isinstance(x, Tensor) else 0 for x in counters]
    return list(zip((x.keys for x in layers), versions, strict=True))
