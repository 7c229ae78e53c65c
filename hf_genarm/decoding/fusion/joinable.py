"""Which passes of the base can be joined, and what their rows read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from ...hub.kv_cache import CACHE
from ..lockstep import position_ids
from ..step import Step

# What a decoding step passes to the base, in addition to what is `None` or `False`.
_STEP_INPUTS = {"input_ids", "attention_mask", "position_ids", CACHE, "use_cache", "return_dict", "logits_to_keep"}


def obstacle_in(cache: Any, config: PreTrainedConfig) -> str | None:
    """Returns why no pass with a cache like this can be joined, given the config of the base; `None` if some can."""
    if cache is None:
        return "the base keeps no cache"
    if type(cache) not in (DynamicCache, StaticCache):
        return f"the base has a `{type(cache).__name__}`"
    if cache.offloading:
        return "the base offloads its cache"
    kinds = {type(x) for x in cache.layers} if type(cache) is StaticCache else set()
    window = getattr(config.get_text_config(), "sliding_window", None)
    if kinds == {StaticSlidingWindowLayer} and (window is None or cache.get_max_length() >= window):
        return "no layer of the base's static cache is known to hold whole texts"
    others = kinds - {StaticLayer, StaticSlidingWindowLayer}
    return f"the static cache of the base has a `{others.pop().__name__}`" if others else None


def is_plain(step: Step, inputs: dict[str, Any]) -> bool:
    """
    Returns whether these are the inputs of a plain step that extends a cache of known tokens, in which there is no
    obstacle.
    """
    new, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    cache: Any = inputs.get(CACHE)
    extra = [name for name, value in inputs.items() if name not in _STEP_INPUTS and value is not None]
    if torch.is_grad_enabled() or not inputs.get("use_cache") or any(inputs[name] is not False for name in extra):
        return False
    if new is None or inputs.get("return_dict") is False:
        return False
    n_new, shape = new.shape[1], step.input_ids.shape
    if not all(_can_be_joined(layer, n_new) for layer in cache.layers) or step.attention_mask.shape != shape:
        return False
    if len(new) != shape[0] or not _holds(cache, step, shape[1] - n_new):
        return False
    # For a static cache, `generate` makes masks over all of its columns from that of the step.
    is_usual = type(cache) is StaticCache or mask is None or mask.shape == shape
    return is_usual and _has_usual_positions(step, inputs.get("position_ids"), n_new)


def joint_rows(masks: Sequence[Tensor], n_columns: int) -> dict[str, Tensor]:
    """
    Returns mask and positions `(n_rows, n_columns)` of texts of different lengths, which are padded on the left.
    """
    mask = torch.cat([nn.functional.pad(mask, (n_columns - mask.shape[1], 0)) for mask in masks])
    return {"attention_mask": mask, "position_ids": position_ids(mask)}


def _holds(cache: Any, step: Step, length: int) -> bool:
    """Returns whether a cache holds so many tokens; for a static one, that is known to the device alone."""
    run, name = step.run, "length of the static cache"
    is_known = type(cache) is StaticCache and run.uses(cache) and run.depth > 0  # `generate` goes on as it has begun
    if is_known and name in run.agreed:
        return True
    is_held = int(cache.get_seq_length()) == length
    if is_known and is_held:
        run.agreed[name] = None
    return is_held


def _has_usual_positions(step: Step, positions: Tensor | None, n_new: int) -> bool:
    """Returns whether the tokens of a step are numbered as a reward model numbers them, one row for each text."""
    if positions is None or step.run.has_usual_positions:
        return True
    usual = position_ids(step.attention_mask)[:, -n_new:].to(positions.device)
    is_usual = torch.equal(positions, usual)
    step.run.has_usual_positions = is_usual and step.run.depth > 0  # `generate` goes on as it has begun
    return is_usual


def _can_be_joined(layer: Any, n_new: int) -> bool:
    """Returns whether the keys and values of a layer can be joined with those of other rows."""
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.is_initialized and not layer.record_past and n_new < layer.sliding_window
    return type(layer) in (DynamicLayer, StaticLayer, StaticSlidingWindowLayer) and layer.is_initialized
