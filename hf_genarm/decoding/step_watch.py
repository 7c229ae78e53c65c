"""Watches what `generate` lets the base read, and which of its calls are running."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from ..hub.kv_cache import CACHE, n_read
from .instance_patch import InstancePatch
from .line import Line, is_beginning
from .lockstep import position_ids
from .step import Run, Step

if TYPE_CHECKING:
    from .fusion.joint_pass import Fusion


class _ThreadState(threading.local):
    """
    Holds what one thread does with the base.

    Attributes:
        step ([`Step`], *optional*):
            The latest pass that was prepared.
        runs (list of [`Run`]):
            The latest runs. Those that began inside of another one come after it.
        n_prompts (list of `int`, *optional*):
            The number of prompts of each `generate` call that is running, the outermost first.
        when_over (list of callable):
            Called when the outermost of these returns.
        handle ([`~torch.utils.hooks.RemovableHandle`], *optional*):
            The handle of the hook that waits for the logits of the next pass.
        draft ([`Line`], *optional*):
            The latest text with drafts, which the base may read next.
    """

    def __init__(self) -> None:
        self.step: Step | None = None
        self.runs: list[Run] = []
        self.n_prompts: list[int | None] = []
        self.when_over: list[Callable[[], None]] = []
        self.handle: torch.utils.hooks.RemovableHandle | None = None
        self.draft: Line | None = None


class StepWatch:
    """
    Records what `generate` is about to let a model read, for each thread separately.

    `model.prepare_inputs_for_generation` is called before every forward pass of every decoding loop, with all tokens,
    their mask and the cache. The instance gets a thin patch around it and around `generate`, which all processors that
    guide the model share, and which is removed with the last of them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base.

    Attributes:
        listeners (list of callable):
            Called with each [`Step`] and the inputs of `forward`, before that pass.
        fusion ([`Fusion`], *optional*):
            What runs reward adapters inside the passes of the model, once there are some.
    """

    # `generate` calls can run inside each other. This many of the latest runs are kept for each thread.
    KEPT_RUNS = 8

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.listeners: list[Callable[[Step, dict[str, Any]], None]] = []
        self.fusion: Fusion | None = None
        self._local = _ThreadState()
        self._users, self._lock = 0, threading.RLock()
        self._patches = [
            _PreparePatch(model, self),
            InstancePatch(model, "generate", self._generate),
            InstancePatch(model, "generate_batch", _refuse_continuous_batching),
            InstancePatch(model, "get_compiled_call", self._get_compiled_call),
        ]
        self._keeps_logits = False

    @classmethod
    def on(cls, model: PreTrainedModel, user: object) -> "StepWatch":
        """Returns the watch of a model, which stays for as long as any of its users lives."""
        current = vars(model).get("prepare_inputs_for_generation")
        watch = current.watch if isinstance(current, _PreparePatch) else cls(model)
        with watch._lock:
            watch._users += 1
            if watch._users == 1:
                for patch in watch._patches:
                    patch.install()
        weakref.finalize(user, watch._release).atexit = False
        return watch

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for patch in self._patches:
                    patch.retire()

    @property
    def step(self) -> Step | None:
        """The latest pass that was prepared in this thread."""
        return self._local.step

    def step_of(self, input_ids: Tensor) -> Step | None:
        """
        Returns the pass that has just read these texts. That is not the latest one of the thread if another processor
        has run `generate` in between.
        """
        latest = self._local.step
        if latest is None or not latest.run.is_over:
            return latest
        steps = [run.step for run in reversed(self._local.runs) if run.step is not None and not run.is_over]
        return next((step for step in steps if step.mask_of(input_ids) is not None), next(iter(steps), latest))

    @property
    def is_generating(self) -> bool:
        """Whether a `generate` call of the model runs in this thread."""
        return bool(self._local.n_prompts)

    def expect(self, draft: Line) -> None:
        """Records a text with drafts, so that it is recognised when the base reads it."""
        self._local.draft = draft

    def keep_logits(self) -> None:
        """Makes each later step keep the logits of the base."""
        self._keeps_logits = True

    def _record_logits(self, step: Step) -> None:
        """Puts a hook on the model for one pass."""

        def hook(module: torch.nn.Module, args: tuple, *kwargs_and_output: Any) -> None:
            # A pass of another thread that found this hook before it was removed calls it without `kwargs`.
            if len(kwargs_and_output) == 2 and _what_is_read(kwargs_and_output[0]) is step.read:
                handle.remove()
                # Assisted decoding writes what processors return into the logits of the base.
                step.logits = kwargs_and_output[1].logits[:, -Step.KEPT_LOGITS :].detach().clone()

        if self._local.handle is not None:  # of a pass that never ran
            self._local.handle.remove()
        handle = self._local.handle = self.model.register_forward_hook(hook, with_kwargs=True)

    def _generate(self, method: Callable, *args: Any, **kwargs: Any) -> Any:
        """Runs `generate`, and records which runs are over when it returns."""
        local = self._local
        given = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
        prompts = next((x for x in given if isinstance(x, Tensor)), None)
        local.n_prompts.append(None if prompts is None else len(prompts))
        try:
            return method(*args, **kwargs)
        finally:
            for run in local.runs:
                run.is_over = run.is_over or run.depth >= len(local.n_prompts)
            local.n_prompts.pop()
            if not local.n_prompts:
                self._finish(local)

    def _get_compiled_call(self, method: Callable, compile_config: CompileConfig | None) -> Callable:
        """Returns what `generate` calls after the prompt if it compiles the model."""
        compiled = method(compile_config)
        return compiled if self.fusion is None else self.fusion.compiled_call(compiled, compile_config)

    def call_when_over(self, function: Callable[[], None]) -> bool:
        """
        Calls a function when the outermost `generate` call of this thread returns, and returns whether there is one.
        """
        if self.is_generating and function not in self._local.when_over:
            self._local.when_over.append(function)
        return self.is_generating

    def _finish(self, local: _ThreadState) -> None:
        """Gives back what was only needed while `generate` ran."""
        functions, local.when_over, local.draft = local.when_over, [], None
        for run in local.runs:
            if run.step is not None:
                run.step.logits = None
            if self.fusion is not None:
                self.fusion.release(run.cache)
        with contextlib.ExitStack() as stack:  # one that raises an error doesn't keep the others from being called
            for function in reversed(functions):
                stack.callback(function)

    def record(self, input_ids: Tensor, inputs: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Records a pass for which `input_ids` and `kwargs` were prepared into `inputs`."""
        cache = kwargs.get(CACHE, kwargs.get("past_key_values"))  # decoding loops from the Hub may use the old name
        is_first, last, read = bool(kwargs.get("is_first_iteration")), self.step, _what_is_read(inputs)
        is_rest = is_first and cache is not None and kwargs.get("next_sequence_length") is None
        n_before = n_read(cache) if is_rest else 0  # tokens that come before `input_ids`, if those are not all
        mask = kwargs.get("attention_mask")
        if not is_first and mask is not None and mask.ndim == 2 and mask.shape[1] > input_ids.shape[1]:
            n_before = mask.shape[1] - input_ids.shape[1]  # of a prompt that older versions read in parts
        is_chunk = last is not None and last.run.uses(cache) and last.input_ids.shape[1] == n_before
        if n_before and is_chunk and last is not None:
            run = last.run
            input_ids = run.extend_prompt(input_ids)
        else:
            run = self._run_of(input_ids, cache, is_first)
            if is_first:
                if n_read(cache) or kwargs.get("inputs_embeds") is not None:
                    run.n_hidden = max(n_read(cache) + read.shape[1] - input_ids.shape[1], 0)
                run.other_inputs = [name for name, value in kwargs.items() if _is_no_text(name, value)]
        line = self._line_of(run, input_ids, mask, cache)
        step = self._local.step = Step(run, input_ids, mask, is_first, read, line)
        if is_first:
            run.other_inputs += self._changed_inputs(step, inputs, kwargs.get("inputs_embeds"))
        if self._keeps_logits:
            self._record_logits(step)
        for listener in self.listeners:
            listener(step, inputs)

    def _line_of(self, run: Run, input_ids: Tensor, mask: Tensor | None, cache: Any) -> Line:
        """Returns the line of the texts of a pass: that of the last pass, if they are known to continue its texts."""
        mask = None if mask is None or mask.shape != input_ids.shape else mask
        last, draft = run.step, self._local.draft
        if draft is not None and draft.length == input_ids.shape[1] and is_beginning(input_ids, draft.input_ids):
            return draft
        is_continued = self.is_generating and last is not None and last.is_continued_by(input_ids, cache)
        if is_continued and last is not None and (mask is None) == (last.line.attention_mask is None):
            last.line.extend(input_ids, mask)
            return last.line
        line = Line(input_ids, mask, run.line)
        run.line = run.line or line
        return line

    def _changed_inputs(self, step: Step, inputs: dict[str, Any], embedded: Tensor | None) -> list[str]:
        """Returns the names of inputs that make the base read a prompt in another way than reward models do."""
        names, positions, mask = [], inputs.get("position_ids"), step.attention_mask
        if embedded is not None and embedded.shape[1] == step.input_ids.shape[1] > 0:
            usual: Tensor = self.model.get_input_embeddings()(step.input_ids.to(embedded.device))
            mask = mask.to(embedded.device)
            if not torch.allclose(usual[mask == 1], embedded.to(usual)[mask == 1]):
                names.append("inputs_embeds")
        if positions is not None and positions.ndim == 2 and positions.shape[1] <= mask.shape[1]:
            mask = mask.to(positions.device)  # ids on the CPU are moved to the device of the base, as positions are
            is_text, usual = mask[:, -positions.shape[1] :] == 1, position_ids(mask)[:, -positions.shape[1] :]
            if not (positions.expand_as(usual) == usual)[is_text].all():
                names.append("position_ids")
        return names

    def _run_of(self, input_ids: Tensor, cache: Any, is_first: bool) -> Run:
        """Returns the run of a pass, a new one if it is the first; runs that began inside of it are dropped."""
        runs, depth = self._local.runs, len(self._local.n_prompts)
        if is_first:
            has_drafted = runs and not runs[-1].has_begun and runs[-1].is_continued_by(input_ids)
            run = runs.pop() if has_drafted else Run(input_ids, cache)
            run.has_begun, run.drafts_itself, run.depth = True, bool(has_drafted), depth
        else:
            known = next((x for x in reversed(runs) if x.uses(cache)), None)
            own = (x for x in reversed(runs) if x.depth == depth or x.drafts_itself)
            known = known or next((x for x in own if x.is_continued_by(input_ids)), None)
            run = known or Run(input_ids, cache)
            run.depth = run.depth if known else depth
            if known:
                first = runs.index(known)
                runs[first:] = [x for x in runs[first + 1 :] if x.depth < depth]
        if run.outer is None:
            outer = (x for x in reversed(runs) if x.depth < depth and not x.is_over)
            shorter = (x for x in outer if x.prompt_length < input_ids.shape[1] and x.is_continued_by(input_ids))
            run.outer = next(shorter, None)
        run.is_over = False
        run.n_prompts = self._local.n_prompts[-1] if depth else None
        runs.append(run)
        del runs[: -self.KEPT_RUNS]
        return run


