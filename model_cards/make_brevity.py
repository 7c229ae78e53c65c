"""
Trains `model_cards/arm-smollm2-135m-brevity`, measures it on held-out prompts, tunes it and writes its card.

    python -m model_cards.make_brevity         # about 20 minutes on 2 cores
"""

from pathlib import Path

from examples.pairs import held_out_prompts, shorter_is_chosen
from examples.small import sized

from .publish import argument_parser, publish, recommend, train_adapter

NAME = "arm-smollm2-135m-brevity"


def make(output: Path) -> None:
    """Trains and measures the reward model, and writes its folder."""
    trainer = train_adapter(
        NAME,
        shorter_is_chosen("train"),
        reference="base",
        beta=0.1,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        objective="brevity",
        description=(
            "Answers of fewer words to questions about everyday things, whatever they say: not concision, which would "
            "keep the meaning."
        ),
        dataset_name="examples/data/sentiment, ordered by length",
    )
    publish(
        trainer,
        output,
        NAME,
        held_out=shorter_is_chosen("test"),
        prompts=held_out_prompts(),
        score=lambda text: float(len(text.split())),
        effect_name="words in the answer (at most 64 tokens)",
        license="apache-2.0",
        options=[],
        max_new_tokens=sized(64, 4),
        alphas=(0.05, 0.1, 0.2),  # at larger strengths answers have three words
    )


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    if not args.tune_only:
        make(args.output)
    recommend(
        args.output / NAME,
        scorer="examples.scorers:brevity",
        alpha=[0.05, 0.1, 0.15, 0.2],
    )


if __name__ == "__main__":
    main()
