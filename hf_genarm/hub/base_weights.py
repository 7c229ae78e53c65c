"""Whether two models have the same weights: names and folders don't tell, a few numbers from each matrix do."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from .sharing import adapter_tensors, is_plain

_N_SAMPLES = 256  # at least one from each matrix
_STRIDE = 7919  # a prime, so that samples fall on all columns
_WRAPPED = {"base_layer", "original_module", "token_adapter"}  # how PEFT calls what it has wrapped


def weights_fingerprint(model: PreTrainedModel | PeftModel) -> str | None:
    """
    The same for models with the same matrices, on any device. An adapter on the model is not part of it, and neither
    are vectors, so that adapters may train its biases, nor rows at the end of a matrix, so that tokens may be added.

    A few numbers from each matrix are read, which takes no time, and rounded to bfloat16: a copy in float32 or bfloat16
    has the same ones, and training of all weights, or merging an adapter, changes many of them. Those of a copy in
    float16 may be off by one step.

    Returns:
        `str`, or `None` if it can't be told: the weights are quantised (of two quantised models, or of one and the
        model that it was made from, nothing is claimed), offloaded or sharded, or there are several adapters.
    """
    own: set[int] = set()
    if isinstance(model, PeftModel):
        if len(model.peft_config) > 1:
            return None
        own = {id(x) for x in adapter_tensors(model).values()}
        model = model.get_base_model()
    if getattr(model.config, "quantization_config", None) is not None:
        return None
    matrices = {_plain_name(name): x for name, x in model.named_parameters() if x.ndim > 1 and id(x) not in own}
    if not matrices or not all(is_plain(x) and x.numel() for x in matrices.values()):
        return None
    n_each = max(1, min(16, _N_SAMPLES // len(matrices)))
    steps = torch.arange(1, n_each + 1) * _STRIDE
    samples = [x.detach().take((steps % x.numel()).to(x.device)).cpu() for _, x in sorted(matrices.items())]
    rounded = torch.cat([x.to(torch.bfloat16) for x in samples])
    kind = "fp16" if any(x.dtype == torch.float16 for x in samples) else "bf16"
    return f"{kind}:{rounded.view(torch.int16).numpy().astype('<i2').tobytes().hex()}"


def same_weights(one: str | None, other: str | None) -> bool | None:
    """Whether two fingerprints are of the same weights; `None` if one of them is not known."""
    if one is None or other is None:
        return None
    (kind, values), (other_kind, other_values) = (x.split(":") for x in (one, other))
    if values == other_values or len(values) != len(other_values) or "fp16" not in (kind, other_kind):
        return values == other_values
    # bfloat16 has 8 significant bits, and the smallest step of float16 is 2**-24.
    return torch.allclose(_numbers(values), _numbers(other_values), rtol=2**-7, atol=2**-23)


def _numbers(values: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(values), dtype=torch.bfloat16).float()


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)
