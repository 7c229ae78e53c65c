"""The step of `generate` that is running: what the base is about to read, noted where it is prepared for it."""

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..hub.kv_cache import CACHE, n_read


class Run:
    """
    A text and what follows it: one `generate` call, or one loop by hand. What is remembered is remembered by runs.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`):
            The prompts, with what was drafted before the base read anything.
        cache ([`~transformers.Cache`], *optional*):
            The cache of the base.
        is_by_hand (`bool`, *optional*, defaults to `False`):
            Whether it is known by its tokens alone.

    Attributes:
        n_hidden (`int`):
            Number of tokens that the base has read and `generate` was not given: they are in its cache, or embedded.
        other_inputs (list of `str`):
            What the base reads besides tokens, such as `pixel_values`.
        attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
            Of the prompts, and some of what follows.
    """

    def __init__(self, input_ids: Tensor, cache: Any = None, is_by_hand: bool = False):
        self._input_ids, self.prompt_length = input_ids, input_ids.shape[1]
        self._cache: Callable[[], Any] = (lambda: None) if cache is None else weakref.ref(cache)
        self.is_by_hand = is_by_hand
        self.has_begun = False  # drafts of the base itself are made before its first pass
        self.n_hidden = 0
        self.other_inputs: list[str] = []
        self.attention_mask = torch.ones_like(input_ids)

    @property
    def prompt(self) -> Tensor:
        """`(batch_size, prompt_length)`"""
        return self._input_ids[:, : self.prompt_length]

    def reads_chunk(self, input_ids: Tensor) -> Tensor:
        """Adds a part of a prompt that is read in parts; returns all of it so far."""
        self._input_ids = torch.cat([self._input_ids, input_ids], dim=1)
        self.prompt_length = self._input_ids.shape[1]
        return self._input_ids

    def uses(self, cache: Any) -> bool:
        return cache is not None and self._cache() is cache

    def goes_on_with(self, input_ids: Tensor) -> bool:
        """Whether texts `(batch_size, length)` begin with the prompts."""
        is_longer = len(input_ids) == len(self._input_ids) and input_ids.shape[1] >= self.prompt_length
        return is_longer and torch.equal(input_ids[:, : self.prompt_length], self.prompt)

    def mask_of(self, input_ids: Tensor) -> Tensor:
        """The mask of texts that begin with the prompts."""
        new = input_ids.new_ones(len(input_ids), input_ids.shape[1] - self.prompt_length)
        return torch.cat([self.attention_mask[:, : self.prompt_length], new], dim=1)


class Step:
    """
    One forward pass of the base, as `prepare_inputs_for_generation` was told of it.

    Attributes:
        run ([`Run`]):
            The `generate` call that it belongs to.
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            All that the base has read after it.
        attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
            Which of it is no padding.
        is_first (`bool`):
            Whether it is the first pass of the run, over the prompt.
        logits (`torch.Tensor` of shape `(batch_size, n, vocab_size)`, *optional*):
            What the base returned for the last n tokens, before any processor, if that is asked for.
    """

    # Of a prompt only the last logits are of use; drafts are shorter than this.
    KEPT_LOGITS = 64

    def __init__(self, run: Run, input_ids: Tensor, mask: Tensor | None, is_first: bool, read: Tensor):
        self.run, self.input_ids, self.is_first = run, input_ids, is_first
        # `generate` drops a mask of ones.
        self.attention_mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device).long()
        run.attention_mask = self.attention_mask
        self.read = read  # the very tensor that goes to `forward`
        self.logits: Tensor | None = None

    def mask_of(self, input_ids: Tensor) -> Tensor | None:
        """The mask `(batch_size, length)` of texts that this pass has read; `None` if they are others."""
        length = input_ids.shape[1]
        is_read = len(input_ids) == len(self.input_ids) and length <= self.input_ids.shape[1]
        if not is_read or self.attention_mask.shape != self.input_ids.shape:
            return None
        if input_ids is not self.input_ids and not torch.equal(input_ids, self.input_ids[:, :length]):
            return None
        return self.attention_mask[:, :length]

    def base_logits(self, length: int) -> Tensor | None:
        """Logits of the base `(batch_size, vocab_size)` after so many tokens, if they were kept."""
        ahead = self.input_ids.shape[1] - length
        if self.logits is None or not 0 <= ahead < self.logits.shape[1]:
            return None
        return self.logits[:, -1 - ahead]


class StandIn:
    """
    An instance attribute in place of a method, with a handle that takes it off.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Whose method.
        name (`str`):
            Which one.
        function (callable):
            What is called instead, with the method before its arguments.
    """

    def __init__(self, model: PreTrainedModel, name: str, function: Callable):
        self._model, self._name, self._function = model, name, function
        self._before = vars(model).get(name)
        self.__wrapped__ = getattr(model, name)  # `generate` looks at its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self.__wrapped__, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return getattr, (self._model, self._name)  # a copy of the model has the method of the copy

    def install(self) -> None:
        vars(self._model)[self._name] = self

    def remove(self) -> None:
        if vars(self._model).get(self._name) is self:
            del vars(self._model)[self._name]
            if self._before is not None:
                vars(self._model)[self._name] = self._before

    def retire(self) -> None:
        """Takes it off for good; if something was put on top of it, which calls it, it only passes on."""
        self.remove()
        self._function = lambda method, *args, **kwargs: method(*args, **kwargs)


