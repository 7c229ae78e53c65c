"""Where models are: a separate reward model, and all that belongs to it, is where the base is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_adapter, tiny_llama
from torch.utils import backend_registration

from hf_genarm import AutoregressiveRewardModel, GuidanceWarning
from hf_genarm.decoding.assembly import load_reward_models
from hf_genarm.hub.placement import device_of


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch can't simulate a device",
)
def test_on_a_simulated_device():
    """In a process of its own, as a device that is registered is there for good."""
    folder = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += [str(folder / f"{name}_on_simulated_device.py") for name in ("guided", "reads")]
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "54 passed" in done.stdout


@pytest.fixture
def arms(tmp_path):
    """A reward model in bfloat16, and an adapter on another base, which shares no weights either."""
    tiny_llama(1).to(torch.bfloat16).save_pretrained(tmp_path / "full")
    tiny_llama(2).save_pretrained(tmp_path / "other")
    return str(tmp_path / "full"), save_adapter(str(tmp_path / "other"), str(tmp_path / "adapter"))


def test_what_is_asked_for_is_kept(arms):
    base = tiny_llama(0).to(torch.bfloat16)
    assert AutoregressiveRewardModel.from_pretrained(arms[1], base).model.dtype == torch.bfloat16
    assert AutoregressiveRewardModel.from_pretrained(arms[1], base, dtype=torch.float32).model.dtype == torch.float32
    assert AutoregressiveRewardModel.from_pretrained(arms[0]).model.dtype == torch.bfloat16  # that of its checkpoint


ODD = [True, 1.5, b"cpu", ["cpu"], {"cpu"}, {"": None}, {"": 1.5}, {0: "cpu"}, object()]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
def test_what_can_not_place_a_model(arms, odd):
    with pytest.raises(TypeError, match=r"`device_map` is .*, but must be 'auto', a device .*Leave it out"):
        AutoregressiveRewardModel.from_pretrained(arms[0], device_map=odd)


@pytest.mark.parametrize("place", [None, "auto", "cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}])
def test_what_places_a_model(arms, place):
    assert AutoregressiveRewardModel.from_pretrained(arms[0], device_map=place).model.device == torch.device("cpu")


def test_devices_of_different_kinds_are_warned_of(arms, recwarn):
    base = tiny_llama(0)
    load_reward_models([arms[0]], base, None)
    assert not [x for x in recwarn if issubclass(x.category, GuidanceWarning)]
    with pytest.warns(GuidanceWarning, match="is on `meta`, and the base is on `cpu`.*Leave `device_map` out"):
        load_reward_models([arms[0]], base, None, device_map="meta")


def test_a_base_whose_layers_are_spread():
    base = tiny_llama(0)
    assert device_of(base) == torch.device("cpu")
    base.hf_device_map = {"model.embed_tokens": "cpu", "model.layers.0": "meta", "model.layers.1": "disk"}
    assert str(device_of(base)) == "meta"  # where offloaded weights are computed
    base.hf_device_map = {"": "cpu"}
    assert device_of(base) == torch.device("cpu")
