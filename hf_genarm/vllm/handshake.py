"""
How the processes that take requests find the defaults of their engine, to check requests against.

vLLM checks requests in its front end, by a class method that is given the request alone, and runs processors in another
process. So the engine leaves a file in a folder of the user for temporary files, and the front end looks for the files
of its engines: of this process, of processes that it has started, or that were started together with it. Where there
are none, the configuration in the environment variable `HF_GENARM_VLLM` is enough.
"""

import atexit
import json
import logging
import multiprocessing
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import psutil

from ..hub.info import RewardInfo
from .request_settings import ServerDefaults
from .server_config import ENVIRONMENT, ServerConfig

logger = logging.getLogger("vllm.hf_genarm")

_OWN_NAME = re.compile(r"(\d+)\.json")
# A folder that was just changed may be changed again without another time.
_SETTLED_NS = 2_000_000_000


class _Notice(NamedTuple):
    """Holds the engines of a process, as they are written in its file."""

    started: float  # when the process was
    processes: list[int]  # itself and those above it
    engines: list[ServerDefaults]


class Handshake:
    """Publishes the defaults of the engines of this process, and finds those of the engines that it serves."""

    def __init__(self) -> None:
        self._own: WeakKeyDictionary[Any, ServerDefaults] = WeakKeyDictionary()
        self._found: dict[int, _Notice] = {}  # by process
        self._seen: int | None = None  # the time of the folder when it was last read
        self._environment: tuple[str, ServerDefaults] | None = None
        self._lock = threading.Lock()

    def post(self, engine: Any, defaults: ServerDefaults) -> None:
        """
        Makes known what an engine of this process offers, for as long as the engine lives.

        Raises:
            ValueError: if the folder for it can't be trusted.
        """
        with self._lock:
            self._own[engine] = defaults
            process = psutil.Process()
            processes = [x.pid for x in [process, *process.parents()]]
            engines = [asdict(x) for x in self._own.values()]
            notice = {"started": process.create_time(), "processes": processes, "engines": engines}
            with _folder() as folder:
                for name, pid in _names(folder):
                    left = _read(folder, name)
                    if left is not None and not _is_alive(pid, left):
                        os.unlink(name, dir_fd=folder)
                _write(folder, f"{process.pid}.json", json.dumps(notice))
        atexit.register(_withdraw, process.pid)

    def find(self) -> list[ServerDefaults]:
        """
        Returns what the engines of this front end offer, different ones once; an empty list if none is known.

        Raises:
            ValueError: if `HF_GENARM_VLLM` is set and wrong.
        """
        with self._lock:
            self._look()
            # One of several front ends is a child of what has started the engine, too.
            ours = {os.getpid(), *([os.getppid()] if multiprocessing.parent_process() else [])}
            notices = [x for x in self._found.values() if not ours.isdisjoint(x.processes)]
            found = list(dict.fromkeys([*self._own.values(), *(x for notice in notices for x in notice.engines)]))
            given = None if found else self._from_environment()
            return found if given is None else [given]

    def _from_environment(self) -> ServerDefaults | None:
        """Returns the defaults of the configuration in the environment, with what its reward models recommend."""
        text = os.environ.get(ENVIRONMENT)
        if text is None:
            return None
        if self._environment is None or self._environment[0] != text:
            config = ServerConfig.from_environment()
            assert config is not None
            try:
                infos = config.infos()
            except (OSError, ValueError):  # what is on the machine of the engine alone
                if config.alpha is None or config.reference == "auto":
                    raise
                infos = [RewardInfo()] * len(config.reward_models)
            self._environment = text, config.with_recommended(infos).server_defaults()
        return self._environment[1]

    def _look(self) -> None:
        """Reads the files of other processes, if the folder has changed."""
        try:
            with _folder() as folder:
                changed = os.fstat(folder).st_mtime_ns
                if changed == self._seen:
                    return
                self._found = {pid: x for pid, x in self._found.items() if _is_alive(pid, x)}
                for name, pid in _names(folder):
                    notice = _read(folder, name)
                    if pid != os.getpid() and notice is not None and _is_alive(pid, notice):
                        self._found[pid] = notice
            self._seen = changed if time.time_ns() - changed > _SETTLED_NS else None
        except (OSError, ValueError) as error:
            logger.warning("The engine can't be looked for: %s", error)


handshake = Handshake()


@contextmanager
def _folder() -> Iterator[int]:
    """
    Opens the folder of this user for temporary files of this package.

    Raises:
        ValueError: if it is a link, or others may write into it.
    """
    path = Path(tempfile.gettempdir(), f"hf_genarm-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ValueError(f"`{path}` is no folder of this user ({error}). Remove it, or set `TMPDIR`.") from error
    try:
        status = os.fstat(folder)
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f"Others may write into `{path}`. Remove it, or set `TMPDIR` to a folder of your own.")
        yield folder
    finally:
        os.close(folder)


def _names(folder: int) -> list[tuple[str, int]]:
    """Lists the files that have the names of notices, with the process of each."""
    matches = [_OWN_NAME.fullmatch(x) for x in os.listdir(folder)]
    return [(x[0], int(x[1])) for x in matches if x is not None]


def _read(folder: int, name: str) -> _Notice | None:
    """Reads a file; `None` if it is a link, is gone, or is no notice."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        os.close(file)
        return None
    try:
        with open(file, encoding="utf-8") as opened:
            values = json.load(opened)
        engines = [ServerDefaults.from_json(x) for x in values["engines"]]
        return _Notice(float(values["started"]), [int(x) for x in values["processes"]], engines)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: int, name: str, text: str) -> None:
    """Writes a file under another name and renames it, so that it is never seen in part."""
    partial = f"{name}.{os.urandom(8).hex()}"
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode=0o600, dir_fd=folder)
    with open(file, "w", encoding="utf-8") as opened:
        opened.write(text)
    os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)


def _withdraw(pid: int) -> None:
    """Removes the file of a process that ends, and not that of a process which was forked off it."""
    if os.getpid() != pid:
        return
    try:
        with _folder() as folder:
            if _read(folder, f"{pid}.json") is not None:
                os.unlink(f"{pid}.json", dir_fd=folder)
    except (OSError, ValueError):  # removed with everything that was in it
        pass


def _is_alive(pid: int, notice: _Notice) -> bool:
    """Returns whether the process that wrote a notice still runs."""
    try:
        return psutil.Process(pid).create_time() == notice.started
    except (psutil.NoSuchProcess, ValueError):
        return False
