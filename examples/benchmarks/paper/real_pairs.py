"""
Real pairs: those of HH-RLHF's harmless-base in two halves, each judged by a reward model that was trained on the other;
and the same training by our trainer and by TRL's CPO.
"""

from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from bench import Bench, Step
from datasets import Dataset
from fingerprint import fingerprint
from intervals import shown
from report import table
from settings import CPO, REAL_PAIRS
from training import adapter_config, arguments, train_arm
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction
from trl.experimental.cpo import CPOConfig, CPOTrainer

from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardModel, AutoregressiveRewardTrainer
from hf_genarm.scripts.evaluate import predict
from hf_genarm.scripts.pairs import PairArguments, hold_out, load_pairs
from hf_genarm.training.metrics import preference_metrics

HUB_ID = "Anthropic/hh-rlhf"


def steps(bench: Bench, dataset: str) -> list[Step]:
    size, work = bench.size, []
    for half in range(2):
        train, judge = partial(train_on_the_other, bench, dataset, half), partial(judge_half, bench, dataset, half)
        work += [
            bench.training(named(dataset, f"arm-hh-{half}"), 2.0 * size.n_hh_pairs / 2, train),
            bench.measuring(named(dataset, f"hh-{half}"), 1.5 * size.n_hh_pairs / 2, judge),
        ]
    return [*work, bench.measuring(named(dataset, "hh-cpo"), 6.0 * size.n_cpo_pairs, lambda: compare(bench, dataset))]


def named(dataset: str, name: str) -> str:
    """With a key of the pairs, which come from elsewhere."""
    return f"{name}-{fingerprint(load(dataset).to_list())}"


@cache
def load(dataset: str) -> Dataset:
    is_hub = dataset == HUB_ID
    return load_pairs(
        PairArguments(dataset, dataset_data_dir="harmless-base" if is_hub else None), "test" if is_hub else "train"
    )


def halves(bench: Bench, dataset: str) -> tuple[Dataset, Dataset]:
    """Without a prompt in common, and always the same."""
    pairs = load(dataset)
    return hold_out(pairs.select(range(min(bench.size.n_hh_pairs, len(pairs)))), 0.5)


def train_on_the_other(bench: Bench, dataset: str, half: int, folder: Path) -> None:
    train_arm(bench, halves(bench, dataset)[1 - half], folder, **REAL_PAIRS)


def judge_half(bench: Bench, dataset: str, half: int) -> dict[str, list]:
    """What `hf-genarm evaluate` makes its report of."""
    folder = str(bench.adapter(named(dataset, f"arm-hh-{half}")))
    arm = AutoregressiveRewardModel.from_pretrained(folder, base_model=bench.model)
    arm.tokenizer = bench.tokenizer
    prediction = predict(arm, halves(bench, dataset)[half], batch_size=8)
    lengths, base_rewards = prediction.label_ids
    return {
        "rewards": prediction.predictions.tolist(),
        "lengths": lengths.tolist(),
        "base_rewards": base_rewards.tolist(),
    }


def _short_texts(bench: Bench, pairs: Dataset) -> Dataset:
    """Pairs that fit without truncation, as plain text, which the two trainers tokenize in the same way."""
    max_length = REAL_PAIRS["max_length"]

    def as_text(pair: dict) -> dict:
        prompt = bench.tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, tokenize=False)
        return {"prompt": prompt, "chosen": pair["chosen"][0]["content"], "rejected": pair["rejected"][0]["content"]}

    def fits(pair: dict) -> bool:
        return all(
            len(bench.tokenizer(pair["prompt"] + pair[name]).input_ids) < max_length for name in ("chosen", "rejected")
        )

    return pairs.map(as_text).filter(fits).select(range(2 * bench.size.n_cpo_pairs))


def compare(bench: Bench, dataset: str) -> dict[str, float]:
    """Eq. 5 by our trainer, and by TRL's CPO, in which it is `sigmoid` without the SFT term."""
    texts, n = _short_texts(bench, load(dataset)), bench.size.n_cpo_pairs
    train, test = texts.select(range(n)), texts.select(range(n, 2 * n))
    settings = arguments(bench, bench.output / "trainers" / "cpo", seed=0) | {
        **CPO,
        "remove_unused_columns": False,
    }
    result: dict[str, float] = {"n_pairs": n}
    for name, trainer_class, config in (
        ("arm", AutoregressiveRewardTrainer, AutoregressiveRewardConfig(**settings)),
        ("cpo", CPOTrainer, CPOConfig(**settings, loss_type="sigmoid", cpo_alpha=0.0)),
    ):
        torch.manual_seed(0)  # of the adapter
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(bench.model_path, dtype=torch.float32),
            args=config,
            train_dataset=train,
            eval_dataset=test,
            processing_class=AutoTokenizer.from_pretrained(bench.model_path),
            peft_config=adapter_config(bench.n_layers),
        )
        trainer.train()
        measured = trainer.evaluate()
        result[f"{name}_loss"] = measured["eval_loss"]
        result[f"{name}_accuracy"] = measured["eval_accuracy" if name == "arm" else "eval_rewards/accuracies"]
    return result


def section(bench: Bench, dataset: str) -> str:
    measured = [bench.measured(named(dataset, f"hh-{half}")) for half in range(2)]
    rewards, lengths, base_rewards = (
        np.concatenate([half[name] for half in measured]) for name in ("rewards", "lengths", "base_rewards")
    )
    rows = []
    for name, values in (
        ("the ARM", rewards),
        ("what the ARM has learned: less the base's log-probability", rewards - base_rewards),
    ):
        metrics = preference_metrics(EvalPrediction(predictions=values, label_ids=(lengths,)))
        accuracy, gain = (
            [metrics[metric + end] for end in ("", "_low", "_high")]
            for metric in ("pair_accuracy", "gain_over_shorter")
        )
        rows.append([name, shown(*accuracy, ".3f"), shown(*gain, "+.3f")])
    rows.append(["preferring the shorter", f"{metrics['shorter_accuracy']:.3f}", ""])
    cpo = bench.measured(named(dataset, "hh-cpo"))
    return "\n\n".join(
        [
            "## Real pairs",
            f"HH-RLHF's harmless-base, {len(rewards)} pairs in two halves, each judged by an ARM that was "
            "trained on the other (means of log-probabilities, "
            f"{REAL_PAIRS['num_train_epochs']} epochs, LoRA r = {REAL_PAIRS['adapter']['r']}). The unit is the pair.",
            table(["", "held-out accuracy", "less that of preferring the shorter, paired"], rows),
            f"Eq. 5 by TRL's `CPOTrainer` and by ours, {cpo['n_pairs']} pairs for one epoch in the same order, on as "
            f"many held-out pairs: loss {cpo['cpo_loss']:.4f} and {cpo['arm_loss']:.4f}, accuracy "
            f"{cpo['cpo_accuracy']:.3f} and {cpo['arm_accuracy']:.3f}.",
        ]
    )
