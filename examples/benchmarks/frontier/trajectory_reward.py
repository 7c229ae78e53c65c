"""A reward model of whole answers, as `trl.RewardTrainer` trains it, for ARGS, rollouts and best of n."""

from pathlib import Path

import numpy as np
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_trajectory_reward_model(folder: Path) -> PreTrainedModel:
    """Loads the classifier, with its adapter merged."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(folder), num_labels=1, dtype=torch.float32)
    return model.merge_and_unload().eval()


@torch.no_grad()
def trajectory_rewards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    answers: list,
    batch_size: int = 32,
) -> np.ndarray:
    """Returns the reward of each answer, `(n_answers,)`, read in the chat format of the training pairs."""
    pairs = zip(prompts, answers, strict=True)
    chats = [[*as_messages(prompt, "user"), *as_messages(answer, "assistant")] for prompt, answer in pairs]
    order = sorted(range(len(chats)), key=lambda row: sum(len(turn["content"]) for turn in chats[row]))
    rewards = torch.empty(len(chats))
    for start in range(0, len(order), batch_size):  # batches of similar lengths
        rows = order[start : start + batch_size]
        inputs = tokenizer.apply_chat_template(
            [chats[row] for row in rows],
            return_dict=True,
            return_tensors="pt",
            padding=True,
            tokenizer_kwargs={"padding_side": "right"},
        )
        rewards[rows] = model(**inputs).logits[:, 0]
    return rewards.numpy()


def as_messages(turns: str | list[dict[str, str]], role: str) -> list[dict[str, str]]:
    """Returns a text as one message; messages stay as they are."""
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns
