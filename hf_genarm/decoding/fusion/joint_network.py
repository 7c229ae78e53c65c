"""The network of the base, with the low-rank products of reward adapters added to separate rows."""

import functools
import inspect
import itertools
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners import lora
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ...hub.kv_cache import CACHE, network_of
from ...hub.sharing import is_plain
from ..instance_patch import InstancePatch
from ..lockstep import LockstepLM
from ..step_watch import StepWatch

# For up to so many rows, `W x` is faster than `x W` where `slow_for_few_rows` holds.
_FEW_ROWS = 32
# All layers in these modules of PEFT are LoRA on a linear layer with quantised weights.
_ON_QUANTISED = {f"peft.tuners.lora.{name}" for name in ("aqlm", "awq", "bnb", "eetq", "gptq", "hqq", "torchao")}
# What is replaced on the instance of a base, or bound to it
_OWN = {"forward", "_old_forward", "prepare_inputs_for_generation", "generate", "generate_batch"}
_OWN |= {"get_compiled_call", "_compiled_call"}


class LowRankProduct(NamedTuple):
    """Holds the low-rank product of one adapter in one layer."""

    a: Tensor
    b: Tensor
    scaling: float

    def at(self, layer: nn.Module, dtype: torch.dtype) -> "LowRankProduct":
        """
        Returns it on the device and in the dtype of the layer, or in the given one if its weights are quantised. PEFT
        loads adapters in float32, also those of a base in bfloat16, where each product would take five kernels in place
        of two.
        """
        weight = next(itertools.chain(layer.parameters(), layer.buffers()))
        dtype = weight.dtype if is_plain(weight) else dtype
        if self.a.dtype == self.b.dtype == dtype and self.a.device == self.b.device == weight.device:
            return self
        device = weight.device
        return LowRankProduct(self.a.to(device, dtype), (self.b * self.scaling).to(device, dtype), 1.0)

    def add(self, x: Tensor, output: Tensor, rows: slice) -> None:
        """Adds scaling * B A x to some rows, in place."""
        low_rank = nn.functional.linear(x[rows].to(self.a.dtype), self.a).flatten(0, -2)
        # With autocast, layers compute in another dtype than that of their weights.
        low_rank, b = low_rank.to(output.dtype), self.b.T.to(output.dtype)
        output[rows].view(-1, len(self.b)).addmm_(low_rank, b, alpha=self.scaling)


class StackedProducts:
    """
    Adds the low-rank products of several adapters in one layer in two kernels.

    Args:
        products (sequence of [`LowRankProduct`] or `None`):
            One for each reward model, `None` where it has none in this layer.
    """

    def __init__(self, products: Sequence[LowRankProduct | None]):
        known = [product for product in products if product is not None]
        rank, example = max(len(x.a) for x in known), known[0]
        self._a = example.a.new_zeros(len(products), example.a.shape[1], rank)
        self._b = example.b.new_zeros(len(products), rank, len(example.b))
        for index, product in enumerate(products):
            if product is not None:
                self._a[index, :, : len(product.a)] = product.a.T
                self._b[index, : len(product.a)] = product.b.T * product.scaling

    def add(self, x: Tensor, output: Tensor) -> None:
        """Adds them to the rows that follow those of the base, in place."""
        n_blocks = len(self._a)
        batch_size, x = len(x) // (1 + n_blocks), x.to(self._a.dtype).contiguous()
        own, of_output = (t[batch_size:].view(n_blocks, -1, t.shape[-1]) for t in (x, output))
        of_output.baddbmm_(torch.bmm(own, self._a).to(output.dtype), self._b.to(output.dtype))


def products_of(reward_model: LockstepLM, base: PreTrainedModel) -> list[tuple[str, LowRankProduct]]:
    """
    Returns the low-rank products that make a reward model of the base, with the names of their layers.

    Raises:
        NotFusableError: if it has more than the weights of the base and such products.
    """
    model = reward_model.model
    refuse_unusual(model, "a reward model")
    if not reward_model.has_cache:
        raise NotFusableError(f"`{type(base).__name__}` has no cache of keys and values alone")
    network = network_of(model)
    factors_of_all: set[Tensor] = set()
    products = []
    for path, layer in network.named_modules():
        if not _is_lora_on_linear(layer):
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
                products.append((path, LowRankProduct(*factors[name], layer.scaling[name])))
    # One test for all that PEFT can do, `layer_replication` too: nothing is in the model but these factors and what is
    # in the base, each weight where it is there.
    own = {
        _in_base(name): id(x) for name, x in network.named_parameters(remove_duplicate=False) if x not in factors_of_all
    }
    is_same = own == {name: id(x) for name, x in base.named_parameters(remove_duplicate=False)}
    # The rows of the reward model are computed with the buffers of the base, such as its rotary frequencies.
    own_buffers = {_in_base(name): x for name, x in network.named_buffers(remove_duplicate=False)}
    if not is_same or not _are_equal(own_buffers, dict(base.named_buffers(remove_duplicate=False))):
        raise NotFusableError(
            f"`{network.config.name_or_path}` and the base differ in more than plain LoRA on linear layers (DoRA, "
            "trained biases, `modules_to_save`, embeddings, replicated layers, or a base that was changed)"
        )
    return products


