"""One static cache for the rows of base and reward models, of which the base's own cache becomes a part."""

import copy
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

# More columns than the cache of the base has come in steps of this many, so that most prompts need as many.
_MORE_COLUMNS = 64


class JointStaticCache:
    """
    Keeps the keys and values of base and reward models in one static cache, whose buffers stay where they are.

    All texts end in the same column. The cache of the base gets the first rows in place of its own buffers, so that
    passes of the base alone read and write the same memory; those of reward models are views of what they have read. A
    layer with a sliding window keeps its own buffers, since these are too short: here it has whole texts, which the
    mask alone limits, and what is new is also written there.

    Args:
        caches (sequence of [`~transformers.StaticCache`] and [`~transformers.DynamicCache`]):
            The cache of the base, which has read something, and those of the reward models.
        lengths (sequence of `int`):
            The number of tokens in each of them.

    Attributes:
        end (`int`):
            The column in which all texts end.
    """

    def __init__(self, caches: Sequence[Any], lengths: Sequence[int]):
        base, *others = caches
        self._others = [weakref.ref(cache) for cache in others]
        self._n_caches, self._n_before = len(lengths), _n_before(lengths)
        self._cache: Any = copy.copy(base)
        self._cache.layers = [StaticLayer(base.get_max_length() + self._n_before) for _ in base.layers]
        self._rows: list[list[tuple[Tensor, Tensor]]] = []  # by layer and cache, its rows of keys and values
        self.end = 0
        self._left: list[Tensor] = []  # the keys of all caches after the last joint pass

    def is_of(self, caches: Sequence[Any], lengths: Sequence[int]) -> bool:
        """
        Returns whether it joins these caches, whose lengths are given. What a reward model has read stays in its rows,
        so that no other can have them.
        """
        others = [known() for known in self._others]
        is_same = len(others) == len(caches) - 1 and all(map(operator.is_, others, caches[1:]))
        return is_same and self._n_before == _n_before(lengths)

    def join(self, caches: Sequence[Any], lengths: Sequence[int]) -> StaticCache:
        """
        Returns the joint cache, into which what is elsewhere has been copied: all of it at first, later the rows that
        were exchanged or read separately.

        Args:
            caches, lengths:
                As for the class.
        """
        end, given, left = self._n_before + lengths[0], _keys_of(caches), self._left
        is_there = end == self.end and len(given) == len(left) and all(map(operator.is_, given, left))
        self.end, self._left = end, []  # an interrupted pass leaves it unknown
        for index, layers in enumerate(() if is_there else zip(*(cache.layers for cache in caches), strict=True)):
            base, n_kept = layers[0], [min(lengths[0], layers[0].max_cache_len), *lengths[1:]]
            if index == len(self._rows):
                self._rows.append(self._allocate(index, base))
            for own, n_columns, (keys, values) in zip(layers, n_kept, self._rows[index], strict=True):
                columns = slice(end - n_columns, end)
                _copy(own.keys[:, :, :n_columns], keys[:, :, columns])
                _copy(own.values[:, :, :n_columns], values[:, :, columns])
            if not base.is_sliding:
                base.keys, base.values = (x[:, :, self._n_before :] for x in self._rows[index][0])
            self._cache.layers[index].cumulative_length.fill_(end)
        return self._cache

    def _allocate(self, index: int, base: Any) -> list[tuple[Tensor, Tensor]]:
        """Makes the buffers of a layer, and returns the rows of each cache in them."""
        joint = self._cache.layers[index]
        joint.lazy_initialization(*(x[:, :, :0].repeat(self._n_caches, 1, 1, 1) for x in (base.keys, base.values)))
        return list(zip(joint.keys.chunk(self._n_caches), joint.values.chunk(self._n_caches), strict=True))

    def split(self, caches: Sequence[Any], lengths: Sequence[int], n_new: int) -> None:
        """Gives each cache its rows with the new tokens. If their number is 0, they stay as they are."""
        if not n_new:
            return
        before, self.end = self.end, self.end + n_new
        counters = [x.cumulative_length for x in caches[0].layers if not x.is_sliding]
        if counters:
            torch._foreach_add_(counters, n_new)
        for rows, *layers in zip(self._rows, *(cache.layers for cache in caches), strict=True):
            if layers[0].is_sliding:
                layers[0].update(*(x[:, :, before : self.end] for x in rows[0]))
            for own, length, (keys, values) in zip(layers[1:], lengths[1:], rows[1:], strict=True):
                columns = slice(before - length, self.end)
                own.keys, own.values = keys[:, :, columns], values[:, :, columns]
        self._left = _keys_of(caches)


def _n_before(lengths: Sequence[int]) -> int:
    """Returns how many columns longer texts of reward models need before that of the base."""
    return -(-(max(lengths) - lengths[0]) // _MORE_COLUMNS) * _MORE_COLUMNS


def _keys_of(caches: Sequence[Any]) -> list[Tensor]:
    return [layer.keys for cache in caches for layer in cache.layers]


def _copy(part: Tensor, place: Tensor) -> None:
    """Copies keys or values to their place, unless they are there."""
    if part.data_ptr() != place.data_ptr() or part.stride() != place.stride():
        place.copy_(part)
