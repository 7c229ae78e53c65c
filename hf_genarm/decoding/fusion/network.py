"""The network of the base, with the low-rank products of reward adapters added to rows of their own."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..lockstep import LockstepLM

# `W x` is 2 to 3 times as fast as `x W` for 2 to 4 rows, and as fast for 32 (`decode_cost.py --products`: MKL, EPYC).
_FEW_ROWS = 32


class JointNetwork:
    """Other modules around the weights of the base, which add the low-rank products of reward models to their rows."""

    def __init__(self, base: PreTrainedModel):
        self._base = base
        self._batch_size = self._n_rows = self._n_products = 0

    def prepare(self, reward_models: Sequence[LockstepLM]) -> None:
        """
        Gives the rows that follow those of the base to the reward models, in order.

        Raises:
            NotFusableError: if a reward model has more than the weights of the base and low-rank products.
        """
        products: dict[str, list[_Product]] = {}
        for block, reward_model in enumerate(reward_models, start=1):
            if reward_model.model.training:
                raise NotFusableError("a reward model is in training mode")
            if not reward_model.has_cache:
                raise NotFusableError(f"`{type(self._base).__name__}` has no cache of keys and values alone")
            for path, product in self._products_of(reward_model.model, block):
                products.setdefault(path, []).append(product)
        self._network = _other_modules(self._base, {})
        self._n_products = len(products)
        for module in self._network.modules():
            if type(module) is nn.Linear:
                vars(module)["forward"] = functools.partial(_linear, module)
        for path, its_products in products.items():
            layer = self._network.get_submodule(path)
            vars(layer)["forward"] = self._with_products(layer.forward, its_products)

    def _products_of(self, model: PreTrainedModel | PeftModel, block: int) -> Iterator[tuple[str, "_Product"]]:
        network = model.get_base_model() if isinstance(model, PeftModel) else model
        known = set(self._base.parameters())
        for path, layer in network.named_modules():
            if type(layer) is not lora.Linear:
                continue
            factors = {name: (a.weight, layer.lora_B[name].weight) for name, a in layer.lora_A.items()}
            known.update(*factors.values())
            active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
            for name in active:
                if name in layer.lora_variant:
                    raise NotFusableError(f"`{type(layer.lora_variant[name]).__name__}` is not plain LoRA")
                if name in factors:
                    yield path, _Product(block, *factors[name], layer.scaling[name])
        # One test for all that PEFT can do: nothing is in the model but what is in the base, and these factors.
        if set(model.parameters()) != known:
            raise NotFusableError(
                f"`{network.config.name_or_path}` and the base differ in more than plain LoRA on linear layers (DoRA, "
                "trained biases, `modules_to_save`, embeddings, or a base that was changed)"
            )

    def _with_products(
        self, forward: Callable[[Tensor], Tensor], products: Sequence["_Product"]
    ) -> Callable[[Tensor], Tensor]:
        def joint_forward(x: Tensor) -> Tensor:
            if x.ndim != 3 or len(x) != self._n_rows:
                raise _NotRowByRowError
            self._seen += 1
            output = forward(x)
            for product in products:
                product.add(x, output, self._batch_size)
            return output

        return joint_forward

    def __call__(self, inputs: dict, batch_size: int) -> ModelOutput | None:
        """`None` if the network treats its batch in a way that products can't be added to rows."""
        self._batch_size, self._n_rows, self._seen = batch_size, len(inputs["input_ids"]), 0
        try:
            output = self._network(**inputs)
        except _NotRowByRowError:
            return None
        if self._seen != self._n_products or output.keys() - {"logits", "past_key_values"}:
            return None
        return output


class NotFusableError(Exception):
    """Says why base and reward models can't share a forward pass."""


class _NotRowByRowError(Exception):
    """An adapted layer was given something else than the rows of the batch, such as the tokens of one expert."""


class _Product(NamedTuple):
    """The low-rank product of one adapter in one layer."""

    block: int
    a: Tensor
    b: Tensor
    scaling: float

    def add(self, x: Tensor, output: Tensor, batch_size: int) -> None:
        """Adds scaling * B A x to the rows of its block, in place."""
        rows = slice(self.block * batch_size, (self.block + 1) * batch_size)
        low_rank = nn.functional.linear(x[rows].to(self.a.dtype), self.a)
        if self.b.dtype == output.dtype:
            output[rows].view(-1, len(self.b)).addmm_(low_rank.flatten(0, 1), self.b.T, alpha=self.scaling)
        else:
            output[rows] += nn.functional.linear(low_rank, self.b) * self.scaling


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """What the layer returns, by the faster way round on a CPU."""
    n_rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or x.dtype != torch.float32 or n_rows > _FEW_ROWS:
        return nn.functional.linear(x, layer.weight, layer.bias)
    output = torch.mm(layer.weight, x.reshape(n_rows, -1).T).T.contiguous().view(*x.shape[:-1], -1)
    return output if layer.bias is None else output.add_(layer.bias)


def _other_modules(module: nn.Module, made: dict[nn.Module, nn.Module]) -> Any:
    """The modules of a network a second time: another tree, and nothing else that is not shared."""
    if module not in made:
        other = made[module] = object.__new__(type(module))
        vars(other).update(vars(module))
        vars(other).pop("forward", None)
        children = {name: child and _other_modules(child, made) for name, child in module._modules.items()}
        # Some networks grow their buffers as they read on; that must not reach the base.
        vars(other).update(_modules=children, _buffers=dict(module._buffers))
    return made[module]
