"""Fingerprints of weights and settings: whether a model is the one that another was trained on, whatever its name."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .kv_cache import input_embeddings, n_embeddings, network_of
from .sharing import adapter_tensors, is_plain

FINGERPRINT = r"(bf16|fp16):(([0-9a-f]{4})+|2:\d+(:([0-9a-f]{8})*){3}:[\w.=,-]*)"

_SECTIONS = ("weights", "biases", "embeddings")
_N_SUMS = 512  # in each section
_N_SAMPLES = 16384  # of a tensor, or one from each row
_WRAPPED = {"base_layer", "original_module", "token_adapter"}  # how PEFT calls what it has wrapped
# Settings that change what the same weights compute, as most architectures call them
_SETTINGS = re.compile(r"rope|rotary|theta|eps|_act|activation|scal|multiplier|cap|heads|head_dim|window|layer_types")
_MORE_SETTINGS = re.compile(r"attention_bias|is_causal|is_decoder|bidirectional|alibi|qk_norm|experts_per_tok|top_?k")


def weights_fingerprint(model: PreTrainedModel | PeftModel) -> str | None:
    """
    Returns a text by which [`has_weights`] recognises the weights of a model, and the settings that change what they
    compute.

    Each tensor is read at places that are spread over all of its rows, experts and columns, rounded to bfloat16: a copy
    in float32 or bfloat16 has the same sums, and one in float16 nearly. A model of 8 billion weights takes less than a
    second. What an adapter trained is left out: its own tensors, and the biases of the base if it trained some of
    these. Of the embeddings only a multiple of 64 rows is read, so that a few tokens may be added.

    Returns:
        `str`, or `None` if it can't be computed: the weights are quantised, offloaded or sharded, or there are several
        adapters.
    """
    own = _of_adapter(model)
    network = network_of(model)
    n_rows = n_embeddings(network)
    n_rows -= n_rows % 64 if n_rows >= 64 else 0
    sums = None if own is None else _sums(network, own, n_rows)
    if sums is None:
        return None
    values = ["".join(_hex(x) for x in sums[name].sums) for name in _SECTIONS]
    settings = ",".join(f"{name}={x}" for name, x in _settings(network.config).items())
    return ":".join([_kind(network), "2", str(n_rows), *values, settings])


def has_weights(model: PreTrainedModel | PeftModel, fingerprint: str | None) -> bool | None:
    """Returns whether a model has the weights and settings of a fingerprint; `None` if that can't be found out."""
    network, own = network_of(model), _of_adapter(model)
    if fingerprint is None or own is None:
        return None
    kind, _, rest = fingerprint.partition(":")
    in_half = "fp16" in (kind, _kind(network))
    if not rest.startswith("2:"):
        return _has_matrices(network, own, rest, in_half)
    _, n_rows, *sections, settings = rest.split(":")
    sums = _sums(network, own, int(n_rows))
    if sums is None:
        return None
    ours, theirs = _settings(network.config), dict(x.split("=") for x in settings.split(",") if x)
    if any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys()):
        return False
    for name, text in zip(_SECTIONS, sections, strict=True):
        is_known = text and sums[name].sums and not (name == "embeddings" and int(n_rows) > n_embeddings(network))
        if is_known and not sums[name].agrees(np.frombuffer(bytes.fromhex(text), dtype=">f4"), in_half):
            return False
    return True


