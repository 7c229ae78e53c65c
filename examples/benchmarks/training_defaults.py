"""
What the default learning rate of adapters is chosen by: what trainings of several lengths learn at several rates.

    python -m examples.benchmarks.training_defaults
    python -m examples.benchmarks.training_defaults --pairs 3000 --epochs 1
    python -m examples.benchmarks.training_defaults --data sentiment --pairs 50

Each training has the defaults of `hf-genarm train` (three epochs, 8 pairs per step, LoRA of rank 16 on the modules that
PEFT chooses). By default its pairs are short, so that thousands of them can be trained on without a GPU:
"My word for the hotel:", and of two random words of VADER's lexicon the more positive one is chosen. Topics and words
of the held-out pairs are in no training. With `--data sentiment`, pairs are those of the sentiment data with the
shortest answers, as plain text.

On held-out pairs it reports the share in which what was learned prefers the chosen answer, with a 95 % interval; how
far it moves the two answers of a pair apart; and how much likelier it makes the chosen ones. On answers that are
sampled at strengths of 0 and 1, it reports their sentiment and, at 1, their divergence from the base.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, set_seed
from trl import get_peft_config
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from examples.benchmarks.measuring import add_record
from examples.data.make_sentiment_pairs import SPLITS, TOPICS
from examples.pairs import DATA
from examples.scorers import sentiment
from examples.small import output_file, sized
from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer, GenARMLogitsProcessor, RewardInfo
from hf_genarm.bootstrap import mean_with_interval
from hf_genarm.decoding.meter import Meter
from hf_genarm.demo import demo_model
from hf_genarm.hub.sharing import without_adapter
from hf_genarm.scripts.train import ModelArguments
from hf_genarm.training.config import adapter_learning_rate, n_steps
from hf_genarm.training.learned import learned

N_TOKENS, N_GUIDED = 8, 64  # of the sampled answers
MIN_GAP = 2.0  # between two words, whose values are from -4 to 4


def pairs_of_words(n_pairs: int, is_test: bool) -> Dataset:
    """Words about a topic; of both, a part is in the test alone."""
    draw = random.Random(int(is_test))
    topics = TOPICS[-SPLITS["test"] :] if is_test else TOPICS[: -SPLITS["test"]]
    lexicon = {word: value for word, value in SentimentIntensityAnalyzer().lexicon.items() if word.isalpha()}
    words = [word for index, word in enumerate(sorted(lexicon)) if (index % 5 == 0) == is_test]
    pairs = []
    while len(pairs) < n_pairs:
        low, high = sorted(draw.sample(words, 2), key=lambda word: lexicon[word])
        if lexicon[high] - lexicon[low] >= MIN_GAP:
            prompt = f"My word for {draw.choice(topics)}:"
            pairs.append({"prompt": prompt, "chosen": f" {high}.", "rejected": f" {low}."})
    return Dataset.from_list(pairs)


def pairs_of_sentiment(n_pairs: int, is_test: bool) -> Dataset:
    """The pairs of the sentiment data with the shortest answers, as plain text."""
    files = [str(DATA / f"{split}.jsonl") for split in (["test"] if is_test else ["train", "dev"])]
    pairs = [
        {name: pair[name][0]["content"] for name in ("prompt", "chosen", "rejected")}
        for pair in load_dataset("json", data_files=files, split="train")
    ]
    pairs.sort(key=lambda pair: max(len(pair["chosen"].split()), len(pair["rejected"].split())))
    return Dataset.from_list(
        [pair | {"chosen": f" {pair['chosen']}", "rejected": f" {pair['rejected']}"} for pair in pairs[:n_pairs]]
    )


PAIRS = {"words": pairs_of_words, "sentiment": pairs_of_sentiment}


def train(args: argparse.Namespace, pairs: Dataset, held_out: Dataset, rate: str, seed: int) -> dict:
    """Trains an adapter, and returns what it has learned."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = AutoregressiveRewardConfig(
            folder,
            reference="base",
            num_train_epochs=args.epochs,
            seed=seed,
            max_length=sized(128, 1024),  # the tokens of tiny models are bytes
            gradient_checkpointing=False,  # the same numbers in less time
            model_init_kwargs={"dtype": args.dtype, "attn_implementation": "eager"},  # the fastest for short texts
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            per_device_eval_batch_size=32,
        )
        by_rule = adapter_learning_rate(n_steps(config, len(pairs)))
        config.learning_rate = by_rule * float(rate[1:]) if rate[0] == "x" else float(rate)
        trainer = AutoregressiveRewardTrainer(
            model=args.model,
            args=config,
            train_dataset=pairs,
            eval_dataset=held_out,
            peft_config=get_peft_config(ModelArguments(model_name_or_path=args.model)),
        )
        trainer.train()
        trainer.model.float()  # small differences are lost in bfloat16
        prediction = trainer.predict(trainer.eval_dataset)
    metrics = {name.removeprefix("test_"): value for name, value in prediction.metrics.items()}
    what = learned(RewardInfo(beta=config.beta, loss=config.changed_loss, metrics=metrics))
    return {
        "model": Path(trainer.model.config.name_or_path).name,
        "data": args.data,
        "pairs": len(pairs),
        "steps": trainer.state.global_step,
        "learning_rate": config.learning_rate,
        "dtype": args.dtype,
        "seed": seed,
        "n_held_out": what.n_pairs,
        "accuracy": [what.share, what.low, what.high],
        "nats_apart": what.nats,
        "nats_of_chosen": float(np.mean(prediction.predictions[:, 0])) / config.beta,
        "loss": next(logs["train_loss"] for logs in reversed(trainer.state.log_history) if "train_loss" in logs),
        "seconds": next(logs["train_runtime"] for logs in trainer.state.log_history if "train_runtime" in logs),
        **guided_texts(trainer, list(dict.fromkeys(held_out["prompt"]))[: sized(N_GUIDED, 4)]),
    }


