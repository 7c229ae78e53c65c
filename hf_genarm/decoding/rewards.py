"""Next-token rewards: the log-probabilities of reward models, for the tokens of the base."""

import logging
from collections.abc import Iterable, Sequence
from functools import partial

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..hub.limits import refuse_nan
from ..hub.sharing import shares_weights
from .fusion.joint_pass import FusedLM, Fusion
from .late_checks import LateChecks
from .line import Line
from .lockstep import LockstepLM
from .own_prompt import OwnPrompt
from .step_watch import StepWatch
from .strings.byte_map import ByteMap
from .strings.starting_model import StartingModel
from .strings.string_rewards import OF_STRINGS, StringRewards
from .vocab import VocabMap

logger = logging.getLogger(__name__)


class NextTokenRewards:
    """
    Runs one or several reward models, each with its own cache.

    Args:
        models (list of [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward models.
        vocab_maps (list of [`VocabMap`], [`ByteMap`] or `None`):
            How the vocabulary of each lines up with that of the base; `None` where the ids are the same.
        starting_models (list of [`StartingModel`] or `None`):
            What rewards of strings are contrasted with; `None` for other rewards.
        watch ([`StepWatch`], *optional*):
            The watch of the base. Reward models that share its weights are run in its passes where that is possible.
        checks ([`LateChecks`]):
            What raises errors about values.

    Attributes:
        models (list of [`LockstepLM`] or [`StringRewards`]):
            The reward models with their caches.
        incomplete (set of `int`):
            Which of them have no reward for some tokens of the base.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel | PeftModel],
        vocab_maps: Sequence[VocabMap | ByteMap | None],
        starting_models: Sequence[StartingModel | None],
        watch: StepWatch | None,
        checks: LateChecks,
    ):
        fusion = None if watch is None else Fusion.on(watch)
        self.models: list[LockstepLM | StringRewards] = []
        for model, vocab_map, start in zip(models, vocab_maps, starting_models, strict=True):
            if isinstance(vocab_map, ByteMap):
                assert start is not None
                self.models.append(StringRewards(model, start, vocab_map))
            else:
                is_apart = fusion is None or not shares_weights(model, fusion.base)
                self.models.append(LockstepLM(model) if fusion is None or is_apart else FusedLM(model, fusion))
        self._vocab_maps, self._checks = vocab_maps, checks
        self.incomplete = {index for index, vocab_map in enumerate(vocab_maps) if vocab_map is not None}

    def begin(self) -> None:
        """Forgets what has been read, since models may have changed, and follows the base to its device."""
        for model in self.models:
            model.reset()
            if isinstance(model, FusedLM):
                model.follow_base()

    def release(self) -> None:
        """Gives back the memory of all caches."""
        for model in self.models:
            model.release()

    @property
    def engines(self) -> list[tuple[str, str]]:
        """Returns the engine of each reward model in its present state, and the reason for it."""
        engines = []
        for model in self.models:
            if isinstance(model, StringRewards):
                engines.append(("strings", model.why))
                continue
            if not isinstance(model, FusedLM):
                engines.append(("separate", "it has weights of its own"))
                continue
            objection = model.why_not_fused()
            why = "it is the base itself, or plain LoRA on its weights" if objection is None else objection
            engines.append(("fused" if objection is None else "shared", why))
        return engines

    def has_strings(self, index: int) -> bool:
        """Returns whether the rewards of a reward model are those of strings, which are contrasted already."""
        return isinstance(self.models[index], StringRewards)

    def of_strings(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """Returns what statistics keep of rewards of strings, by names of columns, `(batch_size,)` each."""
        models = [(index, model) for index in indices if isinstance(model := self.models[index], StringRewards)]
        return {f"{name}_{index}": getattr(model, name) for index, model in models for name in OF_STRINGS}

    def log_engines(self, names: Sequence[str]) -> None:
        """Logs how each reward model that shares the weights of the base is run, and why."""
        for name, (engine, why) in zip(names, self.engines, strict=True):
            if engine != "separate":  # those are logged where they are loaded
                logger.info("%s: engine `%s`, because %s.", name, engine, why)

    def log_probs(
        self,
        index: int,
        input_ids: Tensor,
        attention_mask: Tensor,
        line: Line,
        scores: Tensor,
        prompt: OwnPrompt | None = None,
    ) -> Tensor:
        """
        Returns the next-token log-probabilities of a reward model.

        Args:
            index (`int`):
                Which reward model.
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
                The texts so far, in ids of the base.
            line ([`Line`]):
                What they are known by.
            scores (`torch.FloatTensor` of shape `(batch_size, vocab_size)`):
                The scores of the base, for their shape and device.
            prompt ([`OwnPrompt`], *optional*):
                What the reward model reads in place of the base's prompt.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`: NaN for tokens that the reward model can't score.

        Raises:
            ValueError: if the vocabularies differ, or the reward model returns NaN.
        """
        model, vocab_map = self.models[index], self._vocab_maps[index]
        if isinstance(model, StringRewards):
            assert prompt is not None
            return model.log_probs(line.ids(input_ids.shape[1]), scores, prompt)
        assert not isinstance(vocab_map, ByteMap)
        logits = self._logits(index, input_ids, attention_mask, line, prompt).to(scores.device)
        if vocab_map is None and logits.shape[-1] != scores.shape[-1]:
            raise ValueError(
                f"{self._name(index)} scores {logits.shape[-1]} tokens, but the base model has {scores.shape[-1]}. "
                "Guidance multiplies probabilities token by token. If the two tokenizers have the same tokens, pass "
                "both (`tokenizer`, `reward_tokenizer`) to align them; else use a reward model trained with the "
                "tokenizer of the base model. An assistant model must have the tokenizer of the base model, too."
            )
        log_probs = logits.float().log_softmax(dim=-1)
        dtype = logits.dtype
        self._checks.add(log_probs.isnan().any(), lambda: refuse_nan(self._name(index), dtype))
        return log_probs if vocab_map is None else vocab_map.base_log_probs(log_probs, scores.shape[-1])

    def read_ahead(
        self,
        index: int,
        text: Tensor,
        attention_mask: Tensor,
        line: Line,
        n_logits: int,
        prompt: OwnPrompt | None,
    ) -> None:
        """
        Reads drafts in one pass, after which the rewards that follow each of them are known.

        Args:
            index (`int`):
                Which reward model.
            text, attention_mask (`torch.LongTensor` of shape `(1, length)`):
                The text with its drafts, in ids of the base.
            line ([`Line`]):
                What it is known by.
            n_logits (`int`):
                How many of its last lengths will need rewards.
            prompt ([`OwnPrompt`], *optional*):
                What the reward model reads in place of the base's prompt.
        """
        if self.models[index].has_cache:
            self._logits(index, text, attention_mask, line, prompt, n_logits)

    def _logits(
        self,
        index: int,
        input_ids: Tensor,
        attention_mask: Tensor,
        line: Line,
        prompt: OwnPrompt | None,
        n_logits: int = 1,
    ) -> Tensor:
        """Returns the logits that follow the text of a reward model, given that of the base."""
        model, vocab_map = self.models[index], self._vocab_maps[index]
        assert not isinstance(model, StringRewards)
        assert not isinstance(vocab_map, ByteMap)
        translate = None if vocab_map is None else partial(vocab_map.reward_ids, checks=self._checks)
        if isinstance(model, FusedLM):
            model.own_prompt = prompt
        if prompt is not None:
            input_ids, attention_mask = prompt.text(input_ids, attention_mask, translate)
            line = prompt.line(line)
        elif translate is not None:
            input_ids = translate(input_ids, attention_mask)
        return model(input_ids, attention_mask, n_logits, line, translate is not None)

    def _name(self, index: int) -> str:
        return f"Reward model {index} (`{self.models[index].model.config.name_or_path}`)"
