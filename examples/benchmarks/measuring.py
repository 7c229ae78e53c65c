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
    """Returns what results depend on besides the code: processor, threads and versions."""
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
    """Returns median, minimum and maximum."""
    return [statistics.median(ratios), min(ratios), max(ratios)]


def cell(values: list[float] | None) -> str:
    """Returns the cell of a table for a median and its range."""
    return "" if values is None else "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def run_for_memory(script: str, options: list[str]) -> float:
    """Runs a script in a separate process, and returns the number that it prints last."""
    # Large blocks go back to the system at once, so that fragmentation is not measured as memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module_of(script), *options]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(run.stdout.split()[-1])


def module_of(script: str) -> str:
    """Returns the name by which `python -m` runs the file of a benchmark."""
    return f"examples.benchmarks.{Path(script).stem}"


def forget_peak_memory() -> None:
    """Lets the peak memory of this process be that from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def memory_mb(name: str = "VmHWM") -> float:
    """Returns the peak memory of this process in megabytes, or with `VmRSS` the memory in use."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status[name].split()[0]) / 1024


def save_over_logs(figure: Any, axis: Any, values: Sequence[float], path: Path) -> None:
    """Labels exactly some values of a logarithmic axis, and writes the picture."""
    axis.minorticks_off()
    axis.set_xticks(values, [f"{value:.3g}" for value in values])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def add_record(output: Path | None, script: str, results: list[dict]) -> None:
    """Adds results to a JSON file, if there is one, with the command and the machine."""
    if output:
        command = " ".join(["python", "-m", module_of(script), *sys.argv[1:]])
        records = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
        records.append({"command": command, "machine": machine(), "results": results})
        output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
