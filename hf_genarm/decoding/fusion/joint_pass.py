"""
The joint pass: when it is run, and the patch of the base that runs it.

Decoding is bound by reading weights, so that more rows in a batch cost little. A reward model that is an adapter on the
base reads the base's own weights: its rows can ride along in the base's forward pass. The batch is repeated once for
each reward model, and the low-rank products of its adapter are added to its rows only.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache
from transformers.utils import ModelOutput

from ...hub.kv_cache import CACHE
from ...hub.sharing import follow
from ..instance_patch import InstancePatch
from ..line import Line
from ..lockstep import LockstepLM, State
from ..own_prompt import OwnPrompt
from ..step import Step
from ..step_watch import StepWatch
from .joinable import is_plain, joint_rows, obstacle_in
from .joint_cache import detach, join, split
from .joint_network import JointNetwork, LowRankProduct, NotFusableError, products_of, refuse_unusual, slow_for_few_rows
from .static_cache import JointStaticCache

logger = logging.getLogger(__name__)

_SEPARATELY = "Base and reward model run separately, because %s."


class FusedLM(LockstepLM):
    """
    Runs a reward model that is an adapter on the base, and can be advanced in the base's forward passes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The adapter, on the weights of the base, or other modules around these alone.
        fusion ([`Fusion`]):
            The fusion of the base.

    Attributes:
        joint_passes (`int`):
            Number of forward passes of the base that it was advanced in.
        last_obstacle (`str`, *optional*):
            Why the last attempt at a joint pass failed.
        own_prompt ([`OwnPrompt`], *optional*):
            What it has read in place of the base's prompt.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, fusion: "Fusion"):
        super().__init__(model)
        self._fusion = fusion
        self.joint_passes = 0
        self.last_obstacle: str | None = None
        self.own_prompt: OwnPrompt | None = None

    def why_not_fused(self) -> str | None:
        """Returns why it takes separate passes in the present state; `None` if it doesn't."""
        return self.last_obstacle or self._fusion.why_not(self)

    def follow_base(self) -> None:
        """Moves what is not shared to the device of the base."""
        follow(self.model, self._fusion.base)

    def reset(self) -> None:
        super().reset()
        self._fusion.forget()

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        n_logits: int = 1,
        line: Line | None = None,
        is_translated: bool = False,
    ) -> Tensor:
        # In a joint pass it reads the ids of the base.
        line = None if is_translated else line
        logits = super().__call__(input_ids, attention_mask, n_logits, line)
        self._fusion.join_next_pass(self)
        return logits

    def line_of(self, step: Step) -> Line | None:
        """Returns what it reads where the base reads the text of a step; `None` if it can't join it."""
        if self.own_prompt is None:
            return step.line
        if not self.own_prompt.fits(step.input_ids) or step.input_ids.shape[1] > self._fixed_length:
            return None
        return self.own_prompt.line(step.line)

    def mask_of(self, step: Step) -> Tensor:
        """Returns the mask of what it reads where the base reads the text of a step."""
        if self.own_prompt is None:
            return step.attention_mask
        return self.own_prompt.text(step.input_ids, step.attention_mask)[1]


class _ThreadState(threading.local):
    """
    Holds what one thread knows of the coming passes of the base.

    Attributes:
        waiting (list of [`FusedLM`]):
            Reward models that can be advanced in the next pass.
        is_hastened (`bool`):
            Whether the next pass runs the joint modules even without reward models.
        products (`dict`):
            The low-rank products of each reward model, `None` if it can't be fused.
        networks (`dict`):
            The joint network for each tuple of reward models, `None` if there can't be one.
        static_caches (`weakref.WeakKeyDictionary`):
            For each static cache of the base, the one that it is a part of.
    """

    def __init__(self) -> None:
        self.waiting: list[FusedLM] = []
        self.is_hastened = False
        self.products: dict[FusedLM, list[tuple[str, LowRankProduct]] | None] = {}
        self.networks: dict[tuple[FusedLM, ...], JointNetwork | None] = {}
        self.static_caches = weakref.WeakKeyDictionary[Any, JointStaticCache]()


@dataclass
class _JointPass:
    """Holds a forward pass of the base that is about to be joined, and what its network was compiled to."""

    step: Step
    reward_models: list[FusedLM]
    network: JointNetwork
    compiled: Callable | None = None


