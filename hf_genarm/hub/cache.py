"""The network in a model, and the key-value cache that can be rolled back, if it has one."""

import inspect
import math
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Their frequencies depend on the length of the text.
_DYNAMIC_ROPES = ("dynamic", "longrope")


def network_of(model: Any) -> PreTrainedModel:
    """
    The causal LM in a model that is compiled, or has an adapter.

    Raises:
        TypeError: if it is not a model of transformers or PEFT.
    """
    network = uncompiled(model)
    network = network.get_base_model() if isinstance(network, PeftModel) else network
    if not isinstance(network, PreTrainedModel):
        given = f"a `{type(model).__name__}`" if isinstance(model, nn.Module) else f"{model!r}"
        raise TypeError(
            f"A model is {given}, which is no language model. Pass a `PreTrainedModel` or a `PeftModel`; ids and "
            "folders are loaded by `from_pretrained`."
        )
    return network


def uncompiled(model: Any) -> Any:
    """The model that `torch.compile` wraps, or the model itself."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def why_no_cache(model: PreTrainedModel | PeftModel) -> str | None:
    """
    Why a model has to read a text from its beginning whenever it goes on; `None` if it can go on from a key-value cache
    that is cropped and padded. What has no cache is read row by row, since it may not know padding either.
    """
    network = network_of(model)
    for adapter in model.peft_config.values() if isinstance(model, PeftModel) else ():
        if adapter.is_prompt_learning:
            return "its adapter puts something before the text"
        if isinstance(adapter, LoraConfig) and adapter.alora_invocation_tokens:
            return "its adapter acts from some tokens on (aLoRA), which it looks for in all that it is given"
    arguments, kind = inspect.signature(type(network).forward).parameters, network.config.model_type
    if network._is_stateful or "past_key_values" not in arguments or new_cache(network) is None:
        return "it has recurrent states, or no key-value cache that could be rolled back"
    if "position_ids" not in arguments and kind != "bloom":  # which has the distances of tokens from the mask
        return "it can't be told the positions of a padded text"
    for name, module in network.named_modules():
        # RoBERTa and its like
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return "it counts positions from its pad token on, and leaves out pad tokens in the text"
    return "it looks for an image in its cache" if kind == "git" else None


def new_cache(network: PreTrainedModel) -> DynamicCache | None:
    """An empty key-value cache that keeps whole texts, or `None` for layers with another kind of state."""
    cache = DynamicCache(config=network.config)
    # A layer that drops what leaves the sliding window can't be cropped; the mask alone is exact.
    cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in cache.layers]
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def fixed_length(network: PreTrainedModel) -> float:
    """
    Number of tokens up to which a cache holds what the model would compute from scratch. Beyond it, dynamic rotary
    embeddings turn all positions by frequencies that depend on how long the text is. Infinite for all others.
    """
    config = network.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    lengths = [
        min(config.max_position_embeddings, rope.get("original_max_position_embeddings", math.inf)) - 1
        for rope in [ropes, *ropes.values()]  # those of each kind of layer, where kinds differ
        if isinstance(rope, dict) and rope.get("rope_type") in _DYNAMIC_ROPES
    ]
    return min(lengths, default=math.inf)
