"""
What the default learning rate of adapters is chosen by: what trainings of several lengths learn at several rates.

    python -m examples.benchmarks.training_defaults

Each training is that of `hf-genarm train` with its defaults (three epochs, 8 pairs per step, LoRA of rank 16 on the
modules that PEFT chooses), on the pairs of the sentiment data with the shortest answers, as plain text, which takes a
fourth of the time that chats take. On held-out pairs, whose topics are in no training, it reports the share in which
what was learned prefers the chosen answer, with a 95 % interval; how far it moves the two answers of a pair apart; and
how much likelier it makes the chosen ones. Far below 0, it makes good texts unlikely, too.
"""

import argparse
import tempfile
from collections.abc import Iterator

import numpy as np
from datasets import Dataset, load_dataset
from transformers import set_seed
from trl import get_peft_config

from examples.benchmarks.measuring import add_record
from examples.pairs import DATA
from examples.small import output_file, sized
from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer, RewardInfo
from hf_genarm.demo import demo_model
from hf_genarm.scripts.train import ModelArguments
from hf_genarm.training.learned import learned


def short_pairs(n_pairs: int, *splits: str) -> Dataset:
    """The pairs of some splits with the shortest answers, as plain text."""
    parts = [load_dataset("json", data_files=str(DATA / f"{split}.jsonl"), split="train") for split in splits]
    pairs = [
        {name: pair[name][0]["content"] for name in ("prompt", "chosen", "rejected")} for part in parts for pair in part
    ]
    pairs.sort(key=lambda pair: max(len(pair["chosen"].split()), len(pair["rejected"].split())))
    return Dataset.from_list(
        [pair | {"chosen": f" {pair['chosen']}", "rejected": f" {pair['rejected']}"} for pair in pairs[:n_pairs]]
    )


def train(model: str, pairs: Dataset, held_out: Dataset, reference: str, rate: str, seed: int, epochs: float) -> dict:
    """Trains an adapter, and returns what it has learned."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AutoregressiveRewardTrainer(
            model=model,
            args=AutoregressiveRewardConfig(
                folder,
                learning_rate=None if rate == "default" else float(rate),
                reference=None if reference == "none" else reference,
                num_train_epochs=epochs,
                seed=seed,
                gradient_checkpointing=False,  # the same numbers in less time
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=pairs,
            eval_dataset=held_out,
            peft_config=get_peft_config(ModelArguments(model_name_or_path=model)),
        )
        trainer.train()
        print(f"{trainer.state.global_step} steps", flush=True)
        prediction = trainer.predict(trainer.eval_dataset)
    metrics = {name.removeprefix("test_"): value for name, value in prediction.metrics.items()}
    what = learned(RewardInfo(beta=trainer.args.beta, loss=trainer.args.changed_loss, metrics=metrics))
    rewards = prediction.predictions - (prediction.label_ids[1] if reference == "none" else 0)
    return {
        "model": trainer.model.config.name_or_path.rstrip("/").rsplit("/", 1)[-1],
        "pairs": len(pairs),
        "steps": trainer.state.global_step,
        "reference": reference,
        "rate": rate,
        "learning_rate": trainer.args.learning_rate,
        "seed": seed,
        "n_held_out": what.n_pairs,
        "accuracy": [what.share, what.low, what.high],
        "nats_apart": what.nats,
        "nats_of_chosen": float(np.mean(rewards[:, 0])) / trainer.args.beta,
        "loss": next(logs["train_loss"] for logs in reversed(trainer.state.log_history) if "train_loss" in logs),
    }


def runs(args: argparse.Namespace) -> Iterator[dict]:
    held_out = short_pairs(args.held_out, "test")
    for n_pairs in args.pairs:
        pairs = short_pairs(n_pairs, "train", "dev")
        for seed in args.seeds:
            for reference in args.references:
                for rate in args.rates:
                    yield train(args.model, pairs, held_out, reference, rate, seed, args.epochs)


def row_of_table(row: dict) -> str:
    cells = [row["pairs"], row["steps"], row["reference"], f"{row['learning_rate']:.2g}"]
    cells += ["{:.2f} [{:.2f}, {:.2f}]".format(*row["accuracy"]), f"{row['nats_apart']:.2f}"]
    return "| " + " | ".join(map(str, [*cells, f"{row['nats_of_chosen']:+.1f}"])) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or Hub id of the base; SmolLM2-135M-Instruct by default")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=sized([50, 400], [4]), help="sizes of the training data"
    )
    parser.add_argument("--held-out", type=int, default=sized(32, 4), help="number of held-out pairs")
    parser.add_argument("--references", nargs="+", default=["base"], choices=("base", "none"))
    parser.add_argument("--rates", nargs="+", default=sized(["1e-4", "5e-4", "default", "5e-3"], ["default"]))
    parser.add_argument("--epochs", type=float, default=sized(3.0, 1.0))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=output_file, help="JSON file that the results are added to")
    args = parser.parse_args()
    args.model = args.model or demo_model()
    print("| pairs | steps | reference | rate | accuracy | nats apart | nats of chosen |\n" + "|---" * 7 + "|")
    results = []
    for row in runs(args):
        results.append(row)
        print(row_of_table(row), flush=True)
    add_record(args.output, __file__, results)


if __name__ == "__main__":
    main()
