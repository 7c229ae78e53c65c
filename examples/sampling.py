"""Answers of the demo model to many prompts, for the scripts that make preference pairs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_genarm.demo import demo_model


def sample(
    prompts: list[str],
    encode: Callable[[Any, list[str]], Any],
    decode: Callable[[Any, Tensor], str | None],
    n_samples: int,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, list[str]]:
    """
    Samples answers at temperature 1, without top-k or top-p.

    Args:
        prompts (list of `str`):
            The prompts, all different.
        encode (callable):
            Makes the inputs of `generate` from the tokenizer and prompts.
        decode (callable):
            Makes a text from the tokenizer and the new tokens `(max_new_tokens,)`, or `None` to leave an answer out.
        n_samples, max_new_tokens, batch_size (`int`):
            The number of answers to each prompt, their length, and the number of prompts in a batch.
    """
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_model(), padding_side="left")
    texts: dict[str, list[str]] = {prompt: [] for prompt in prompts}
    for start in tqdm(range(0, len(prompts), batch_size), desc="Sampling"):
        batch = prompts[start : start + batch_size]
        inputs = encode(tokenizer, batch)
        output = model.generate(
            **inputs, do_sample=True, top_k=0, max_new_tokens=max_new_tokens, num_return_sequences=n_samples
        )[:, inputs["input_ids"].shape[1] :]
        for index, ids in enumerate(output):
            if (text := decode(tokenizer, ids)) is not None:
                texts[batch[index // n_samples]].append(text)
    return texts
