"""A round trip over HTTP: the real client of the Hub, in this process and (slow) in others, against a small server."""

import contextlib
import io
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hub_server import TOKEN, connect, in_environment
from tiny import save_adapter, tiny_llama

HEADER = """
import resource, signal, torch
from transformers import AutoModelForCausalLM
from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo
ids = torch.tensor([[5, 6, 7, 8, 9]])
def logits(arm):
    with torch.no_grad():
        return arm.model(input_ids=ids).logits
"""


def in_this_process(script, server, home, **options):
    """What a script prints, or its error."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        connect(patch, server, home, **options)
        try:
            exec(script, {"__name__": "__main__"})
        except Exception:
            return traceback.format_exc().strip()
    return printed.getvalue().strip()


def in_a_process(script, server, home, **options):
    """The same, from the beginning."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= in_environment(server, home, **options) | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


@pytest.fixture(params=[in_this_process, pytest.param(in_a_process, marks=pytest.mark.slow)], ids=lambda x: x.__name__)
def client(request, server, tmp_path):
    """Runs a script with a cache of the given name, and returns what it prints; on an error, the error."""
    base = tmp_path / "base"
    tiny_llama(0).save_pretrained(base)
    save_adapter(base, tmp_path / "arm")
    header = HEADER + f"base, arm_folder = {str(base)!r}, {str(tmp_path / 'arm')!r}\n"

    def run(script, cache="cache", token=TOKEN, is_offline=False, way=request.param):
        return way(header + script, server, tmp_path / cache, token=token, is_offline=is_offline)

    return run


PUSH = """
arm = AutoregressiveRewardModel.from_pretrained(arm_folder)
arm.info = RewardInfo(beta=0.1, objective="warmth")
arm.push_to_hub("me/arm", private={private})
torch.save(logits(arm), arm_folder + "/logits.pt")
print("pushed")
"""
PULL = """
arm = AutoregressiveRewardModel.from_pretrained("me/arm")
assert torch.equal(logits(arm), torch.load(arm_folder + "/logits.pt")), "other log-probs"
assert arm.info == RewardInfo(beta=0.1, objective="warmth")
print("the same")
"""


def test_push_and_pull(server, client):
    assert client(PUSH.format(private=False)) == "pushed"
    files = server.repos["me/arm"].commits[server.repos["me/arm"].head]
    assert {"adapter_config.json", "adapter_model.safetensors", "genarm_config.json", "README.md"} <= files.keys()
    assert client(PULL, "another cache", token=None) == "the same"
    # The same repository steers, by its id alone.
    steer = """
model = AutoModelForCausalLM.from_pretrained(base)
processor = GenARMLogitsProcessor.from_pretrained("me/arm", base_model=model)
print(processor.engine, model.generate(ids, logits_processor=[processor], max_new_tokens=4).shape[1])
"""
    assert client(steer, "another cache", token=None) == "fused 9"


def test_a_trainer_pushes_the_complete_folder(server, client, tmp_path):
    """`push_to_hub` of the trainer, by the command; what is pulled steers, and its card names the repository."""
    train = """
from datasets import Dataset
from pairs import STANDARD
from tiny import tiny_llama, tiny_tokenizer
from hf_genarm import cli
tiny_tokenizer().save_pretrained(base)
tiny_llama(vocab_size=len(tiny_tokenizer())).save_pretrained(base)
roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
chats = {key: [[{"role": roles[key], "content": x}] for x in texts] for key, texts in STANDARD.items()}
Dataset.from_dict(chats).to_json(arm_folder + "/pairs.jsonl")
arguments = ["--model", base, "--dataset", arm_folder + "/pairs.jsonl", "--output_dir", arm_folder + "/trained"]
arguments += ["--push_to_hub", "--hub_model_id", "me/my-arm", "--custom_generate"]
arguments += ["--max_steps", "1", "--test_size", "1"]
cli.main(["train", *arguments, "--report_to", "none"])
"""
    assert "/trained.\n" in client(train)
    files = server.repos["me/my-arm"].commits[server.repos["me/my-arm"].head]
    expected = {"adapter_config.json", "adapter_model.safetensors", "genarm_config.json", "README.md", "tokenizer.json"}
    assert expected | {"custom_generate/generate.py", "training.png"} <= files.keys()
    assert {name for name in files if name.endswith((".pt", ".bin"))} <= {"training_args.bin"}  # as every Trainer's
    card = files["README.md"].decode()
    assert 'GenARMLogitsProcessor.from_pretrained("me/my-arm"' in card
    assert "base_model_relation" not in card  # the base is a folder here
    pull = """
arm = AutoregressiveRewardModel.from_pretrained("me/my-arm")
assert torch.equal(logits(arm), logits(AutoregressiveRewardModel.from_pretrained(arm_folder + "/trained")))
assert arm.info.metrics["n_pairs"] == 1 and arm.info.dataset == "pairs.jsonl"
print("the same")
"""
    assert client(pull, "another cache", token=None) == "the same"


