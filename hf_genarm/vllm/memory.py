"""How much memory the keys and values of reward models get."""

from collections.abc import Sequence
from typing import Any

import psutil
import torch

from .server_config import ServerConfig

# Of the memory of the device, if the configuration does not say.
_SHARE = 0.2


def n_tokens_that_fit(config: ServerConfig, bytes_per_token: int, length: int, most: int | None, device: str) -> int:
    """
    Returns the number of tokens whose keys and values each reward model keeps.

    Args:
        config ([`ServerConfig`]):
            The configuration of the server, with `reward_memory` or `slots`, or neither.
        bytes_per_token (`int`):
            Size of the keys and values of a token, in all reward models together.
        length (`int`):
            The largest number of tokens in a text.
        most (`int`, *optional*):
            The largest number of texts at once, if known: what they need is enough if the configuration does not say.
        device (`str`):
            The type of the device, such as `"cuda"`.

    Raises:
        ValueError: if one text does not fit, or the device has less free memory.
    """
    total, free = _memory(device)
    of_a_text = bytes_per_token * length
    if config.slots is not None:
        n_bytes, setting, given = config.slots * of_a_text, "slots", f"{config.slots}"
    elif config.reward_memory is not None:
        share = config.reward_memory
        n_bytes = int(share * total) if share <= 1 else int(share)
        setting, given = "reward_memory", f"{share:g}" + (f", {_shown(n_bytes)}" if share <= 1 else "")
    else:
        n_bytes = int(_SHARE * total)
        if most is not None:
            n_bytes = min(n_bytes, most * of_a_text)
        setting, given = "reward_memory", f"left out, so {_shown(n_bytes)}"
    if n_bytes < of_a_text:
        raise ValueError(
            f"`{setting}` in `genarm` of `additional_config` is {given}, but the keys and values of one text of "
            f"{length} tokens take {_shown(of_a_text)} in the reward models. Raise it, or start the server with "
            f"`--max-model-len {n_bytes // bytes_per_token}` or less."
        )
    if n_bytes > free:
        raise ValueError(
            f"`{setting}` in `genarm` of `additional_config` is {given}: {_shown(n_bytes)} for the keys and values of "
            f"the reward models, but {_shown(free)} are free. Set `reward_memory` to less, in bytes or as a share; one "
            f"text of {length} tokens takes {_shown(of_a_text)}."
        )
    return n_bytes // bytes_per_token


def bytes_per_token(configs: Sequence[Any], n_bytes: int) -> int | None:
    """
    Computes the size of the keys and values of a token from the configurations of models.

    Args:
        configs (sequence of [`~transformers.PreTrainedConfig`]):
            The configurations.
        n_bytes (`int`):
            Size of a number.

    Returns:
        `int`, *optional*: `None` if a model is of an unusual kind.
    """
    total = 0
    for config in configs:
        try:
            text = config.get_text_config()
            n_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            total += 2 * text.num_hidden_layers * n_heads * head_size * n_bytes
        except AttributeError:
            return None
    return total


def _memory(device: str) -> tuple[int, int]:
    """Returns the number of bytes of a device, and how many of them are free."""
    if device == "cpu":
        memory = psutil.virtual_memory()
        return memory.total, memory.available
    free, total = torch.get_device_module(device).mem_get_info()
    return total, free


def _shown(n_bytes: int) -> str:
    return f"{n_bytes:,} bytes"
