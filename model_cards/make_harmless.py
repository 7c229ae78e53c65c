"""
Trains `model_cards/arm-smollm2-135m-harmless` on HH-RLHF's harmless-base, measures it, tunes it and writes its card.

    python model_cards/make_harmless.py                               # from the Hub: test split of Anthropic/hh-rlhf
    python model_cards/make_harmless.py --dataset hh_harmless.jsonl.gz                      # about an hour on 2 cores

Some of the pairs are trained on, and what it does is measured on others. They contain offensive text, and are not part
of this repository; the card quotes none of it. `examples/benchmarks/frontier` measures the same reward model against
DPO's and others, by a judge that was trained on a half of the pairs that this one has not seen.
"""

import sys
from functools import cache
from typing import NamedTuple

from datasets import Dataset, load_dataset
from publish import argument_parser, publish, recommend, train_adapter, work_of
from quickstart import DATA
from scorers import refusal, text_of
from small import sized

from hf_genarm.scripts.pairs import PairArguments, hold_out, load_pairs, public_name

NAME, HUB_ID = "arm-smollm2-135m-harmless", "Anthropic/hh-rlhf"
N_TEST_PAIRS, N_HALF = 236, 440
N_PROMPTS, N_TUNED = 72, 24


@cache
def dialogues(dataset: str) -> Dataset:
    """The pairs of a file, or of a Hub id; of HH-RLHF, those of harmless-base."""
    if dataset == HUB_ID:
        return load_pairs(PairArguments(dataset, dataset_data_dir="harmless-base"), "test")
    return load_pairs(PairArguments(dataset), "train")


class Parts(NamedTuple):
    """Of the pairs, by prompts: for what steers, for its judge, and what neither has seen."""

    half: Dataset
    other: Dataset
    test: Dataset


@cache
def parts(dataset: str) -> Parts:
    rest, test = hold_out(dialogues(dataset), sized(N_TEST_PAIRS, 8))
    halves = hold_out(rest, 0.5)
    return Parts(*(half.select(range(min(len(half), sized(N_HALF, 4)))) for half in halves), test)


def openings(pairs: Dataset) -> list[str]:
    """The first turns of dialogues that are no longer."""
    return list(dict.fromkeys(pair["prompt"][0]["content"] for pair in pairs if len(pair["prompt"]) == 1))


@cache
def everyday_questions() -> list[str]:
    pairs = load_dataset("json", data_files=str(DATA / "dev.jsonl"), split="train")
    return list(dict.fromkeys(text_of(prompt) for prompt in pairs["prompt"]))[: sized(N_TUNED, 2)]


def rightly_refused(prompts: list, completions: list, **_) -> list[float]:
    """A scorer: 1 if an everyday question is answered or another one refused, as far as words tell; else 0."""
    asked = zip(prompts, refusal(prompts, completions), strict=True)
    return [1 - refused if text_of(prompt) in everyday_questions() else refused for prompt, refused in asked]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--dataset", default=HUB_ID, help="Hub id, or a file with `chosen` and `rejected`")
    args = parser.parse_args()
    try:
        half, other, test = parts(args.dataset)
    except ValueError as error:
        sys.exit(f"make_harmless: {error}")
    trainer = train_adapter(
        NAME,
        half,
        reference="base",
        beta=0.1,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        max_length=1024,  # all dialogues are shorter
        seed=0,
        objective="harmlessness",
        description=(
            "The answers that crowd workers called less harmful, in the dialogues of HH-RLHF's harmless-base. They "
            "often prefer a refusal, a question or a shorter answer: it is no safety filter. It was trained on "
            f"{len(half)} of {len(dialogues(args.dataset)):,} pairs of harmless-base, and its numbers are of "
            f"{len(test)} others, with other prompts."
        ),
        dataset_name=HUB_ID,
    )
    publish(
        trainer,
        args.output,
        NAME,
        held_out=test,
        prompts=openings(test)[: sized(N_PROMPTS, 2)],
        score=lambda text: refusal([""], [text])[0],
        effect_name="share of answers with a word of refusal",
        license="mit",
        options=["--dataset", public_name(args.dataset)],
        max_new_tokens=sized(48, 4),
        quote=False,
    )
    questions = [*openings(other)[: sized(N_TUNED, 2)], *everyday_questions()]
    path = work_of(NAME) / "prompts.jsonl"
    Dataset.from_dict({"prompt": [[{"role": "user", "content": question}] for question in questions]}).to_json(path)
    recommend(
        args.output / NAME,
        prompts=str(path),
        max_prompts=len(questions),
        scorer="model_cards.make_harmless:rightly_refused",
        n_examples=0,
    )


if __name__ == "__main__":
    main()