def test_a_private_repository(client):
    assert client(PUSH.format(private=True)) == "pushed"
    error = client(PULL, "another cache", token=None)
    assert "RepositoryNotFoundError" in error
    assert "private or gated repo" in error
    assert client(PULL, "another cache") == "the same"


def test_a_missing_revision(client):
    assert client(PUSH.format(private=False)) == "pushed"
    error = client('AutoregressiveRewardModel.from_pretrained("me/arm", revision="v2")', "another cache")
    assert "RevisionNotFoundError" in error
    assert "v2" in error


def test_a_connection_that_is_cut(server, client):
    """No half of it is ever loaded, also not without a connection later on; the next download makes it whole."""
    assert client(PUSH.format(private=False)) == "pushed"
    server.cut_after = 100
    error = client(PULL, "another cache")
    assert "Error" in error.splitlines()[-1]
    assert "the same" not in error
    error = client(PULL, "another cache", is_offline=True)
    assert "Error" in error.splitlines()[-1]
    assert "the same" not in error
    server.cut_after = None
    assert client(PULL, "another cache") == "the same"


@pytest.mark.slow
def test_a_full_disk(client):
    """Files can't grow beyond a limit, as on a disk without space; neither could those in which pytest keeps output."""
    assert client(PUSH.format(private=False)) == "pushed"
    limit = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""
    error = client(limit + PULL, "another cache", way=in_a_process)
    assert "OSError" in error.splitlines()[-1]
    assert client(PULL, "another cache") == "the same"


def test_custom_generate_takes_the_reward_model_of_its_own_revision(server, client):
    """Code and weights are of one commit, though the repository has moved on."""
    push = """
import pathlib
from huggingface_hub import HfApi
from hf_genarm.hub.card import write_custom_generate
from tiny import save_adapter
write_custom_generate(arm_folder, "me/arm")
for seed in (0, 1):
    save_adapter(base, arm_folder, seed)
    HfApi().create_repo("me/arm", exist_ok=True)
    HfApi().upload_folder(repo_id="me/arm", folder_path=arm_folder)
print("pushed")
"""
    assert client(push) == "pushed"
    *_, first, second = server.repos["me/arm"].commits
    compare = f"""
model = AutoModelForCausalLM.from_pretrained(base)
texts = []
for revision in ("{first}", "{second}"):
    options = {{"max_new_tokens": 12, "do_sample": False}}
    custom = model.generate(ids, custom_generate="me/arm", trust_remote_code=True, revision=revision, **options)
    processor = GenARMLogitsProcessor.from_pretrained("me/arm", base_model=model, revision=revision)
    assert custom.tolist() == model.generate(ids, logits_processor=[processor], **options).tolist(), revision
    texts.append(custom.tolist())
assert texts[0] != texts[1]
newest = model.generate(ids, custom_generate="me/arm", trust_remote_code=True, **options)
assert newest.tolist() == texts[1]
print("the same")
"""
    assert client(compare, "another cache", token=None) == "the same"
