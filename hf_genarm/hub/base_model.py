"""The model that is steered: which one it is, where it is put, and in which dtype. Every command loads it here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..demo import DEMO_MODEL_ID, demo_model
from .info import INFO_NAME, RewardInfo
from .loading import ADAPTER_CONFIG, adapter_config, download, recorded_revision, short_name

# Values of `device_map` that are not the name of a device
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Base:
    """
    Holds a base that is ready to be steered. As text it is its name, its devices and its dtype.

    Parameters:
        name (`str`):
            Its Hub id or folder.
        model ([`~transformers.PreTrainedModel`]):
            The model, in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, which pads on the left.
    """

    name: str
    model: Any
    tokenizer: Any

    def __str__(self) -> str:
        return f"`{self.name}` {where_and_how(self.model)}"


def where_and_how(model: PreTrainedModel | PeftModel) -> str:
    """Returns the devices and the dtype of a model, as in "on cuda:0 in bfloat16"."""
    devices = dict.fromkeys(str(x.device) for x in model.parameters())
    return f"on {', '.join(devices)} in {str(model.dtype).removeprefix('torch.')}"


def load_base(
    base: str | None = None,
    reward_models: Sequence[str] = (),
    *,
    device: str | None = None,
    device_map: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    reward_model_revision: str | None = None,
) -> Base:
    """
    Loads the model to be steered and its tokenizer.

    Args:
        base (`str`, *optional*):
            Hub id or folder. Defaults to the base that the reward models name, at the revision that they were trained
            on; without reward models, to the model that the examples run on.
        reward_models (sequence of `str`):
            Hub ids or folders.
        device (`str`, *optional*):
            A device of PyTorch. Defaults to the one that `accelerate` chooses: that of this process.
        device_map (`str`, *optional*):
            As for `from_pretrained`, such as `"auto"` to spread the layers over several devices.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Of the weights; `"auto"` is that of the checkpoint.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the repository.
        reward_model_revision (`str`, *optional*):
            Revision of the reward models.

    Raises:
        ValueError: if the reward models name different bases or none, the device can't be used, or the base can't be
            loaded.
        OSError: if a reward model is not found.
    """
    if base is not None and not base.strip():
        raise ValueError(f"`base` is {base!r}, but must be a Hub id or a folder. Leave it out for its default.")
    if base is not None:
        refuse_file("base", base)
    if device is not None and device_map is not None:
        raise ValueError(
            f"`device` is {device!r} and `device_map` is {device_map!r}, but only one of them can place the base. "
            "Leave the other one out."
        )
    if device_map is not None and device_map not in _SPREADING:
        usable_device(device_map, "device_map")
    target = None if device_map is not None else usable_device(device)
    what, revision = f"`{base}`", None
    if base is None and reward_models:
        base, revision = named_base(reward_models, reward_model_revision)
        what = f"`{base}`, the base that `{reward_models[0]}` names,"
    name = base or DEMO_MODEL_ID
    path = demo_model() if name == DEMO_MODEL_ID else name
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    try:
        # First what is small, and fails early
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **options)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{what} can't be loaded. Name the Hub id or folder of a causal LM: `--base`. {error}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Quantised weights are put in their place while they are loaded.
    if target is not None and getattr(model.config, "quantization_config", None) is None:
        model.to(target)
    return Base(name, model.eval(), tokenizer)


def named_base(reward_models: Sequence[str], revision: str | None = None) -> tuple[str, str | None]:
    """
    Returns the base that reward models name, a Hub id or folder, and the revision that they were trained on, if known.

    Raises:
        ValueError: if they name different ones, or none.
        OSError: if a reward model is not found.
    """
    named = {reward_model: _named_by(reward_model, revision) for reward_model in reward_models}
    for reward_model, (base, _) in named.items():
        if base is None:
            raise ValueError(
                f"`{reward_model}` is not an adapter and its `{INFO_NAME}` names no `base_model`, so that it is not "
                "known which model to steer. Give its Hub id or folder: `--base`."
            )
    if len({short_name(base) for base, _ in named.values()}) > 1:
        listed = ", ".join(f"`{base}` by `{reward_model}`" for reward_model, (base, _) in named.items())
        raise ValueError(f"The reward models name different bases ({listed}), but one is steered. Choose it: `--base`.")
    base, base_revision = named[reward_models[0]]
    return str(base), base_revision


def _named_by(reward_model: str, revision: str | None) -> tuple[str | None, str | None]:
    try:
        folder = download(reward_model, patterns=[ADAPTER_CONFIG, INFO_NAME], revision=revision)
    except (OSError, ValueError) as error:  # the latter for what can't be a Hub id
        raise OSError(
            f"`{reward_model}` can't be loaded. Name the Hub id or folder of a reward model. {error}"
        ) from error
    info = RewardInfo.load(folder / INFO_NAME) if (folder / INFO_NAME).exists() else RewardInfo()
    if (folder / ADAPTER_CONFIG).exists():
        config = adapter_config(folder / ADAPTER_CONFIG)
        if short_name(config.base_model_name_or_path):
            return config.base_model_name_or_path, recorded_revision(config, info)
    return info.base_model, info.base_model_revision


def refuse_file(argument: str, name: str) -> None:
    """
    Refuses the name of a file as that of a model: transformers would read it as a configuration.

    Raises:
        ValueError: if it is one.
    """
    if Path(name).is_file():
        raise ValueError(f"`{argument}` is {name!r}, which is a file, but must be a Hub id or the folder of a model.")


def usable_device(device: str | None, name: str = "device") -> torch.device:
    """
    Returns the device of a name, or else the one that accelerate chooses.

    Raises:
        ValueError: if it can't be used.
    """
    if device is None:
        return PartialState().device
    try:
        empty = torch.empty(0, device=device)
        empty.cpu()  # which there is none of on `meta`
        return empty.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`{name}` is {device!r}, which can't be used here: {reason} Name another one, such as 'cpu' or 'cuda:0', "
            "or leave it out."
        ) from error
