"""What reward models have to say about the next token, as log-probabilities of the tokens of the base."""

from collections.abc import Sequence

from torch import Tensor

from ..functional import fill_unscored
from .lockstep import LockstepLM
from .vocab import VocabMap


class NextTokenRewards:
    """
    Args:
        reward_models (list of [`LockstepLM`]):
            One or several.
        vocab_maps (list of [`VocabMap`] or `None`):
            How the vocabulary of each lines up with that of the base; `None` where the ids are the same.
    """

    def __init__(self, reward_models: Sequence[LockstepLM], vocab_maps: Sequence[VocabMap | None]):
        self._reward_models, self._vocab_maps = reward_models, vocab_maps

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
        logits = self._reward_models[index](input_ids, attention_mask).to(scores.device)
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

    def filled(self, rewards: dict[int, Tensor], strengths: Sequence[float | Tensor], scores: Tensor) -> list[Tensor]:
        """The rewards by index, with what a reward model can't score as it is neutral at these strengths."""
        return [
            reward if self._vocab_maps[index] is None else fill_unscored(reward, alpha, scores)
            for (index, reward), alpha in zip(rewards.items(), strengths, strict=True)
        ]

    def _name(self, index: int) -> str:
        return f"Reward model {index} (`{self._reward_models[index].model.config.name_or_path}`)"
