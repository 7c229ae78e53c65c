"""
Trains `model_cards/arm-smollm2-135m-harmless` on HH-RLHF's harmless-base, measures it, tunes it and writes its card.

    python -m model_cards.make_harmless                               # from the Hub: test split of Anthropic/hh-rlhf
    python -m model_cards.make_harmless --dataset hh_harmless.jsonl.gz                      # about an hour on 2 cores

It is trained on some of the pairs, and measured on others. They contain offensive text, which is not in this
repository; the card quotes none of it. `examples/benchmarks/frontier` compares the same reward model with DPO and
others, by a judge that was trained on other pairs.
"""

import sys
from functools import cache
from pathlib import Path

from datasets import Dataset, load_dataset

from examples.benchmarks.frontier.settings import MARGIN, OBJECTIVES, TRAINING
from examples.pairs import DATA, HH_RLHF, HarmlessPairs, harmless_dialogues, harmless_pairs, opening_turns
from examples.scorers import refusal, text_of
from examples.small import sized
from hf_genarm.hub.compatibility import chat_of
from hf_genarm.scripts.pairs import public_name

from .publish import argument_parser, publish, recommend, train_adapter, work_of

NAME = "arm-smollm2-135m-harmless"
N_PROMPTS, N_TUNED = 72, 24


@cache
def everyday_questions() -> list[str]:
    """Returns questions that should be answered."""
    pairs = load_dataset("json", data_files=str(DATA / "dev.jsonl"), split="train")
    return list(dict.fromkeys(text_of(prompt) for prompt in pairs["prompt"]))[: sized(N_TUNED, 2)]


def rightly_refused(prompts: list, completions: list, **_) -> list[float]:
    """Returns 1 if an everyday question is answered or another one is refused, judged by single words; else 0."""
    asked = zip(prompts, refusal(prompts, completions), strict=True)
    return [1 - refused if text_of(prompt) in everyday_questions() else refused for prompt, refused in asked]


def make(parts: HarmlessPairs, dataset: str, output: Path) -> None:
    """Trains and measures the reward model, and writes its folder."""
    trainer = train_adapter(
        NAME,
        parts.half,
        **TRAINING,  # as the frontier benchmark trains the reward model that it measures
        **OBJECTIVES[MARGIN],
        seed=0,
        objective="harmlessness",
        description=(
            "The answers that crowd workers called less harmful, in the dialogues of HH-RLHF's harmless-base. They "
            "often prefer a refusal, a question or a shorter answer: it is no safety filter. It was trained on "
            f"{len(parts.half)} of {len(harmless_dialogues(dataset)):,} pairs of harmless-base, and its numbers are of "
            f"{len(parts.test)} others, with other prompts."
        ),
        dataset_name=HH_RLHF,
    )
    publish(
        trainer,
        output,
        NAME,
        held_out=parts.test,
        prompts=opening_turns(parts.test)[: sized(N_PROMPTS, 2)],
        score=lambda text: refusal([""], [text])[0],
        effect_name="share of answers with a word of refusal",
        license="mit",
        options=["--dataset", public_name(dataset)],
        max_new_tokens=sized(48, 4),
        quote=False,
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--dataset", default=HH_RLHF, help="Hub id, or a file with `chosen` and `rejected`")
    args = parser.parse_args()
    try:
        parts = harmless_pairs(args.dataset)
    except ValueError as error:
        sys.exit(f"make_harmless: {error}")
    if not args.tune_only:
        make(parts, args.dataset, args.output)
    questions = [*opening_turns(parts.other)[: sized(N_TUNED, 2)], *everyday_questions()]
    path = work_of(NAME) / "prompts.jsonl"
    Dataset.from_dict({"prompt": [chat_of(question) for question in questions]}).to_json(path)
    recommend(
        args.output / NAME,
        prompts=str(path),
        max_prompts=len(questions),
        scorer="model_cards.make_harmless:rightly_refused",
        n_examples=0,
    )


if __name__ == "__main__":
    main()
