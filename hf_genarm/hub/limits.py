"""What a network can read: texts in parts, next to padding, up to some length, and some tokens."""

import inspect
import math

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .kv_cache import CACHE, n_embeddings, network_of, new_cache

# Rotary embeddings whose frequencies depend on the length of the text
_DYNAMIC_ROPES = ("dynamic", "longrope")
# `generate` appends a mask token to their texts, and reads the prediction from it.
_WITH_MASK_TOKEN = ("xlm", "flaubert", "xlnet")
# GIT looks for an image in its cache, the loops of Dory add layers to theirs, XLM uses the lengths of texts; the
# others are wrong with a cache or padding in transformers 5.16.
_ODD = ("git", "dory", "xlm", "big_bird", "doge", "megatron-bert", "rembert")


def why_no_cache(model: PreTrainedModel | PeftModel) -> str | None:
    """
    Returns why a model has to read a text from its beginning each time; `None` if it can continue from a key-value
    cache that is cropped and padded. A model without a cache is read row by row, since it may not support padding.
    """
    network = network_of(model)
    for adapter in model.peft_config.values() if isinstance(model, PeftModel) else ():
        if adapter.is_prompt_learning:
            return "its adapter puts something before the text"
        if isinstance(adapter, LoraConfig) and adapter.alora_invocation_tokens:
            return "its adapter acts from some tokens on (aLoRA), which it looks for in all that it is given"
    arguments, kind = inspect.signature(type(network).forward).parameters, network.config.model_type
    if network._is_stateful or CACHE not in arguments or new_cache(network) is None:
        return "it has recurrent states, or no key-value cache that could be rolled back"
    if "position_ids" not in arguments and kind != "bloom":  # which computes the distances of tokens from the mask
        return "it takes no positions, which a padded text needs"
    if _counts_from_pad_token(network):
        return "it counts positions from its pad token on, and leaves out pad tokens in the text"
    return "its cache or its masks are not usual ones in all versions of transformers" if kind in _ODD else None


def is_read_otherwise_by_generate(network: PreTrainedModel) -> bool:
    """
    Returns whether `generate` doesn't pass a text to a model as training and scoring do.

    Either it numbers positions from 0, where the model itself (such as RoBERTa) counts from its pad token; or it adds
    tokens.
    """
    return _counts_from_pad_token(network) or network.config.model_type in _WITH_MASK_TOKEN


def _counts_from_pad_token(network: PreTrainedModel) -> bool:
    """Returns whether a model counts positions from the id of its pad token, as RoBERTa does."""
    return any(
        name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
        for name, module in network.named_modules()
    )


def fixed_length(network: PreTrainedModel) -> float:
    """
    Returns the number of tokens up to which a cache holds what the model would compute from scratch: beyond it, the
    frequencies of dynamic rotary embeddings depend on the length of the text. Infinite for all other models.
    """
    config = network.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    lengths = [
        min(config.max_position_embeddings, rope.get("original_max_position_embeddings", math.inf)) - 1
        for rope in [ropes, *ropes.values()]  # those of each kind of layer, where kinds differ
        if isinstance(rope, dict) and rope.get("rope_type") in _DYNAMIC_ROPES
    ]
    return min(lengths, default=math.inf)


def refuse_unknown_ids(network: PreTrainedModel, input_ids: Tensor) -> None:
    """
    Refuses ids that a model has no embeddings for. On a GPU its pass would end in an assertion, after which nothing
    runs in the process.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            What would read them.
        input_ids (`torch.LongTensor` of shape `(batch_size, n)`):
            The ids.

    Raises:
        ValueError: if there are such ids.
    """
    n_known = n_embeddings(network)
    lowest, highest = torch.stack(input_ids.aminmax()).tolist()
    if lowest < 0 or highest >= n_known:
        raise ValueError(
            f"The text has ids from {lowest} to {highest}, but `{type(network).__name__}`, as a reward model or "
            f"reference, knows ids from 0 to {n_known - 1}. Leave out tokens that it lacks, or use a model with the "
            "tokenizer of the base model."
        )


def refuse_out_of_range(network: PreTrainedModel, input_ids: Tensor, length: int, error: Exception) -> None:
    """
    Explains an error of a forward pass if a token or a position may have been out of range, and else does nothing.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            The model that raised the error.
        input_ids (`torch.LongTensor` of shape `(batch_size, n)`):
            The tokens that it was called with.
        length (`int`):
            The length of their text, with what was read before.
        error (`Exception`):
            The error. It gives no reason if a table has no row for a token or its position.

    Raises:
        ValueError: if a token or a position may have been out of range.
    """
    n_known = n_embeddings(network)
    config, highest = network.config, int(input_ids.max())
    n_positions = getattr(config, "max_position_embeddings", getattr(config, "max_target_positions", math.inf))
    if highest >= n_known or length + 2 > n_positions:  # some count positions from 1 or 2
        raise ValueError(
            f"`{type(network).__name__}` as a reward model can't read a text of {length} tokens with ids up to "
            f"{highest}: it knows {n_positions} positions and ids below {n_known} ({error}). Shorten the prompt or "
            "lower `max_new_tokens`, leave out tokens that it lacks, or use another reward model."
        ) from error
