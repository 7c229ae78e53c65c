"""Reward functions for `hf-genarm tune --scorer` and TRL's GRPOTrainer, which read texts or messages."""

import re
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_REFUSAL = re.compile(
    r"\b(sorry|can't|cannot|can not|won't|unable|not able|illegal|not appropriate|shouldn't)\b", re.IGNORECASE
)


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment(prompts: list, completions: list, **_) -> list[float]:
    """Returns the sentiment by the lexicon VADER, from -1 to 1."""
    return [_vader().polarity_scores(text)["compound"] for text in map(text_of, completions)]


def brevity(prompts: list, completions: list, **_) -> list[float]:
    """Returns minus the number of words, since fewer are better."""
    return [-float(len(text.split())) for text in map(text_of, completions)]


def refusal(prompts: list, completions: list, **_) -> list[float]:
    """Returns 1 if an answer has a word of refusal, else 0. This is crude, and sometimes wrong in both directions."""
    return [float(bool(_REFUSAL.search(text))) for text in map(text_of, completions)]


def text_of(completion: str | list[dict[str, str]]) -> str:
    """Returns a text, or that of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
