"""What a network can read: texts in parts, next to padding, up to some length, and some tokens."""

import inspect
import math
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .kv_cache import CACHE, n_embeddings, network_of, new_cache

# Rotary embeddings whose frequencies depend on the length of the text
_DYNAMIC_ROPES = ("dynamic", "longrope")
# Names of tables of positions
_TABLES = ("wpe", "embed_positions", "positions_embed", "position_embeddings", "position_embedding", "pos_encoding")
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


def n_positions(model: PreTrainedModel | PeftModel) -> float:
    """
    Returns the number of tokens that a model has positions for, minus what an adapter puts before the text. Infinite if
    there is no table of positions, as where they are rotary.
    """
    network = network_of(model)
    config, lengths = network.config.get_text_config(), [math.inf]
    named = getattr(config, "max_position_embeddings", getattr(config, "max_target_positions", None))
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(_TABLES):
            offset = getattr(module, "offset", 0)
            # Another length is that of another table, such as of the patches of an image.
            if module.num_embeddings - offset == named:
                lengths.append(named if offset or module.padding_idx is None else named - module.padding_idx - 1)
        lengths += [len(x) for key, x in module.named_buffers(recurse=False) if key in _TABLES and len(x) == named]
    adapters: Any = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return min(lengths) - sum(x.num_virtual_tokens for x in adapters if x.is_prompt_learning)


def refuse_too_long(network: PreTrainedModel, length: int, n_positions: float, role: str) -> None:
    """
    Refuses a text that is longer than a table of positions. On a GPU the pass would end in an assertion, after which
    nothing runs in the process.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            What would read the text.
        length (`int`), n_positions (`float`):
            The number of its tokens, and how many can be read.
        role (`str`):
            What the network is used as.

    Raises:
        ValueError: if it is.
    """
    if length > n_positions:
        raise ValueError(
            f"The text has {length} tokens, but `{type(network).__name__}`, as a {role}, has {n_positions} positions. "
            f"Shorten the prompt or lower `max_new_tokens`, or use another {role}."
        )


def refuse_unknown_ids(network: PreTrainedModel, input_ids: Tensor, role: str) -> None:
    """
    Refuses ids that a model has no embeddings for. On a GPU its pass would end in an assertion, after which nothing
    runs in the process.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            What would read them.
        input_ids (`torch.LongTensor` of shape `(batch_size, n)`):
            The ids.
        role (`str`):
            What the network is used as.

    Raises:
        ValueError: if there are such ids.
    """
    n_known = n_embeddings(network)
    lowest, highest = torch.stack(input_ids.aminmax()).tolist()
    if lowest < 0 or highest >= n_known:
        raise ValueError(
            f"The text has ids from {lowest} to {highest}, but `{type(network).__name__}`, as a {role}, knows ids from "
            f"0 to {n_known - 1}. Leave out tokens that it lacks, or use a model with the tokenizer of the base model."
        )


def refuse_unfilled_cache(network: PreTrainedModel, cache: Any, length: int) -> None:
    """
    Refuses a cache that does not hold what was read.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            What has read the texts.
        cache ([`~transformers.Cache`]):
            The cache that it was called with.
        length (`int`):
            The number of columns that it should hold.

    Raises:
        RuntimeError: if it holds another number.
    """
    if cache.get_seq_length() != length:
        raise RuntimeError(
            f"`{type(network).__name__}` did not fill its key-value cache. A model in training mode with gradient "
            "checkpointing turns the cache off: call `reward_model.eval()` first."
        )


def refuse_nan(what: str, dtype: torch.dtype) -> None:
    """
    Refuses a reward model that has returned NaN.

    Args:
        what (`str`):
            What returned it, with its name.
        dtype (`torch.dtype`):
            That of its logits.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{what} returned NaN. Its weights or its dtype ({dtype}) are at fault: load it with `dtype=torch.float32`, or "
        "check its training."
    )
