"""Rewarded soups (Ramé et al., NeurIPS 2023, https://hf.co/papers/2306.04488): one adapter, the average of several."""

import shutil
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM


def save_soup(base_path: str, folders: list[str], weights: list[float], folder: Path) -> None:
    """Writes an adapter whose low-rank products are the weighted averages of those in `folders`."""
    # No numbers: PEFT would take the layers of that number for parts of the adapter, and not save them.
    names = [f"part{index}" for index in range(len(folders))]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path), folders[0], names[0])
    for name, path in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(path, name)
    # `cat` keeps the factors side by side, so that the product is the average, exactly.
    model.add_weighted_adapter(names, weights, "soup", combination_type="cat")
    model.save_pretrained(folder, selected_adapters=["soup"])
    shutil.copytree(folder / "soup", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "soup")
