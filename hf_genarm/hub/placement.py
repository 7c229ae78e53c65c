"""The devices of models, and how a reward model that doesn't share weights gets to where the base is."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..arguments import shown
from .info import GuidanceWarning
from .kv_cache import network_of
from .sharing import shares_weights

# With these arguments a model is put in its place, or made to fit there, while it is loaded.
_PLACING = {"device_map", "quantization_config", "tp_plan"}


def device_of(model: PreTrainedModel | PeftModel) -> torch.device:
    """Returns the device on which a model takes its input: if its layers are on several devices, that of the first."""
    device_map = getattr(network_of(model), "hf_device_map", {})
    # Weights that are offloaded are computed where the others are, as in `accelerate.dispatch_model`.
    computing = [place for place in device_map.values() if str(place) not in ("cpu", "disk")]
    return torch.device(computing[0]) if computing else model.device


def loaded_as_base(base_model: PreTrainedModel | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments that load a separate reward model: in the dtype of the base, unless they name one."""
    if base_model is None or {"dtype", "torch_dtype", "quantization_config"} & kwargs.keys():
        return dict(kwargs)
    return {**kwargs, "dtype": base_model.dtype}


def refuse_no_dtype(kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: if a name of a dtype is none.
    """
    for name in ("dtype", "torch_dtype"):
        dtype = kwargs.get(name)
        is_name = isinstance(dtype, str) and (dtype == "auto" or isinstance(getattr(torch, dtype, None), torch.dtype))
        if dtype is not None and not is_name and not isinstance(dtype, torch.dtype | dict):
            raise ValueError(
                f"`{name}` is {shown(dtype)}, but must be 'auto' or a dtype of PyTorch, such as 'bfloat16'."
            )


def refuse_no_device_map(device_map: Any) -> None:
    """
    Raises:
        TypeError: if a value is not of a type that places a model: a device, or one for each of some modules.
    """
    places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    names = list(device_map) if isinstance(device_map, Mapping) else []
    is_place = all(isinstance(x, str | int | torch.device) and not isinstance(x, bool) for x in places)
    if device_map is not None and not (is_place and all(isinstance(name, str) for name in names)):
        raise TypeError(
            f"`device_map` is {shown(device_map)}, but must be 'auto', a device such as 'cuda:0', or a `dict` of a "
            "device for each module. Leave it out to load the reward model where the base is."
        )


def put_with_base(
    model: PreTrainedModel | PeftModel, base_model: PreTrainedModel | None, kwargs: Mapping[str, Any]
) -> None:
    """
    Moves a reward model with weights of its own to the device of the base, unless its place was chosen.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward model, moved in place.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The base.
        kwargs (`dict`):
            The arguments that the reward model was loaded with.
    """
    if base_model is None or shares_weights(model, base_model) or _PLACING & kwargs.keys():
        return
    if getattr(network_of(model).config, "quantization_config", None) is None:
        model.to(device_of(base_model))  # type: ignore[arg-type]  # which mypy takes for a dtype


def warn_of_other_devices(
    models: Sequence[PreTrainedModel | PeftModel], names: Sequence[str], base_model: PreTrainedModel | None
) -> None:
    """Warns if a reward model is on a device of another kind than the base, which is exact and slow."""
    for model, name in zip(models, names, strict=True):
        if base_model is None:
            continue
        own, base = device_of(model), device_of(base_model)
        if own.type != base.type:
            warnings.warn(
                f"`{name}` is on `{own}`, and the base is on `{base}`: tokens and log-probabilities are copied from "
                "one to the other at every step, and the slower one sets the pace. Leave `device_map` out to load it "
                "where the base is.",
                GuidanceWarning,
                stacklevel=4,
            )
