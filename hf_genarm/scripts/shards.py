"""Saving of answers as they are written: a file for each process, merged at the end."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..files import write_whole

_RUN = "run.json"


class Shards:
    """
    Keeps the answers of a command that may be killed at any time, in a folder next to its output.

    Each answer is one line, with the number of its prompt; a line that was cut off by a kill doesn't count.

    Args:
        output (`str`):
            The file of all answers in the end.
        settings (`dict`):
            The settings that answers depend on. Answers are continued only with the settings that they were begun with.
        rank (`int`):
            The rank of this process.

    Raises:
        ValueError: if the output exists already, can't be written, or was begun with other settings.
    """

    def __init__(self, output: str, settings: dict[str, Any], rank: int):
        self.output, self.folder = Path(output), Path(f"{output}.partial")
        if self.output.is_dir():
            raise ValueError(f"`{output}` is a folder. Name a file in it: `--output`.")
        if self.output.exists() and not self.folder.exists():
            raise ValueError(f"`{output}` is there already. Name another file, or remove it: `--output`.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # the latter for a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"`{self.folder}` can't be made: {reason}. Name another `--output`.") from error
        self._check(settings, is_first=rank == 0)
        self._own = self.folder / f"rank-{rank}.jsonl"
        _drop_cut_line(self._own)

    def _check(self, settings: dict[str, Any], is_first: bool) -> None:
        path = self.folder / _RUN
        if path.exists():
            try:
                begun = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"`{path}` doesn't hold the settings of a run ({error}). Remove `{self.folder}`, or name another "
                    "`--output`."
                ) from error
            different = sorted(name for name in settings if begun.get(name) != settings[name])
            if different:
                name = different[0]
                raise ValueError(
                    f"`{self.folder}` has the answers of a run with {name} {begun.get(name)!r}, but now it is "
                    f"{settings[name]!r}. Continue with the same, remove that folder, or name another `--output`."
                )
        elif is_first:
            write_whole(path, json.dumps(settings, indent=2))

    def done(self) -> set[int]:
        """Returns the numbers of the prompts that are answered, by any process, now or before."""
        return {row["row"] for row in self._answers()}

    def add(self, answers: dict[int, Any]) -> None:
        """Saves answers by the numbers of their prompts; they are on disk when this returns."""
        lines = (json.dumps({"row": row, "completion": x}, ensure_ascii=False) for row, x in answers.items())
        try:
            with open(self._own, "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(self._own)  # there is none where the disk is full
            raise

    def merge(self, rows: list[dict[str, Any]]) -> None:
        """
        Writes the output, the rows of the prompts with their answers, and removes the files of the processes.

        Raises:
            RuntimeError: if an answer is missing or is there twice.
        """
        answers = {}
        for answer in self._answers():
            if answer["row"] in answers:
                raise RuntimeError(
                    f"Two processes have answered prompt {answer['row']}. Remove `{self.folder}`, and start it again."
                )
            answers[answer["row"]] = answer["completion"]
        missing = set(range(len(rows))) - answers.keys()
        if missing:
            raise RuntimeError(f"{len(missing)} of {len(rows)} answers are missing in {self.folder}: start it again.")
        lines = ({**row, "completion": answers[number]} for number, row in enumerate(rows))
        write_whole(self.output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        shutil.rmtree(self.folder)

    def _answers(self) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for path in sorted(self.folder.glob("rank-*.jsonl"))
            for line in path.read_bytes().split(b"\n")[:-1]  # what follows the last one is a line that was cut off
        ]


def digest(rows: list[dict[str, Any]]) -> str:
    """Returns a fingerprint of the rows of prompts."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _drop_cut_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        with open(path, "r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
