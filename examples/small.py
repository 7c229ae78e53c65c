"""What all examples share: a small size for `HF_GENARM_SMOKE=1`, and checked arguments for outputs."""

import argparse
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_genarm.demo import demo_model, is_smoke
from hf_genarm.files import make_output_dir

T = TypeVar("T")


def sized(usual: T, smoke: T) -> T:
    """Returns the usual value of an argument, or with `HF_GENARM_SMOKE=1` one that lets a script end in seconds."""
    return smoke if is_smoke() else usual


def fitting_adapter(name: str) -> str:
    """Returns the adapter itself; at the small size the folder of a random one, which fits the tiny model."""
    if not is_smoke():
        return name
    folder = Path(demo_model()).parent / Path(name).name
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(demo_model())
        torch.manual_seed(0)
        get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM")).save_pretrained(folder)
    return str(folder)


def output_folder(text: str) -> Path:
    """Reads an argument of `argparse` that is a folder, and makes the folder."""
    try:
        make_output_dir(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def output_file(text: str) -> Path:
    """Reads an argument of `argparse` that is a file to be written, and makes its folder."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"`{text}` is a folder. Name a file in it.")
    return output_folder(str(Path(text).parent)) / Path(text).name
