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
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import hf_genarm

from .arguments import EnvArguments
from .guided_model import load_guided
from .shared_arguments import BaseArguments, GuidanceArguments

PACKAGES = ("transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "huggingface_hub")
OPTIONAL = ("vllm", "lm_eval", "gradio")


def main(args: EnvArguments) -> dict[str, Any]:
    """Returns what is printed, by name; what is logged about the reward models is a list, `models`."""
    facts: dict[str, Any] = {
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
        facts["models"] = _engines(args)
        for line in facts["models"]:
            print(f"- {line}")
    return facts


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
        given = {x.name: getattr(args, x.name) for x in fields(BaseArguments)}
        base, _ = load_guided(GuidanceArguments(arm=args.arm or [], **given), announce=False)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines.insert(0, f"base: {base}")
    for name in (base.name, *(args.arm or [])):
        lines = [line.replace(name, Path(name).name) if Path(name).is_dir() else line for line in lines]
    return [re.sub(r"`(/[^`]*)`", lambda found: f"`{Path(found[1]).name}`", line) for line in lines]
