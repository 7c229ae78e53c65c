"""Reward functions as `hf-genarm tune --scorer` and TRL's GRPOTrainer take them: of texts or of messages."""

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
    """From -1 to 1, by the words of the lexicon VADER."""
    return [_vader().polarity_scores(text)["compound"] for text in map(text_of, completions)]


def brevity(prompts: list, completions: list, **_) -> list[float]:
    """The number of words, negative, as fewer are better."""
    return [-float(len(text.split())) for text in map(text_of, completions)]


def refusal(prompts: list, completions: list, **_) -> list[float]:
    """1 if there is a word of refusal, else 0: crude, and wrong at times either way."""
    return [float(bool(_REFUSAL.search(text))) for text in map(text_of, completions)]


def text_of(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
