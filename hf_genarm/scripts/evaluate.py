"""
Reports how well a reward model distinguishes chosen from rejected responses, next to a rule that only counts tokens.

    hf-genarm evaluate --arm user/my-arm --dataset pairs.jsonl --output_dir evaluation

Writes `evaluation.json` and `evaluation.png`, and prints a table, or with `--json` the content of the file.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import EvalPrediction

from ..files import make_output_dir, write_whole
from ..hub.base_model import usable_device, where_and_how
from ..hub.info import package_versions
from ..hub.loading import base_of, info_of
from ..hub.reward_model import AutoregressiveRewardModel
from ..training.metrics import preference_metrics
from .arguments import EvaluateArguments
from .pairs import hold_out, load_pairs
from .plots import plot_evaluation
from .shared_arguments import PairArguments


def main(pair_args: PairArguments, args: EvaluateArguments) -> dict[str, Any]:
    """Returns what `evaluation.json` holds."""
    make_output_dir(args.output_dir)
    pairs = load_pairs(pair_args, pair_args.dataset_test_split or pair_args.dataset_train_split)
    ignored = {"tools", "chat_template_kwargs"} & set(pairs.column_names)
    if ignored:
        raise ValueError(
            f"`{pair_args.dataset}` has the columns {sorted(ignored)}, which scores would ignore. Evaluate with "
            "`AutoregressiveRewardTrainer.evaluate`, which reads them, or remove them."
        )
    if pair_args.test_size:
        _, pairs = hold_out(pairs, pair_args.test_size)
    if args.max_pairs is not None:
        pairs = pairs.select(range(min(args.max_pairs, len(pairs))))
    try:
        arm = load(args)
    except OSError as error:
        raise ValueError(
            f"`{args.model}` can't be loaded. Name the Hub id or folder of a reward model: `--arm`. {error}"
        ) from error

    prediction: Any = predict(arm, pairs, args.batch_size)
    metrics = preference_metrics(prediction)
    report = {"model": args.model, "dataset": pair_args.dataset, "beta": arm.info.beta or 1.0, "metrics": metrics}
    report["versions"] = package_versions()
    write_whole(Path(args.output_dir, "evaluation.json"), json.dumps(report, indent=2))
    rewards, lengths = prediction.predictions, prediction.label_ids[0]
    margin, longer = rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1]
    plot_evaluation(margin, longer, os.path.join(args.output_dir, "evaluation.png"))
    print(table(args.model, metrics))
    print(f"The report is in {args.output_dir}.")
    return report


def load(args: EvaluateArguments) -> AutoregressiveRewardModel:
    """Loads the reward model, onto its base if it has one, and prints where it is."""
    where: dict[str, Any] = {"revision": args.model_revision}
    base = None
    if args.base is not None or base_of(args.model, **where) or info_of(args.model, **where).reference == "base":
        base = args.load([args.model], revision=args.model_revision)
    else:
        where |= {"dtype": args.dtype, "device_map": args.device_map or str(usable_device(args.device))}
    arm = AutoregressiveRewardModel.from_pretrained(
        args.model,
        None if base is None else base.model,
        base_tokenizer=None if base is None else base.tokenizer,
        trust_remote_code=args.trust_remote_code,
        **where,
    )
    print(f"Reward model: `{args.model}` {where_and_how(arm.model)}", flush=True)
    return arm


def predict(arm: AutoregressiveRewardModel, pairs: Dataset, batch_size: int) -> EvalPrediction:
    """Scores pairs; returns rewards and numbers of tokens as [`preference_metrics`] takes them."""
    beta = arm.info.beta or 1.0
    rewards, lengths = score(arm, pairs, batch_size)
    labels: Any = (lengths,)
    if isinstance(arm.model, PeftModel) and arm.info.reference is None:
        with arm.model.disable_adapter():
            labels += (beta * score(arm, pairs, batch_size)[0],)
    return EvalPrediction(predictions=beta * rewards, label_ids=labels)


def score(arm: AutoregressiveRewardModel, pairs: Dataset, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores the chosen and the rejected responses: rewards and numbers of tokens, each `(n_pairs, 2)`."""
    sides = []
    for side in ("chosen", "rejected"):
        rows = arm.token_rewards(list(pairs["prompt"]), list(pairs[side]), batch_size=batch_size, show_progress=True)
        sides.append([(float(arm.reduce(row.rewards)), len(row.rewards)) for row in rows])
    rewards, lengths = np.array(sides).transpose(2, 1, 0)
    return rewards, lengths


def table(name: str, metrics: dict[str, float]) -> str:
    """Returns the report as a table of text."""

    def share(metric: str) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(*(metrics[metric + end] for end in ("", "_low", "_high")))

    rows = [
        ("pairs", f"{metrics['n_pairs']}"),
        ("prefers the chosen response", share("pair_accuracy")),
        ("  the shorter response is the chosen one", f"{metrics['shorter_accuracy']:.3f}"),
        ("  the difference, paired", share("gain_over_shorter")),
    ]
    if metrics["n_length_matched"]:
        matched = f"  among {metrics['n_length_matched']} pairs of similar lengths"
        rows.append((matched, share("length_matched_accuracy")))
    if "contrast_accuracy" in metrics:
        rows.append(("  by its contrast with the base", share("contrast_accuracy")))
    rows += [
        ("mean margin of the rewards", f"{metrics['mean_margin']:.3f}"),
        ("correlation of margin and length", f"{metrics['margin_length_correlation']:.2f}"),
        ("calibration error", f"{metrics['calibration_error']:.3f}"),
    ]
    return "\n".join([f"\n{name}, with 95 % intervals:", *(f"  {what:<42} {value}" for what, value in rows)])
