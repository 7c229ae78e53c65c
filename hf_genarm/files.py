"""Writing of results: into a folder that was checked before, and complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """
    Gives a path next to `path` to write to, and renames what was written there to `path` at the end.

    After an error nothing is left, and what `path` held before is unchanged; no reader sees a part of it.

    Args:
        path (`str`):
            A file, which may exist, or a folder, which must not. The folder that it is in is made if it is missing.

    Raises:
        OSError: if it can't be written, such as where another process has made the same folder meanwhile.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        yield Path(folder, path.name)
        os.replace(Path(folder, path.name), path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as where the disk is full
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: str | Path, text: str) -> None:
    """Writes a text file that is complete whenever it can be seen."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_output_dir(folder: str | Path) -> None:
    """
    Makes the folder of results, before hours of work whose results would be lost.

    Raises:
        ValueError: if files can't be written there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`{folder}` can't be the folder of the results: {error.strerror}. Name another one."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"`{folder}` can't be the folder of the results: it can't be written to. Name another one.")


def refuse_overwriting(folder: str | Path, names: Iterable[str]) -> None:
    """
    Refuses a folder with results in it, which took hours to make.

    Raises:
        ValueError: if the folder has one of these files.
    """
    there = [name for name in names if Path(folder, name).exists()]
    if there:
        raise ValueError(
            f"`{folder}` has a `{there[0]}` already, which would be overwritten. Name another `--output_dir`, add "
            "`--overwrite_output_dir`, or go on from a checkpoint with `--resume_from_checkpoint`."
        )
