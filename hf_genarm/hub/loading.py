"""Loading of reward models: complete or not at all, without pickles, and without code that the user has not trusted."""

import json
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..demo import loadable_name
from .adapter_config import n_added_tokens, refuse_other_dtypes, refuse_out_of_bounds
from .base_weights import has_weights
from .info import INFO_NAME, GuidanceWarning, RewardInfo
from .kv_cache import embeddings_of
from .placement import loaded_as_base
from .sharing import check_tensors, is_plain, load_onto_shared_weights, why_adapter_changes_base

logger = logging.getLogger(__name__)

# Pickled weights run code when they are loaded, so they are not even downloaded.
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md")
ADAPTER_CONFIG = "adapter_config.json"


def download(name_or_path: str, subfolder: str = "", patterns: Iterable[str] = _FILES, **hub_kwargs: Any) -> Path:
    """Returns a folder as it is, or the folder in the cache with one revision of a repository, complete."""
    if not Path(name_or_path).is_dir():
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        name_or_path = snapshot_download(name_or_path, allow_patterns=patterns, **hub_kwargs)
    folder = Path(name_or_path, subfolder)
    if subfolder and not folder.is_dir():
        raise ValueError(f"`{name_or_path}` has no folder `{subfolder}`. Check `subfolder`.")
    return folder


def load_full_model(folder: Path, name: str, **kwargs: Any) -> PreTrainedModel:
    """
    Loads a reward model that is not an adapter.

    Args:
        folder (`Path`):
            Its folder.
        name (`str`):
            Its name in messages.
        **kwargs:
            Passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: if it has pickled weights, or not exactly those of its architecture, or some that are not finite.
    """
    if not any(folder.glob("*.safetensors")):
        adapters = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        if adapters:
            raise ValueError(
                f"`{name}` is a folder of several adapters: {', '.join(f'`{x}`' for x in adapters)}. Choose one with "
                f'`subfolder`, such as `from_pretrained(..., subfolder="{adapters[0]}")`.'
            )
        raise _pickled(name)
    _refuse_pickled_shards(folder, name)
    model, unexpected = _load(folder, name, **kwargs)
    unexpected = [key for key in unexpected if not _is_old_buffer(folder, key, model)]
    if unexpected:
        raise ValueError(
            f"`{name}` has `{unexpected[0]}`, which a `{type(model).__name__}` doesn't have: it is not, or not only, a "
            "causal LM. Load it with its own class, and save the language model in it with `save_pretrained`."
        )
    return model


