"""Transfer-Q (Chakraborty et al., NeurIPS 2024, https://hf.co/papers/2405.20495): rollouts give tokens their value."""

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from .trajectory_reward import trajectory_rewards


class RolloutLogitsProcessor(LogitsProcessor):
    r"""
    Samples among the `top_k` likeliest tokens by $\log\pi_\text{base}(y_t) + w \cdot r(x, y)$, where $y$ is the
    answer that an aligned policy completes after that token.

    Args:
        policy ([`~transformers.PreTrainedModel`]):
            The aligned policy, for instance one that DPO trained.
        reward_model ([`~transformers.PreTrainedModel`]):
            A classifier with one label, which scores whole answers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of all three models, which pads on the left.
        prompts (list of `str`):
            The prompts, one per row.
        prompt_length (`int`):
            Their number of tokens, padding included.
        max_new_tokens (`int`):
            Length at which answers, and so rollouts, are cut.
        weight (`float`):
            $w$, the weight of the reward.
        top_k (`int`, *optional*, defaults to 10):
            Number of candidates.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        policy: PreTrainedModel,
        reward_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[str],
        prompt_length: int,
        max_new_tokens: int,
        weight: float,
        top_k: int = 10,
    ):
        self.policy, self.reward_model, self.tokenizer = policy, reward_model, tokenizer
        self.prompts, self.prompt_length = prompts, prompt_length
        self.max_length = prompt_length + max_new_tokens
        self.weight, self.top_k = weight, top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs, candidates = scores.float().log_softmax(dim=-1).topk(self.top_k)
        texts = torch.cat([input_ids.repeat_interleave(self.top_k, dim=0), candidates.view(-1, 1)], dim=1)
        if texts.shape[1] < self.max_length:
            is_text = (texts != self.tokenizer.pad_token_id).long().cummax(dim=1).values
            texts = self.policy.generate(
                texts, attention_mask=is_text, do_sample=True, top_k=0, max_length=self.max_length
            )
        answers = texts[:, self.prompt_length :]
        # If the candidate ends the answer, what the policy adds is not part of it.
        ended = (answers == self.tokenizer.eos_token_id).long().cummax(dim=1).values.bool()
        answers = answers.masked_fill(ended, self.tokenizer.eos_token_id)
        rewards = trajectory_rewards(
            self.reward_model,
            self.tokenizer,
            [prompt for prompt in self.prompts for _ in range(self.top_k)],
            self.tokenizer.batch_decode(answers, skip_special_tokens=True),
        )
        guided = log_probs + self.weight * torch.from_numpy(rewards).view_as(log_probs)
        return torch.full_like(scores, -torch.inf, dtype=torch.float32).scatter(1, candidates, guided)
