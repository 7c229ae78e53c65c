"""`hf-genarm publish`: what is uploaded, and what the card says there."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import run
from hub_server import Repo, connect
from huggingface_hub import ModelCard
from tiny import save_adapter, save_llama

from hf_genarm import RewardInfo, cli
from hf_genarm.demo import DEMO_MODEL_ID, hub_id, loadable_name
from hf_genarm.hub.card import requirement, reward_model_card, write_custom_generate

BASE = "someone/a-model"


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server as the Hub of this process."""
    connect(monkeypatch, server, tmp_path / "home")
    return server


@pytest.fixture
def arm(tmp_path, monkeypatch):
    """The folder of a training, `my-arm`: an adapter on a folder, with a card, checkpoints and pickles."""
    monkeypatch.chdir(tmp_path)
    base = save_llama(tmp_path / "base")
    folder = Path(save_adapter(base, "my-arm"))
    info = RewardInfo(beta=0.1, objective="warmth")
    info.save(folder)
    reward_model_card(info, "my-arm", "my-arm", is_adapter=True).save(folder / "README.md")
    write_custom_generate(folder, str(folder.absolute()))
    shutil.copytree(folder, folder / "checkpoint-2")
    (folder / "training.png").write_bytes(b"\x89PNG")
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "eval_results.json"):
        (folder / name).write_bytes(b"{}")
    return folder


def files_of(server, repo_id="me/warm"):
    repo = server.repos[repo_id]
    return repo.commits[repo.head]


def refused(*call, capsys):
    assert cli.main([str(x) for x in call]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_uploaded(arm, hub, capsys):
    options = ["--base", BASE, "--license", "mit", "--private"]
    run("publish", "my-arm", "me/warm", *options, "--dry_run")
    listed = capsys.readouterr().out
    assert not hub.repos
    assert listed.endswith("This would be me/warm. Nothing was published.\n")

    run("publish", "my-arm", "me/warm", *options)
    assert hub.repos["me/warm"].private
    assert "POST /api/validate-yaml" in hub.requests
    files = files_of(hub)
    uploaded = {"README.md", "genarm_config.json", "adapter_config.json", "adapter_model.safetensors", "training.png"}
    uploaded |= {"custom_generate/generate.py", "custom_generate/requirements.txt"}
    assert files.keys() - {".gitattributes"} == uploaded
    assert set(re.findall(r"^  (\S+)  ", listed, re.MULTILINE)) == uploaded
    assert (
        "Not uploaded: checkpoint-2, eval_results.json, optimizer.pt, trainer_state.json, training_args.bin" in listed
    )
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(files["genarm_config.json"])["base_model"] == BASE
    assert '"me/warm"' in files["custom_generate/generate.py"].decode().replace("'", '"')

    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.base_model, card.data.base_model_relation) == ("mit", BASE, "adapter")
    assert (card.data.model_name, "genarm" in card.data.tags) in (("warm", True), (None, True))
    assert "\n# warm\n" in card.text
    assert 'from_pretrained("me/warm"' in card.text
    assert "my-arm" not in card.text
    assert "<the model to be steered>" not in card.text

    assert ModelCard.load(arm / "README.md").data.license is None, "The folder stays as it is."
    assert json.loads((arm / "adapter_config.json").read_text())["base_model_name_or_path"] != BASE


def test_what_must_be_known(arm, hub, tmp_path, capsys, monkeypatch):
    call = ["publish", "my-arm", "me/warm"]
    assert re.search("`my-arm` is an adapter on `.*base`, a folder.*`--base`", refused(*call, capsys=capsys))
    assert "names a `license`" in refused(*call, "--base", BASE, capsys=capsys)
    assert "`repo_id` is `warm`" in refused("publish", "my-arm", "warm", capsys=capsys)
    assert "`no` has no weights in safetensors" in refused("publish", "no", "me/warm", capsys=capsys)
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no token" in refused(*call, "--base", BASE, "--license", "mit", capsys=capsys)
    assert not hub.repos


def test_the_licence_of_the_base(arm, hub):
    """With the name and the address that some licences have."""
    hub.repos[BASE] = Repo(private=False)
    data = "license: other\nlicense_name: a-licence\nlicense_link: LICENSE\n"
    hub.repos[BASE].commits["1" * 40] = {"README.md": f"---\n{data}---\n".encode()}
    run("publish", "my-arm", "me/warm", "--base", BASE)
    card = ModelCard(files_of(hub)["README.md"].decode()).data
    assert (card.license, card.license_name, card.license_link) == ("other", "a-licence", "LICENSE")


def test_a_dry_run_needs_no_network(arm, capsys):
    """The base that examples run on is known, with its licence."""
    run("publish", "my-arm", "me/warm", "--base", DEMO_MODEL_ID, "--dry_run")
    printed = capsys.readouterr().out
    assert f"Licence: apache-2.0. Base: {DEMO_MODEL_ID}." in printed
    assert "The card was not checked, because the Hub can't be reached" in printed


def test_a_reward_model_without_a_card_gets_one(arm, hub):
    (arm / "README.md").unlink()
    run("publish", "--arm", "my-arm", "--repo_id", "me/warm", "--base", BASE, "--license", "mit")
    card = ModelCard(files_of(hub)["README.md"].decode())
    assert "**warmth**" in card.text
    assert card.data.license == "mit"


def test_hub_ids_of_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_GENARM_SMOKE", "1")
    folder = loadable_name(DEMO_MODEL_ID)
    assert Path(folder).is_dir()
    assert hub_id(folder) == DEMO_MODEL_ID
    assert hub_id("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123") == "org/name"
    assert [hub_id(x) for x in ("org/name", "gpt2", "", None, str(tmp_path), "/no/where", "a/b/c")] == [
        "org/name",
        "gpt2",
        *[None] * 5,
    ]
    assert loadable_name("org/name") == "org/name"


def test_what_others_install(tmp_path, monkeypatch):
    """From where this installation came from: an index, or else the repository."""
    record = tmp_path / "hf_genarm-0.3.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: hf_genarm\nVersion: 0.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert requirement("demo") == "hf_genarm[demo]>=0.3"
    (record / "direct_url.json").write_text('{"url": "file:///home/me/hf_genarm", "dir_info": {}}')
    assert requirement("demo") == "hf_genarm[demo] @ git+https://github.com/hf-genarm/hf_genarm"