def _in_base(name: str) -> str:
    """Returns what a tensor is called in the base; some of PEFT's layers hold the one that they wrap by two names."""
    return name.replace(".base_layer.", ".").replace(".quant_linear_module.", ".")


def _is_lora_on_linear(layer: nn.Module) -> bool:
    """Returns whether a layer adds B A x to what a linear layer returns, whose weights may be quantised."""
    return type(layer) is lora.Linear or (isinstance(layer, lora.LoraLayer) and type(layer).__module__ in _ON_QUANTISED)


def _are_equal(own: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Returns whether two sets of buffers have the same names and values, in whatever dtype."""
    pairs = [(x, others.get(name)) for name, x in own.items()]
    same = (x is y or (y is not None and x.device == y.device and x.double().equal(y.double())) for x, y in pairs)
    return own.keys() == others.keys() and all(same)


class JointNetwork:
    """
    Runs other modules around the weights of the base, which add the low-rank products of reward models to their rows.

    The rows that follow those of the base belong to the reward models, in order. It stays valid as long as the modules
    of the base and of the reward models don't change.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The model to be steered, which [`refuse_unusual`] accepts.
        products (sequence of list of (`str`, [`LowRankProduct`])):
            Those of each reward model, from [`products_of`].
    """

    def __init__(self, base: PreTrainedModel, products: Sequence[Sequence[tuple[str, LowRankProduct]]]):
        # A tensor, since code is compiled again for other numbers, but not for tensors of another shape.
        self._input_ids, self._seen = torch.empty(0, 0), set[str]()
        by_path: dict[str, list[tuple[int, LowRankProduct]]] = {}
        for block, its_products in enumerate(products, start=1):
            for path, product in its_products:
                by_path.setdefault(path, []).append((block, product))
        self._network = _other_modules(base, {})
        self.takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters
        self._paths = by_path.keys()
        for module in self._network.modules() if slow_for_few_rows(base.device) else ():
            if type(module) is nn.Linear and type(module.weight) is nn.Parameter:  # not quantised
                vars(module)["forward"] = functools.partial(_linear, module)
        for path, of_layer in by_path.items():
            layer = self._network.get_submodule(path)
            placed = [(block, product.at(layer, base.dtype)) for block, product in of_layer]
            vars(layer)["forward"] = self._with_products(path, layer.forward, _adding(placed, len(products)))
        for module in self._network.modules():
            if "_hf_hook" in vars(module):
                vars(module)["forward"] = functools.partial(_moved, module._hf_hook, module, module.forward)

    def _with_products(
        self, path: str, forward: Callable[[Tensor], Tensor], add: Callable[[Tensor, Tensor], None]
    ) -> Callable[[Tensor], Tensor]:
        is_one_of_many = sum(part.isdigit() for part in path.split(".")) > 1  # in its layer, as an expert is

        def joint_forward(x: Tensor) -> Tensor:
            n_rows, n_new = self._input_ids.shape
            # The tokens of all rows in one dimension are in the order of the rows if each has only one; experts get
            # them in an order of their own.
            is_row_by_row = len(x) == n_rows and (x.ndim > 2 or (n_new == 1 and not is_one_of_many))
            if not is_row_by_row:
                raise _NotRowByRowError
            self._seen.add(path)
            output = forward(x)
            add(x, output)
            return output

        return joint_forward

    def prepared(self, rows: dict[str, Any], cache: Any) -> dict[str, Any]:
        """Returns rows as `generate` prepares them for a static cache, with masks over all of its columns."""
        prepared = self._network.prepare_inputs_for_generation(**rows, **{CACHE: cache}, use_cache=True)
        return {name: prepared.get(name) for name in rows}

    def compiled(self, config: CompileConfig | None) -> Callable:
        """Returns the network, compiled as `generate` compiles the base."""
        return self._network.get_compiled_call(config)

    def __call__(self, inputs: dict, compiled: Callable | None = None) -> ModelOutput | None:
        """
        Runs the network, or what it was compiled to; `None` if it treats its batch in a way that products can't be
        added to rows.
        """
        self._input_ids, self._seen = inputs["input_ids"], set()
        try:
            output = (self._network if compiled is None else compiled)(**inputs)
        except _NotRowByRowError:
            return None
        # A layer that was not called had its weights used in another way, without its products.
        if self._seen != self._paths or output.keys() - {"logits", CACHE}:
            return None
        return output


def _adding(products: Sequence[tuple[int, LowRankProduct]], n_reward_models: int) -> Callable[[Tensor, Tensor], None]:
    """Returns what adds the products of one layer, with the number of the reward model of each, counted from 1."""
    if len(products) > 1 and products[0][1].a.device.type != "cpu":  # where kernels are few, not where they are small
        of = dict(products)
        return StackedProducts([of.get(block) for block in range(1, n_reward_models + 1)]).add

    def add(x: Tensor, output: Tensor) -> None:
        batch_size = len(x) // (1 + n_reward_models)
        for block, product in products:
            product.add(x, output, slice(block * batch_size, (block + 1) * batch_size))

    return add


def slow_for_few_rows(device: torch.device) -> bool:
    """
    Returns whether torch computes `x W` slowly for a few rows in float32: MKL does, on processors of AMD.

    There, `W x` is 2 to 3 times as fast for 2 to 4 rows. On an Intel Xeon it takes twice as long as `x W`. Both are
    measured by `decode_cost --products`. It depends on the machine alone, so that the same seed gives the same text.
    """
    return device.type == "cpu" and _is_amd_with_mkl()


@functools.cache
def _is_amd_with_mkl() -> bool:
    cpu = Path("/proc/cpuinfo")
    vendor = cpu.read_text(encoding="utf-8") if cpu.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "AuthenticAMD" in vendor


class NotFusableError(Exception):
    """Gives the reason why base and reward models can't share a forward pass."""


class _NotRowByRowError(Exception):
    """Is raised if an adapted layer gets something other than the rows of the batch, such as tokens of one expert."""


def refuse_unusual(model: nn.Module, what: str) -> None:
    """
    Refuses a model whose layers do more than a forward pass of their class, row by row.

    Raises:
        NotFusableError: if there is a hook, a replaced `forward` or another such thing, which other modules around its
            weights would not run, or a layer where the rows of a batch depend on each other.
    """
    for module in model.modules():
        own = vars(module)
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        forward = own.get("forward")
        while isinstance(forward, InstancePatch):
            forward = forward.before
        is_own = forward is None or _only_moves(module, forward)
        if not is_own or module._compiled_call_impl is not None or not all(map(_is_harmless, hooks)):
            raise NotFusableError(f"hooks, offloading, compilation or a replaced `forward` act on {what}")
        if module.training:
            raise NotFusableError(f"{what} is in training mode")
        if _mixes_rows(module):
            raise NotFusableError(f"quantised layers of {what} round each row of a batch in view of the others")


def _mixes_rows(module: nn.Module) -> bool:
    """Returns whether a layer rounds its inputs with outliers or with a scale that it takes from all rows."""
    has_outliers = getattr(vars(module).get("state"), "threshold", 0.0) > 0  # of bitsandbytes, in 8 bits
    rounding = getattr(module._parameters.get("weight"), "act_quant_kwargs", None)  # of torchao
    return has_outliers or type(getattr(rounding, "granularity", None)).__name__ == "PerTensor"


def _only_moves(module: nn.Module, forward: Any) -> bool:
    """Returns whether `forward` is that of the class and what moves its inputs, as accelerate spreads layers."""
    hook: Any = vars(module).get("_hf_hook")
    method = vars(module).get("_old_forward")
    is_own = getattr(method, "__func__", None) is type(module).forward
    is_hook = isinstance(forward, functools.partial) and forward.func.__module__ == AlignDevicesHook.__module__
    return is_hook and is_own and type(hook) is AlignDevicesHook and not hook.offload


def _moved(hook: AlignDevicesHook, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """Runs a layer where accelerate has put it."""
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.post_forward(module, forward(*args, **kwargs))


def _is_harmless(hook: Callable) -> bool:
    """Returns whether a hook is what `output_hidden_states` leaves behind, or ours that keeps logits."""
    return hook.__module__ in ("transformers.utils.output_capturing", StepWatch.__module__)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Computes a linear layer, as `W x` for a few rows in float32 on a CPU."""
    n_rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or x.dtype != torch.float32 or n_rows > _FEW_ROWS:
        return nn.functional.linear(x, layer.weight, layer.bias)
    output = torch.mm(layer.weight, x.reshape(n_rows, -1).T).T.contiguous().view(*x.shape[:-1], -1)
    return output if layer.bias is None else output.add_(layer.bias)


def _other_modules(module: nn.Module, made: dict[nn.Module, nn.Module]) -> Any:
    """
    Returns a second tree of modules, which shares everything in the modules of the first.

    It is made again for each `generate` call, so that it is never stale. A deep copy around the same weights would take
    twenty times as long, and copy whatever is attached to the modules.
    """
    if module not in made:
        other = made[module] = object.__new__(type(module))
        vars(other).update(vars(module))
        for name in _OWN:  # what a base that is compiled, patched or spread has on its instance
            vars(other).pop(name, None)
        children = {name: child and _other_modules(child, made) for name, child in module._modules.items()}
        # Some networks grow their buffers as they read on; that must not reach the base.
        vars(other).update(_modules=children, _buffers=dict(module._buffers))
    return made[module]
