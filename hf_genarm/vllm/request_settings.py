"""The settings that a request may give to a server that guides, and the defaults for those that it leaves out."""

import json
import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from ..decoding.kl_control import check_target_kl
from ..decoding.strength import check_alpha
from ..hub.sentence import DEFAULT_STRENGTH
from .presets import DEFAULT, Preset, PresetFile

_PREFIX = "genarm_"
_PRESET = "preset"
# What a client gives; what the front end makes of it, or a client gives itself; and the strengths of both.
SENTENCES, PROMPTS, SENTENCE_ALPHA = (f"{_PREFIX}{x}" for x in ("sentences", "prompts", "sentence_alpha"))
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
        sentences (tuple of `str` or `None`, *optional*):
            For each reward model, its sentence if it is one.
        max_sentences (`int`, *optional*, defaults to 0):
            The largest number of sentences that a request may add.
        max_length (`int`, *optional*):
            The largest number of tokens in a text, if known.
        vocab_size (`int`, *optional*):
            Number of logits of the served model, if known.
    """

    reward_models: tuple[str, ...]
    alpha: tuple[float, ...]
    target_kl: float | None
    refuses_bias: bool = False
    refuses_beams: bool = False
    refuses_seeds: bool = False
    presets: tuple[tuple[str, Preset], ...] = ()
    presets_file: str | None = None
    sentences: tuple[str | None, ...] = ()
    max_sentences: int = 0
    max_length: int | None = None
    vocab_size: int | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ServerDefaults":
        """Restores the defaults from what `dataclasses.asdict` and JSON have made of them."""
        presets = [(name, Preset(alpha and tuple(alpha), kl)) for name, (alpha, kl) in values["presets"]]
        lists = {name: values[name] for name in ("reward_models", "alpha", "sentences")} | {"presets": presets}
        return cls(**{**values, **{name: tuple(x) for name, x in lists.items()}})

    def current_presets(self) -> dict[str, Preset]:
        """Returns the presets by their names, as the file has them now if they are in one."""
        if self.presets_file is None:
            return dict(self.presets)
        return _preset_file(self.presets_file, len(self.reward_models)).latest()

    def sentence_places(self, n_own: int) -> list[int]:
        """Returns the places of sentences among the strengths of a request: the server's, then `n_own` of its own."""
        n_rewards = len(self.reward_models)
        of_server = [index for index, sentence in enumerate(self.sentences) if sentence is not None]
        return [*of_server, *range(n_rewards, n_rewards + n_own)]


@dataclass(eq=False)
class RequestSettings:
    """
    Holds the settings of one request; the object itself stands for the request.

    Parameters:
        alpha (tuple of `float`):
            Strength of each reward model, and then of each sentence that the request adds.
        target_kl (`float`, *optional*):
            Divergence per token that the strengths are scaled to, in nats.
        prompts (`dict`):
            What sentences read before the answer: token ids, by their place in `alpha`, if their strength is not 0.
    """

    alpha: tuple[float, ...]
    target_kl: float | None
    prompts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def is_guided(self) -> bool:
        """Whether any reward model acts on the request."""
        return any(self.alpha)

    def owner(self, index: int) -> Hashable:
        """Returns what stands for the text that a reward model reads for this request."""
        return (self, index) if index in self.prompts else self

    @property
    def owners(self) -> list[Hashable]:
        """What stands for its texts: that of the request, and one for each prompt."""
        return [self, *((self, index) for index in self.prompts)]


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
    keys = genarm_keys(extra_args)
    if SENTENCES in keys:
        rule = (
            "in a request to `/v1/chat/completions` or `/v1/completions` of a server that was started with `python -m "
            f"hf_genarm.vllm`, which puts sentences into its prompt. Elsewhere, give what they read: `{PROMPTS}`"
        )
        if not defaults.max_sentences:
            rule = "left out, since this server takes none: it was started without `max_sentences` in `genarm`"
        raise ValueError(f"`{SENTENCES}` is {shown(keys[SENTENCES])}, but must be {rule}.")
    given = keys.pop(PROMPTS, None)
    n_named = len(defaults.sentence_places(0))
    prompts: list[tuple[int, ...]] = [()] * n_named if given is None else _prompts(given, n_named, defaults)
    settings = request_strengths(keys, defaults, len(prompts) - n_named)
    of_places = dict(zip(defaults.sentence_places(len(prompts) - n_named), prompts, strict=True))
    for place, prompt in of_places.items():
        if settings.alpha[place] and not prompt:
            named = f"`{defaults.reward_models[place]}`" if place < len(defaults.reward_models) else "of the request"
            raise ValueError(
                f"The sentence {named} has strength {settings.alpha[place]:g}, but what it reads is not there. The "
                "front end puts it into requests to `/v1/chat/completions` and `/v1/completions`, if the server was "
                f"started with `python -m hf_genarm.vllm`. Elsewhere, give the token ids of its prompt in `{PROMPTS}`, "
                "or set its strength to 0."
            )
    return replace(settings, prompts={place: x for place, x in of_places.items() if settings.alpha[place]})


