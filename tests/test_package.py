"""Tests of what is released: the files of wheel and source, the version, the authors and the links."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import hf_genarm

ROOT = Path(__file__).parent.parent


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_genarm.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog.replace("[", "").replace("]", ""), re.MULTILINE)[1] in (
        "Unreleased",
        hf_genarm.__version__,
    )


def test_authors_and_links_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["authors"] == citation["authors"]
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"site_url: {project['urls']['Documentation']}\n" in site
    assert f"repo_url: {project['urls']['Repository']}\n" in site


def test_forms_workflows_and_updates_are_valid_yaml():
    github = ROOT / ".github"
    forms = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in github.rglob("*.yml")}
    assert [forms[name]["name"] for name in ("bug.yml", "feature.yml")] == ["Bug report", "Feature request"]
    for name in ("bug.yml", "feature.yml"):
        assert all(field["attributes"]["label"] for field in forms[name]["body"])
    assert {update["package-ecosystem"] for update in forms["dependabot.yml"]["updates"]} == {"github-actions", "pip"}
    for name in ("ci.yml", "docs.yml", "nightly.yml", "release.yml"):
        assert all(job["steps"] for job in forms[name]["jobs"].values()), name


def test_importing_the_package_warns_of_nothing():
    subprocess.run([sys.executable, "-W", "error", "-c", "import hf_genarm"], check=True)


@pytest.mark.slow
def test_what_is_in_a_release(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)], cwd=ROOT, check=True)
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"hf_genarm-{hf_genarm.__version__}.dist-info"
    tracked = subprocess.run(["git", "ls-files", "hf_genarm"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert names == set(tracked.stdout.split()) | {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    assert {"hf_genarm/py.typed", "hf_genarm/hub/templates/model_card.md"} <= names
    metadata = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode()
    assert f"Version: {hf_genarm.__version__}" in metadata
    with tarfile.open(source) as files:
        in_source = {Path(*Path(name).parts[1:]).as_posix() for name in files.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/tiny.py"} <= in_source
    assert not any(name.startswith(("model_cards/", "examples/")) for name in in_source)