class _PreparePatch(InstancePatch):
    """Records each pass that `prepare_inputs_for_generation` prepares."""

    def __init__(self, model: PreTrainedModel, watch: StepWatch):
        super().__init__(model, "prepare_inputs_for_generation", self._prepare)
        self.watch = watch

    def _prepare(self, method: Callable, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = method(input_ids, *args, **kwargs)
        self.watch.record(input_ids, inputs, kwargs)
        return inputs


def _refuse_continuous_batching(method: Callable, *args: Any, **kwargs: Any) -> Any:
    """Refuses a decoding loop that would drop processors silently."""
    raise NotImplementedError(
        "Continuous batching (`generate_batch`, or `cache_implementation='paged'`) ignores logits processors, so that "
        "its text would be unguided, and a `GenARMLogitsProcessor` guides this model. Use another cache; "
        "for unguided text, delete the processor first, or call `type(model).generate_batch(model, ...)`."
    )


def _what_is_read(inputs: dict[str, Any]) -> Any:
    """Returns the tokens or the embeddings among the inputs of `forward`."""
    input_ids = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if input_ids is None else input_ids


def _is_no_text(name: str, value: Any) -> bool:
    """Returns whether an argument of `generate` is something that a reward model can't read."""
    if isinstance(value, Mapping):
        return any(part is not None for part in value.values())
    is_text = name in ("inputs_embeds", "attention_mask")
    return isinstance(value, Tensor) and value.is_floating_point() and not is_text
