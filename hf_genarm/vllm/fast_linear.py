"""The linear layers of a reward model as vLLM runs its own on a CPU, from packed weights."""

import functools

from torch import Tensor, nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm


def use_linear_layers_of_vllm(network: nn.Module) -> None:
    """Packs the weights of linear layers, and frees the others. The network can't be saved or moved any more."""
    for module in network.modules():
        if type(module) is nn.Linear:
            dispatch_cpu_unquantized_gemm(module, remove_weight=True)
            vars(module)["forward"] = functools.partial(_forward, module)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer.cpu_linear(x, layer.weight, layer.bias)  # type: ignore[operator]  # set by vLLM
