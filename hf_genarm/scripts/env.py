"""
Prints what belongs in a report of a problem: versions, the device, and how reward models are run here, and why.

    hf-genarm env --arm model_cards/arm-smollm2-135m-sentiment

It does not print where files are: of a folder only the last name is shown.
"""

import importlib.metadata
import logging
import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

import hf_genarm

from .guided_model import BaseArguments, GuidanceArguments, load_guided

PACKAGES = ("transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "huggingface_hub")
OPTIONAL = ("vllm", "lm_eval", "gradio")


@dataclass
class EnvArguments(BaseArguments):
    """Chooses models to load, to report how they are run; none by default."""

    arm: list[str] | None = field(
        default=None, metadata={"help": "Hub id or folder of a reward model. Repeatable.", "action": "extend"}
    )

    def __post_init__(self) -> None:
        if self.base is not None and self.arm is None:
            raise ValueError(f"`base` is {self.base}, but there is no reward model to run with it. Name one: `--arm`.")


ARGUMENTS = (EnvArguments,)


def main(args: EnvArguments) -> None:
    facts = {
        "hf_genarm": hf_genarm.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "torch": torch.__version__,
        "device": _device(),
    }
    facts |= {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    facts |= {
        name: value for name, value in sorted(os.environ.items()) if name in ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
    }
    for name, value in facts.items():
        print(f"- {name}: {value}")
    if args.arm is not None:
        for line in _engines(args):
            print(f"- {line}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    """Returns the name of the device that commands run on by default."""
    device = PartialState().device
    if device.type == "cuda":
        return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _engines(args: EnvArguments) -> list[str]:
    """Loads the models; returns the base, and what is logged: the engine of each reward model, with the reason."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("hf_genarm"), Keep(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        base, _ = load_guided(GuidanceArguments(**vars(args)), announce=False)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines.insert(0, f"base: {base}")
    for name in (base.name, *(args.arm or [])):
        lines = [line.replace(name, Path(name).name) if Path(name).is_dir() else line for line in lines]
    return [re.sub(r"`(/[^`]*)`", lambda found: f"`{Path(found[1]).name}`", line) for line in lines]
