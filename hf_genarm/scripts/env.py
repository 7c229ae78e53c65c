"""
Prints what a report of a problem should say: versions, the device, and how reward models would be run here, and why.

    hf-genarm env --arm model_cards/arm-smollm2-135m-sentiment

Nothing of it says where files are: of a folder it has the last name only.
"""

import importlib.metadata
import logging
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch

import hf_genarm

from .guidance import GuidanceArguments, load_guided

PACKAGES = ("transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "huggingface_hub")
OPTIONAL = ("vllm", "lm_eval", "gradio")


@dataclass
class EnvArguments:
    """What to load, to say how it would be run. Nothing by default."""

    arm: list[str] | None = field(
        default=None, metadata={"help": "Hub id or folder of a reward model. Repeatable.", "action": "extend"}
    )
    base: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model that is steered, with `--arm`."}
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
        for line in _engines(args.arm, args.base):
            print(f"- {line}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu, {torch.get_num_threads()} threads"


def _engines(arms: list[str], base: str | None) -> list[str]:
    """What is logged while reward models are loaded: the engine of each, and the reason for it."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("hf_genarm"), Keep(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        load_guided(GuidanceArguments(arm=arms, base=base), torch.device("cpu"))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    for name in arms:
        said = [line.replace(name, Path(name).name) for line in said]
    return said
