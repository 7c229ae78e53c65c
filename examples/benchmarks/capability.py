"""
What guidance costs in knowledge: SmolLM2-135M-Instruct on 239 questions of common knowledge and grammar, by strength.

    python -m examples.benchmarks.capability         # some minutes

The task is `examples/data/common_knowledge`, scored by the Language Model Evaluation Harness, which is installed by
`pip install -e ".[eval]"`. An answer is right if the guided distribution gives it the most probability. The sentiment
adapter has not learned from such questions, so what changes is a side effect. Printed are the accuracy and its paired
change from the unguided model, with 95 % bootstrap intervals over questions.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from examples.benchmarks.measuring import add_place
from examples.small import fitting_adapter, output_file, sized
from hf_genarm.bootstrap import mean_with_interval
from hf_genarm.demo import demo_model

ROOT = Path(__file__).parent.parent.parent
TASK = ROOT / "examples" / "data" / "common_knowledge" / "common_knowledge.yaml"


def load_task() -> dict[str, Any]:
    """Reads the task, and makes the path of its file absolute."""
    task = yaml.safe_load(TASK.read_text(encoding="utf-8"))
    files = task["dataset_kwargs"]["data_files"]
    task["dataset_kwargs"]["data_files"] = {split: str(ROOT / path) for split, path in files.items()}
    return task


def score(alpha: float, reference: str | None, n_questions: int | None, arm: str, args: Any) -> list[dict[str, Any]]:
    """Returns the questions, each with `acc`, which is 1 if its answer was right."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import hf_genarm.lm_eval  # noqa: F401  registers the model

    results = simple_evaluate(
        model="hf-genarm",
        model_args={
            "pretrained": demo_model(),
            "dtype": args.dtype,
            "arm": arm,
            "alpha": alpha,
            "reference": reference,
        },
        tasks=[load_task()],
        task_manager=TaskManager(include_defaults=False),  # the harness's own tasks take seconds to list
        batch_size=16,
        device=args.device,
        limit=n_questions,
        bootstrap_iters=0,
    )
    (samples,) = results["samples"].values()
    return sorted(samples, key=lambda sample: sample["doc_id"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", default="model_cards/arm-smollm2-135m-sentiment", help="Hub id or folder")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 1.0], help="strengths, in addition to 0")
    parser.add_argument("--seed", type=int, default=0, help="for the bootstrap")
    add_place(parser)
    parser.add_argument(
        "--output",
        type=output_file,
        default=sized("examples/benchmarks/capability.json", "outputs/capability.json"),
        help="JSON file",
    )
    args = parser.parse_args()
    arm = fitting_adapter(args.arm)
    n_questions = sized(None, 8)
    settings = [(0.0, None), *((alpha, reference) for reference in (None, "base") for alpha in args.alphas)]
    rows: list[dict[str, Any]] = []
    right_before = np.empty(0)
    for alpha, reference in settings:
        samples = score(alpha, reference, n_questions, arm, args)
        right = np.array([sample["acc"] for sample in samples], dtype=float)
        right_before = right if alpha == 0 else right_before
        by_kind: dict[str, list[float]] = {}
        for sample in samples:
            by_kind.setdefault(sample["doc"]["kind"], []).append(sample["acc"])
        rows.append(
            {
                "alpha": alpha,
                "reference": reference,
                "accuracy": mean_with_interval(right, seed=args.seed),
                "change": mean_with_interval(right - right_before, seed=args.seed),
                "by_kind": {kind: float(np.mean(values)) for kind, values in by_kind.items()},
            }
        )
    report = {
        "arm": args.arm,
        "n_questions": len(right_before),
        "chance": float(np.mean([1 / len(sample["doc"]["choices"]) for sample in samples])),
        "rows": rows,
        "versions": {name: version(name) for name in ("hf_genarm", "lm_eval", "torch", "transformers")},
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{report['n_questions']} questions, of which {report['chance']:.3f} are right by chance")
    print("reference      α   accuracy               minus unguided, paired")
    for row in rows:
        cells = "{:.3f} [{:.3f}, {:.3f}]   {:+.3f} [{:+.3f}, {:+.3f}]".format(*row["accuracy"], *row["change"])
        print(f"{row['reference'] or 'none':<10} {row['alpha']:5g}   {cells}")
    print(f"The report is in {args.output}.")


if __name__ == "__main__":
    main()
