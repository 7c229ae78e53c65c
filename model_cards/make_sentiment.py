"""
Trains `model_cards/arm-smollm2-135m-sentiment`, measures it on held-out prompts, tunes it and writes its card.

    python -m model_cards.make_sentiment       # about 25 minutes on 2 cores
"""

from pathlib import Path

from datasets import load_dataset
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from examples.pairs import DATA, held_out_prompts, training_pairs
from examples.quickstart import plot
from examples.small import sized

from .publish import SEED, argument_parser, publish, recommend, train_adapter

NAME = "arm-smollm2-135m-sentiment"


def make(output: Path) -> None:
    """Trains and measures the reward model, and writes its folder."""
    trainer = train_adapter(
        NAME,
        training_pairs(),
        num_train_epochs=2,
        objective="positive sentiment",
        description=(
            "Words that the sentiment lexicon VADER likes, in short answers about everyday things. The labels come "
            "from that word list: not truth, not kindness, not quality."
        ),
        dataset_name="examples/data/sentiment",
    )
    scorer = SentimentIntensityAnalyzer()
    publish(
        trainer,
        output,
        NAME,
        held_out=load_dataset("json", data_files=str(DATA / "test.jsonl"), split=sized("train", "train[:8]")),
        prompts=held_out_prompts(),
        score=lambda text: scorer.polarity_scores(text)["compound"],
        effect_name="sentiment of the answer (VADER, −1 to 1)",
        license="apache-2.0",
        max_new_tokens=sized(48, 4),
        options=[],
        plot=lambda effects, control, path: plot(effects, control, SEED, path),
    )


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    if not args.tune_only:
        make(args.output)
    recommend(
        args.output / NAME,
        scorer="examples.scorers:sentiment",
        alpha=[0.25, 0.5, 0.75, 1.0, 2.0],
        temperature=[1.0, 0.7],
    )


if __name__ == "__main__":
    main()
