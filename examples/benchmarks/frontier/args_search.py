"""ARGS (Khanov et al., ICLR 2024, https://hf.co/papers/2402.01694): a reward of whole texts scores unfinished ones."""

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from hf_genarm.hub.kv_cache import CACHE


class ARGSLogitsProcessor(LogitsProcessor):
    r"""
    Samples among the `top_k` likeliest tokens by $\log\pi_\text{base}(y_t) + w \cdot r(x, y_{\le t})$.

    The candidates of a step are read in one pass after the cached text, and none sees the others. Prompts are padded on
    the left. Rows of `input_ids` must keep their order, so beam search is not possible.

    Args:
        reward_model ([`~transformers.PreTrainedModel`]):
            A decoder-only classifier with one label and the tokens of the base model.
        weight (`float`):
            $w$, the weight of the reward.
        top_k (`int`, *optional*, defaults to 10):
            Number of candidates.
    """

    supports_continuous_batching = False

    def __init__(self, reward_model: PreTrainedModel, weight: float, top_k: int = 10):
        self.reward_model, self.weight, self.top_k = reward_model, weight, top_k
        self._cache = DynamicCache()
        self._read = torch.empty(0, 0, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs, candidates = scores.float().log_softmax(dim=-1).topk(self.top_k)
        guided = log_probs + self.weight * self._rewards(input_ids, candidates)
        return torch.full_like(scores, -torch.inf, dtype=torch.float32).scatter(1, candidates, guided)

    @torch.no_grad()
    def _rewards(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        """Returns the rewards of the texts with each candidate, `(batch_size, top_k)`."""
        n_read = self._read.shape[1]
        if input_ids.shape[1] <= n_read or not torch.equal(input_ids[:, :n_read], self._read):
            self._cache, n_read = DynamicCache(), 0
        is_text = (input_ids != self.reward_model.config.pad_token_id).long().cummax(dim=1).values.bool()
        length, k = input_ids.shape[1], candidates.shape[1]
        # Each token sees the text before it and itself; the candidates all follow the text directly.
        sees = torch.ones(length + k, length + k, dtype=torch.bool, device=input_ids.device).tril()
        sees[length:, length:] = torch.eye(k, dtype=torch.bool, device=input_ids.device)
        sees = sees[None] & torch.cat([is_text, torch.ones_like(candidates, dtype=torch.bool)], dim=1)[:, None]
        sees |= torch.eye(
            length + k, dtype=torch.bool, device=input_ids.device
        )  # padding too, since an empty softmax is NaN
        positions = is_text.cumsum(dim=1) - 1
        positions = torch.cat([positions.clamp(min=0), positions[:, -1:] + torch.ones_like(candidates)], dim=1)
        hidden = self.reward_model.model(
            input_ids=torch.cat([input_ids, candidates], dim=1)[:, n_read:],
            attention_mask=sees[:, None, n_read:],
            position_ids=positions[:, n_read:],
            **{CACHE: self._cache},
        ).last_hidden_state
        self._cache.crop(-k)
        self._read = input_ids
        return self.reward_model.score(hidden[:, -k:])[..., 0]
