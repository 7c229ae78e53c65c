"""
Base and reward adapters in one forward pass.

Decoding is bound by reading weights, so that more rows in a batch cost little. A reward model that is an adapter on the
base reads the base's own weights: its rows can ride along in the base's forward pass. The batch is repeated once for
each reward model, and the low-rank products of its adapter are added to its rows only.
"""

import copy
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

from .lockstep import LockstepLM, State, position_ids
from .running import RunningGeneration

logger = logging.getLogger(__name__)

# What a decoding step gives to the base, beside what is `None` or `False`.
_STEP_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"}
_STEP_INPUTS |= {"logits_to_keep"}
# The variables in which decoding loops keep the tokens up to those that they give to the base; the first is the latest.
_TOKENS_SO_FAR = ("candidate_input_ids", "flat_running_sequences", "input_ids")

# `W x` is 2 to 3 times as fast as `x W` for 2 to 4 rows, and as fast for 32 (`decode_cost.py --products`: MKL, EPYC).
_FEW_ROWS = 32


class Fusion:
    """
    Advances reward models that are adapters on the base inside the forward passes of the base.

    It only runs ahead: after a joint pass, each [`LockstepLM`] has read the tokens that the base has just read, and
    keeps the logits that follow them. Asked about those tokens, it has the answer; asked about any others, or if a pass
    of the base could not be joined, it works the answer out itself. So only time depends on what is done here.

    The modules of the base are never changed. From the call of a logits processor to the next step of the same
    `generate`, `base.forward` is replaced on the instance; the replacement acts only when called by that `generate` in
    that thread. It runs other modules around the same weights.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The model to be steered.
    """

    def __init__(self, base: PreTrainedModel):
        self.base = base
        self.joint_passes = 0
        self._network = _JointNetwork(base)
        self._objection: str | None = None
        self._generation: Callable[[], object] = lambda: None
        self._watches: list = []

    def why_not(self, reward_model: LockstepLM) -> str | None:
        """Why a reward model can't be fused with the base as the two are now; `None` if it can."""
        return self._network.prepare([reward_model])

    def join_next_pass(self, reward_models: Sequence[LockstepLM], generation: RunningGeneration) -> None:
        """
        Joins the next forward pass of the base, if that is the next step of a `generate` call.

        Args:
            reward_models (sequence of [`LockstepLM`]):
                Those that have just been asked about the tokens so far.
            generation ([`RunningGeneration`]):
                The `generate` call that asked.
        """
        if generation.variables.get("self") is not self.base or not reward_models:
            return
        watches = [reward_model.watch for reward_model in reward_models]
        # The modules are looked at once for each `generate` call, and again when other weights act.
        if self._generation() is not generation.processors or watches != self._watches:
            self._generation, self._watches = weakref.ref(generation.processors), watches
            self._object(self._network.prepare(reward_models))
        if self._objection is None:
            _NextForward(self, reward_models, generation.processors).install()

    def _object(self, objection: str | None) -> None:
        self._objection = objection
        if objection is not None:
            logger.info("Base and reward models run apart, because %s.", objection)

    def forward(
        self, reward_models: Sequence[LockstepLM], inputs: dict, variables: Mapping[str, Any]
    ) -> ModelOutput | None:
        """
        Returns what the base returns for these inputs, and advances the reward models. `None` means that this is not
        a plain decoding step, that nothing has changed, and that the base has to do it alone.
        """
        step = _decoding_step(inputs, variables)
        if step is None:
            return None
        input_ids, attention_mask = step
        cache: DynamicCache = inputs["past_key_values"]
        # Taken, so that an interruption loses them, and can't leave them half changed.
        taken = [x.take(input_ids, attention_mask, int(cache.get_seq_length())) for x in reward_models]
        states = [x for x in taken if x is not None and len(x.cache.layers) == len(cache.layers)]
        output = None
        if len(states) == len(taken):
            output = self._joint_pass(states, input_ids, attention_mask, inputs)
        for reward_model, state in zip(reward_models, taken, strict=True):
            if state is not None:
                reward_model.put_back(state)
        return output

    def _joint_pass(
        self, states: Sequence[State], input_ids: Tensor, attention_mask: Tensor, inputs: dict
    ) -> ModelOutput | None:
        caches = [inputs["past_key_values"], *(state.cache for state in states)]
        rows = {name: inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
        rows = {name: value.repeat(len(caches), 1) for name, value in rows.items() if value is not None}
        n_read, n_new = int(caches[0].get_seq_length()), inputs["input_ids"].shape[1]
        joint, output = _join(caches), None
        try:
            output = self._network(inputs | rows | {"past_key_values": joint}, batch_size=len(input_ids))
        finally:
            _split(joint, caches, n_read, 0 if output is None else n_new)
        if output is None:
            self._object(f"`{type(self.base).__name__}` mixes the rows of a batch, or returns more than logits")
            return None
        base_logits, *reward_logits = output.logits.split(len(input_ids))
        for state, logits in zip(states, reward_logits, strict=True):
            state.extend(input_ids, attention_mask, logits)
        output.logits, output.past_key_values = base_logits, caches[0]
        self.joint_passes += 1
        return output


class _NextForward:
    """Stands in for `base.forward` until the `generate` call that it waits for calls it, or is over."""

    def __init__(self, fusion: Fusion, reward_models: Sequence[LockstepLM], processors: LogitsProcessorList):
        self._fusion = fusion
        self._reward_models = reward_models
        self._thread = threading.get_ident()
        self._processors = weakref.ref(processors, lambda _: self._uninstall())
        self.__wrapped__ = _forward_of(fusion.base)  # its signature is looked at

    def install(self) -> None:
        self._fusion.base.forward = self

    def _uninstall(self) -> None:
        if vars(self._fusion.base).get("forward") is self:
            del self._fusion.base.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == self._thread and not args:
            caller = RunningGeneration.of_forward()
            if caller.processors is self._processors():
                self._uninstall()
                output = self._fusion.forward(self._reward_models, kwargs, caller.variables)
                if output is not None:
                    return output
        return self.__wrapped__(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return _forward_of, (self._fusion.base,)  # a copy of the base, or a saved one, has its own forward pass


def _forward_of(model: PreTrainedModel) -> Callable:
    return MethodType(type(model).forward, model)


class _JointNetwork:
    """Other modules around the weights of the base, which add the low-rank products of reward models to their rows."""

    def __init__(self, base: PreTrainedModel):
        self._base = base
        self._batch_size = self._n_rows = self._n_products = 0

    def prepare(self, reward_models: Sequence[LockstepLM]) -> str | None:
        """Gives the rows that follow those of the base to the reward models, in order; returns why it can't."""
        for module in self._base.modules():
            forward = vars(module).get("forward")
            if module._forward_hooks or module._forward_pre_hooks or not isinstance(forward, _NextForward | None):
                return "hooks, offloading or a replaced `forward` act on the base"
            if module.training:
                return "the base is in training mode"
        products: dict[str, list[_Product]] = {}
        for block, reward_model in enumerate(reward_models, start=1):
            model = reward_model.model
            if model.training:
                return "a reward model is in training mode"
            if not reward_model.has_cache:
                return f"`{type(self._base).__name__}` has no cache of keys and values alone"
            network = model.get_base_model() if isinstance(model, PeftModel) else model
            known = set(self._base.parameters())
            for path, layer in network.named_modules():
                if type(layer) is lora.Linear:
                    factors = {name: (a.weight, layer.lora_B[name].weight) for name, a in layer.lora_A.items()}
                    known.update(*factors.values())
                    active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
                    for name in active:
                        if name in layer.lora_variant:
                            return f"`{type(layer.lora_variant[name]).__name__}` is not plain LoRA"
                        if name in factors:
                            products.setdefault(path, []).append(_Product(block, *factors[name], layer.scaling[name]))
            # One test for all that PEFT can do: nothing is in the model but what is in the base, and these factors.
            if set(model.parameters()) != known:
                return (
                    f"`{network.config.name_or_path}` and the base differ in more than plain LoRA on linear layers "
                    "(DoRA, trained biases, `modules_to_save`, embeddings, or a base that was changed)"
                )
        self._network = _other_modules(self._base, {})
        self._n_products = len(products)
        for module in self._network.modules():
            if type(module) is nn.Linear:
                vars(module)["forward"] = functools.partial(_linear, module)
        for path, its_products in products.items():
            layer = self._network.get_submodule(path)
            vars(layer)["forward"] = self._with_products(layer.forward, its_products)
        return None

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


def _decoding_step(inputs: dict[str, Any], variables: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """All tokens and their mask, if these are the inputs of a plain step that goes on from a growing cache."""
    new, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    cache: Any = inputs.get("past_key_values")
    extra = [name for name, value in inputs.items() if name not in _STEP_INPUTS and value is not None]
    if torch.is_grad_enabled() or not inputs.get("use_cache") or any(inputs[name] is not False for name in extra):
        return None
    if new is None or inputs.get("return_dict") is False or type(cache) is not DynamicCache or cache.offloading:
        return None
    n_new = new.shape[1]
    if not all(_can_be_joined(layer, n_new) for layer in cache.layers):
        return None
    shape = (len(new), int(cache.get_seq_length()) + n_new)
    tokens = [variables[name].to(new.device) for name in _TOKENS_SO_FAR if isinstance(variables.get(name), Tensor)]
    tokens = [x for x in tokens if x.shape == shape and torch.equal(x[:, -n_new:], new)]
    if not tokens or (mask is not None and mask.shape != shape):
        return None
    attention_mask = torch.ones_like(tokens[0]) if mask is None else mask.long()
    positions = inputs.get("position_ids")
    # Not those that a reward model would be given on its own, one row for each text.
    if positions is not None and not torch.equal(positions, position_ids(attention_mask)[:, -n_new:]):
        return None
    return tokens[0], attention_mask


def _can_be_joined(layer: Any, n_new: int) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.is_initialized and not layer.record_past and n_new < layer.sliding_window
    return type(layer) is DynamicLayer and layer.is_initialized


def _join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """
    One cache of the rows of all, the base's first. It takes their keys and values, so that those of a layer are freed
    as soon as it has grown; [`_split`] gives them back.
    """
    joint = copy.copy(caches[0])
    joint.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer: Any = copy.copy(layers[0])
        length = layer.keys.shape[-2]  # of a sliding window that the caches of reward models don't have
        layer.keys = _concatenate([x.keys[..., -length:, :] for x in layers])
        layer.values = _concatenate([x.values[..., -length:, :] for x in layers])
        joint.layers.append(layer)
        for x in layers if type(layer) is DynamicLayer else ():
            x.keys = x.values = None
    return joint


def _split(joint: DynamicCache, caches: Sequence[DynamicCache], n_read: int, n_new: int) -> None:
    """Gives each cache its rows of the joint one, with the new tokens, or without them if their number is 0."""
    for layer, *layers in zip(joint.layers, *(cache.layers for cache in caches), strict=True):
        if type(layer) is DynamicLayer:
            keys, values = layer.keys[..., : n_read + n_new, :], layer.values[..., : n_read + n_new, :]
            for own, its_keys, its_values in zip(
                layers, keys.chunk(len(caches)), values.chunk(len(caches)), strict=True
            ):
                own.keys, own.values = its_keys, its_values
        elif n_new:
            keys, values = layer.keys.chunk(len(caches)), layer.values.chunk(len(caches))
            vars(layers[0]).update(vars(layer) | {"keys": keys[0], "values": values[0]})
            for own, its_keys, its_values in zip(layers[1:], keys[1:], values[1:], strict=True):
                own.update(its_keys[..., -n_new:, :], its_values[..., -n_new:, :])


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Along the rows; without copying if they are still what an earlier joint cache was split into."""
    first = parts[0]
    step = first.numel() and first.stride(0) * len(first)
    for index, part in enumerate(parts):
        offset = first.storage_offset() + index * step
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.shape != first.shape or part.stride() != first.stride() or part.storage_offset() != offset:
            return torch.cat(list(parts))
    return first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())
