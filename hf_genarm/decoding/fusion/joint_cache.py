"""One key-value cache for the rows of base and reward models, without a second copy of the keys and values."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """
    Makes one cache with the rows of all caches, those of the base first.

    The keys and values are taken out of the caches, so that those of a layer are freed as soon as it has grown;
    [`split`] gives them back.
    """
    joint = copy.copy(caches[0])
    joint.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer: Any = copy.copy(layers[0])
        length = layer.keys.shape[-2]  # of a sliding window that the caches of reward models don't have
        layer.keys = _concatenate([x.keys[..., -length:, :] for x in layers])
        layer.values = _concatenate([x.values[..., -length:, :] for x in layers])
        joint.layers.append(layer)
        for x in layers if type(layer) is DynamicLayer else ():
            x.keys = x.values = None
    return joint


def split(joint: DynamicCache, caches: Sequence[DynamicCache], n_read: int, n_new: int) -> None:
    """Gives each cache its rows of the joint one, with the new tokens, or without them if their number is 0."""
    for layer, *layers in zip(joint.layers, *(cache.layers for cache in caches), strict=True):
        if type(layer) is DynamicLayer:
            assert layer.keys is not None
            assert layer.values is not None
            keys, values = layer.keys[..., : n_read + n_new, :], layer.values[..., : n_read + n_new, :]
            for own, its_keys, its_values in zip(
                layers, keys.chunk(len(caches)), values.chunk(len(caches)), strict=True
            ):
                own.keys, own.values = its_keys, its_values
        elif n_new:
            keys, values = layer.keys.chunk(len(caches)), layer.values.chunk(len(caches))
            vars(layers[0]).update(vars(layer) | {"keys": keys[0], "values": values[0]})
            for own, its_keys, its_values in zip(layers[1:], keys[1:], values[1:], strict=True):
                own.update(its_keys[..., -n_new:, :], its_values[..., -n_new:, :])


def detach(cache: DynamicCache) -> None:
    """Copies keys and values that are part of a joint cache, whose other rows can then be freed."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):
            continue
        for name in ("keys", "values"):
            x = getattr(layer, name)
            if x is not None and x.untyped_storage().nbytes() > x.numel() * x.element_size():
                setattr(layer, name, x.clone())


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates along the rows, without copying parts that an earlier joint cache was split into."""
    first = parts[0]
    step = first.numel() and first.stride(0) * len(first)
    for index, part in enumerate(parts):
        offset = first.storage_offset() + index * step
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.shape != first.shape or part.stride() != first.stride() or part.storage_offset() != offset:
            return torch.cat(list(parts))
    return first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())
