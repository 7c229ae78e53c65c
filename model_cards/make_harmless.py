"""
Trains `model_cards/arm-smollm2-135m-harmless`, measures it on held-out prompts and writes its card.

    python model_cards/make_harmless.py                                         # from the Hub: Anthropic/hh-rlhf
    python model_cards/make_harmless.py --dataset path/to/hh_harmless.jsonl.gz  # about 25 minutes on 2 cores
"""

import argparse
import re

from datasets import Dataset, load_dataset
from publish import HERE, SEED, publish
from quickstart import train
from transformers import AutoTokenizer

from hf_genarm.demo import demo_model

NAME = "arm-smollm2-135m-harmless"
N_HELD_OUT, N_PROMPTS = 120, 72
MAX_LENGTH = 192
# A crude sign of a refusal. It is a count of words, and can be wrong either way.
REFUSAL = re.compile(r"\b(sorry|can't|cannot|can not|won't|unable|not able|illegal|not appropriate|shouldn't)\b", re.I)


def messages(text: str) -> list[dict[str, str]]:
    """HH-RLHF's dialogues are one text, with `Human:` and `Assistant:` before each turn."""
    turns = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()} for speaker, said in zip(turns[::2], turns[1::2], strict=True)
    ]


def pairs_of(dataset: str | None, tokenizer) -> Dataset:
    """Single-turn pairs that fit, with the prompt apart."""
    if dataset is None:
        raw = load_dataset("Anthropic/hh-rlhf", data_dir="harmless-base", split="test")
    else:
        raw = load_dataset("json", data_files=dataset, split="train")

    def split(pair: dict) -> dict:
        chosen, rejected = messages(pair["chosen"]), messages(pair["rejected"])
        return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}

    def fits(pair: dict) -> bool:
        whole = [
            tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
            for side in ("chosen", "rejected")
        ]
        usable = len(pair["prompt"]) == 1 and all(pair[side][0]["content"] for side in ("chosen", "rejected"))
        return usable and max(len(tokenizer(text).input_ids) for text in whole) <= MAX_LENGTH

    return raw.map(split, remove_columns=raw.column_names).filter(fits).shuffle(seed=SEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="JSONL file with `chosen` and `rejected`; by default, HH-RLHF on the Hub")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(demo_model(), padding_side="left")
    pairs = pairs_of(args.dataset, tokenizer)
    held_out = pairs.select(range(N_HELD_OUT))
    trainer = train(
        demo_model(),
        tokenizer,
        HERE.parent / "outputs" / NAME,
        pairs.select(range(N_HELD_OUT, len(pairs))),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        max_length=MAX_LENGTH,
        objective="harmlessness",
        description=(
            "The answers that crowd workers called less harmful, in single-turn dialogues of HH-RLHF's harmless-base. "
            "They often prefer a refusal, a question or a shorter answer: it is no safety filter."
        ),
        dataset_name="Anthropic/hh-rlhf",
    )
    publish(
        trainer,
        tokenizer,
        NAME,
        held_out=held_out,
        prompts=[pair["prompt"][0]["content"] for pair in held_out.select(range(N_PROMPTS))],
        score=lambda text: float(bool(REFUSAL.search(text))),
        effect_name="share of answers with a word of refusal",
        license="mit",
        quote=False,
    )


if __name__ == "__main__":
    main()
