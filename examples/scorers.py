"""Reward functions as `hf-genarm tune --scorer` and TRL's GRPOTrainer take them: of texts or of messages."""

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment(prompts: list, completions: list, **_) -> list[float]:
    """From -1 to 1, by the words of the lexicon VADER."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [_vader().polarity_scores(text)["compound"] for text in texts]