def request_strengths(keys: dict[str, Any], defaults: ServerDefaults, n_own: int) -> RequestSettings:
    """
    Reads the settings of a request except what its sentences read.

    Args:
        keys (`dict`):
            What [`genarm_keys`] has found, without sentences and prompts.
        defaults ([`ServerDefaults`]):
            The defaults of the server.
        n_own (`int`):
            Number of sentences that the request adds.

    Raises:
        ValueError: as for [`request_settings`].
    """
    values: dict[str, Any] = {"alpha": defaults.alpha, "target_kl": defaults.target_kl}
    keys, presets = dict(keys), defaults.current_presets()
    own = _own_strengths(keys, n_own)
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
            loaded = ", ".join(f"`{x}`" for x in defaults.reward_models) or "none"
            raise ValueError(
                f"`{key}` is {shown(value)}, but must be {error}. Reward models here: {loaded}."
            ) from error
    return RequestSettings((*values["alpha"], *own), values["target_kl"])


def _own_strengths(keys: dict[str, Any], n_own: int) -> list[float]:
    """Takes the strengths of the sentences that a request adds out of its keys."""
    if SENTENCE_ALPHA not in keys:
        return [DEFAULT_STRENGTH] * n_own
    value = keys.pop(SENTENCE_ALPHA)
    try:
        return strengths(value, n_own, "sentence of the request")
    except ValueError as error:
        raise ValueError(f"`{SENTENCE_ALPHA}` is {shown(value)}, but must be {error}.") from error


def _prompts(value: Any, n_named: int, defaults: ServerDefaults) -> list[tuple[int, ...]]:
    """Reads what sentences read, from lists of token ids or JSON of them: for those of the server, then the others."""
    most, size = n_named + defaults.max_sentences, defaults.vocab_size or math.inf
    try:
        prompts = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        prompts = None
    is_list = isinstance(prompts, list | tuple) and all(isinstance(x, list | tuple) for x in prompts)
    if not is_list or not all(type(x) is int and 0 <= x < size for prompt in prompts for x in prompt):
        rule = "a list of prompts, each a list of token ids" + (f" below {size}" if size < math.inf else "")
    elif not n_named <= len(prompts) <= most:
        rule = f"{n_named} prompts, one for each sentence of the server, and up to {defaults.max_sentences} more"
    else:
        return [tuple(x) for x in prompts]
    raise ValueError(f"`{PROMPTS}` is {shown(value)}, but must be {rule}.")


def refuse_long(settings: RequestSettings, max_tokens: int | None, defaults: ServerDefaults) -> None:
    """
    Checks that what sentences read, and the answer after it, fit into the texts of a server.

    Raises:
        ValueError: if they don't.
    """
    longest = max(map(len, settings.prompts.values()), default=0)
    if longest and defaults.max_length is not None and longest + (max_tokens or math.inf) > defaults.max_length:
        raise ValueError(
            f"`max_tokens` is {max_tokens}, but must be a number up to {defaults.max_length - longest}: with its "
            f"sentence, the prompt has {longest} tokens, and the server reads {defaults.max_length}."
        )


def genarm_keys(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Finds the keys of a request that set its guidance.

    Raises:
        ValueError: if one looks like such a key, but is unknown.
    """
    known = [*(_PREFIX + name for name in (*RULES, _PRESET)), SENTENCES, SENTENCE_ALPHA, PROMPTS]
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
    """Writes a value for an error message, cut after 200 characters; halves of characters are escaped."""
    text = repr(value) if quote is None else f"{quote}{value}{quote}".encode(errors="backslashreplace").decode()
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def strengths(value: Any, n_rewards: int, what: str = "reward model") -> list[float]:
    """
    Reads a strength for each reward model, or another thing, from a number or a list.

    Raises:
        ValueError: with the rule that the value breaks.
    """
    if not n_rewards and value == []:
        return []
    if not n_rewards:
        raise ValueError(f"left out, since there is no {what}")
    numbers = value if isinstance(value, list | tuple) else [value]
    rule = f"a finite number, or a list of {n_rewards}, one for each {what}"
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
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(rule)
    try:
        return check_target_kl(value)
    except (TypeError, ValueError) as error:
        raise ValueError(rule) from error


RULES: dict[str, Any] = {"alpha": strengths, "target_kl": divergence}


@lru_cache
def _preset_file(path: str, n_rewards: int) -> PresetFile:
    """Returns the one reader of a file, which remembers what it has read."""
    return PresetFile(path, RULES, n_rewards)
