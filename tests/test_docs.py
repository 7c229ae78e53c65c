"""Tests of README, docs and cards: printed code runs, tables match their files, the site builds, the API is listed."""

import ast
import builtins
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_command
from tiny import save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_genarm
from hf_genarm import demo

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
PAIRS = ROOT / "examples" / "data" / "sentiment"
QUICKSTART = ROOT / "docs" / "quickstart.md"
# Commands that neither this file nor test_commands.py runs, and where they are run
ELSEWHERE = {
    "hf-genarm tune --arm outputs/quickstart/adapter --prompts examples/data/sentiment/dev.jsonl "
    "--scorer examples.scorers:sentiment": "tests/test_tune.py",
    "hf-genarm demo --export FOLDER": "tests/test_playground.py",
    "hf-genarm publish my-arm user/my-arm": "tests/test_publish.py",
}


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\b[^\n]*\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)


def continues_the_quickstart(page):
    """Whether its code needs that of the quickstart to have been run."""
    return re.search(r"\bcontinues? from the \[quickstart\]", " ".join(text_of(page).split())) is not None


def code(page):
    """All Python blocks of a page, from top to bottom."""
    return "\n".join(blocks(page, "python"))


def commands(page):
    """The command lines of `hf-genarm` in blocks and text, without those that only name a command."""
    return [
        " ".join(command.split())
        for command in re.findall(r"(?<![\w.-])hf-genarm [a-z-]+ (?:-|my-arm )[^`#\n|]*", text_of(page))
    ]


OURS = list(dict.fromkeys(command for page in PAGES for command in commands(page) if command not in ELSEWHERE))


