"""
Trains `model_cards/arm-smollm2-135m-harmless` on HH-RLHF's harmless-base, measures it and writes its card.

    python model_cards/make_harmless.py                               # from the Hub: test split of Anthropic/hh-rlhf
    python model_cards/make_harmless.py --dataset hh_harmless.jsonl.gz                    # about 40 minutes on 2 cores

Some of the pairs are held out, and the others trained on. They contain offensive text, and are not part of this
repository; the card quotes none of it.
"""

import re
import sys

from datasets import Dataset
from publish import argument_parser, publish, train_adapter
from small import sized

from hf_genarm.scripts.pairs import PairArguments, hold_out, load_pairs

NAME, HUB_ID = "arm-smollm2-135m-harmless", "Anthropic/hh-rlhf"
N_HELD_OUT, N_PROMPTS = 400, 72
# A crude sign of a refusal. It is a count of words, and can be wrong either way.
REFUSAL = re.compile(r"\b(sorry|can't|cannot|can not|won't|unable|not able|illegal|not appropriate|shouldn't)\b", re.I)


def usual_split(dataset: str) -> str:
    return "test" if dataset == HUB_ID else "train"


def dialogues(dataset: str, split: str | None = None) -> Dataset:
    """The pairs of a Hub id or a file; of HH-RLHF, those of harmless-base."""
    data_dir = "harmless-base" if dataset == HUB_ID else None
    return load_pairs(PairArguments(dataset, dataset_data_dir=data_dir), split or usual_split(dataset))


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
            "often prefer a refusal, a question or a shorter answer: it is no safety filter."
        ),
        dataset_name=HUB_ID,
    )
    prompts = [pair["prompt"][0]["content"] for pair in held_out if len(pair["prompt"]) == 1]
    publish(
        trainer,
        args.output,
        NAME,
        held_out=held_out,
        prompts=prompts[: sized(N_PROMPTS, 4)],
        score=lambda text: float(bool(REFUSAL.search(text))),
        effect_name="share of answers with a word of refusal",
        license="mit",
        options=["--dataset", args.dataset, "--split", split],
        max_new_tokens=sized(48, 4),
        quote=False,
    )


if __name__ == "__main__":
    main()
