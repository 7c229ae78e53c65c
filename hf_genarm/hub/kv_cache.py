"""The causal LM inside a model, and its key-value cache, if it has one that can be rolled back."""

import inspect
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..arguments import shown

# What models call the argument with their cache: `cache` since transformers 5.24, `past_key_values` before.
_STEP_ARGS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _STEP_ARGS else "past_key_values"


def network_of(model: Any, name: str = "model") -> PreTrainedModel:
    """
    Returns the causal LM inside a model that is compiled or has an adapter.

    Raises:
        TypeError: if it is not a model of transformers or PEFT.
    """
    network = uncompiled(model)
    network = network.get_base_model() if isinstance(network, PeftModel) else network
    if not isinstance(network, PreTrainedModel):
        raise TypeError(
            f"`{name}` is {shown(model)}, which is no language model. Pass a `PreTrainedModel` or a `PeftModel`; ids "
            "and folders are loaded by `from_pretrained`."
        )
    return network


def uncompiled(model: Any) -> Any:
    """Returns the model that `torch.compile` wraps, or the model itself."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def input_embeddings(model: PreTrainedModel | PeftModel) -> nn.Module | None:
    """Returns the module of the embeddings of tokens; `None` for a model with custom code that doesn't show it."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def n_embeddings(model: PreTrainedModel | PeftModel) -> int:
    """Returns the number of tokens that a model has embeddings for."""
    if input_embeddings(model) is None:
        return int(network_of(model).config.get_text_config().vocab_size)
    return len(embeddings_of(model))


def embeddings_of(model: PreTrainedModel | PeftModel) -> Tensor:
    """Returns the matrix `(vocab_size, hidden_size)` of the embeddings of tokens."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def new_cache(network: PreTrainedModel) -> DynamicCache | None:
    """Returns an empty key-value cache that keeps whole texts, or `None` if a layer has another kind of state."""
    cache = DynamicCache(config=network.config)
    # A layer that drops what leaves the sliding window can't be cropped; the mask alone is exact.
    cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in cache.layers]
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def n_read(cache: Any) -> int:
    """Returns the number of tokens in a cache of the base, which may be `None`; recurrent states don't count them."""
    return 0 if cache is None or all(cache.is_linear) else int(cache.get_seq_length())
