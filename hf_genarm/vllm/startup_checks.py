"""Checks of the configuration of a server, before any weights are loaded."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..hub.base_weights import has_weights
from ..hub.info import RewardInfo
from ..hub.loading import ADAPTER_CONFIG, base_of, download, info_of
from ..hub.reward_model import find_tokenizer
from .memory import bytes_per_token, n_tokens_that_fit
from .paged_lm import refuse_short
from .reward_lms import is_on, refuse_lacking
from .server_config import ServerConfig


def check_reward_models(
    config: ServerConfig,
    served: str,
    tokenizer_name: str | None,
    max_model_len: int | None,
    trust_remote_code: bool = False,
) -> ServerConfig:
    """
    Checks the reward models of a server by their files: that they are there, belong to the served model, read texts of
    its length, and have its tokens.

    Args:
        config ([`ServerConfig`]):
            The configuration of the server.
        served, tokenizer_name (`str`):
            The model that is served and its tokenizer, Hub ids or folders.
        max_model_len (`int`, *optional*):
            The largest number of tokens in a text, if known.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the repositories.

    Returns:
        The configuration with the settings that the reward models recommend.

    Raises:
        ValueError: if the server could not be guided like this.
    """
    if not Path(served).exists() and ":" not in served:  # a GGUF file of a repository has a colon
        _download(served, f"`--model` is `{served}`, which is no folder here, and can't be loaded from the Hub")
    for name in _names(config):
        _check_files(name, served)
    resolved = config.with_recommended(config.infos())
    names = _names(resolved)
    if config.reference == "auto" and resolved.reference == "base":
        _refuse_other_bases(resolved.models, [info_of(x) for x in resolved.models], served, trust_remote_code)
    tokenizer = find_tokenizer(tokenizer_name or served, trust_remote_code=trust_remote_code)
    length = max_model_len or _longest(served, trust_remote_code)
    for name in names:
        network = _network(name, served)
        longest = _longest(network, trust_remote_code)
        if length < math.inf:  # or else it is left to the engine
            refuse_short(f"`{name}`", longest, length)
        own = find_tokenizer(name, network, trust_remote_code=trust_remote_code)
        if tokenizer is not None and own is not None:
            refuse_lacking(name, tokenizer.get_vocab().keys() - own.get_vocab().keys())
    return resolved


def check_memory(
    config: ServerConfig,
    served: str,
    max_model_len: int | None,
    max_num_seqs: int | None,
    dtype: str | None,
    device: str,
    trust_remote_code: bool = False,
) -> None:
    """
    Checks by their configurations that the keys and values of reward models fit into memory, as far as can be known.

    Args:
        config, served, max_model_len, trust_remote_code:
            As for [`check_reward_models`].
        max_num_seqs (`int`, *optional*):
            The largest number of texts at once, if known.
        dtype (`str`, *optional*):
            Data type of the engine, if known.
        device (`str`):
            The type of the device, such as `"cuda"`.

    Raises:
        ValueError: if they do not fit.
    """
    n_bytes = 4 if (config.dtype or dtype) in ("float32", "float") else 2  # vLLM never chooses 4 itself
    networks = [*(_network(name, served) for name in _names(config)), *[served] * config.n_sentences]
    configs = [_config(x, trust_remote_code) for x in networks]
    per_token = bytes_per_token(configs, n_bytes)
    length = max_model_len or _longest(served, trust_remote_code)
    if per_token is not None and length < math.inf:
        n_tokens_that_fit(config, per_token, int(length), max_num_seqs, device)


def _names(config: ServerConfig) -> list[str]:
    """Returns the names of all models that are read next to the served one."""
    own_reference = [config.reference] if config.reference not in ("auto", "base", None) else []
    return [*config.models, *own_reference]


def _network(name: str, served: str) -> str:
    """Returns where the configuration of the network of a reward model is: its own, or that of what it adapts."""
    base = base_of(name)
    return name if base is None else served if is_on(name, served) else base


def _check_files(name: str, served: str) -> None:
    """Raises if a reward model is not there, is not whole, or belongs to a model that is not there; a sentence has
    no weights."""
    folder = _download(name, f"`{name}` is no folder here, and can't be loaded from the Hub")
    if info_of(name).sentence is not None:
        return
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    if not is_adapter and not (folder / "config.json").exists():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        raise ValueError(
            f"`{name}` has no `{ADAPTER_CONFIG}` and no `config.json`, so it is no reward model. "
            + (f"Name one of its folders: {', '.join(inner[:5])}." if inner else "Check the folder.")
        )
    weights = [folder / SAFETENSORS_WEIGHTS_NAME] if is_adapter else sorted(folder.glob("*.safetensors"))
    if Path(name).is_dir() and not (weights and all(x.exists() for x in weights)):
        raise ValueError(
            f"`{name}` has no weights in safetensors. Save it with `save_pretrained`; pickled weights (`.bin`, `.pt`) "
            "are refused, because loading them can run code."
        )
    for path in weights:
        try:
            if path.exists():
                safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"`{path}` is damaged ({error}). Download or write it again.") from error
    base = base_of(name)
    if is_adapter and not is_on(name, served):
        _download(
            str(base),
            f"`{name}` was trained on `{base}`, which is not the served model `{served}`, no folder here, and can't be "
            "loaded from the Hub",
        )


def _download(name: str, problem: str) -> Path:
    """Returns the folder of a model with its configurations, or raises with the problem."""
    try:
        return download(name, patterns=["*.json"])
    except (HFValidationError, OSError) as error:
        raise ValueError(f"{problem} ({type(error).__name__}). Check the name.") from error


def _refuse_other_bases(
    names: Sequence[str], infos: Sequence[RewardInfo], served: str, trust_remote_code: bool
) -> None:
    """Raises if rewards that are contrasts with their base belong to another model than the served one."""
    model = _model_of_files(served, trust_remote_code) if any(x.base_weights for x in infos) else None
    for name, info in zip(names, infos, strict=True):
        if not is_on(name, served) or (model is not None and has_weights(model, info.base_weights) is False):
            raise ValueError(
                f"The rewards of `{name}` are contrasts with the model that it was trained from, which is not the "
                f"served one, `{served}`. Serve that model, or choose in `genarm` of `additional_config`: "
                '`"reference": "base"`, `null`, or a model.'
            )


def _model_of_files(name: str, trust_remote_code: bool) -> PreTrainedModel | None:
    """Returns a model around the mapped files of a folder, which are read where they are used; `None` if unknown."""
    config = _config(name, trust_remote_code)
    if config is None:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    for path in sorted(_download(name, f"`{name}` is not there").glob("*.safetensors")):
        model.load_state_dict(load_file(path), assign=True, strict=False)
    model.tie_weights()
    return model


def _longest(name: str, trust_remote_code: bool) -> float:
    """Returns the number of tokens that a model reads, by its configuration; infinity if it has none."""
    config = _config(name, trust_remote_code)
    return math.inf if config is None else getattr(config.get_text_config(), "max_position_embeddings", math.inf)


def _config(name: str, trust_remote_code: bool) -> Any:
    """Returns the configuration of a model; `None` for what only vLLM can read, such as a GGUF file."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None
