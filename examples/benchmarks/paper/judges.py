"""What answers are judged by: an exact oracle, a second judge that knows nothing of it, and signs of degeneration."""

from collections import Counter

import numpy as np
from textblob import TextBlob
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_VADER = SentimentIntensityAnalyzer()


def oracle(text: str) -> float:
    """VADER's compound score, from −1 to 1: the program that labelled the pairs."""
    return _VADER.polarity_scores(text)["compound"]


def second_judge(text: str) -> float:
    """TextBlob's polarity, from −1 to 1: another lexicon, of adjectives, by other people."""
    return TextBlob(text).sentiment.polarity


def n_words(text: str) -> float:
    return float(len(text.split()))


def is_degenerate(text: str) -> bool:
    """Empty, a word three times in a row, or the same three words back to back or at least three times."""
    words = text.lower().split()
    if not words:
        return True
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    stutters = any(len(set(trigram)) == 1 for trigram in trigrams)
    loops = any(one == other for one, other in zip(trigrams, trigrams[3:], strict=False))
    return stutters or loops or max(Counter(trigrams).values(), default=0) >= 3


def judge(judged, answers: list[list[dict]]) -> np.ndarray:
    """What `judged` says about the text of each answer, `(n_prompts, n_samples)`."""
    return np.array([[float(judged(answer["text"])) for answer in row] for row in answers])


def read(name: str, answers: list[list[dict]]) -> np.ndarray:
    """A number that is kept with each answer, `(n_prompts, n_samples)`."""
    return np.array([[answer[name] for answer in row] for row in answers], dtype=float)


def perplexity(answers: list[list[dict]]) -> float:
    """Of all answers under the base."""
    return float(np.exp(-read("base_log_prob", answers).sum() / read("n_tokens", answers).sum()))
