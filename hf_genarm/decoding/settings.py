"""What can be set on a processor at any time."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from ..hub.info import RewardInfo
from .kl_control import check_target_kl
from .padding import PromptMask
from .prompts import OwnPrompts
from .strength import Alpha, Strengths, alpha_of_beta, alpha_of_weights, check_alpha
from .strings.prompt_reader import PromptReader


class GuidanceSettings(LogitsProcessor):
    """
    Holds the settings of a [`GenARMLogitsProcessor`], which are read again at each step.

    Args:
        infos (list of [`RewardInfo`]):
            What is known about each reward model.
        readers (list of [`PromptReader`] or `None`):
            For each, what writes prompts of the base in its tokens, if these are other strings.
        alpha, target_kl, pad_token_id, attention_mask:
            As for [`GenARMLogitsProcessor`].
    """

    reference: Any

    def __init__(
        self,
        infos: Sequence[RewardInfo],
        readers: Sequence[PromptReader | None],
        alpha: Alpha,
        target_kl: float | None,
        pad_token_id: int | None,
        attention_mask: Tensor | None,
    ):
        self._infos = list(infos)
        self._prompt_mask = PromptMask(pad_token_id, attention_mask)
        self._own_prompts = OwnPrompts([info.sentence for info in infos], readers)
        self.alpha = alpha
        self.target_kl = target_kl

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy starts from; nothing in it is changed in place by the original."""
        own: dict[str, Any] = {"_prompt_mask": self._prompt_mask.copy(), "_own_prompts": self._own_prompts.copy()}
        if isinstance(self._alpha, list):
            own["_alpha"] = list(self._alpha)
        return vars(self) | own

    @property
    def alpha(self) -> list[float] | Tensor | Callable[[int], Strengths]:
        """The strength of each reward. Can be set at any time, also by another thread while `generate` runs."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: Alpha) -> None:
        self._alpha = check_alpha(alpha, len(self._infos))

    @property
    def target_kl(self) -> float | None:
        """The mean divergence per token, in nats, that each text is held at; `None` if strengths act as they are."""
        return self._target_kl

    @target_kl.setter
    def target_kl(self, target_kl: float | None) -> None:
        self._target_kl = None if target_kl is None else check_target_kl(target_kl)

    @property
    def attention_mask(self) -> Tensor | None:
        """The explicit mask of the prompts, if one was given."""
        return self._prompt_mask.attention_mask

    @attention_mask.setter
    def attention_mask(self, attention_mask: Tensor | None) -> None:
        self._prompt_mask.attention_mask = attention_mask

    @property
    def prompts(self) -> list[dict[str, Tensor] | None] | None:
        """
        What each reward model reads in place of the base's prompt, before the common answer: a list with a dict of
        `input_ids` and `attention_mask`, `(n_requests, length)`, for each of them, `None` where it reads that of the
        base; `None` if all do. One dict can be set for all. The ids are of the reward model's own tokenizer, padded on
        the left. They are for the coming `generate` calls, with one row for each of its prompts.
        """
        return self._own_prompts.rewards

    @prompts.setter
    def prompts(self, prompts: Any) -> None:
        self._own_prompts.rewards = prompts

    @property
    def reference_prompts(self) -> dict[str, Tensor] | None:
        """
        What the reference reads in place of the base's prompt, as for [`~GenARMLogitsProcessor.prompts`]. With
        `reference="base"` it is a negative prompt: away from it, `alpha` steers.
        """
        return self._own_prompts.reference

    @reference_prompts.setter
    def reference_prompts(self, prompts: Any) -> None:
        if prompts is not None and self.reference is None:
            raise ValueError(
                "`reference_prompts` is set, but the processor has no reference that could read them. Make it with "
                '`reference="base"` or a model.'
            )
        self._own_prompts.reference = prompts

    def set_beta(self, beta: float) -> None:
        """
        Sets `alpha` so that decoding realises a KL temperature, by the scales that the reward models were trained with.

        Args:
            beta (`float`):
                The KL temperature; with several reward models, of each. The smaller, the stronger the guidance.

        Raises:
            ValueError: if the `beta` that a reward model was trained with is not known.
        """
        self.alpha = alpha_of_beta(beta, [info.beta for info in self._infos])

    def set_weights(self, weights: Sequence[float] | Tensor, alpha: float = 1.0) -> None:
        """
        Sets `alpha` so that objectives are traded off on one scale, that of their rewards on held-out pairs.

        Args:
            weights (list of `float`, or `torch.Tensor` of shape `(n_requests, n_rewards)`):
                One for each objective, summing to 1.
            alpha (`float`, *optional*, defaults to 1.0):
                The strength that they share.

        Raises:
            ValueError: if the weights do not sum to 1, or the scale of a reward model is not known.
        """
        self.alpha = alpha_of_weights(weights, alpha, [info.reward_scale for info in self._infos])