class _Section:
    """Holds sums over the tensors of one kind: of their samples and of the squares of these, and how many there are."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self._squares: list[float] = []
        self._numbers: list[int] = []
        self._n_tensors = 0

    def add(self, x: Tensor) -> None:
        samples = _samples(x)
        # The golden ratio spreads the factors evenly: samples can't be exchanged unseen.
        factors = (np.arange(len(samples)) * ((math.sqrt(5) - 1) / 2)) % 1
        if self._n_tensors < _N_SUMS:
            self.sums.append(0.0)
            self._squares.append(0.0)
            self._numbers.append(0)
        slot, self._n_tensors = self._n_tensors % _N_SUMS, self._n_tensors + 1
        self.sums[slot] += float(samples @ factors)
        self._squares[slot] += float(samples @ samples)
        self._numbers[slot] += len(samples)

    def agrees(self, others: np.ndarray, in_half: bool) -> bool:
        if len(others) != len(self.sums):
            return False
        norms, n = np.sqrt(self._squares), np.array(self._numbers)
        # Some values in float16 are a step of bfloat16 (2**-8) off; those near 0 have steps of 2**-24.
        tolerance = 2e-3 * norms + 2**-24 * np.sqrt(n) if in_half else 1e-6 * norms
        return bool((np.abs(np.array(self.sums) - others) <= tolerance + 1e-6 * np.abs(others)).all())


def _sums(network: PreTrainedModel, own: set[int], n_rows: int) -> dict[str, _Section] | None:
    """
    Returns the sums of each section, with `n_rows` rows of embeddings; a section is empty if an adapter trained a part
    of it. `None` if a tensor can't be read.
    """
    if getattr(network.config, "quantization_config", None) is not None:
        return None
    modules = (input_embeddings(network), network.get_output_embeddings())
    embeddings = {id(x) for module in modules if module is not None for x in module.parameters()}
    sections = {name: _Section() for name in _SECTIONS}
    trained = set()
    tensors = list(_tensors(network))
    if not any(x.ndim > 1 for _, x in tensors):
        return None
    for name, x in tensors:
        section = "embeddings" if id(x) in embeddings else "biases" if name.endswith("bias") else "weights"
        if id(x) in own:
            trained |= {section} if name.endswith("bias") else set()
        elif not is_plain(x) or not x.numel():
            return None
        else:
            sections[section].add(x[:n_rows] if section == "embeddings" else x)
    return sections | {name: _Section() for name in trained}


def _tensors(network: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields each parameter and saved buffer once, sorted by the names that they have without an adapter."""
    seen = set()
    for name, x in sorted((_plain_name(name), x) for name, x in network.state_dict(keep_vars=True).items()):
        if isinstance(x, Tensor) and id(x) not in seen and (isinstance(x, torch.nn.Parameter) or is_plain(x)):
            seen.add(id(x))
            yield name, x


def _samples(x: Tensor) -> np.ndarray:
    """Returns values from all rows and columns, rounded to bfloat16, `(n,)`, in float64."""
    flat = x.detach().reshape(-1)
    n_columns = x.shape[-1] if x.ndim > 1 else 1
    step = max(1, min(n_columns, len(flat) // _N_SAMPLES))
    while step > 1 and math.gcd(step, n_columns) > 1:  # else some columns would never be read
        step -= 1
    return flat[::step].to(torch.bfloat16).cpu().float().numpy().astype(np.float64)


def _settings(config: PreTrainedConfig) -> dict[str, str]:
    """Returns a few characters for each setting that changes what weights compute."""

    def leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for name, part in value.items():
                yield from leaves(f"{prefix}.{name}", part)
        else:
            yield prefix, float(value) if type(value) is int else value

    named = {name: x for name, x in config.get_text_config().to_dict().items() if not name.startswith("_")}
    kept = {name: x for name, x in named.items() if _SETTINGS.search(name) or _MORE_SETTINGS.search(name)}
    found = dict(leaf for name, x in sorted(kept.items()) for leaf in leaves(name, x))
    return {
        re.sub(r"[^\w.]", "-", name): hashlib.sha256(json.dumps(x, default=str).encode()).hexdigest()[:4]
        for name, x in found.items()
    }


def _of_adapter(model: PreTrainedModel | PeftModel) -> set[int] | None:
    """Returns the ids of the tensors that an adapter has or trained; `None` if there are several adapters."""
    if not isinstance(model, PeftModel):
        return set()
    return None if len(model.peft_config) > 1 else {id(x) for x in adapter_tensors(model).values()}


def _kind(network: PreTrainedModel) -> str:
    return "fp16" if any(x.dtype == torch.float16 for x in network.parameters()) else "bf16"


def _hex(value: float) -> str:
    return np.array(value, dtype=">f4").tobytes().hex()


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


# --- fingerprints of earlier versions: some numbers of each matrix ---

_STRIDE = 7919


def _has_matrices(network: PreTrainedModel, own: set[int], values: str, in_half: bool) -> bool | None:
    """Returns whether a model has the matrices of a fingerprint made by an earlier version of this package."""
    if getattr(network.config, "quantization_config", None) is not None:
        return None
    matrices = {_plain_name(name): x for name, x in network.named_parameters() if x.ndim > 1 and id(x) not in own}
    if not matrices or not all(is_plain(x) and x.numel() for x in matrices.values()):
        return None
    steps = torch.arange(1, max(1, min(16, 256 // len(matrices))) + 1) * _STRIDE
    samples = [x.detach().take((steps % x.numel()).to(x.device)).cpu() for _, x in sorted(matrices.items())]
    ours = torch.cat([x.to(torch.bfloat16) for x in samples])
    theirs = torch.frombuffer(bytearray.fromhex(values), dtype=torch.bfloat16)
    if not in_half or len(ours) != len(theirs):
        return torch.equal(ours, theirs)
    # bfloat16 has 8 significant bits, and the smallest step of float16 is 2**-24.
    return torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=2**-23)
