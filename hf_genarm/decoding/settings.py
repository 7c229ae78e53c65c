"""What can be set on a processor at any time, and what it then says."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from ..hub.info import RewardInfo
from .guided_tokens import GuidedTokens
from .kl_control import KLControl
from .padding import PromptMask
from .statistics import Statistics
from .strength import Alpha, Strengths, alpha_of_beta, alpha_of_weights, check_alpha


class GuidanceSettings(LogitsProcessor):
    """The settings of a [`GenARMLogitsProcessor`], which are read anew at each step."""

    _infos: list[RewardInfo]
    _models: list[Any]
    _tokenizer: Any
    _prompt_mask: PromptMask

    @property
    def alpha(self) -> list[float] | Tensor | Callable[[int], Strengths]:
        """The strength of each reward. Can be set at any time, also by another thread while `generate` runs."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: Alpha) -> None:
        self._alpha = check_alpha(alpha, len(self._models))

    @property
    def target_kl(self) -> float | None:
        """The mean divergence per token, in nats, that each text is held at; `None` if strengths act as they are."""
        return None if self._kl_control is None else self._kl_control.target

    @target_kl.setter
    def target_kl(self, target_kl: float | None) -> None:
        self._kl_control = None if target_kl is None else KLControl(target_kl)

    @property
    def keeps_statistics(self) -> bool:
        """Whether it is kept what guidance does to each token, for [`~GenARMLogitsProcessor.statistics`]."""
        return self._statistics is not None

    @keeps_statistics.setter
    def keeps_statistics(self, keeps_statistics: bool) -> None:
        self._statistics = Statistics(len(self._models), self._tokenizer) if keeps_statistics else None

    def statistics(self, sequences: Tensor) -> GuidedTokens:
        """
        What guidance did to each generated token, as columns for a `pandas.DataFrame`: `sequence`, `position` and
        `token`; its `base_log_prob`, `guided_log_prob` and for each reward model `reward_log_prob_0`, … (less that of
        the reference, if there is one) and `alpha_0`, …, the strengths in force; and of the distribution that it was
        drawn from `kl`, the divergence from the base, `log_z`, the logarithm of the sum that normalises Eq. 7,
        `entropy`, `base_entropy`, and `top_token_changed`. All in nats, before temperature and top-k. It draws itself.

        Args:
            sequences (`torch.LongTensor` of shape `(n_sequences, length)`):
                What `generate` returned.

        Raises:
            ValueError: if nothing was kept: set `processor.keeps_statistics = True` first.
        """
        if self._statistics is None:
            raise ValueError("No statistics were kept. Set `processor.keeps_statistics = True` before `generate`.")
        return self._statistics.of(sequences)

    def set_beta(self, beta: float) -> None:
        """
        Sets `alpha` so that decoding realises a KL temperature, by the scales that the reward models were trained with.

        Args:
            beta (`float`):
                The KL temperature; with several reward models, of each. The smaller, the stronger the guidance.

        Raises:
            ValueError: if a reward model does not say with which `beta` it was trained.
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
            ValueError: if the weights do not sum to 1, or a reward model does not say its scale.
        """
        self.alpha = alpha_of_weights(weights, alpha, [info.reward_scale for info in self._infos])

    @property
    def attention_mask(self) -> Tensor | None:
        """The explicit mask of the prompts, if one was given."""
        return self._prompt_mask.attention_mask

    @attention_mask.setter
    def attention_mask(self, attention_mask: Tensor | None) -> None:
        self._prompt_mask.attention_mask = attention_mask