def load_adapter(
    folder: Path,
    name: str,
    info: RewardInfo,
    base_model: PreTrainedModel | None,
    hub_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> PeftModel:
    """
    Loads an adapter onto the weights of the base, if it was trained on these and only adds to them, or else onto
    another copy of the model that it was trained on.

    Args:
        folder (`Path`):
            Its folder.
        name (`str`):
            Its name in messages.
        info ([`RewardInfo`]):
            What is recorded about it.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The model to be steered.
        hub_kwargs, kwargs (`dict`):
            Where to find that copy, and how to load it.

    Raises:
        ValueError: if the adapter or its model are pickled, damaged, incomplete or not finite.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.exists():
        raise _pickled(name)
    config = adapter_config(folder / ADAPTER_CONFIG)
    refuse_other_dtypes(folder)
    if config.peft_type == PeftType.XLORA:
        raise ValueError(f"`{name}` is X-LoRA, which loads other adapters itself. Load one of these instead.")
    objection = _why_not_shared(base_model, config, info, kwargs)
    if base_model is not None:
        refuse_out_of_bounds(config, base_model, name)
    if base_model is not None and objection is None:
        adds = n_added_tokens(base_model, config, folder) > 0
        objection = "it adds tokens" if adds else why_adapter_changes_base(base_model, config, folder)
    if base_model is not None and objection is None:
        _refuse_not_finite(load_file(path).items(), name)
        return load_onto_shared_weights(base_model, folder)
    logger.info("%s: engine `separate`, with weights of its own, because %s.", name, objection)
    network = _load_network(name, config, info, folder, hub_kwargs, loaded_as_base(base_model, kwargs))
    if has_weights(network, info.base_weights) is False:
        warnings.warn(
            f"`{name}` was trained on other weights than those of `{config.base_model_name_or_path}`, so that its "
            "rewards are not what it has learned. Give `base_model` the model that it was trained on.",
            GuidanceWarning,
            stacklevel=3,
        )
    refuse_out_of_bounds(config, network, name)
    n_added = n_added_tokens(network, config, folder)
    if n_added > 0:  # their weights come with the adapter
        network.resize_token_embeddings(len(embeddings_of(network)) + n_added, mean_resizing=False)
    why_adapter_changes_base(
        network, config, folder
    )  # raises an error with the tensor that doesn't fit, as PEFT doesn't
    _refuse_not_finite(load_file(path).items(), name)
    model = PeftModel.from_pretrained(network, str(folder))
    check_tensors(model, folder)
    return model


def _why_not_shared(
    base_model: PreTrainedModel | None, config: PeftConfig, info: RewardInfo, kwargs: dict[str, Any]
) -> str | None:
    if base_model is None:
        return "no `base_model` was given"
    loading = [name for name in kwargs if name != "trust_remote_code"]
    if loading:
        return f"arguments require other weights ({', '.join(loading)})"
    wrappers = PeftModel | BaseTunerLayer | AuxiliaryTrainingWrapper
    if any(isinstance(module, wrappers) for module in base_model.modules()):
        return "the base has an adapter itself"
    is_same = has_weights(base_model, info.base_weights)
    if is_same is False:
        return "it was trained on other weights than those of the base"
    trained_on, given = config.base_model_name_or_path, base_model.name_or_path
    if is_same is None and _is_in_4_bit(trained_on):
        logger.warning(
            "The adapter names `%s`, a 4-bit copy. It is taken for a copy of the given base, `%s`.",
            trained_on,
            given,
        )
        return None
    if is_same is None and (not short_name(given) or short_name(given) != short_name(trained_on)):
        return f"it was trained on `{trained_on}`, and the base is `{given}`"
    return None


def _load_network(
    name: str, config: PeftConfig, info: RewardInfo, folder: Path, hub_kwargs: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    trained_on = config.base_model_name_or_path
    if trained_on is None or not short_name(trained_on):
        raise ValueError(
            f"`base_model_name_or_path` of `{name}` is {trained_on!r}, but must be the Hub id or the folder of the "
            f"model that it was trained on. Write it into `{folder / ADAPTER_CONFIG}`."
        )
    revision = recorded_revision(config, info)
    where = loadable_name(trained_on)
    try:
        files = download(where, patterns=["*.json"], revision=revision, **hub_kwargs)
    except HFValidationError as error:
        raise ValueError(
            f"`{name}` was trained on `{trained_on}`, which is no folder here, and no id on the Hub. Write where it is "
            f"now into `{folder / ADAPTER_CONFIG}`."
        ) from error
    except OSError as error:
        raise ValueError(
            f"`{name}` was trained on `{trained_on}`, which can't be loaded. Give the model that it was trained on as "
            f"`base_model`, or write where that is now into `{folder / ADAPTER_CONFIG}`. {error}"
        ) from error
    if (files / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"`{name}` was trained on `{trained_on}`, which is an adapter itself. Merge that into its model with "
            f"`merge_and_unload`, save it, and write its folder into `{folder / ADAPTER_CONFIG}`."
        )
    _refuse_pickled_shards(files, trained_on)
    try:
        return _load(where, trained_on, revision=revision, **hub_kwargs, **kwargs)[0]
    except OSError as error:
        raise ValueError(f"`{trained_on}`, on which `{name}` was trained, can't be loaded. {error}") from error


def _load(name_or_path: str | Path, name: str, **kwargs: Any) -> tuple[PreTrainedModel, list[str]]:
    """Loads a causal LM with all of its weights; returns it, and the names of tensors in its files that it lacks."""
    if not kwargs.get("use_safetensors", True):
        raise ValueError(f"`use_safetensors` is {kwargs['use_safetensors']}, but no other weights are loaded. Omit it.")
    # A size that is wrong is an error here, with its name.
    ours = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(name_or_path, **{**kwargs, **ours})
    model, found = loaded
    mismatched = {key for key, *_ in found["mismatched_keys"]}
    for what, keys in (("no", found["missing_keys"]), ("another shape of", mismatched)):
        if keys:
            raise ValueError(
                f"`{name}` has {what} `{min(keys)}`, which a `{type(model).__name__}` needs. Download or save it "
                "again; if it is no causal LM, such as a classifier, it can't be used here."
            )
    _refuse_not_finite(model.named_parameters(), name)
    return model, sorted(found["unexpected_keys"])


def recorded_revision(config: PeftConfig, info: RewardInfo) -> str | None:
    """Returns the revision of the base that an adapter was trained on, if it is recorded."""
    is_same = short_name(info.base_model) == short_name(config.base_model_name_or_path)
    return config.revision or (info.base_model_revision if is_same else None)


def base_of(name_or_path: str, **hub_kwargs: Any) -> str | None:
    """Returns the Hub id or folder of the model that an adapter belongs to; `None` for what is no adapter."""
    path = download(name_or_path, patterns=[ADAPTER_CONFIG], **hub_kwargs) / ADAPTER_CONFIG
    return adapter_config(path).base_model_name_or_path if path.exists() else None


def info_of(name_or_path: str, **hub_kwargs: Any) -> RewardInfo:
    """Returns what is recorded about a reward model; an empty record, if it has no `genarm_config.json`."""
    path = download(name_or_path, patterns=[INFO_NAME], **hub_kwargs) / INFO_NAME
    return RewardInfo.load(path) if path.exists() else RewardInfo()


def adapter_config(path: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(path.parent))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"`{path}` is no configuration that this version of PEFT can read ({error!r}). Download or write it again, "
            "or update PEFT: `pip install -U peft`."
        ) from error


def _is_in_4_bit(name_or_path: Any) -> bool:
    """Returns whether a model is one of the 4-bit copies that Unsloth loads in place of the model that was named."""
    return short_name(name_or_path).lower().endswith("-bnb-4bit")


def _is_old_buffer(folder: Path, key: str, model: PreTrainedModel) -> bool:
    """
    Returns whether a tensor that a model lacks is not a weight, but a mask or a table that old versions of transformers
    saved and new ones compute.
    """
    buffers = {name for name, _ in model.named_buffers()}
    if key.endswith(".inv_freq") or key in buffers or f"{model.base_model_prefix}.{key}" in buffers:
        return True
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if key in file.keys():  # noqa: SIM118
                shape, dtype = file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()
                is_mask = dtype in ("BOOL", "U8") or (len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3])
                return is_mask or (shape == [] and key.endswith("masked_bias"))
    return False


def _refuse_pickled_shards(folder: Path, name: str) -> None:
    for index in folder.glob("*.safetensors.index*.json"):
        try:
            shards = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            is_safe = all(shard.endswith(".safetensors") for shard in shards)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`{index}` must be an index of shards, an object with the file of each tensor in `weight_map` "
                f"({error!r}). Download or save it again."
            ) from error
        if not is_safe:
            raise _pickled(name)


def _pickled(name: str) -> ValueError:
    return ValueError(
        f"`{name}` has no weights in safetensors. Pickled weights (`.bin`, `.pt`) are refused, because loading them "
        "can run code: convert them with `save_pretrained`. If the repository has safetensors, the download was not "
        "finished: load it again with a connection to the Hub."
    )


def _refuse_not_finite(tensors: Iterable[tuple[str, Tensor]], name: str) -> None:
    for key, x in tensors:
        if is_plain(x) and x.numel() and not torch.stack(x.aminmax()).isfinite().all():
            raise ValueError(
                f"`{name}` has NaN or infinite values in `{key}`. Its training has failed, or its file is damaged: "
                "train or download it again."
            )


def short_name(name_or_path: Any) -> str:
    """
    Returns the last part of a name: `SmolLM2-135M` for `HuggingFaceTB/SmolLM2-135M`, `/models/SmolLM2-135M` and a
    folder of the Hub's cache; empty if it is not a name.
    """
    path = PurePath(name_or_path.strip() if isinstance(name_or_path, str) else "")
    cached = [part for part in path.parts if part.startswith("models--")]
    return cached[-1].split("--")[-1] if cached else path.name
