"""
Trains `model_cards/arm-smollm2-135m-harmless` on HH-RLHF's harmless-base, measures it and writes its card.

    python model_cards/make_harmless.py                                         # from the Hub: Anthropic/hh-rlhf
    python model_cards/make_harmless.py --dataset path/to/hh_harmless.jsonl.gz  # about 40 minutes on 2 cores

The pairs contain offensive text, and are not part of this repository; the card quotes none of it.
"""

import argparse
import re

from publish import HERE, publish
from quickstart import train
from transformers import AutoTokenizer

from hf_genarm.demo import demo_model
from hf_genarm.scripts.pairs import PairArguments, hold_out, load_pairs

NAME = "arm-smollm2-135m-harmless"
N_HELD_OUT, N_PROMPTS = 400, 72
# A crude sign of a refusal. It is a count of words, and can be wrong either way.
REFUSAL = re.compile(r"\b(sorry|can't|cannot|can not|won't|unable|not able|illegal|not appropriate|shouldn't)\b", re.I)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="Anthropic/hh-rlhf", help="Hub id, or a file with `chosen` and `rejected`")
    parser.add_argument("--split", default="test", help="split of a dataset on the Hub")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(demo_model(), padding_side="left")
    folder = "harmless-base" if args.dataset == "Anthropic/hh-rlhf" else None
    pairs = load_pairs(PairArguments(args.dataset, dataset_data_dir=folder), args.split)
    training_pairs, held_out = hold_out(pairs, N_HELD_OUT)
    trainer = train(
        demo_model(),
        tokenizer,
        HERE.parent / "outputs" / NAME,
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
        dataset_name="Anthropic/hh-rlhf",
    )
    prompts = [pair["prompt"][0]["content"] for pair in held_out if len(pair["prompt"]) == 1]
    publish(
        trainer,
        tokenizer,
        NAME,
        held_out=held_out,
        prompts=prompts[:N_PROMPTS],
        score=lambda text: float(bool(REFUSAL.search(text))),
        effect_name="share of answers with a word of refusal",
        license="mit",
        quote=False,
    )


if __name__ == "__main__":
    main()
