"""Guided models for the [Language Model Evaluation Harness](https://github.com/EleutherAI/lm-evaluation-harness)."""

from typing import Any, Literal

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from .decoding.processor import GenARMLogitsProcessor
from .decoding.recommended import recommended_alpha, recommended_reference
from .decoding.vocab import vocab_maps
from .functional import guided_product
from .hub.compatibility import tokenizers_to_align
from .hub.reward_model import AutoregressiveRewardModel
from .hub.sharing import shares_weights


@register_model("hf-genarm")
class GuidedHFLM(HFLM):
    r"""
    Guides the harness's own `hf` model: `generate_until` writes with guidance, and `loglikelihood` and
    `loglikelihood_rolling` score under the distribution that is written from,

    $$\log\pi(y_t) = \log\pi_\text{base}(y_t) + \sum_k \alpha_k \log\pi_{r,k}(y_t) - \log Z_t$$

    A subclass that changes what a forward pass returns and what `generate` is called with.

    Args:
        pretrained (`str`):
            Hub id or folder of the base.
        arm (`str` or list of `str`):
            Hub ids or folders of reward models.
        alpha (`float` or list of `float`, *optional*):
            Strength of all of them, or one for each. At 0, all numbers are those of `hf`. Defaults to what they
            recommend, or else 1.
        reference (`"auto"`, `"base"` or `None`, *optional*, defaults to `"auto"`):
            `"base"` steers by what reward models have learned, their log-probability minus that of the base; `"auto"`
            as they recommend, or else were trained.
        **kwargs:
            Whatever `hf` takes.

    Raises:
        ValueError: if the base is not decoder-only, or `alpha` or the vocabularies don't fit.
    """

    def __init__(
        self,
        pretrained: str,
        arm: str | list[str],
        alpha: float | list[float] | None = None,
        reference: Literal["auto", "base"] | None = "auto",
        **kwargs: Any,
    ):
        if reference not in (None, "auto", "base"):
            raise ValueError(f"`reference` is {reference!r}, but must be 'auto', 'base' or None.")
        super().__init__(pretrained, **kwargs)
        names = [arm] if isinstance(arm, str) else list(arm)
        trust = bool(kwargs.get("trust_remote_code"))
        arms = [AutoregressiveRewardModel.from_pretrained(x, self.model, trust_remote_code=trust) for x in names]
        for loaded in arms:
            if not shares_weights(loaded.model, self.model):
                loaded.model.to(self.device)
        aligned = tokenizers_to_align(arms, names, self.model, self.tokenizer)
        if reference == "auto":
            reference = recommended_reference(arms, names, self.model, aligned)
        if reference not in (None, "base"):
            raise ValueError(
                f"The rewards of `{names[0]}` are less those of the model that it was trained from, which is not the "
                "base, and is not scored here. Choose the reference: `reference=base` or `reference=None`."
            )
        self._processor = GenARMLogitsProcessor(
            arms,
            recommended_alpha([x.info for x in arms]) if alpha is None else alpha,
            base_model=self.model,
            reference=reference,
            tokenizer=self.tokenizer,
            reward_tokenizer=aligned,
        )
        self._arms = [loaded.model for loaded in arms]
        self._vocab_maps = vocab_maps(self.tokenizer, aligned, len(arms))
        self._is_contrasted = reference is not None

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Returns guided log-probabilities of all positions, `(batch_size, length, vocab_size)`, instead of logits."""
        scores = super()._model_call(inps, attn_mask, labels)
        strengths: Any = self._processor.alpha  # a number for each, as no other kind is taken here
        active = [index for index, alpha in enumerate(strengths) if alpha != 0]
        if not active:
            return scores
        logits = {index: self._reward_logits(index, inps) for index in active}
        alphas = [strengths[index] for index in active]
        incomplete = [place for place, index in enumerate(active) if self._vocab_maps[index] is not None]
        # Row by row, since float32 copies of all logits are large
        rows = []
        for row, base in enumerate(scores):
            rewards = [self._log_probs(index, logits[index][row], base.shape[-1]) for index in active]
            reference = base.float().log_softmax(dim=-1) if self._is_contrasted else None
            product = guided_product(base, rewards, alphas, reference, incomplete)
            product.refuse_empty_rows()
            rows.append(product.log_probs)
        return torch.stack(rows)

    def _reward_logits(self, index: int, input_ids: Tensor) -> Tensor:
        vocab_map = self._vocab_maps[index]
        if vocab_map is not None:
            input_ids = vocab_map.reward_ids(input_ids, torch.ones_like(input_ids))
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            return self._arms[index](input_ids).logits

    def _log_probs(self, index: int, logits: Tensor, vocab_size: int) -> Tensor:
        """Returns the log-probabilities of one text for the tokens of the base, `(length, vocab_size)`."""
        log_probs = logits.float().log_softmax(dim=-1)
        vocab_map = self._vocab_maps[index]
        return log_probs if vocab_map is None else vocab_map.base_log_probs(log_probs, vocab_size)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Generates as the harness does, with the processor."""
        return super()._model_generate(
            context, max_length, stop, logits_processor=[self._processor], **generation_kwargs
        )
