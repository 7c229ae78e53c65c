"""
Trains `model_cards/arm-smollm2-135m-brevity`, measures it on held-out prompts, tunes it and writes its card.

    python model_cards/make_brevity.py         # about 20 minutes on 2 cores
"""

from datasets import Dataset, load_dataset
from publish import argument_parser, publish, recommend, train_adapter
from quickstart import DATA, held_out_prompts
from small import sized

NAME = "arm-smollm2-135m-brevity"


def n_words(answer: list[dict[str, str]]) -> int:
    return len(answer[0]["content"].split())


def shorter_is_chosen(split: str) -> Dataset:
    """The answers of the sentiment pairs, with those of fewer words as chosen; pairs within 3 words are left out."""
    pairs = load_dataset("json", data_files=str(DATA / f"{split}.jsonl"), split="train")
    pairs = pairs.filter(lambda pair: abs(n_words(pair["chosen"]) - n_words(pair["rejected"])) > 3)
    pairs = pairs.select(range(sized(len(pairs), 8)))

    def order(pair: dict) -> dict:
        shorter, longer = sorted((pair["chosen"], pair["rejected"]), key=n_words)
        return {"chosen": shorter, "rejected": longer}

    return pairs.map(order)


def main() -> None:
    args = argument_parser(__doc__).parse_args()
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
        args.output,
        NAME,
        held_out=shorter_is_chosen("test"),
        prompts=held_out_prompts(),
        score=lambda text: float(len(text.split())),
        effect_name="words in the answer (at most 64 tokens)",
        license="apache-2.0",
        options=[],
        max_new_tokens=sized(64, 4),
        alphas=(0.05, 0.1, 0.2),  # beyond, answers of three words are left
    )
    recommend(
        args.output / NAME,
        scorer="examples.scorers:brevity",
        alpha=[0.05, 0.1, 0.15, 0.2],
        reference=["base"],
        max_kl=5.0,
    )


if __name__ == "__main__":
    main()
