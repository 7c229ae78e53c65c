"""The settings that a request may give to a server that guides, and the defaults for those that it leaves out."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..decoding.kl_control import check_target_kl
from ..decoding.strength import check_alpha
from .presets import DEFAULT, Preset, PresetFile

_PREFIX = "genarm_"
_PRESET = "preset"
_LONGEST_SHOWN = 200


@dataclass(frozen=True)
class ServerDefaults:
    """
    Holds the settings of a request that gives none, and what is needed to check the settings of one that does.

    Parameters:
        reward_models (tuple of `str`):
            Their names, as a client may read them.
        alpha (tuple of `float`):
            Strength of each reward model.
        target_kl (`float`, *optional*):
            Divergence per token, in nats.
        refuses_bias (`bool`, *optional*, defaults to `False`):
            Whether a logit bias would become part of the reference.
        refuses_beams (`bool`, *optional*, defaults to `False`):
            Whether beam search would choose by log-probabilities that are not guided.
        refuses_seeds (`bool`, *optional*, defaults to `False`):
            Whether a seed could end the engine.
        presets (tuple of `str` and [`~hf_genarm.vllm.presets.Preset`], *optional*):
            Named settings.
        presets_file (`str`, *optional*):
            The file that has them instead.
    """

    reward_models: tuple[str, ...]
    alpha: tuple[float, ...]
    target_kl: float | None
    refuses_bias: bool = False
    refuses_beams: bool = False
    refuses_seeds: bool = False
    presets: tuple[tuple[str, Preset], ...] = ()
    presets_file: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ServerDefaults":
        """Restores the defaults from what `dataclasses.asdict` and JSON have made of them."""
        presets = [(name, Preset(alpha and tuple(alpha), kl)) for name, (alpha, kl) in values["presets"]]
        lists = {"reward_models": values["reward_models"], "alpha": values["alpha"], "presets": presets}
        return cls(**{**values, **{name: tuple(x) for name, x in lists.items()}})

    def current_presets(self) -> dict[str, Preset]:
        """Returns the presets by their names, as the file has them now if they are in one."""
        if self.presets_file is None:
            return dict(self.presets)
        return _preset_file(self.presets_file, len(self.reward_models)).latest()


@dataclass(eq=False)
class RequestSettings:
    """
    Holds the settings of one request; the object itself stands for the request.

    Parameters:
        alpha (tuple of `float`):
            Strength of each reward model.
        target_kl (`float`, *optional*):
            Divergence per token that the strengths are scaled to, in nats.
    """

    alpha: tuple[float, ...]
    target_kl: float | None

    @property
    def is_guided(self) -> bool:
        """Whether any reward model acts on the request."""
        return any(self.alpha)


def request_settings(extra_args: Mapping[str, Any] | None, defaults: ServerDefaults) -> RequestSettings:
    """
    Reads the settings of a request, with the defaults of the server for those that it leaves out.

    Args:
        extra_args (`dict`, *optional*):
            Extra arguments of the sampling parameters, `vllm_xargs` over HTTP. Keys for other purposes are ignored.
        defaults ([`ServerDefaults`]):
            The defaults of the server.

    Raises:
        ValueError: if a key is unknown, or its value is not possible on this server.
    """
    values: dict[str, Any] = {"alpha": defaults.alpha, "target_kl": defaults.target_kl}
    keys, presets = genarm_keys(extra_args), defaults.current_presets()
    named = [keys.pop(_PREFIX + _PRESET)] if _PREFIX + _PRESET in keys else []
    for name in named:
        if not (isinstance(name, str) and name in presets):
            known = ", ".join(f"`{x}`" for x in presets)
            rule = f"one of {known}" if presets else "left out, since this server has no presets"
            raise ValueError(f"`{_PREFIX}{_PRESET}` is {shown(name)}, but must be {rule}.")
    for name in (DEFAULT, *named):
        values |= {key: value for key, value in presets.get(name, Preset())._asdict().items() if value is not None}
    for key, value in keys.items():
        name = key.removeprefix(_PREFIX)
        try:
            values[name] = RULES[name](value, len(defaults.reward_models))
        except ValueError as error:
            loaded = ", ".join(f"`{x}`" for x in defaults.reward_models)
            raise ValueError(
                f"`{key}` is {shown(value)}, but must be {error}. Reward models here: {loaded}."
            ) from error
    return RequestSettings(tuple(values["alpha"]), values["target_kl"])


def genarm_keys(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Finds the keys of a request that set its guidance.

    Raises:
        ValueError: if one looks like such a key, but is unknown.
    """
    known = [_PREFIX + name for name in (*RULES, _PRESET)]
    plain = {re.sub(r"[^a-z]", "", x) for x in (*known, *RULES)}  # `gen-arm.Alpha` is `genarmalpha`
    ours = {}
    for key, value in (extra_args or {}).items():
        letters = re.sub(r"[^a-z]", "", str(key).lower())
        if "genarm" not in letters and letters not in plain:
            continue
        if key not in known:
            raise ValueError(
                f"{shown(key, '`')} is {shown(value)}, but there is no such key. Known are {', '.join(known)}."
            )
        ours[key] = value
    return ours


def shown(value: Any, quote: str | None = None) -> str:
    """Writes a value for an error message, cut after 200 characters."""
    text = repr(value) if quote is None else f"{quote}{value}{quote}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def strengths(value: Any, n_rewards: int) -> list[float]:
    """
    Reads a strength for each reward model from a number or a list.

    Raises:
        ValueError: with the rule that the value breaks.
    """
    numbers = value if isinstance(value, list | tuple) else [value]
    rule = f"a finite number, or a list of {n_rewards}, one for each reward model"
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers):
        raise ValueError(rule)
    try:
        return list(check_alpha(list(value) if isinstance(value, list | tuple) else value, n_rewards))  # type: ignore
    except (ValueError, TypeError) as error:
        raise ValueError(f"{rule}, none larger than 1e6") from error


def divergence(value: Any, n_rewards: int) -> float:
    """
    Reads a divergence per token.

    Raises:
        ValueError: with the rule that the value breaks.
    """
    rule = "a positive, finite number of nats per token"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(rule)
    try:
        check_target_kl(value)
    except ValueError as error:
        raise ValueError(rule) from error
    return float(value)


RULES = {"alpha": strengths, "target_kl": divergence}


@lru_cache
def _preset_file(path: str, n_rewards: int) -> PresetFile:
    """Returns the one reader of a file, which remembers what it has read."""
    return PresetFile(path, RULES, n_rewards)