class Fusion:
    """
    Advances reward models that are adapters on the base inside the forward passes of the base.

    It only runs ahead: after a joint pass, each [`FusedLM`] has read the tokens that the base has just read, and
    keeps the logits that follow them. When these are needed, they are there; for any other tokens, or if a pass of the
    base could not be joined, the reward model computes its logits itself. So only time depends on what is done here.

    The modules of the base are never changed. When `generate` has prepared a pass that can be joined, `base.forward` is
    replaced on the instance, and put back as the first thing when it is called. What replaces it runs other modules
    around the same weights, and acts only on exactly the inputs that were prepared, in that thread. Where `generate`
    compiles the base, these other modules are compiled in its place.

    Args:
        watch ([`StepWatch`]):
            The watch of the model to be steered.
    """

    def __init__(self, watch: StepWatch):
        self.base = watch.model
        self._local = _ThreadState()
        self._armed: dict[int, _JointPass] = {}  # by thread
        self._lock = threading.Lock()
        self._patch = InstancePatch(self.base, "forward", self._forward)
        watch.listeners.append(self._before_a_pass)

    @classmethod
    def on(cls, watch: StepWatch) -> "Fusion":
        """Returns the fusion of a base, which all processors that guide it share."""
        if watch.fusion is None:
            watch.fusion = cls(watch)
        return watch.fusion

    def why_not(self, reward_model: LockstepLM) -> str | None:
        """Returns why a reward model can't be fused with the base in their present state; `None` if it can."""
        try:
            refuse_unusual(self.base, "the base")
            products_of(reward_model, self.base)
        except NotFusableError as error:
            return str(error)
        return None

    def join_next_pass(self, reward_model: FusedLM) -> None:
        """Joins the next forward pass of the base in this thread, if that continues what was just read."""
        if reward_model not in self._local.waiting:
            self._local.waiting.append(reward_model)

    def hasten_next_pass(self) -> None:
        """Runs the next pass of the base in this thread as joint passes are run, where that is faster."""
        self._local.is_hastened = slow_for_few_rows(self.base.device)

    def _before_a_pass(self, step: Step, inputs: dict[str, Any]) -> None:
        """Decides whether the pass that was just prepared is joined."""
        self._disarm()
        waiting, is_hastened = self._local.waiting, self._local.is_hastened
        self._local.waiting, self._local.is_hastened = [], False
        fusable = [x for x in waiting if self._products(x) is not None] if not step.is_first else []
        is_hastened = is_hastened and not step.is_first and type(inputs.get(CACHE)) is DynamicCache
        if not fusable and not is_hastened:
            return
        obstacle = obstacle_in(inputs.get(CACHE), self.base.config)
        if obstacle is not None and any(x.last_obstacle != obstacle for x in fusable):
            logger.info(_SEPARATELY, obstacle)
        for reward_model in fusable if obstacle is not None else ():
            reward_model.last_obstacle = obstacle
        if obstacle is None and is_plain(step, inputs):
            network = self._network(fusable)
            if network is not None:
                with self._lock:
                    self._armed[threading.get_ident()] = _JointPass(step, fusable, network)
                    self._patch.install()

    def _disarm(self) -> "_JointPass | None":
        """Returns the pass of this thread that was to be joined, and restores `forward` when no thread has one."""
        with self._lock:
            armed = self._armed.pop(threading.get_ident(), None)
            if not self._armed:
                self._patch.remove()
        return armed

    def forget(self) -> None:
        """Forgets what the modules of the base and of reward models were like."""
        self._local.products, self._local.networks = {}, {}

    def release(self, cache: Any) -> None:
        """Leaves a cache of the base that outlives its `generate` call with its own rows only."""
        if isinstance(cache, DynamicCache | StaticCache):
            self._local.static_caches.pop(cache, None)
            detach(cache)

    def _products(self, reward_model: FusedLM) -> list[tuple[str, LowRankProduct]] | None:
        """Returns the low-rank products of a reward model; `None` if it can't be fused."""
        known = self._local.products
        if reward_model not in known:
            try:
                known[reward_model] = products_of(reward_model, self.base)
            except NotFusableError as error:
                logger.info(_SEPARATELY, error)
                known[reward_model] = None
        return known[reward_model]

    def _network(self, reward_models: list[FusedLM]) -> JointNetwork | None:
        """Returns the joint network of base and reward models; `None` if a hook on the base would not act in it."""
        networks, key = self._local.networks, tuple(reward_models)
        if key not in networks:
            try:
                refuse_unusual(self.base, "the base")
                networks[key] = JointNetwork(self.base, [self._products(x) or [] for x in reward_models])
            except NotFusableError as error:
                if reward_models:
                    logger.info(_SEPARATELY, error)
                networks[key] = None
        return networks[key]

    def compiled_call(self, compiled: Callable, config: CompileConfig | None) -> Callable:
        """
        Returns what `generate` calls in place of the compiled base: in a joint pass, the joint network is compiled.

        Args:
            compiled (callable):
                The compiled base.
            config ([`~transformers.CompileConfig`], *optional*):
                How it was compiled.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            armed = self._armed.get(threading.get_ident())
            if armed is None:
                return compiled(*args, **kwargs)
            armed.compiled = armed.network.compiled(config)
            return self.base(*args, **kwargs)  # which ends in `_forward`

        return call

    def _forward(self, method: Callable, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of `base.forward` for one pass."""
        armed = self._disarm()
        if armed is not None and not args and kwargs.get("input_ids") is armed.step.read:
            output = self._joint_pass(armed, kwargs)
            if output is not None:
                return output
        return method(*args, **kwargs)

    def _joint_pass(self, armed: _JointPass, inputs: dict[str, Any]) -> ModelOutput | None:
        """
        Returns what the base returns for these inputs, and advances the reward models. `None` if they have read
        something else: nothing has changed then, and the base has to run alone.
        """
        cache, n_new = inputs[CACHE], inputs["input_ids"].shape[1]
        lines = [x.line_of(armed.step) for x in armed.reward_models]
        known = [line for line in lines if line is not None]
        if len(known) < len(lines):
            return None
        # Taken, so that an interruption loses them, and can't leave them half changed.
        taken = [x.take(line, n_new) for x, line in zip(armed.reward_models, known, strict=True)]
        states = [x for x in taken if x is not None and len(x.cache.layers) == len(cache.layers)]
        output = None
        if len(states) == len(taken):
            output = self._run(armed, states, known, inputs)
        for reward_model, state in zip(armed.reward_models, taken, strict=True):
            if state is not None:
                reward_model.put_back(state)
        return output

    def _run(
        self,
        armed: _JointPass,
        states: Sequence[State],
        lines: Sequence[Line],
        inputs: dict[str, Any],
    ) -> ModelOutput | None:
        """Runs the joint network on the rows of the base and of the reward models, which have read these texts."""
        caches, (batch_size, n_new) = [inputs[CACHE], *(state.cache for state in states)], inputs["input_ids"].shape
        lengths = [armed.step.input_ids.shape[1] - n_new, *(state.length for state in states)]
        static, output = self._static_cache(caches, lengths), None
        joint: Any = join(caches, lengths) if static is None else static.join(caches, lengths)
        try:
            rows = self._rows(armed, inputs, joint, n_new + (max(lengths) if static is None else static.end))
            output = armed.network(inputs | rows | {CACHE: joint}, armed.compiled)
        finally:
            n_read = 0 if output is None else n_new
            if static is None:
                split(joint, caches, lengths, n_read)
            else:
                static.split(caches, lengths, n_read)
        if output is None:
            self._local.networks[tuple(armed.reward_models)] = None
            name = type(self.base).__name__
            reason = f"`{name}` mixes the rows of a batch, skips adapted layers, or returns more than logits"
            for reward_model in armed.reward_models:
                reward_model.last_obstacle = reason
            logger.info(_SEPARATELY, reason)
            return None
        # What was compiled may write its next output in the same memory.
        logits = output["logits"] if armed.compiled is None else output["logits"].clone()
        base_logits, *reward_logits = logits.split(batch_size)
        for reward_model, state, line, of_rows in zip(armed.reward_models, states, lines, reward_logits, strict=True):
            state.extend(line, line.length - line.padding.n_columns, of_rows)
            reward_model.joint_passes += 1
            reward_model.last_obstacle = None
        output["logits"], output[CACHE] = base_logits, caches[0]
        return output

    def _static_cache(self, caches: Sequence[Any], lengths: Sequence[int]) -> JointStaticCache | None:
        """Returns what joins the caches of base and reward models if that of the base is static."""
        base, known = caches[0], self._local.static_caches
        if type(base) is DynamicCache:
            return None
        if base not in known or not known[base].is_of(caches, lengths):
            known[base] = JointStaticCache(caches, lengths)
        return known[base]

    def _rows(self, armed: _JointPass, inputs: dict[str, Any], cache: Any, n_columns: int) -> dict[str, Any]:
        """Returns what all rows read, whose texts have so many columns in the joint cache."""
        new, n_texts = inputs["input_ids"], 1 + len(armed.reward_models)
        rows: dict[str, Any] = {"input_ids": new.repeat(n_texts, 1)}
        is_static = type(cache) is StaticCache
        if not is_static and all(x.own_prompt is None for x in armed.reward_models):
            known = {name: inputs.get(name) for name in ("attention_mask", "position_ids")}
            return rows | {name: value.repeat(n_texts, 1) for name, value in known.items() if value is not None}
        masks = [armed.step.attention_mask, *(x.mask_of(armed.step) for x in armed.reward_models)]
        place = (new if inputs.get("position_ids") is None else inputs["position_ids"]).device
        rows |= {name: x.to(place, non_blocking=True) for name, x in joint_rows(masks, n_columns).items()}
        if not armed.network.takes_positions:  # it counts by the mask
            del rows["position_ids"]
        elif not is_static:
            rows["position_ids"] = rows["position_ids"][:, -new.shape[1] :]
        return armed.network.prepared(rows, cache) if is_static else rows
