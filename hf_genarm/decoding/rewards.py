"""What reward models have to say about the next token, as log-probabilities of the tokens of the base."""

import logging
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..functional import fill_unscored
from ..hub.sharing import shares_weights
from .fusion.joint_pass import FusedLM, Fusion
from .lockstep import LockstepLM
from .step import StepWatch
from .vocab import VocabMap

logger = logging.getLogger(__name__)


class NextTokenRewards:
    """
    One or several reward models, each with its cache, and how each is run.

    Args:
        models (list of [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward models.
        vocab_maps (list of [`VocabMap`] or `None`):
            How the vocabulary of each lines up with that of the base; `None` where the ids are the same.
        watch ([`StepWatch`], *optional*):
            Of the base. Those that share its weights are run in its passes where that is possible.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel | PeftModel],
        vocab_maps: Sequence[VocabMap | None],
        watch: StepWatch | None,
    ):
        fusion = None if watch is None else Fusion.of(watch)
        self.models = [
            LockstepLM(x) if fusion is None or not shares_weights(x, fusion.base) else FusedLM(x, fusion)
            for x in models
        ]
        self._vocab_maps = vocab_maps

    def begin(self) -> None:
        """Forgets what has been read, since models may have changed, and moves with the base."""
        for model in self.models:
            model.reset()
            if isinstance(model, FusedLM):
                model.follow_base()

    @property
    def engines(self) -> list[tuple[str, str]]:
        """The engine of each reward model as things are now, and why."""
        engines = []
        for model in self.models:
            if not isinstance(model, FusedLM):
                engines.append(("separate", "it has weights of its own"))
                continue
            objection = model.why_not_fused()
            why = "it is plain LoRA on the weights of the base" if objection is None else objection
            engines.append(("fused" if objection is None else "shared", why))
        return engines

    def log_engines(self, names: Sequence[str]) -> None:
        """Says of each reward model that shares the weights of the base how it is run, and why."""
        for name, (engine, why) in zip(names, self.engines, strict=True):
            if engine != "separate":  # why those are is known where they are loaded
                logger.info("%s: engine `%s`, because %s.", name, engine, why)

    def of(self, index: int, input_ids: Tensor, attention_mask: Tensor, scores: Tensor) -> Tensor:
        """
        Args:
            index (`int`):
                Which reward model.
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
                The texts so far, in ids of the base.
            scores (`torch.FloatTensor` of shape `(batch_size, vocab_size)`):
                Of the base, for their shape and device.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`: NaN for tokens that the reward model can't score.

        Raises:
            ValueError: if the vocabularies differ, or the reward model returns NaN.
        """
        vocab_map = self._vocab_maps[index]
        if vocab_map is not None:
            input_ids = vocab_map.reward_ids(input_ids, attention_mask)
        logits = self.models[index](input_ids, attention_mask).to(scores.device)
        if vocab_map is None and logits.shape[-1] != scores.shape[-1]:
            raise ValueError(
                f"{self._name(index)} scores {logits.shape[-1]} tokens, but the base model has {scores.shape[-1]}. "
                "Guidance multiplies probabilities token by token. If the two tokenizers have the same tokens, pass "
                "both (`tokenizer`, `reward_tokenizer`) to align them; else use a reward model trained with the "
                "tokenizer of the base model. An assistant model must have the tokenizer of the base model, too."
            )
        log_probs = logits.float().log_softmax(dim=-1)
        if log_probs.isnan().any():
            raise ValueError(
                f"{self._name(index)} returned NaN. Its weights or its dtype ({logits.dtype}) are at fault: load it "
                "with `dtype=torch.float32`, or check its training."
            )
        return log_probs if vocab_map is None else vocab_map.base_log_probs(log_probs, scores.shape[-1])

    def read_ahead(self, index: int, text: Tensor, attention_mask: Tensor, n_logits: int) -> None:
        """
        Reads drafts in one pass, so that the rewards after each of them are known.

        Args:
            index (`int`):
                Which reward model.
            text, attention_mask (`torch.LongTensor` of shape `(1, length)`):
                With drafts, in ids of the base.
            n_logits (`int`):
                For how many lengths of it rewards will be wanted, up to the whole.
        """
        model, vocab_map = self.models[index], self._vocab_maps[index]
        if model.has_cache:
            model(text if vocab_map is None else vocab_map.reward_ids(text, attention_mask), attention_mask, n_logits)

    def filled(self, rewards: dict[int, Tensor], strengths: Sequence[float | Tensor], scores: Tensor) -> list[Tensor]:
        """The rewards by index, with what a reward model can't score as it is neutral at these strengths."""
        return [
            reward if self._vocab_maps[index] is None else fill_unscored(reward, alpha, scores)
            for (index, reward), alpha in zip(rewards.items(), strengths, strict=True)
        ]

    def _name(self, index: int) -> str:
        return f"Reward model {index} (`{self.models[index].model.config.name_or_path}`)"


def refuse_nan(guided: Tensor, scores: Tensor, strengths: Sequence[float | Tensor]) -> None:
    """
    Raises:
        ValueError: if a row of guided log-probabilities `(batch_size, vocab_size)` is no distribution.
    """
    broken = guided.isnan().any(dim=-1)
    if broken.any():
        row = int(broken.nonzero()[0])
        what = "guidance" if (scores[row] > -torch.inf).any() else "what runs before guidance"
        raise ValueError(
            f"In row {row}, {what} leaves no token to choose from (strengths {[str(x) for x in strengths]}). A token "
            "to which a reward model gives no probability is excluded by a positive strength, and can't have a "
            "negative one. Use positive strengths, and processors that leave tokens which the reward models know."
        )
