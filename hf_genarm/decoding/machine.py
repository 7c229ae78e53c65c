"""The machine behind a processor: what its models have read, and the last guided distribution."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..functional import GuidedProduct
from ..hub.compatibility import PromptFormat
from .drafts import Draft
from .kl_control import KLControl
from .late_checks import LateChecks
from .likely_mistakes import LikelyMistakes
from .line import Line
from .own_prompt import OwnPrompt
from .prompts import OwnPrompts
from .reference import Reference
from .rewards import NextTokenRewards
from .statistics import Statistics
from .step import Run
from .step_watch import StepWatch
from .strings.byte_map import ByteMap
from .strings.starting_model import StartingModel
from .strings.string_rewards import OF_STRINGS
from .texts import Text, TextReader
from .vocab import VocabMap


class GuidanceMachine:
    """
    Runs the models of one processor in lockstep with the base. Everything that belongs to runs is kept here, so that a
    copy of a processor is its settings with a new machine.

    Args:
        models (sequence of [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward models.
        vocab_maps (sequence of [`VocabMap`], [`ByteMap`] or `None`):
            How the vocabulary of each lines up with that of the base; `None` where the ids are the same.
        starting_models (sequence of [`StartingModel`] or `None`):
            What rewards of strings are contrasted with; `None` for other rewards.
        base ([`~transformers.PreTrainedModel`], *optional*):
            The model to be steered.
        reference (`"base"`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The model that rewards are contrasted with.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of the base.
        prompt_format ([`PromptFormat`], *optional*):
            As for [`LikelyMistakes`].
        prompts ([`OwnPrompts`]):
            The prompts that models read in place of the base's.

    Attributes:
        watch ([`StepWatch`], *optional*):
            The watch of the base.
        checks ([`LateChecks`]):
            What raises errors about values that only a device knows.
        rewards ([`NextTokenRewards`]), reference ([`Reference`], *optional*), kl_control ([`KLControl`]), \
        statistics ([`Statistics`]):
            What a step of guidance consists of.
        product ([`~hf_genarm.functional.GuidedProduct`]):
            The guided distribution of the last call.
        draft ([`Draft`], *optional*):
            The last draft of an assistant.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel | PeftModel],
        vocab_maps: Sequence[VocabMap | ByteMap | None],
        starting_models: Sequence[StartingModel | None],
        base: PreTrainedModel | None,
        reference: Literal["base"] | PreTrainedModel | PeftModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt_format: PromptFormat | None,
        prompts: OwnPrompts,
    ):
        self.base, self.tokenizer, self._prompts = base, tokenizer, prompts
        self.watch = None if base is None else StepWatch.on(base, self)
        self.checks = LateChecks(self.watch)
        self.rewards = NextTokenRewards(models, vocab_maps, starting_models, self.watch, self.checks)
        are_strings = [self.rewards.has_strings(index) for index in range(len(models))]
        self.reference = None if reference is None or all(are_strings) else Reference(reference, self.watch)
        of_strings = [f"{name}_{index}" for index, is_one in enumerate(are_strings) if is_one for name in OF_STRINGS]
        self.kl_control, self.statistics = KLControl(), Statistics(len(models), tokenizer, of_strings)
        self.product = _unguided(torch.zeros(0, 1))
        self.draft: Draft | None = None
        self._reader = TextReader(self.watch)
        self._likely_mistakes = LikelyMistakes(base, prompt_format)

    def reset(self) -> None:
        """Forgets what the models have read."""
        self.checks.forget()
        self.rewards.begin()
        if self.reference is not None:
            self.reference.reset()

    def finish(self) -> None:
        """Ends a `generate` call: gives back the memory of keys and values, and raises errors that were found late."""
        self.rewards.release()
        if self.reference is not None:
            self.reference.release()
        self.checks.settle()

    @property
    def run(self) -> Run | None:
        """The run of the last call."""
        return self._reader.run

    def begin_with_drafts(self, input_ids: Tensor) -> None:
        """Begins a run whose first tokens are drafted before the base has read anything of it."""
        self._reader.begin_with_drafts(input_ids)
        self.product = _unguided(torch.zeros(0, 1))  # so that drafts don't depend on an earlier call
        self.reset()

    def scores_of_draft(self, input_ids: Tensor, scores: Tensor) -> Tensor | None:
        """Returns the scores for a call that needs no product, since it is about a draft; otherwise `None`."""
        return None if self.draft is None else self.draft.scores_without_product(input_ids, scores)

    def read(self, input_ids: Tensor, scores: Tensor) -> Text:
        """Finds out what is known about the texts of a call; when a run begins, models forget the last one."""
        self.checks.settle()
        text = self._reader(input_ids, scores)
        if self.watch is not None and not self.watch.call_when_over(self.finish):
            self._release_with_cache(text.run)
        if text.is_new:
            self.reset()
        self.product = _unguided(scores)
        return text

    def _release_with_cache(self, run: Run) -> None:
        """Gives back the memory of a custom loop once the cache of the base is deleted."""
        cache = run.cache
        if cache is not None and ("released", id(self)) not in run.agreed:
            run.agreed["released", id(self)] = None
            weakref.finalize(cache, _release_if_in, weakref.ref(self), weakref.ref(run)).atexit = False

    def check(self, text: Text) -> None:
        """Warns of likely mistakes, and refuses texts that the base has not read as they are."""
        self._likely_mistakes(text, self.rewards.models)

    def log_probs(
        self, text: Text, mask: Tensor, indices: Iterable[int], scores: Tensor
    ) -> tuple[list[Tensor], list[Tensor | None] | None]:
        """
        Returns the next-token log-probabilities of some reward models, and those of the reference of each, if there is
        a reference; `None` for rewards of strings, which are contrasted already.

        Args:
            text ([`Text`]):
                The texts so far.
            mask (`torch.LongTensor` of shape `(batch_size, length)`):
                Their mask.
            indices (iterable of `int`):
                Which reward models are needed.
            scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
                The scores of the base, for their shape and device.
        """
        indices = list(indices)
        prompts, of_reference = self._prompts.of(indices, text)
        own = dict(zip(indices, prompts, strict=True))
        if of_reference is not None and any(map(self.rewards.has_strings, indices)):
            raise ValueError(
                "`processor.reference_prompts` is set, but a reward model has other tokens than the base: what it is "
                "contrasted with reads the same prompt as it. Set `processor.reference_prompts` to `None`."
            )
        if self.draft is not None:
            self._read_draft(self.draft, text, mask, own, of_reference)
        rewards = [
            self.rewards.log_probs(index, text.input_ids, mask, text.line, scores, own[index]) for index in indices
        ]
        if self.reference is None or all(map(self.rewards.has_strings, indices)):
            return rewards, None
        reference = self.reference.log_probs(text, mask, scores, of_reference)
        return rewards, [None if self.rewards.has_strings(index) else reference for index in indices]

    def log_probs_to_draft(self, index: int, line: Line, scores: Tensor) -> Tensor:
        """Returns the next-token log-probabilities of a reward model, for drafts that the base has not read yet."""
        run = self._reader.run
        assert run is not None
        text = Text(line.input_ids, run, [line.length - run.root.prompt_length], line)
        mask = torch.ones_like(line.input_ids) if line.attention_mask is None else line.attention_mask
        (prompt,), _ = self._prompts.of([index], text)
        return self.rewards.log_probs(index, line.input_ids, mask, line, scores, prompt)

    def keep(self, product: GuidedProduct, input_ids: Tensor) -> Tensor:
        """
        Keeps the guided distribution of a call, and returns its log-probabilities. A row without any token to choose
        from is uniform until that is noticed, since drawing from NaN would be the end of everything on a GPU.
        """
        self.product, is_empty = product, product.is_empty
        self.checks.add(is_empty.any(), product.refuse_empty_rows)
        if self.draft is not None:
            self.draft.record(input_ids, product.log_probs)
        return product.log_probs.masked_fill(is_empty[:, None], 0.0) if self.checks.send() else product.log_probs

    def _read_draft(
        self,
        draft: Draft,
        text: Text,
        mask: Tensor,
        prompts: dict[int, OwnPrompt | None],
        of_reference: OwnPrompt | None,
    ) -> None:
        """Lets the models that have not written a draft read it in one pass, when its verification begins."""
        drafted = draft.text_to_read(text.input_ids)
        if drafted is None:
            return
        n_drafts = drafted.shape[1] - mask.shape[1]
        mask = torch.cat([mask, mask.new_ones(1, n_drafts)], dim=1)
        line = text.line if text.line is draft.line else Line(drafted, mask)
        for index in prompts.keys() - {draft.writer}:
            self.rewards.read_ahead(index, drafted, mask, line, n_drafts + 1, prompts[index])
        if self.reference is not None:
            self.reference.read_ahead(drafted, mask, line, n_drafts + 1, of_reference)


def _release_if_in(machine: "weakref.ref[GuidanceMachine]", run: "weakref.ref[Run]") -> None:
    """Ends a custom loop, unless the machine has gone on to another text."""
    own = machine()
    if own is not None and own.run is not None and own.run is run():
        own.finish()


def _unguided(scores: Tensor) -> GuidedProduct:
    return GuidedProduct(scores, scores, [], [], [])
