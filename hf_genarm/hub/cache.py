"""A key-value cache that can be rolled back, for the networks that have one."""

import inspect

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def new_cache(network: PreTrainedModel) -> DynamicCache | None:
    """An empty key-value cache that keeps whole texts, or `None` for a model whose cache can't be rolled back."""
    if network._is_stateful or "past_key_values" not in inspect.signature(network.forward).parameters:
        return None
    cache = DynamicCache(config=network.config)
    # A layer that drops what leaves the sliding window can't be cropped; the mask alone is exact.
    cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in cache.layers]
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None
