"""The sentiment of answers: one word list labels the pairs; it and another one judge the answers."""

import json

from datasets import Dataset
from textblob import TextBlob
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ...data.make_sentiment_pairs import TEMPLATES, TOPICS
from ...pairs import DATA, training_pairs
from .bench import Task
from .settings import Size

# These topics are in no split of the pairs.
_TEST_TOPICS = """
the lost property office|a paper boat|the evening class|a set of keys|the bus driver|an ironing board|the quiz night
a packed lunch|the library card|a lemon tree|the boat rental|a bedside lamp|the car park attendant|a wool blanket
the reception desk|a coin collection|the railway bridge|a garden gnome|the choir rehearsal|a second helping
the seaside pier|a spare room|the repair café|a phone charger|the sports day|a picnic table|the village pond
a cardboard box|the night porter|a folding chair|the model railway|a bag of apples|the art class|a pair of gloves
the coach trip|a kitchen timer|the allotment|a door handle|the local paper|a walking stick|the tram stop|a tin of soup
the charity shop|a bunk bed|the travel agent|a window seat|the science fair|a jar of honey
"""
TEST_TOPICS = [topic for line in _TEST_TOPICS.split("\n") for topic in line.split("|") if topic]


def task(size: Size) -> Task:
    """Returns the task of positive answers."""
    pairs: Dataset = training_pairs(size.n_pairs).select_columns(["prompt", "chosen", "rejected"])
    return Task(
        "sentiment",
        "Sentiment",
        f"{len(pairs)} pairs, labelled by VADER, a word list. The reward is VADER's score of the answer, from −1 to 1; "
        "the second judge is TextBlob, another lexicon by other people.",
        pairs,
        dev_prompts(size.n_dev_prompts),
        test_prompts(size.n_test_prompts),
        JUDGES,
        size,
    )


def dev_prompts(n_prompts: int) -> list[str]:
    """Returns prompts of the dev split, evenly over topics and templates."""
    lines = (DATA / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = list(dict.fromkeys(json.loads(line)["prompt"][0]["content"] for line in lines))
    return [prompts[index * len(prompts) // n_prompts] for index in range(n_prompts)]


def test_prompts(n_prompts: int) -> list[str]:
    """Returns one prompt for each of the new topics, with the templates in turn."""
    assert not set(TEST_TOPICS) & set(TOPICS)
    assert n_prompts <= len(TEST_TOPICS)
    return [TEMPLATES[index % len(TEMPLATES)].format(topic) for index, topic in enumerate(TEST_TOPICS[:n_prompts])]


_VADER = SentimentIntensityAnalyzer()


def vader(prompts, texts):
    """Returns the scores of VADER, which labelled the pairs, from −1 to 1."""
    return [_VADER.polarity_scores(text)["compound"] for text in texts]


def textblob(prompts, texts):
    """Returns the scores of TextBlob, another lexicon by other people, from −1 to 1."""
    return [round(TextBlob(text).sentiment.polarity, 4) for text in texts]


JUDGES = {"reward": vader, "second": textblob}
