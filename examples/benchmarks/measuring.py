"""What the benchmarks share: the machine they ran on, peak memory, and files of results."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, str | int]:
    model = [
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    ]
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "other",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def spread(ratios: list[float]) -> list[float]:
    """Median and range."""
    return [statistics.median(ratios), min(ratios), max(ratios)]


def cell(values: list[float] | None) -> str:
    return "" if values is None else "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def run_for_memory(script: str, options: list[str]) -> float:
    """The number that a script prints last, from a process that does nothing else."""
    # Large blocks go back to the system at once, so that memory in use is measured, and not how it is fragmented.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module_of(script), *options]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(run.stdout.split()[-1])


def module_of(script: str) -> str:
    """The name by which `python -m` runs the file of a benchmark."""
    return f"examples.benchmarks.{Path(script).stem}"


def forget_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def memory_mb(name: str = "VmHWM") -> float:
    """Peak memory of this process, or with `VmRSS` the memory in use, in megabytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status[name].split()[0]) / 1024


def save_over_logs(figure: Any, axis: Any, values: Sequence[float], path: Path) -> None:
    """Labels the values of a logarithmic axis, and them alone, and writes the picture."""
    axis.minorticks_off()
    axis.set_xticks(values, [f"{value:.3g}" for value in values])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def add_record(output: Path | None, script: str, results: list[dict]) -> None:
    if output:
        command = " ".join(["python", "-m", module_of(script), *sys.argv[1:]])
        records = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
        records.append({"command": command, "machine": machine(), "results": results})
        output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
