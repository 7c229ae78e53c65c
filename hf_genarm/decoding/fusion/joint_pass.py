"""
Base and reward adapters in one forward pass.

Decoding is bound by reading weights, so that more rows in a batch cost little. A reward model that is an adapter on the
base reads the base's own weights: its rows can ride along in the base's forward pass. The batch is repeated once for
each reward model, and the low-rank products of its adapter are added to its rows only.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

from ..lockstep import LockstepLM, State, position_ids
from ..step import RunningGeneration
from .cache import join, split
from .network import JointNetwork, NotFusableError

logger = logging.getLogger(__name__)

# What a decoding step gives to the base, beside what is `None` or `False`.
_STEP_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict"}
_STEP_INPUTS |= {"logits_to_keep"}
# The variables in which decoding loops keep the tokens up to those that they give to the base; the first is the latest.
_TOKENS_SO_FAR = ("candidate_input_ids", "flat_running_sequences", "input_ids")


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

    Attributes:
        joint_passes (`int`):
            Number of forward passes that were joined so far.
    """

    def __init__(self, base: PreTrainedModel):
        self.base = base
        self.joint_passes = 0
        self._network = JointNetwork(base)
        self._objection: str | None = None
        self._generation: Callable[[], object] = lambda: None
        self._watches: list = []
        self._read: tuple[Tensor, Tensor, Tensor] | None = None

    def why_not(self, reward_model: LockstepLM) -> str | None:
        """Why a reward model can't be fused with the base as the two are now; `None` if it can."""
        try:
            self._prepare([reward_model])
        except NotFusableError as error:
            return str(error)
        return None

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
            self._objection = None
            try:
                self._prepare(reward_models)
            except NotFusableError as error:
                self._object(str(error))
        if self._objection is None:
            _NextForward(self, reward_models, generation.processors).install()

    def base_logits(self, input_ids: Tensor, attention_mask: Tensor, generation: RunningGeneration) -> Tensor | None:
        """
        What the base itself, before any processor, has after some tokens: logits `(batch_size, vocab_size)`, if the
        last joint pass of a `generate` call has read these tokens.
        """
        if self._read is None or self._generation() is not generation.processors:
            return None
        read_ids, read_mask, logits = self._read
        length, ahead = input_ids.shape[1], read_ids.shape[1] - input_ids.shape[1]
        if not 0 <= ahead < logits.shape[1] or not torch.equal(read_ids[:, :length], input_ids):
            return None
        return logits[:, -1 - ahead] if torch.equal(read_mask[:, :length], attention_mask) else None

    def _prepare(self, reward_models: Sequence[LockstepLM]) -> None:
        for module in self.base.modules():
            forward = vars(module).get("forward")
            if module._forward_hooks or module._forward_pre_hooks or not isinstance(forward, _NextForward | None):
                raise NotFusableError("hooks, offloading or a replaced `forward` act on the base")
            if module.training:
                raise NotFusableError("the base is in training mode")
        self._network.prepare(reward_models)

    def _object(self, objection: str) -> None:
        self._objection = objection
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
        joint, output = join(caches), None
        try:
            output = self._network(inputs | rows | {"past_key_values": joint}, batch_size=len(input_ids))
        finally:
            split(joint, caches, n_read, 0 if output is None else n_new)
        if output is None:
            self._object(f"`{type(self.base).__name__}` mixes the rows of a batch, or returns more than logits")
            return None
        base_logits, *reward_logits = output.logits.split(len(input_ids))
        for state, logits in zip(states, reward_logits, strict=True):
            state.extend(input_ids, attention_mask, logits)
        output.logits, output.past_key_values = base_logits, caches[0]
        self._read = input_ids, attention_mask, base_logits
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
