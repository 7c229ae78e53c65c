"""Named strengths, which a request asks for by their name: in the configuration, or in a file that may change."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

logger = logging.getLogger("vllm.hf_genarm")

# The preset of requests that name none, if there is one.
DEFAULT = "default"


class Preset(NamedTuple):
    """Holds what a preset sets; `None` is left to the server."""

    alpha: tuple[float, ...] | None = None
    target_kl: float | None = None


def read_presets(given: Any, rules: Mapping[str, Any], n_rewards: int) -> dict[str, Preset]:
    """
    Reads presets from an object, such as `{"kind": {"alpha": [1.0, 0]}}`.

    Args:
        given (`dict`):
            The object.
        rules (`dict`):
            What reads each value of a preset.
        n_rewards (`int`):
            Number of reward models.

    Raises:
        ValueError: with the rule that it breaks.
    """
    if not isinstance(given, Mapping):
        raise ValueError('an object such as {"kind": {"alpha": 1}}, or the name of a JSON file with one')
    presets = {}
    for name, values in given.items():
        if not name or not isinstance(values, Mapping) or not values or not values.keys() <= rules.keys():
            raise ValueError(f"an object of objects with {' or '.join(rules)}, which {name!r} is not")
        read = {}
        for key, value in values.items():
            try:
                read[key] = rules[key](value, n_rewards)
            except ValueError as error:
                raise ValueError(f"such that `{key}` of {name!r} is {error}") from error
        alpha = read.get("alpha")
        presets[name] = Preset(None if alpha is None else tuple(alpha), read.get("target_kl"))
    return presets


class PresetFile:
    """
    Reads presets from a file, again whenever it has changed.

    Args:
        path (`str`):
            The file.
        rules, n_rewards:
            As for [`read_presets`].
    """

    def __init__(self, path: str, rules: Mapping[str, Any], n_rewards: int):
        self._path, self._rules, self._n_rewards = path, rules, n_rewards
        self._version: tuple[int, int, int] | None = None
        self._presets: dict[str, Preset] = {}

    def read(self) -> dict[str, Preset]:
        """
        Reads the file.

        Raises:
            ValueError: with the rule that it breaks, or why it can't be read.
        """
        try:
            with open(self._path, encoding="utf-8") as file:
                given = json.load(file)
        except OSError as error:
            raise ValueError(f"an object, or a file that can be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"an object, or a JSON file ({error})") from error
        return read_presets(given, self._rules, self._n_rewards)

    def latest(self) -> dict[str, Preset]:
        """Returns the presets of the file; those from before if it is wrong now, which is logged once."""
        try:
            status = os.stat(self._path)
            version = status.st_mtime_ns, status.st_size, status.st_ino
        except OSError:
            version = (0, 0, 0)
        if version != self._version:
            self._version = version
            try:
                self._presets = self.read()
            except ValueError as error:
                logger.error("The presets stay as they were, because `%s` must be %s.", self._path, error)
        return self._presets
