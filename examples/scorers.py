"""Reward functions as `hf-genarm tune --scorer` and TRL's GRPOTrainer take them: of texts or of messages."""

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment(prompts: list, completions: list, **_) -> list[float]:
    """From -1 to 1, by the words of the lexicon VADER."""
    return [_vader().polarity_scores(text)["compound"] for text in map(text_of, completions)]


def brevity(prompts: list, completions: list, **_) -> list[float]:
    """The number of words, negative, as fewer are better."""
    return [-float(len(text.split())) for text in map(text_of, completions)]


def text_of(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
