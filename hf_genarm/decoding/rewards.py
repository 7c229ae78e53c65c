"""Next-token rewards: the log-probabilities of reward models, for the tokens of the base."""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..hub.sharing import shares_weights
from .fusion.joint_pass import FusedLM, Fusion
from .late_checks import LateChecks
from .line import Line
from .lockstep import LockstepLM
from .prompts import OwnPrompt
from .step_watch import StepWatch
from .vocab import VocabMap

logger = logging.getLogger(__name__)


class NextTokenRewards:
    """
    Runs one or several reward models, each with its own cache.

    Args:
        models (list of [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward models.
        vocab_maps (list of [`VocabMap`] or `None`):
            How the vocabulary of each lines up with that of the base; `None` where the ids are the same.
        watch ([`StepWatch`], *optional*):
            The watch of the base. Reward models that share its weights are run in its passes where that is possible.
        checks ([`LateChecks`]):
            What raises errors about values.

    Attributes:
        models (list of [`LockstepLM`]):
            The reward models with their caches.
        incomplete (set of `int`):
            Which of them have no reward for some tokens of the base.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel | PeftModel],
        vocab_maps: Sequence[VocabMap | None],
        watch: StepWatch | None,
        checks: LateChecks,
    ):
        fusion = None if watch is None else Fusion.on(watch)
        self.models = [
            LockstepLM(x) if fusion is None or not shares_weights(x, fusion.base) else FusedLM(x, fusion)
            for x in models
        ]
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
            if not isinstance(model, FusedLM):
                engines.append(("separate", "it has weights of its own"))
                continue
            objection = model.why_not_fused()
            why = "it is the base itself, or plain LoRA on its weights" if objection is None else objection
            engines.append(("fused" if objection is None else "shared", why))
        return engines

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
        vocab_map = self._vocab_maps[index]
        logits = self._logits(index, input_ids, attention_mask, line, prompt).to(scores.device)
        if vocab_map is None and logits.shape[-1] != scores.shape[-1]:
            raise ValueError(
                f"{self._name(index)} scores {logits.shape[-1]} tokens, but the base model has {scores.shape[-1]}. "
                "Guidance multiplies probabilities token by token. If the two tokenizers have the same tokens, pass "
                "both (`tokenizer`, `reward_tokenizer`) to align them; else use a reward model trained with the "
                "tokenizer of the base model. An assistant model must have the tokenizer of the base model, too."
            )
        log_probs = logits.float().log_softmax(dim=-1)
        self._checks.add(log_probs.isnan().any(), partial(self._refuse_nan, index, logits.dtype))
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
        translate = None if vocab_map is None else partial(vocab_map.reward_ids, checks=self._checks)
        if isinstance(model, FusedLM):
            model.own_prompt = prompt
        if prompt is not None:
            input_ids, attention_mask = prompt.text(input_ids, attention_mask, translate)
            line = prompt.line(line)
        elif translate is not None:
            input_ids = translate(input_ids, attention_mask)
        return model(input_ids, attention_mask, n_logits, line, translate is not None)

    def _refuse_nan(self, index: int, dtype: torch.dtype) -> None:
        """Refuses a reward model that returned NaN."""
        raise ValueError(
            f"{self._name(index)} returned NaN. Its weights or its dtype ({dtype}) are at fault: load it with "
            "`dtype=torch.float32`, or check its training."
        )

    def _name(self, index: int) -> str:
        return f"Reward model {index} (`{self.models[index].model.config.name_or_path}`)"