def guided_texts(trainer: AutoregressiveRewardTrainer, prompts: list[str]) -> dict[str, list[float]]:
    """Continues held-out beginnings at the strengths 0 and 1; returns means over texts, with 95 % intervals."""
    model, base = trainer.model.eval(), without_adapter(trainer.model)
    tokenizer = AutoTokenizer.from_pretrained(base.name_or_path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    processor = GenARMLogitsProcessor(model, base_model=base, tokenizer=tokenizer, reference="base")
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    measured = {}
    for name, processor.alpha in {"unguided": 0.0, "guided": 1.0}.items():
        set_seed(0)
        meter = Meter()
        output = base.generate(
            **inputs,
            logits_processor=meter.around([processor]),
            do_sample=True,
            top_k=0,
            min_new_tokens=N_TOKENS,
            max_new_tokens=N_TOKENS,
        )[:, inputs["input_ids"].shape[1] :]
        kl, _ = meter.read(output, torch.full((len(output),), N_TOKENS))
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        measured[f"sentiment_{name}"] = list(mean_with_interval(np.array(sentiment([], texts))))
    measured["kl_guided"] = list(mean_with_interval(kl.numpy()))
    return measured


def runs(args: argparse.Namespace) -> Iterator[dict]:
    held_out = PAIRS[args.data](args.held_out, True)
    for n_pairs in args.pairs:
        pairs = PAIRS[args.data](sized(n_pairs, 4), False)
        for seed in args.seeds:
            for rate in args.rates:
                yield train(args, pairs, held_out, rate, seed)


def row_of_table(row: dict) -> str:
    cells = [row["pairs"], row["steps"], f"{row['learning_rate']:.2g}"]
    cells += ["{:.2f} [{:.2f}, {:.2f}]".format(*row["accuracy"]), f"{row['nats_apart']:.2f}"]
    cells += [f"{row['nats_of_chosen']:+.1f}", f"{row['kl_guided'][0]:.2f}"]
    cells += [f"{row['sentiment_unguided'][0]:+.2f} → {row['sentiment_guided'][0]:+.2f}", f"{row['seconds']:.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or Hub id of the base; SmolLM2-135M-Instruct by default")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the base; an adapter is trained in float32")
    parser.add_argument("--pairs", type=int, nargs="+", default=[50, 400], help="sizes of the training data")
    parser.add_argument("--held-out", type=int, default=sized(200, 4), help="number of held-out pairs")
    parser.add_argument(
        "--rates",
        nargs="+",
        default=sized(["1e-4", "x0.33", "x1"], ["x1"]),
        help="learning rates, as numbers or as multiples of that of the rule",
    )
    parser.add_argument("--epochs", type=float, default=sized(3.0, 1.0))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", choices=PAIRS, default="words", help="what the pairs are")
    parser.add_argument("--output", type=output_file, help="JSON file that the results are added to")
    args = parser.parse_args()
    args.model = args.model or demo_model()
    print("| pairs | steps | rate | accuracy | nats apart | of chosen | KL at 1 | sentiment | s |\n" + "|---" * 9 + "|")
    results = []
    for row in runs(args):
        results.append(row)
        print(row_of_table(row), flush=True)
    add_record(args.output, __file__, results)


if __name__ == "__main__":
    main()
