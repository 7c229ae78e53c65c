"""The network of the base, with the low-rank products of reward adapters added to rows of their own."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...hub.kv_cache import CACHE, network_of
from ..lockstep import LockstepLM
from ..step import StandIn, StepWatch

# `W x` is 2 to 3 times as fast as `x W` for 2 to 4 rows, and as fast for 32 (`decode_cost.py --products`: MKL, EPYC).
_FEW_ROWS = 32


class Product(NamedTuple):
    """The low-rank product of one adapter in one layer."""

    a: Tensor
    b: Tensor
    scaling: float

    def add(self, x: Tensor, output: Tensor, rows: slice) -> None:
        """Adds scaling * B A x to some rows, in place."""
        low_rank = nn.functional.linear(x[rows].to(self.a.dtype), self.a)
        if self.b.dtype == output.dtype:
            output[rows].view(-1, len(self.b)).addmm_(low_rank.flatten(0, 1), self.b.T, alpha=self.scaling)
        else:
            output[rows] += nn.functional.linear(low_rank, self.b) * self.scaling


def products_of(reward_model: LockstepLM, base: PreTrainedModel) -> list[tuple[str, Product]]:
    """
    The low-rank products that make a reward model of the base, with the names of their layers.

    Raises:
        NotFusableError: if it has more than the weights of the base and such products.
    """
    model = reward_model.model
    check_heard(model, "a reward model")
    if not reward_model.has_cache:
        raise NotFusableError(f"`{type(base).__name__}` has no cache of keys and values alone")
    network = network_of(model)
    factors_of_all: set[Tensor] = set()
    products = []
    for path, layer in network.named_modules():
        if type(layer) is not lora.Linear:
            continue
        factors: dict[str, tuple[Any, Any]] = {
            name: (a.weight, layer.lora_B[name].weight) for name, a in layer.lora_A.items()
        }
        factors_of_all.update(*factors.values())
        active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
        for name in active:
            if name in layer.lora_variant:
                raise NotFusableError(f"`{type(layer.lora_variant[name]).__name__}` is not plain LoRA")
            if name in factors:
                products.append((path, Product(*factors[name], layer.scaling[name])))
    # One test for all that PEFT can do, `layer_replication` too: nothing is in the model but these factors and what is
    # in the base, each weight where it is there.
    own = {
        name.replace(".base_layer.", "."): id(x)
        for name, x in network.named_parameters(remove_duplicate=False)
        if x not in factors_of_all
    }
    if own != {name: id(x) for name, x in base.named_parameters(remove_duplicate=False)}:
        raise NotFusableError(
            f"`{network.config.name_or_path}` and the base differ in more than plain LoRA on linear layers (DoRA, "
            "trained biases, `modules_to_save`, embeddings, replicated layers, or a base that was changed)"
        )
    return products


class JointNetwork:
    """
    Other modules around the weights of the base, which add the low-rank products of reward models to their rows.

    The rows that follow those of the base belong to the reward models, in order. It is good as long as nobody changes
    the modules of the base or of a reward model.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The model to be steered; [`check_heard`] finds nothing wrong with it.
        products (sequence of list of (`str`, [`Product`])):
            Of each reward model, from [`products_of`].
    """

    def __init__(self, base: PreTrainedModel, products: Sequence[Sequence[tuple[str, Product]]]):
        self._batch_size = self._n_rows = self._seen = 0
        by_path: dict[str, list[tuple[int, Product]]] = {}
        for block, its_products in enumerate(products, start=1):
            for path, product in its_products:
                by_path.setdefault(path, []).append((block, product))
        self._network = _other_modules(base, {})
        self._n_layers = len(by_path)
        for module in self._network.modules():
            if type(module) is nn.Linear:
                vars(module)["forward"] = functools.partial(_linear, module)
        for path, of_layer in by_path.items():
            layer = self._network.get_submodule(path)
            vars(layer)["forward"] = self._with_products(layer.forward, of_layer)

    def _with_products(
        self, forward: Callable[[Tensor], Tensor], products: Sequence[tuple[int, Product]]
    ) -> Callable[[Tensor], Tensor]:
        def joint_forward(x: Tensor) -> Tensor:
            if x.ndim != 3 or len(x) != self._n_rows:
                raise _NotRowByRowError
            self._seen += 1
            output = forward(x)
            for block, product in products:
                product.add(x, output, slice(block * self._batch_size, (block + 1) * self._batch_size))
            return output

        return joint_forward

    def __call__(self, inputs: dict, batch_size: int) -> ModelOutput | None:
        """`None` if the network treats its batch in a way that products can't be added to rows."""
        self._batch_size, self._n_rows, self._seen = batch_size, len(inputs["input_ids"]), 0
        try:
            output = self._network(**inputs)
        except _NotRowByRowError:
            return None
        if self._seen != self._n_layers or output.keys() - {"logits", CACHE}:
            return None
        return output


class NotFusableError(Exception):
    """Says why base and reward models can't share a forward pass."""


class _NotRowByRowError(Exception):
    """An adapted layer was given something else than the rows of the batch, such as the tokens of one expert."""


def check_heard(model: nn.Module, what: str) -> None:
    """
    Raises:
        NotFusableError: if something acts on a model that other modules around its weights would not hear.
    """
    for module in model.modules():
        own = vars(module)
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        is_ours = isinstance(own.get("forward"), StandIn | None)
        if not is_ours or module._compiled_call_impl is not None or not all(map(_is_silent, hooks)):
            raise NotFusableError(f"hooks, offloading, compilation or a replaced `forward` act on {what}")
        if module.training:
            raise NotFusableError(f"{what} is in training mode")


def _is_silent(hook: Callable) -> bool:
    """Hooks that transformers leaves on modules that were once asked for hidden states, and ours that takes notes."""
    return hook.__module__ in ("transformers.utils.output_capturing", StepWatch.__module__)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """What the layer returns, by the faster way round on a CPU."""
    n_rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or x.dtype != torch.float32 or n_rows > _FEW_ROWS:
        return nn.functional.linear(x, layer.weight, layer.bias)
    output = torch.mm(layer.weight, x.reshape(n_rows, -1).T).T.contiguous().view(*x.shape[:-1], -1)
    return output if layer.bias is None else output.add_(layer.bias)


def _other_modules(module: nn.Module, made: dict[nn.Module, nn.Module]) -> Any:
    """
    The modules of a network a second time: another tree, and nothing else that is not shared. A deep copy
    around the same weights takes twenty times as long, and copies whatever hangs on the modules; this is made anew for
    each `generate` call, so that it is never stale.
    """
    if module not in made:
        other = made[module] = object.__new__(type(module))
        vars(other).update(vars(module))
        vars(other).pop("forward", None)  # a compiled or watched base has some on its instance
        vars(other).pop("prepare_inputs_for_generation", None)
        children = {name: child and _other_modules(child, made) for name, child in module._modules.items()}
        # Some networks grow their buffers as they read on; that must not reach the base.
        vars(other).update(_modules=children, _buffers=dict(module._buffers))
    return made[module]
