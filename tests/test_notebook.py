"""The notebook, cell by cell, on tiny models; its outputs are from a run on the real one."""

import json
import os
from pathlib import Path

import pytest
from tiny import save_adapter, save_llama

from hf_genarm import demo

ROOT = Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "examples" / "steering.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")
def test_the_notebook_runs(tmp_path, monkeypatch):
    base = save_llama(tmp_path / "base", 3, max_position_embeddings=4096)
    for seed, name in enumerate(("sentiment", "brevity")):
        save_adapter(base, str(tmp_path / "model_cards" / f"arm-smollm2-135m-{name}"), seed)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "demo_model", lambda: base)
    setup, *cells = CELLS
    assert setup.startswith("# Only where the package is not installed")
    names: dict = {"os": os}
    for cell in cells:
        exec(compile(cell, "cell", "exec"), names)
    assert names["processor"].statistics(names["guided"])["token"]
    assert (tmp_path / "my-arm" / "adapter_model.safetensors").exists()


def test_its_outputs_are_kept():
    outputs = [output for cell in NOTEBOOK["cells"] for output in cell.get("outputs", [])]
    assert sum("text/html" in output.get("data", {}) for output in outputs) == 3
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len((ROOT / "examples" / "steering.ipynb").read_bytes()) < 200_000
