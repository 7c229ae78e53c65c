"""What the benchmarks share: the device and the machine they run on, peak memory, and files of results."""

import argparse
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
from transformers import AutoModelForCausalLM


def add_place(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that [`load`] reads: `--device` and `--dtype`."""
    parser.add_argument("--device", default="cpu", help="where models are, such as cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")


def load(path: str | Path, args: argparse.Namespace) -> Any:
    """Loads a model onto the device and in the dtype of the arguments."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).to(args.device)


def wait(device: str | torch.device) -> None:
    """Waits until the device has done what it was given, before a time is taken."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, str | int]:
    """Returns what results depend on besides the code: processor, GPU, threads and versions."""
    model = [
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    ]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": model[0].split(":")[1].strip() if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "other",
        "torch": torch.__version__,
        "python": platform.python_version(),
        **gpu,
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


def forget_peak_memory(device: str) -> None:
    """Lets the peak memory of this process be that from now on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def memory_mb(device: str, in_use: bool = False) -> float:
    """Returns the peak memory of this process on a device in megabytes, or the memory in use."""
    if device.startswith("cuda"):
        of = torch.cuda.memory_allocated if in_use else torch.cuda.max_memory_allocated
        return of(device) / 2**20
    name = "VmRSS" if in_use else "VmHWM"
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
