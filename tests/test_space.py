"""An exported Space starts as Hugging Face starts it: by `python app.py` in its folder, with the base from the Hub."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from tiny import save_adapter, save_llama

from hf_genarm import cli

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture
def cache(tmp_path):
    """A cache of the Hub that holds a tiny base, `me/base`."""
    repository = tmp_path / "hub" / "models--me--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    save_llama(repository / "snapshots" / ("0" * 40), 3, max_position_embeddings=2048)
    return tmp_path / "hub"


def test_an_exported_space_starts_and_shows_what_it_was_exported_with(cache, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    adapter = save_adapter(str(next((cache / "models--me--base" / "snapshots").iterdir())), str(tmp_path / "my-arm"))
    space = tmp_path / "space"
    options = ["--base", "me/base", "--arm", adapter, "--sentence", "You are kind.", "--export", str(space)]
    assert cli.main(["demo", *options]) == 0
    for line in (space / "requirements.txt").read_text(encoding="utf-8").splitlines():
        Requirement(line)
    assert (space / RepoCard.load(space / "README.md", repo_type="space").data["app_file"]).exists()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    environment |= {
        "HF_HUB_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
    }  # in place of `pip install -r requirements.txt`
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=space, env=os.environ | environment, stdout=file, stderr=file
        )
    try:
        end = time.monotonic() + 600
        while "Running on local URL" not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=60) as response:
            page = response.read().decode()
        assert "You are kind." in page
        assert "my-arm" in page
    finally:
        server.terminate()
        server.wait(30)
