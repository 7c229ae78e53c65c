"""Checks of the files of an adapter before it is loaded onto a base: bounds, dtypes, and regular expressions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .kv_cache import embeddings_of
from .sharing import saved_shapes

_SECONDS = 20  # for a regular expression, which takes microseconds
_MATCH = "import json, re, sys; x = json.load(sys.stdin); [re.fullmatch(p, n) for p in x[0] for n in x[1]]"


def n_added_tokens(network: PreTrainedModel, config: PeftConfig, folder: str | Path) -> int:
    """
    Counts the rows that the embeddings of a base lack for an adapter that was trained with more tokens than the base
    has, as `chat_template_path` of TRL's trainers adds.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            The base.
        config ([`~peft.PeftConfig`]):
            The configuration of the adapter.
        folder (`str`):
            The folder of the adapter.
    """
    embeddings = (network.get_input_embeddings(), network.get_output_embeddings())
    names = [f"base_model.model.{name}." for name, module in network.named_modules() if module in embeddings]
    whole = [
        shape[0]
        for key, shape in saved_shapes(folder).items()
        if key.startswith(tuple(names)) and key.endswith(".weight") and "lora_" not in key
    ]
    return max([*whole, *(index + 1 for index in _trained_tokens(config)), 0]) - len(embeddings_of(network))


def refuse_out_of_bounds(config: PeftConfig, network: PreTrainedModel, name: str) -> None:
    """
    Refuses a configuration whose tokens, layers or regular expressions can't be those of an adapter on a base.

    Args:
        config ([`~peft.PeftConfig`]):
            The configuration of the adapter.
        network ([`~transformers.PreTrainedModel`]):
            The base.
        name (`str`):
            What to call the adapter.

    Raises:
        ValueError: if a token or a layer is out of range, or a regular expression takes too long.
    """
    n_tokens = len(embeddings_of(network))
    for index in _trained_tokens(config):
        if not isinstance(index, int) or not 0 <= index < 2 * n_tokens:  # those from n_tokens on were added
            raise ValueError(
                f"`{name}` has trained the token {index!r} (`trainable_token_indices`), but its base has {n_tokens} "
                "tokens, to which at most as many can be added. Correct its `adapter_config.json`, or give the "
                "base that it was trained on."
            )
    n_layers = getattr(network.config.get_text_config(), "num_hidden_layers", None)
    for part in getattr(config, "layer_replication", None) or []:
        is_range = isinstance(part, list | tuple) and len(part) == 2 and all(isinstance(x, int) for x in part)
        if not is_range or (n_layers is not None and not 0 <= part[0] < part[1] <= n_layers):
            raise ValueError(
                f"`{name}` repeats the layers {part!r} (`layer_replication`), but its base has {n_layers} layers: "
                "each part is a first layer and the one after the last. Correct its `adapter_config.json`."
            )
    patterns = [x for x in _patterns(config) if set(x) & set("*+{")]
    if patterns:
        modules = [module for module, _ in network.named_modules()]
        try:
            subprocess.run(
                [sys.executable, "-I", "-c", _MATCH],
                input=json.dumps([patterns, modules]),
                text=True,
                capture_output=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"`{name}` has a regular expression in its `adapter_config.json` ({', '.join(map(repr, patterns))}) "
                f"that needs more than {_SECONDS} s to find its modules. List the names of the modules instead."
            ) from error


def refuse_other_dtypes(folder: str | Path) -> None:
    """
    Refuses LoRA factors in a folder that are not floating-point numbers, which would be cast silently.

    Raises:
        ValueError: if there are some.
    """
    path = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys() if "lora_" in key}  # noqa: SIM118
    except SafetensorError:
        return  # refused with its name where it is read
    for key, dtype in dtypes.items():
        if not dtype.startswith(("F", "BF")):
            raise ValueError(
                f"`{path}` has `{key}` as {dtype}, but an adapter has floating-point numbers. Save it again."
            )


def _trained_tokens(config: PeftConfig) -> list[Any]:
    """Returns the indices of tokens whose embeddings the adapter trained, unchecked."""
    values = [getattr(config, name, None) or [] for name in ("trainable_token_indices", "token_indices")]
    lists = [part for value in values for part in (value.values() if isinstance(value, dict) else [value])]
    return [index for tokens in lists for index in tokens]


def _patterns(config: PeftConfig) -> list[str]:
    """Returns what PEFT reads as regular expressions."""
    given = [getattr(config, name, None) for name in ("target_modules", "exclude_modules")]
    found = [x for x in given if isinstance(x, str)]
    for name in ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = getattr(config, name, None) or []
        found += [value] if isinstance(value, str) else [x for x in value if isinstance(x, str)]
    return found
