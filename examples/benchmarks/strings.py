"""
How far the shipped sentiment adapter on SmolLM2 steers a base of another family, whose tokens are other strings.

    python -m examples.benchmarks.strings         # about ten minutes on 2 cores

Questions are answered at temperature 1 under one seed, at several strengths. Printed are the mean sentiment (VADER) and
the mean divergence from the base per answer, with 95 % bootstrap intervals over questions, and the time per token, one
text at a time, in turns that alternate. Answers are kept in `--output`, where a run that was killed continues, and the
means and times in a `.json` next to it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, set_seed

from examples.benchmarks.measuring import add_place, cell, load, machine, spread, wait
from examples.scorers import sentiment
from examples.small import fitting_adapter, output_file, sized
from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.bootstrap import mean_with_interval
from hf_genarm.demo import demo_model, is_smoke
from hf_genarm.hub.compatibility import chat_of
from hf_genarm.scripts.sweep import sample_answers

ADAPTER = "model_cards/arm-smollm2-135m-sentiment"
TOPICS = ("hotel", "train ride", "concert", "restaurant", "museum", "weather", "film", "new phone", "lecture", "hike")
QUESTIONS = [f"What did you think of the {topic}? Answer in one sentence." for topic in TOPICS]
STRENGTHS = (0.0, 0.5, 1.0, 2.0)


def answers_at(alpha: float, steer: GenARMLogitsProcessor, base: Any, tokenizer: Any, args: Any) -> list[dict]:
    """Returns an answer to each question at a strength, with its sentiment and its divergence from the base."""
    chats = [chat_of(question) for question in QUESTIONS[: args.questions]]
    inputs = steer.encode(chats)
    steer.alpha, steer.keeps_statistics = alpha, True
    set_seed(args.seed)
    answers = sample_answers(base, tokenizer, chats, [steer] if alpha else [], args.max_new_tokens, inputs)
    scores = sentiment(chats, answers.texts)
    columns = zip(QUESTIONS, answers.texts, scores, answers.kl, answers.n_tokens, strict=False)
    names = ("question", "answer", "sentiment", "kl", "n_tokens")
    return [{"alpha": alpha} | dict(zip(names, row, strict=True)) for row in columns]


def time_per_token(model: Any, steer: GenARMLogitsProcessor, is_guided: bool, turn: int, args: Any) -> float:
    """Returns the seconds for each token of an answer to the first question, one text at a time."""
    inputs = steer.encode(chat_of(QUESTIONS[0]))
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
    set_seed(turn)
    start = time.perf_counter()
    model.generate(**inputs, logits_processor=[steer] if is_guided else [], **options)
    wait(model.device)
    return (time.perf_counter() - start) / args.tokens


def cost(steer: GenARMLogitsProcessor, base: Any, own: GenARMLogitsProcessor, own_base: Any, args: Any) -> dict:
    """
    Returns the time per token with guidance over that without, and what guidance adds over what the same reward model
    and its starting model add to a base with their tokens, in two passes. Medians and ranges.
    """
    steer.alpha, over_base, over_own_tokens = 1.0, [], []
    for turn in range(args.turns + 1):
        alone, guided = (time_per_token(base, steer, x, turn, args) for x in (False, True))
        own_alone, own_guided = (time_per_token(own_base, own, x, turn, args) for x in (False, True))
        over_base.append(guided / alone)
        over_own_tokens.append((guided - alone) / (own_guided - own_alone))
    ratios = {"over_base": over_base, "over_own_tokens": over_own_tokens}
    return {name: spread(values[1:]) for name, values in ratios.items()}  # the first turn warms up


def summary(rows: list[dict]) -> list[dict]:
    """Returns mean sentiment and divergence at each strength, with their 95 % intervals over questions."""
    return [
        {"alpha": alpha}
        | {
            name: mean_with_interval(np.array([row[name] for row in rows if row["alpha"] == alpha]), 10_000, 0)
            for name in ("sentiment", "kl")
        }
        for alpha in STRENGTHS
    ]


def table(means: list[dict]) -> str:
    """Returns what was measured as a table."""
    lines = ["| alpha | sentiment | KL per answer, nats |", "| --- | --- | --- |"]
    for row in means:
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[name]) for name in ("sentiment", "kl")]
        lines.append(f"| {row['alpha']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="Hub id or folder of the base")
    parser.add_argument("--questions", type=int, default=sized(8, 2), help="number of questions")
    parser.add_argument("--max-new-tokens", type=int, default=sized(24, 3), help="length of the longest answer")
    parser.add_argument("--turns", type=int, default=sized(5, 1), help="number of pairs of passes that are timed")
    parser.add_argument("--tokens", type=int, default=sized(16, 2), help="tokens in each of them")
    parser.add_argument("--seed", type=int, default=0, help="seed of the answers")
    add_place(parser)
    parser.add_argument("--output", type=output_file, default="outputs/strings.jsonl", help="where answers are kept")
    args = parser.parse_args()
    name = demo_model() if is_smoke() else args.base
    base = load(name, args)
    tokenizer = AutoTokenizer.from_pretrained(name)
    adapter = fitting_adapter(ADAPTER)
    steer = GenARMLogitsProcessor.from_pretrained(adapter, base_model=base, reference="base", alpha=1.0)
    output = Path(args.output)
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {row["alpha"] for row in rows}
    for alpha in tqdm([alpha for alpha in STRENGTHS if alpha not in done], desc="strengths"):
        new = answers_at(alpha, steer, base, tokenizer, args)
        with output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
        rows += new
    means, own_base = summary(rows), load(demo_model(), args)
    arm = AutoregressiveRewardModel.from_pretrained(adapter, dtype=base.dtype, device_map=base.device)
    own_tokenizer = AutoTokenizer.from_pretrained(demo_model())
    own = GenARMLogitsProcessor(arm, base_model=own_base, tokenizer=own_tokenizer, reference=arm.reference)
    spent = cost(steer, base, own, own_base, args) | {"turns": args.turns, "machine": machine()}
    text = json.dumps({"answers": means, "cost": spent}, indent=1)
    output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(
        f"Engine: {steer.engine}\n\n{table(means)}\n\nTime per token over that of the base: {cell(spent['over_base'])}"
    )
    print(f"What guidance adds, over that with the tokens of the reward model: {cell(spent['over_own_tokens'])}")


if __name__ == "__main__":
    main()
