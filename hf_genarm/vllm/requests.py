"""What a server is configured with, and what a request may ask of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..decoding.kl_control import check_target_kl
from ..decoding.recommended import recommended_alpha, wanted_reference
from ..decoding.strength import check_alpha
from ..hub.info import RewardInfo

_PREFIX = "genarm_"


@dataclass
class ServerConfig:
    """
    `additional_config={"genarm": {...}}` of an engine.

    Parameters:
        reward_models (`str` or list of `str`):
            Hub ids or folders.
        alpha (`float` or list of `float`, *optional*):
            Strengths of requests that give none. Defaults to what the reward models recommend, or else 1.
        target_kl (`float`, *optional*):
            Divergence per token of requests that give none.
        reference (`str`, *optional*, defaults to `"auto"`):
            `"base"`, or the Hub id or folder of the model that all reward models are contrasted with; `None` for none.
            `"auto"` is what they recommend, or else were trained with.
        dtype (`str`, *optional*):
            Of the reward models, such as `"float32"`. Defaults to that of the engine.
        slots (`int`, *optional*):
            Number of texts that reward models hold at once. Defaults to, and is at the least, `max_num_seqs` of the
            engine; more let requests that were preempted, and conversations that go on, find what was read.
        chunk (`int`, *optional*, defaults to 512):
            The largest number of tokens in a forward pass of a reward model.

    Raises:
        ValueError: if a value is not what its field holds.
    """

    reward_models: Any = None
    alpha: Any = None
    target_kl: Any = None
    reference: Any = "auto"
    dtype: Any = None
    slots: Any = None
    chunk: Any = 512

    def __post_init__(self) -> None:
        names = [self.reward_models] if isinstance(self.reward_models, str) else self.reward_models
        if not isinstance(names, list) or not names or not all(isinstance(x, str) and x for x in names):
            raise self._wrong("reward_models", "a Hub id or a folder, or a list of them")
        self.reward_models = names
        for name in ("alpha", "target_kl"):
            try:
                value = getattr(self, name)
                setattr(self, name, _RULES[name](value, len(names)) if value is not None else None)
            except ValueError as error:
                raise self._wrong(name, str(error)) from error
        if self.reference is not None and not (isinstance(self.reference, str) and self.reference):
            raise self._wrong("reference", '"auto", "base", a Hub id or a folder')
        if self.dtype is not None and not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise self._wrong("dtype", 'the name of a dtype, such as "float32"')
        for name, missing in (("slots", self.slots is None), ("chunk", False)):
            value = getattr(self, name)
            if not missing and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise self._wrong(name, "a positive whole number")

    @classmethod
    def of(cls, additional_config: Any) -> "ServerConfig":
        """
        Raises:
            ValueError: if there is none, or it has unknown keys.
        """
        given = additional_config.get("genarm") if isinstance(additional_config, Mapping) else None
        example = '--additional-config \'{"genarm": {"reward_models": "FOLDER_OR_HUB_ID"}}\''
        if not isinstance(given, Mapping):
            raise ValueError(f"`additional_config` has no object `genarm`. Say which reward models to load: {example}.")
        known = [x.name for x in fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(f"`genarm` of `additional_config` has the key `{key}`, but knows {known} only.")
        return cls(**given)

    def with_recommended(self, infos: Sequence[RewardInfo]) -> "ServerConfig":
        """
        With the settings that were left open, as the reward models say.

        Raises:
            ValueError: if they want different references.
        """
        return replace(
            self,
            alpha=recommended_alpha(infos) if self.alpha is None else self.alpha,
            reference=wanted_reference(infos, self.reward_models) if self.reference == "auto" else self.reference,
        )

    def _wrong(self, name: str, rule: str) -> ValueError:
        return ValueError(
            f"`{name}` in `genarm` of `additional_config` is {getattr(self, name)!r}, but must be {rule}."
        )


@dataclass(frozen=True)
class Offer:
    """
    What requests have to know of a server, and all that is needed to check them.

    Parameters:
        reward_models (tuple of `str`):
            Their names.
        alpha (tuple of `float`), target_kl (`float`, *optional*):
            Defaults.
        refuses_bias (`bool`):
            Whether a logit bias would become part of the reference.
    """

    reward_models: tuple[str, ...]
    alpha: tuple[float, ...]
    target_kl: float | None
    refuses_bias: bool

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Offer":
        reward_models, alpha = tuple(values["reward_models"]), tuple(values["alpha"])
        return cls(reward_models, alpha, values["target_kl"], values["refuses_bias"])


@dataclass(eq=False)
class Wish:
    """What a request asks for: a strength for each reward model, and the divergence that they are scaled to, if any."""

    alpha: tuple[float, ...]
    target_kl: float | None

    @property
    def is_guided(self) -> bool:
        return any(self.alpha)


def wish_of(extra_args: Mapping[str, Any] | None, offer: Offer) -> Wish:
    """
    Args:
        extra_args (`dict`, *optional*):
            Of the sampling parameters, `vllm_xargs` over HTTP. Keys of others are ignored.
        offer ([`Offer`]):
            Of the server.

    Raises:
        ValueError: if a key that begins with `genarm_` is unknown, or its value not possible here.
    """
    values: dict[str, Any] = {"alpha": offer.alpha, "target_kl": offer.target_kl}
    for key, value in keys_of(extra_args).items():
        name = key.removeprefix(_PREFIX)
        try:
            values[name] = _RULES[name](value, len(offer.reward_models))
        except ValueError as error:
            loaded = ", ".join(f"`{x}`" for x in offer.reward_models)
            raise ValueError(f"`{key}` is {value!r}, but must be {error}. Reward models here: {loaded}.") from error
    return Wish(tuple(values["alpha"]), values["target_kl"])


def keys_of(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    The keys of a request that are meant for here.

    Raises:
        ValueError: if one of them is unknown.
    """
    ours = {key: value for key, value in (extra_args or {}).items() if "genarm" in key.lower()}
    known = [_PREFIX + name for name in _RULES]
    for key, value in ours.items():
        if key not in known:
            raise ValueError(f"`{key}` is {value!r}, but there is no such key. Known are {', '.join(known)}.")
    return ours


def _strengths(value: Any, n_rewards: int) -> list[float]:
    numbers = value if isinstance(value, list | tuple) else [value]
    rule = f"a finite number, or a list of {n_rewards}, one for each reward model"
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers):
        raise ValueError(rule)
    try:
        return list(check_alpha(list(value) if isinstance(value, list | tuple) else value, n_rewards))  # type: ignore
    except (ValueError, TypeError) as error:
        raise ValueError(f"{rule}, none larger than 1e6") from error


def _divergence(value: Any, n_rewards: int) -> float:
    rule = "a positive, finite number of nats per token"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(rule)
    try:
        check_target_kl(value)
    except ValueError as error:
        raise ValueError(rule) from error
    return float(value)


_RULES = {"alpha": _strengths, "target_kl": _divergence}
