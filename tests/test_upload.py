"""The shipped reward models as they are published: metadata that the Hub reads, and one script for all of them."""

import json
import subprocess
from pathlib import Path

import pytest
from helpers import run_script
from hub_server import TOKEN, connect
from huggingface_hub import ModelCard

from hf_genarm import RewardInfo

CARDS = Path(__file__).parent.parent / "model_cards"
NAMES = sorted(path.parent.name for path in CARDS.glob("*/genarm_config.json"))


def upload(server, home: Path, *arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, server, home, token)
        return run_script("model_cards.upload", "--namespace", "me", *arguments)


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_of_a_card_is_what_the_hub_reads(name):
    data = ModelCard.load(CARDS / name / "README.md").data
    info = RewardInfo.load(CARDS / name / "genarm_config.json")
    metrics = info.metrics
    assert data.model_name == name
    first, *others = data.eval_results
    # What was learned leads; a reward that was trained as a margin over the base is that.
    learned = {"pair_accuracy"} if info.reference else {"contrast_accuracy"}
    assert {first.metric_type} == learned
    assert [round(metrics[x.metric_type], 4) for x in data.eval_results] == [x.metric_value for x in data.eval_results]
    assert {x.metric_type for x in others} == {"pair_accuracy", "shorter_accuracy"} - learned
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data.base_model_relation, data.library_name) == ("adapter", "peft")
    # Ids of the Hub, where there are any
    assert data.datasets is None or data.datasets == "Anthropic/hh-rlhf"
    assert data.license in ("apache-2.0", "mit")


def test_the_collection_has_all_of_them():
    assert sorted(json.loads((CARDS / "collection.json").read_text())["notes"]) == NAMES


def test_all_are_published_twice_and_are_there_once(server, tmp_path):
    for _ in range(2):
        done = upload(server, tmp_path)
        assert done.returncode == 0, done.stderr
    assert sorted(server.repos) == [f"me/{name}" for name in NAMES]
    for name in NAMES:
        repo = server.repos[f"me/{name}"]
        files = repo.commits[repo.head]
        assert files.keys() == {path.name for path in (CARDS / name).iterdir()}
        card = files["README.md"].decode()
        assert f'"me/{name}"' in card
        assert f"model_cards/{name}" not in card
        assert files["adapter_model.safetensors"] == (CARDS / name / "adapter_model.safetensors").read_bytes()
    (collection,) = server.collections.values()
    assert sorted(item["id"] for item in collection["items"]) == sorted(server.repos)
    assert all(item["note"]["text"] for item in collection["items"])
    assert collection["slug"] in done.stdout


def test_a_dry_run_publishes_nothing(server, tmp_path):
    done = upload(server, tmp_path, "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert all(f"me/{name}: " in done.stdout for name in NAMES)
    assert done.stdout.endswith("Nothing was published.\n")
    assert not server.requests


def test_without_a_token_nothing_is_published(server, tmp_path):
    done = upload(server, tmp_path, token=None)
    assert done.returncode == 1
    assert done.stderr.startswith("upload: there is no token")
    assert not server.requests


def test_a_refused_token_is_reported(server, tmp_path):
    done = upload(server, tmp_path, token="hf_wrong")
    assert done.returncode == 1
    assert done.stderr.startswith("upload: ")
    assert "401" in done.stderr
    assert "Traceback" not in done.stderr
    assert not server.repos
