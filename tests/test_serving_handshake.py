"""How a front end finds the defaults of its own engines, and of no others, whatever is in the folder between them."""

import json
import multiprocessing
import os
import threading

import pytest

from hf_genarm.vllm import handshake as module
from hf_genarm.vllm.handshake import Handshake
from hf_genarm.vllm.request_settings import ServerDefaults
from hf_genarm.vllm.server_config import ENVIRONMENT, ServerConfig

ONE = ServerDefaults(("kind",), (0.25,), None, refuses_bias=True)
TWO = ServerDefaults(("kind", "brief"), (1.0, 0.0), 0.5)


class Engine:
    """What posts, and keeps its defaults known while it lives."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"hf_genarm-{os.getuid()}"


def _post_and_wait(defaults, posted, done):
    engine = Engine()
    Handshake().post(engine, defaults)
    posted.set()
    done.wait(60)


class OtherProcess:
    """An engine in a child of this process, until it is ended."""

    def __init__(self, defaults):
        context = multiprocessing.get_context("fork")
        posted, self.done = context.Event(), context.Event()
        self.process = context.Process(target=_post_and_wait, args=(defaults, posted, self.done))
        self.process.start()
        assert posted.wait(60)

    def __enter__(self):
        return self.process.pid

    def __exit__(self, *_):
        self.done.set()
        self.process.join()


def test_a_front_end_finds_its_own_engine(folder, monkeypatch):
    front_end = Handshake()
    assert front_end.find() == []
    with OtherProcess(ONE):
        assert front_end.find() == [ONE]
        # A process that has nothing to do with the engine does not find it.
        with monkeypatch.context() as stranger:
            stranger.setattr(module.os, "getpid", lambda: 2**30)
            assert Handshake().find() == []
    assert front_end.find() == []


def test_two_engines_keep_their_own_defaults(folder):
    front_end, engine, other = Handshake(), Engine(), Engine()
    front_end.post(engine, ONE)
    front_end.post(other, TWO)
    assert front_end.find() == [ONE, TWO]
    with OtherProcess(TWO):
        assert front_end.find() == [ONE, TWO]
    del other
    assert front_end.find() == [ONE]


def test_a_file_that_was_tidied_up_does_not_make_a_front_end_forget(folder):
    front_end = Handshake()
    with OtherProcess(ONE) as pid:
        assert front_end.find() == [ONE]
        (folder / f"{pid}.json").unlink()
        assert front_end.find() == [ONE]
        folder.rmdir()
        assert front_end.find() == [ONE]
    front_end.post(Engine(), TWO)
    assert front_end.find() == []  # both have ended


def test_a_file_of_a_process_that_is_gone_is_removed_and_others_stay(folder):
    Handshake().post(Engine(), ONE)
    own = folder / f"{os.getpid()}.json"
    written = json.loads(own.read_text(encoding="utf-8"))
    for name in ("1.json", "4000000.json"):  # of another process, and of one that is gone
        (folder / name).write_text(json.dumps(written | {"started": 1.0}), encoding="utf-8")
    foreign = {"notes.json": "{}", "4000001.json": "{}", "4000002.json": "not JSON", "4000003.jsonl": "{}"}
    for name, text in foreign.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "4000004.json").mkdir()
    Handshake().post(Engine(), TWO)
    assert {x.name for x in folder.iterdir()} == {own.name, "4000004.json", *foreign}


def test_links_are_not_followed(folder, tmp_path):
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    victim = treasure / "4000000.json"
    victim.write_text(json.dumps({"started": 1.0, "processes": [os.getpid()], "engines": []}), encoding="utf-8")
    folder.symlink_to(treasure)
    with pytest.raises(ValueError, match=r"is no folder of this user .* Remove it, or set `TMPDIR`"):
        Handshake().post(Engine(), ONE)
    assert Handshake().find() == []
    assert [x.name for x in treasure.iterdir()] == [victim.name]
    folder.unlink()
    folder.mkdir(mode=0o700)
    (folder / "4000000.json").symlink_to(victim)
    Handshake().post(Engine(), ONE)
    assert victim.exists()
    assert (folder / "4000000.json").is_symlink()


def test_a_folder_that_others_may_write_into_is_not_used(folder):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="Others may write into"):
        Handshake().post(Engine(), ONE)


def test_files_that_are_rewritten_are_read_whole(folder):
    """Both are seen, over and over, and nothing else."""
    with OtherProcess(ONE) as pid:
        path, done, seen = folder / f"{pid}.json", threading.Event(), []
        values = json.loads(path.read_text(encoding="utf-8"))

        def look():
            while not done.is_set():
                seen.append(tuple(Handshake().find()))

        readers = [threading.Thread(target=look) for _ in range(2)]
        for reader in readers:
            reader.start()
        for index in range(300):
            defaults = TWO if index % 2 else ONE
            text = json.dumps(values | {"engines": [module.asdict(defaults)]})
            with module._folder() as opened:
                module._write(opened, path.name, text)
        done.set()
        for reader in readers:
            reader.join()
        assert seen
        assert set(seen) <= {(ONE,), (TWO,)}


def test_what_was_found_is_not_looked_for_again(folder, monkeypatch):
    front_end = Handshake()
    with OtherProcess(ONE):
        os.utime(folder, ns=(0, 0))  # long ago
        assert front_end.find() == [ONE]
        monkeypatch.setattr(module, "_read", None)
        assert front_end.find() == [ONE]
        os.utime(folder)
        with pytest.raises(TypeError):
            front_end.find()


def test_the_environment_is_enough(folder, monkeypatch, tmp_path):
    config = {"reward_models": [str(tmp_path), str(tmp_path)], "reference": "base", "alpha": [1, 0]}
    monkeypatch.setenv(ENVIRONMENT, json.dumps(config))
    (defaults,) = Handshake().find()
    assert defaults.alpha == (1.0, 0.0)
    assert defaults.refuses_bias
    engine = Engine()
    here = Handshake()
    here.post(engine, ONE)
    assert here.find() == [ONE]  # which knows more than its configuration
    assert ServerConfig.from_additional_config({"genarm": config}).alpha == [1.0, 0.0]
    with pytest.raises(ValueError, match=f"`{ENVIRONMENT}` is not the object `genarm`"):
        ServerConfig.from_additional_config({"genarm": {**config, "alpha": 1}})
    monkeypatch.setenv(ENVIRONMENT, "{")
    with pytest.raises(ValueError, match="which is not JSON"):
        Handshake().find()
