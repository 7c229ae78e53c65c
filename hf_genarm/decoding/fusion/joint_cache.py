"""One key-value cache for the rows of base and reward models, without a second copy of the keys and values."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer


def join(caches: Sequence[DynamicCache], lengths: Sequence[int]) -> DynamicCache:
    """
    Makes one cache with the rows of all caches, those of the base first, of which the shorter ones are padded on the
    left.

    The keys and values are taken out of the caches, so that those of a layer are freed as soon as it has grown;
    [`split`] gives them back.

    Args:
        caches (sequence of [`~transformers.DynamicCache`]):
            The caches.
        lengths (sequence of `int`):
            The number of tokens in each of them.
    """
    joint, longest = copy.copy(caches[0]), max(lengths)
    joint.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer: Any = copy.copy(layers[0])
        length = longest
        if type(layer) is DynamicSlidingWindowLayer:  # which the caches of reward models don't have
            length = min(longest, layer.sliding_window - 1)
            layer.cumulative_length = longest
        layer.keys = _concatenate([x.keys for x in layers], length)
        layer.values = _concatenate([x.values for x in layers], length)
        joint.layers.append(layer)
        for x in layers if type(layer) is DynamicLayer else ():
            x.keys = x.values = None
    return joint


def split(joint: DynamicCache, caches: Sequence[DynamicCache], lengths: Sequence[int], n_new: int) -> None:
    """Gives each cache its rows of the joint one, with the new tokens, or without them if their number is 0."""
    end = max(lengths) + n_new
    for layer, *layers in zip(joint.layers, *(cache.layers for cache in caches), strict=True):
        keys, values = layer.keys.chunk(len(caches)), layer.values.chunk(len(caches))
        if type(layer) is DynamicLayer:
            for own, length, its_keys, its_values in zip(layers, lengths, keys, values, strict=True):
                first = end - n_new - length  # after its padding
                own.keys, own.values = its_keys[..., first:end, :], its_values[..., first:end, :]
        elif n_new:
            n_read = lengths[0] + n_new
            kept = min(n_read, layer.sliding_window - 1)
            its_keys, its_values = (x[0][..., -kept:, :] for x in (keys, values))
            vars(layers[0]).update(vars(layer) | {"keys": its_keys, "values": its_values, "cumulative_length": n_read})
            for own, its_keys, its_values in zip(layers[1:], keys[1:], values[1:], strict=True):
                own.update(its_keys[..., -n_new:, :], its_values[..., -n_new:, :])


def detach(cache: DynamicCache | StaticCache) -> None:
    """Copies keys and values that are part of a joint cache, whose other rows can then be freed."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer | StaticLayer) or layer.keys is None or layer.values is None:
            continue
        keys, values = (x.clone() if _is_part(x) else x for x in (layer.keys, layer.values))
        if isinstance(layer, StaticLayer) and keys is not layer.keys:
            layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])  # which marks new addresses for compilers
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        else:
            layer.keys, layer.values = keys, values


def _is_part(x: Tensor) -> bool:
    """Returns whether memory is held for more than this tensor."""
    return x.untyped_storage().nbytes() > x.numel() * x.element_size()


def _concatenate(parts: Sequence[Tensor], length: int) -> Tensor:
    """
    Concatenates the last columns along the rows, those of shorter parts after zeros, without copying parts that an
    earlier joint cache was split into.
    """
    parts = [part[..., -length:, :] for part in parts]
    first, pads = parts[0], [length - part.shape[-2] for part in parts]
    shape = (len(parts) * len(first), *first.shape[1:-2], length, first.shape[-1])
    row, column = first.numel() and first.stride(0) * len(first), first.stride(-2)
    start = first.storage_offset() - pads[0] * column
    for index, (part, pad) in enumerate(zip(parts, pads, strict=True)):
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        offset = part.storage_offset() - pad * column
        if not same or part.stride() != first.stride() or offset != start + index * row:
            break
    else:
        return first.as_strided(shape, first.stride(), start)
    if not any(pads):
        return torch.cat(parts)
    joint = first.new_zeros(shape)
    for part, pad, rows in zip(parts, pads, joint.chunk(len(parts)), strict=True):
        rows[..., pad:, :] = part
    return joint