def load(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / ".build" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# --- without the model ---


def test_the_readme_fits_two_screens():
    assert len(text_of(README).splitlines()) <= 150


def test_every_error_names_a_value_or_an_argument():
    messages = load("messages")
    listed = [x for path in sorted((ROOT / "hf_genarm").rglob("*.py")) for x in messages.messages(path)]
    errors = [text for _, kind, text in listed if kind in ("ValueError", "TypeError", "UsageError")]
    assert len(errors) > 150
    for text in errors:
        assert re.search("`|{|prompt", text), text


def test_the_messages_are_listed_as_the_script_says():
    script = ROOT / "docs" / ".build" / "messages.py"
    (command,) = re.findall(r"python (docs/\S+)", text_of(script))
    listed = subprocess.run([sys.executable, command], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.search(r"^hf_genarm/decoding/strength\.py:\d+: ValueError: `alpha` is \{shown", listed, re.MULTILINE)
    helped = subprocess.run([sys.executable, command, "--help"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "Lists all errors" in helped.stdout


def test_tables_of_numbers_are_those_of_the_files():
    numbers = load("numbers")
    assert {page.name for page in numbers.pages() if numbers.BLOCK.search(text_of(page))} >= {"README.md", "speed.md"}
    for page in numbers.pages():
        assert numbers.filled(text_of(page)) == text_of(page), "Run `python docs/.build/numbers.py`."


def test_the_diagram_is_as_it_is_drawn():
    diagram = load("diagram")
    for name, ink in diagram.INKS.items():
        assert text_of(diagram.IMAGES / f"lockstep-{name}.svg") == diagram.draw(ink), (
            "Run `python docs/.build/diagram.py`."
        )


def test_public_names_and_arguments_are_those_of_the_committed_list():
    api = load("api")
    listed = text_of(api.SNAPSHOT)
    for name in hf_genarm.__all__:
        assert f"\n::: hf_genarm.{name}\n" in text_of(ROOT / "docs" / "reference.md"), name
        assert re.search(rf"^{name}\(", listed, re.MULTILINE), f"`{name}` is missing from docs/.build/api.py's output."
    assert api.public_api() == listed, "If the public API was changed on purpose, run `make api`."


def test_the_list_of_public_names_reads_the_source_it_is_given(tmp_path):
    """A name that is removed, renamed, or given another default changes the list."""
    api = load("api")
    package = tmp_path / "hf_genarm"
    shutil.copytree(ROOT / "hf_genarm", package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "reference.md", tmp_path / "docs")
    api.ROOT = tmp_path
    assert api.public_api() == text_of(api.SNAPSHOT)
    formulas = package / "functional.py"
    changed = text_of(formulas).replace(
        "def ratio_equivalent(alpha: float, temperature: float = 1.0)", "def gone(alpha)"
    )
    assert changed != text_of(formulas)
    formulas.write_text(changed, encoding="utf-8")
    lost = set(text_of(api.SNAPSHOT).splitlines()) - set(api.public_api().splitlines())
    assert lost == {"functional.ratio_equivalent(alpha, temperature=1.0)"}


def test_make_runs_the_commands_that_are_printed():
    recipes = dict(re.findall(r"^(\w+):[^\n]*\n((?:\t[^\n]*\n)+)", text_of(ROOT / "Makefile"), re.MULTILINE))
    recipes = {target: recipe.replace("\t", "").splitlines() for target, recipe in recipes.items()}
    contributing = text_of(ROOT / "CONTRIBUTING.md")
    for target, recipe in recipes.items():
        assert f"`make {target}`" in contributing, target
        assert f"`{' && '.join(recipe)}`" in contributing, target
    # CI calls the same
    (readme,) = re.findall(r"^.*&& (pytest .*)$", text_of(README), re.MULTILINE)
    assert recipes["test"] == [readme]
    assert "\n".join(recipes["lint"]) + "\n" in text_of(ROOT / ".ci" / "run")
    assert "run: make docs" in text_of(ROOT / ".github" / "workflows" / "docs.yml")


def test_the_two_lines_are_the_same_everywhere():
    sentence, trained = blocks(README, "python")
    first, second, *_ = blocks(QUICKSTART, "python")
    assert first == sentence
    assert second.startswith(trained)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_examples_use_no_name_that_the_page_or_the_quickstart_lacks(page):
    before = code(QUICKSTART) if continues_the_quickstart(page) else ""
    nodes = list(ast.walk(ast.parse(f"{before}\n{code(page)}")))
    known = set(dir(builtins))
    known |= {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    known |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    known |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler)}
    known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    assert not {node.id for node in nodes if isinstance(node, ast.Name)} - known


def test_every_printed_command_is_run_by_a_test():
    """`hf-genarm` is run below, scripts by test_commands.py, and what sets up an environment by `.ci`."""
    known = {
        "hf-genarm",
        "make",
        "python",
        "torchrun",
        "pip",
        "git",
        "source",
        "pre-commit",
        "pytest",
        "ruff",
        "bash",
        "curl",
    }
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in (x for x in block.splitlines() if x and not x.startswith((" ", "#", "export "))):
                assert line.split()[0] in known, f"{page.name}: no test runs `{line}`."


def test_links_to_files_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", ROOT / "CODE_OF_CONDUCT.md"]:
        links = re.findall(r"\]\(([^)#\s:]+)(?:#[^)\s]*)?\)", text_of(page))
        for target in [*links, *re.findall(r'(?:src|srcset)="([^":{]+)"', text_of(page))]:
            assert (page.parent / target).exists(), f"{page.name}: `{target}`"


# --- with the model ---


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory):
    """A cache of the Hub that holds the demo model under the id that is printed."""
    folder = tmp_path_factory.mktemp("hub") / f"models--{demo.DEMO_MODEL_ID.replace('/', '--')}"
    revision = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / revision).symlink_to(demo.demo_model())
    other = folder.parent / "models--Qwen--Qwen2.5-0.5B-Instruct"  # a tiny model with other tokens under its name
    (other / "refs").mkdir(parents=True)
    (other / "refs" / "main").write_text(revision)
    save_llama(other / "snapshots" / revision)
    return str(folder.parent)


@pytest.fixture
def workspace(tmp_path):
    """A folder with what a reader has: a clone, and files of pairs and prompts."""
    for name in ("model_cards", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = text_of(PAIRS / "train.jsonl").splitlines()
    for name, part in (("pairs", lines[:12]), ("other-pairs", lines[12:16]), ("prompts", lines[16:19])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    return tmp_path


def save_small_reward_model(folder):
    """Saves the first layers of the demo model: a small model with the same tokens, whose rewards mean nothing."""
    model = AutoModelForCausalLM.from_pretrained(demo.demo_model())
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.demo_model()).save_pretrained(folder)


@pytest.fixture
def python(workspace, hub_cache):
    """Runs code as a reader does who has a clone, a trained adapter and a small reward model."""
    shutil.copytree(ROOT / "model_cards" / "arm-smollm2-135m-sentiment", workspace / "my-arm")
    save_small_reward_model(workspace / "a-small-reward-model")
    return lambda code: run_command(sys.executable, "-c", code, cwd=workspace, HF_HUB_CACHE=hub_cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [x for x in PAGES if blocks(x, "python") and x not in (README, QUICKSTART) and not continues_the_quickstart(x)],
    ids=lambda page: page.stem,
)
def test_python_runs_as_printed(page, python):
    python(code(page))


@pytest.mark.slow
def test_python_runs_as_printed_after_the_quickstart(python):
    """Each page continues from a copy of the variables of the quickstart, which begins with the code of the README."""
    pages = {page.name: code(page) for page in PAGES if blocks(page, "python") and continues_the_quickstart(page)}
    assert len(pages) > 5
    each = "".join(f"exec(compile({text!r}, {name!r}, 'exec'), dict(quickstart))\n" for name, text in pages.items())
    python(f"quickstart = {{}}\nexec({code(QUICKSTART)!r}, quickstart)\n{each}")


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_the_quick_start_of_a_card_runs_as_printed(card, workspace, hub_cache):
    (script,) = blocks(card, "python")
    assert len(run_command(sys.executable, "-c", script, cwd=workspace, HF_HUB_CACHE=hub_cache).strip()) > 3


@pytest.mark.slow
def test_commands_run_as_printed(workspace, hub_cache):
    scripts = Path(sys.executable).parent  # where `hf-genarm` is
    has_harness = importlib.util.find_spec("lm_eval") is not None
    for command in OURS:
        if command.startswith("hf-genarm lm-eval") and not has_harness:
            continue  # which is in the extra `slow`
        if "--output_dir my-arm" in command:
            shutil.rmtree(workspace / "my-arm", ignore_errors=True)  # of the page before
        run_command(
            *shlex.split(command),
            cwd=workspace,
            HF_HUB_CACHE=hub_cache,
            HF_HUB_OFFLINE="1",
            PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}",
        )
    assert (workspace / "my-arm" / "training.png").exists()
    assert (workspace / "evaluation" / "evaluation.json").exists()


# What people type, and the sections that answer it
QUESTIONS = {
    "which strength do I use": ("strength/", "questions/#which-strength-do-i-use"),
    "is it working": ("working/", "questions/#is-it-working"),
    "how do I serve it": ("serving/", "questions/#how-do-i-serve-it"),
    "why is my text odd": ("questions/#why-is-my-text-odd",),
    "can I use my DPO adapter": ("other_adapters/", "questions/#can-i-use-my-dpo-adapter"),
    "which device do commands use": (
        "generate/#base-and-device",
        "questions/#which-base-do-the-commands-steer-and-on-which-device",
    ),
    "what does it cost": ("speed/#what-it-costs", "questions/#what-does-it-cost"),
    "7B on a GPU": ("large_models/#a-7b-model-on-one-gpu", "questions/#does-it-run-on-a-gpu-with-a-7b-model"),
    "other tokenizers": ("questions/#which-tokenizers-fit-together",),
    "70B on several GPUs": ("large_models/#a-70b-model-on-several-gpus",),
    "TRL's server": ("trl/#trls-vllm-server",),
    "licences": ("licences/",),
    "strength": ("strength/", "questions/#which-strength-do-i-use"),
    "odd": ("questions/#why-is-my-text-odd",),
    "serve": ("serving/", "questions/#how-do-i-serve-it"),
    "DPO": ("migration/#dpo", "other_adapters/", "trl/#dpo-adapters"),
    "cost": ("speed/#what-it-costs", "questions/#what-does-it-cost"),
    "7B": ("large_models/#a-7b-model-on-one-gpu", "questions/#does-it-run-on-a-gpu-with-a-7b-model"),
    "70B": ("large_models/#a-70b-model-on-several-gpus",),
    "GPU": ("large_models/", "questions/#does-it-run-on-a-gpu-with-a-7b-model"),
    "multi-GPU": ("large_models/", "questions/#how-do-i-steer-a-70b-model-on-several-gpus-multi-gpu"),
    "tokenizer": ("questions/#which-tokenizers-fit-together",),
    "TRL": ("trl/", "trl/#trls-vllm-server"),
    "licence": ("licences/",),
    "license": ("licences/",),
    "colab": ("examples/", "examples/#start-here"),
}


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_finds_answers(tmp_path):
    pytest.importorskip("mkdocs")
    from lunr import lunr

    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # As the search of the site ranks them
    sections = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    index = lunr(ref="location", fields=[{"field_name": "title", "boost": 10}, "text"], documents=sections)
    for question, places in QUESTIONS.items():
        found = [result["ref"] for result in index.search(question)[:3]]
        assert set(found) & set(places), f"{question}: {found}"

    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    for page in pages:  # a reader's browser asks no other server
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', text_of(page)), page
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(?:https?:)?//', text_of(page)), (
            page
        )
