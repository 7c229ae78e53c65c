"""
How the processes that take requests come to know what the engine offers.

vLLM checks requests in its front end, by a class method that is given the request alone, and runs processors in another
process. So the engine leaves a notice in a folder of the user for temporary files, and the front end looks for that of
its own engine: of a process that it has started, or that was started beside it.
"""

import atexit
import json
import multiprocessing
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from .requests import Offer


def post(offer: Offer) -> None:
    """Leaves the notice of this process, in place of an earlier one, for as long as it lives."""
    folder = _folder()
    for path in folder.glob("*.json"):
        if not _is_alive(path):
            path.unlink(missing_ok=True)
    process = psutil.Process()
    processes = [x.pid for x in [process, *process.parents()]]
    notice = {"started": process.create_time(), "processes": processes, "offer": asdict(offer)}
    path, partial = folder / f"{process.pid}.json", folder / f"{process.pid}.partial"
    partial.write_text(json.dumps(notice), encoding="utf-8")
    partial.replace(path)
    atexit.register(path.unlink, missing_ok=True)


def find() -> Offer | None:
    """What the engine of this process offers, the latest if there are several; `None` if none is known here."""
    alive = [path for path in _folder().glob("*.json") if _is_alive(path)]
    notices = [_read(path) for path in sorted(alive, key=lambda path: path.stat().st_mtime)]
    # One of several front ends is a child of what has started the engine, too.
    for pid in [os.getpid(), *([os.getppid()] if multiprocessing.parent_process() else [])]:
        for notice in reversed(notices):
            if pid in notice["processes"]:
                return Offer.from_json(notice["offer"])
    return None


def _folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"hf_genarm-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"`{folder}` belongs to another user. Set `TMPDIR` to a folder of your own.")
    return folder


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _is_alive(path: Path) -> bool:
    try:
        return psutil.Process(int(path.stem)).create_time() == _read(path).get("started")
    except (psutil.NoSuchProcess, ValueError):
        return False
