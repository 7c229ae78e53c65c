"""The preference pairs, and prompts that share no topic with them."""

import json

import bench  # noqa: F401  (where the examples are)
from datasets import Dataset
from make_brevity import shorter_is_chosen
from make_sentiment_pairs import TEMPLATES, TOPICS
from quickstart import DATA, held_out_prompts, training_pairs

# Beside the topics of the test split, which are too few
_MORE_TOPICS = """
a board game|the pharmacy|a new pair of shoes|the fish market|a thunderstorm|the lighthouse|a wedding cake
the dry cleaner|a podcast|the botanical garden|a bus strike|the ice rink|a detective novel|the school play
a heat wave|the car wash|a cooking show|the petrol station|a night at the opera|the recycling centre|a tea ceremony
the escalator|a treasure hunt|the flea market|a sailing boat|the census form|a jigsaw puzzle|the sauna
a bank holiday|the toll road|a chemistry lab|the carnival|a mattress|the aquarium|a hiking map|the food truck
a violin solo|the vending machine|a leap year|the canal|a rental bike|the planetarium|a frozen pizza|the tailor
a desert road|the choir|a wooden table|the roundabout|a magic trick|the greenhouse|a winter coat|the cable car
a spelling test|the auction|a paper map|the drawbridge|a smoke alarm|the poetry evening|a sandwich|the stadium
a ceiling fan|the kindergarten|a tax refund|the quarry|a candle|the antique shop|a rowing race|the laundrette
a microwave|the duck pond|a keyboard|the city tour|a raincoat|the opera house|a dog show|the vineyard
a traffic jam|the print shop|a tent|the water park|a doorbell|the monastery|a school trip|the night market
a bus stop|the windmill|a pillow|the golf course|a yoga class|the bakery queue|a toothbrush|the circus
a hot chocolate|the canyon|a stapler|the rose garden
"""
MORE_TOPICS = [topic for line in _MORE_TOPICS.split("\n") for topic in line.split("|") if topic]


def sentiment_pairs(n_pairs: int) -> Dataset:
    """Those that differ most, without the columns that only the program that made them reads."""
    return training_pairs(n_pairs).select_columns(["prompt", "chosen", "rejected"])


def brevity_pairs(n_pairs: int) -> Dataset:
    pairs = shorter_is_chosen("train").select_columns(["prompt", "chosen", "rejected"])
    return pairs.select(range(min(n_pairs, len(pairs))))


def dev_prompts(n_prompts: int) -> list[str]:
    """Of the topics of the dev split: settings are chosen on them."""
    lines = (DATA / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = list(dict.fromkeys(json.loads(line)["prompt"][0]["content"] for line in lines))
    return prompts[:n_prompts]


def test_prompts(n_prompts: int) -> list[str]:
    """Of the topics of the test split, and of topics that are in no split. No prompt is among the others."""
    assert not set(MORE_TOPICS) & set(TOPICS)
    prompts = held_out_prompts() + [template.format(topic) for topic in MORE_TOPICS for template in TEMPLATES]
    assert n_prompts <= len(prompts)
    # Evenly over topics and templates
    return [prompts[int(index * len(prompts) / n_prompts)] for index in range(n_prompts)]