class StepWatch:
    """
    Takes note of what `generate` is about to let a model read, for each thread by itself.

    `model.prepare_inputs_for_generation` is called before every forward pass of every decoding loop, with all tokens,
    their mask and the cache. The instance gets a thin wrapper around it, shared by all processors that guide the model,
    and loses it with the last of them.

    Attributes:
        listeners (list of callable):
            Called with each [`Step`] and the inputs of `forward`, before that pass.
    """

    # `generate` calls inside each other, which is how many can go on at once in a thread.
    KEPT_RUNS = 8

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.listeners: list[Callable[[Step, dict[str, Any]], None]] = []
        self._local = threading.local()
        self._users, self._lock = 0, threading.RLock()
        self._stand_ins = [
            _PrepareStandIn(model, self),
            StandIn(model, "generate_batch", _refuse_continuous_batching),
        ]
        self._keeps_logits = False

    @classmethod
    def on(cls, model: PreTrainedModel, user: object) -> "StepWatch":
        """The one of a model, for as long as any of its users lives."""
        current = vars(model).get("prepare_inputs_for_generation")
        watch = current.watch if isinstance(current, _PrepareStandIn) else cls(model)
        with watch._lock:
            watch._users += 1
            if watch._users == 1:
                for stand_in in watch._stand_ins:
                    stand_in.install()
        weakref.finalize(user, watch._release).atexit = False
        return watch

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for stand_in in self._stand_ins:
                    stand_in.retire()

    @property
    def step(self) -> Step | None:
        """The latest pass that was prepared in this thread."""
        return getattr(self._local, "step", None)

    def keep_logits(self) -> None:
        """From now on, each step has the logits of the base."""
        self._keeps_logits = True

    def _note_logits(self, step: Step) -> None:
        """Puts a hook on the model for one pass."""

        def hook(module: torch.nn.Module, args: tuple, *kwargs_and_output: Any) -> None:
            # A pass of another thread that found this hook before it was taken off calls it without `kwargs`.
            if len(kwargs_and_output) == 2 and _what_is_read(kwargs_and_output[0]) is step.read:
                handle.remove()
                # Assisted decoding writes what processors return into the logits of the base.
                step.logits = kwargs_and_output[1].logits[:, -Step.KEPT_LOGITS :].detach().clone()

        stale = vars(self._local).get("handle")
        if stale is not None:  # of a pass that was never run
            stale.remove()
        handle = self._local.handle = self.model.register_forward_hook(hook, with_kwargs=True)

    def note(self, input_ids: Tensor, inputs: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Of a pass for which `input_ids` and `kwargs` were prepared into `inputs`."""
        cache = kwargs.get(CACHE, kwargs.get("past_key_values"))  # decoding loops from the Hub may use the old name
        is_first, last = bool(kwargs.get("is_first_iteration")), self.step
        is_rest = is_first and cache is not None and kwargs.get("next_sequence_length") is None
        n_before = n_read(cache) if is_rest else 0  # tokens that come before `input_ids`, if those are not all
        mask = kwargs.get("attention_mask")
        if not is_first and mask is not None and mask.ndim == 2 and mask.shape[1] > input_ids.shape[1]:
            n_before = mask.shape[1] - input_ids.shape[1]  # of a prompt that older versions read in parts
        is_chunk = last is not None and last.run.uses(cache) and last.input_ids.shape[1] == n_before
        if n_before and is_chunk and last is not None:
            run = last.run
            input_ids = run.reads_chunk(input_ids)
        else:
            run = self._run_of(input_ids, cache, is_first)
            if is_first:
                embedded = kwargs.get("inputs_embeds")
                run.n_hidden = n_before if embedded is None else embedded.shape[1] - input_ids.shape[1]
                run.other_inputs = [name for name, value in kwargs.items() if _is_no_text(name, value)]
        step = self._local.step = Step(run, input_ids, kwargs.get("attention_mask"), is_first, _what_is_read(inputs))
        if self._keeps_logits:
            self._note_logits(step)
        for listener in self.listeners:
            listener(step, inputs)

    def _run_of(self, input_ids: Tensor, cache: Any, is_first: bool) -> Run:
        runs: list[Run] = vars(self._local).setdefault("runs", [])
        if is_first:
            has_drafted = runs and not runs[-1].has_begun and runs[-1].goes_on_with(input_ids)
            run = runs.pop() if has_drafted else Run(input_ids, cache)
            run.has_begun = True
        else:  # those inside of it are over
            its = next((x for x in reversed(runs) if x.uses(cache)), None)
            its = its or next((x for x in reversed(runs) if x.goes_on_with(input_ids)), None)
            run = its or Run(input_ids, cache)
            if its:
                del runs[runs.index(its) :]
        runs.append(run)
        del runs[: -self.KEPT_RUNS]
        return run


class _PrepareStandIn(StandIn):
    def __init__(self, model: PreTrainedModel, watch: StepWatch):
        super().__init__(model, "prepare_inputs_for_generation", self._prepare)
        self.watch = watch

    def _prepare(self, method: Callable, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = method(input_ids, *args, **kwargs)
        self.watch.note(input_ids, inputs, kwargs)
        return inputs


def _refuse_continuous_batching(method: Callable, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "Continuous batching (`generate_batch`, or `cache_implementation='paged'`) ignores logits processors, so that "
        "its text would be unguided, and a `GenARMLogitsProcessor` guides this model. Use another cache; "
        "for unguided text, delete the processor first, or call `type(model).generate_batch(model, ...)`."
    )


def _what_is_read(inputs: dict[str, Any]) -> Any:
    input_ids = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if input_ids is None else input_ids


def _is_no_text(name: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(part is not None for part in value.values())
    is_text = name in ("inputs_embeds", "attention_mask")
    return isinstance(value, Tensor) and value.is_floating_point() and not is_text
