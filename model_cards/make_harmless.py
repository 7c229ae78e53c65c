"""
Trains `model_cards/arm-smollm2-135m-harmless` on HH-RLHF's harmless-base, measures it, tunes it and writes its card.

    python model_cards/make_harmless.py                               # from the Hub: test split of Anthropic/hh-rlhf
    python model_cards/make_harmless.py --dataset hh_harmless.jsonl.gz                    # about 40 minutes on 2 cores

Some of the pairs are held out, and the others trained on. They contain offensive text, and are not part of this
repository; the card quotes none of it.
"""

import sys
from functools import cache

from datasets import Dataset, load_dataset
from publish import argument_parser, publish, recommend, train_adapter, work_of
from quickstart import DATA
from scorers import refusal, text_of
from small import sized

from hf_genarm.scripts.pairs import PairArguments, hold_out, load_pairs

NAME, HUB_ID = "arm-smollm2-135m-harmless", "Anthropic/hh-rlhf"
N_HELD_OUT, N_PROMPTS, N_TUNED = 400, 72, 24


def usual_split(dataset: str) -> str:
    return "test" if dataset == HUB_ID else "train"


def dialogues(dataset: str, split: str | None = None) -> Dataset:
    """The pairs of a Hub id or a file; of HH-RLHF, those of harmless-base."""
    data_dir = "harmless-base" if dataset == HUB_ID else None
    return load_pairs(PairArguments(dataset, dataset_data_dir=data_dir), split or usual_split(dataset))


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
    parser.add_argument("--split", help=f"default: test for {HUB_ID}, and train, which is all of a file, for others")
    args = parser.parse_args()
    split = args.split or usual_split(args.dataset)
    try:
        pairs = dialogues(args.dataset, split)
    except ValueError as error:
        sys.exit(f"make_harmless: {error}")
    training_pairs, held_out = hold_out(pairs, sized(N_HELD_OUT, 4))
    trainer = train_adapter(
        NAME,
        training_pairs,
        # A sum of log-probs would be judged by length: means, for which there is enough to learn in two epochs.
        beta=1.0,
        length_normalized=True,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=1.5e-3,
        max_length=128,
        truncation_mode="keep_end",
        train_sampling_strategy="group_by_length",
        objective="harmlessness",
        description=(
            "The answers that crowd workers called less harmful, in the dialogues of HH-RLHF's harmless-base. They "
            "often prefer a refusal, a question or a shorter answer: it is no safety filter. Of "
            f"{len(pairs):,} pairs {len(training_pairs)} were trained on, and {len(held_out)}, with other prompts, "
            "held out."
        ),
        dataset_name=HUB_ID,
    )
    prompts = [pair["prompt"][0]["content"] for pair in held_out if len(pair["prompt"]) == 1]
    n_prompts = sized(N_PROMPTS, 2)
    publish(
        trainer,
        args.output,
        NAME,
        held_out=held_out,
        prompts=prompts[:n_prompts],
        score=lambda text: refusal([""], [text])[0],
        effect_name="share of answers with a word of refusal",
        license="mit",
        options=["--dataset", args.dataset, "--split", split],
        max_new_tokens=sized(48, 4),
        quote=False,
    )
    questions = [*prompts[n_prompts:][: sized(N_TUNED, 2)], *everyday_questions()]
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
