"""The configuration of a server that guides."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..decoding.recommended import recommended_alpha, wanted_reference
from ..hub.info import RewardInfo
from ..hub.loading import info_of, short_name
from .presets import PresetFile, read_presets
from .request_settings import RULES, ServerDefaults, shown

# Holds the same object as `genarm` of `additional_config`, for front ends that are far from their engine.
ENVIRONMENT = "HF_GENARM_VLLM"
_EXAMPLE = '--additional-config \'{"genarm": {"reward_models": "FOLDER_OR_HUB_ID"}}\''


@dataclass
class ServerConfig:
    """
    Holds the object `genarm` in `additional_config` of an engine.

    Parameters:
        reward_models (`str`, `dict`, or list of them, *optional*):
            Hub ids or folders; or sentences, such as `{"name": "kind", "sentence": "Be kind."}`. Needed unless
            `max_sentences` is given.
        alpha (`float` or list of `float`, *optional*):
            Strengths of requests that give none. Defaults to what the reward models recommend, or else 1.
        target_kl (`float`, *optional*):
            Divergence per token of requests that give none, in nats.
        reference (`str`, *optional*, defaults to `"auto"`):
            `"base"`, or the Hub id or folder of the model that all reward models are contrasted with; `None` for none.
            `"auto"` is what they recommend, or else were trained with.
        dtype (`str`, *optional*):
            Data type of the reward models, such as `"float32"`. Defaults to that of the engine.
        presets (`dict` or `str`, *optional*):
            Named strengths, such as `{"kind": {"alpha": [1.0, 0]}}`, or the name of a JSON file with such an object,
            which is read again when it changes. The preset `default` is that of requests that name none.
        max_sentences (`int`, *optional*, defaults to 0):
            The largest number of sentences that a request may add.
        reward_memory (`float`, *optional*):
            Memory for the keys and values of all reward models, in bytes, or up to 1 as a share of that of the device.
            Defaults to what `max_num_seqs` texts of `max_model_len` tokens take, and at most a fifth of the memory.
            Texts that don't fit are dropped, the least recently used first, and read again when they are continued.
        slots (`int`, *optional*):
            The same as a number of texts of `max_model_len` tokens.
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
    presets: Any = None
    max_sentences: Any = 0
    reward_memory: Any = None
    slots: Any = None
    chunk: Any = 512

    def __post_init__(self) -> None:
        if isinstance(self.max_sentences, bool) or not isinstance(self.max_sentences, int) or self.max_sentences < 0:
            raise self._wrong("max_sentences", "a whole number, 0 for none")
        given = [] if self.reward_models is None and self.max_sentences else self.reward_models
        names = [given] if isinstance(given, str | dict) else given
        if not isinstance(names, list) or not (names or self.max_sentences) or not all(map(_is_reward, names)):
            raise self._wrong(
                "reward_models",
                'a Hub id or a folder, or a sentence such as {"name": "kind", "sentence": "Be kind."}, or a list of '
                "them; only with `max_sentences` it can be left out",
            )
        self.reward_models = [x if isinstance(x, str) else {"name": x["sentence"], **x} for x in names]
        for name, rule in RULES.items():
            try:
                value = getattr(self, name)
                setattr(self, name, rule(value, len(names)) if value is not None else None)
            except ValueError as error:
                raise self._wrong(name, str(error)) from error
        if self.reference is not None and not (isinstance(self.reference, str) and self.reference):
            raise self._wrong("reference", '"auto", "base", a Hub id, a folder, or null')
        if self.dtype is not None and not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise self._wrong("dtype", 'the name of a data type, such as "float32"')
        self._check_presets()
        memory = self.reward_memory
        is_number = isinstance(memory, int | float) and not isinstance(memory, bool) and 0 < memory < math.inf
        if memory is not None and not is_number:
            raise self._wrong("reward_memory", "a number of bytes, or a share of the memory of the device, such as 0.2")
        if memory is not None and self.slots is not None:
            raise self._wrong("slots", "left out where `reward_memory` is given")
        for name, missing in (("slots", self.slots is None), ("chunk", False)):
            value = getattr(self, name)
            if not missing and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise self._wrong(name, "a positive whole number")

    def _check_presets(self) -> None:
        """Raises if the presets, or the file of them, are wrong; names the file so that all processes find it."""
        if self.presets is None:
            return
        try:
            if isinstance(self.presets, str):
                PresetFile(self.presets, RULES, len(self.reward_models)).read()
                self.presets = str(Path(self.presets).resolve())
            else:
                read_presets(self.presets, RULES, len(self.reward_models))
        except ValueError as error:
            raise self._wrong("presets", str(error)) from error

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> "ServerConfig":
        """
        Reads the configuration of an engine.

        Raises:
            ValueError: if there is none, it has unknown keys, or the environment has another one.
        """
        given = additional_config.get("genarm") if isinstance(additional_config, Mapping) else None
        if not isinstance(given, Mapping):
            raise ValueError(f"`additional_config` has no object `genarm`. Name the reward models to load: {_EXAMPLE}.")
        config = cls._from_object(given, "`genarm` of `additional_config`")
        if ENVIRONMENT in os.environ and cls.from_environment() != config:
            raise ValueError(
                f"The environment variable `{ENVIRONMENT}` is not the object `genarm` of `additional_config`. Make "
                "them the same, or unset the variable."
            )
        return config

    @classmethod
    def from_environment(cls) -> "ServerConfig | None":
        """
        Reads the configuration that `HF_GENARM_VLLM` holds; `None` if it is not set.

        Raises:
            ValueError: if it is not a JSON object, or has unknown keys.
        """
        text = os.environ.get(ENVIRONMENT)
        if text is None:
            return None
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValueError(f"`{ENVIRONMENT}` is {shown(text)}, which is not JSON ({error}).") from error
        if not isinstance(given, Mapping):
            raise ValueError(f"`{ENVIRONMENT}` is {shown(text)}, but must be the object `genarm` of {_EXAMPLE}.")
        return cls._from_object(given, f"`{ENVIRONMENT}`")

    @classmethod
    def _from_object(cls, given: Mapping[str, Any], place: str) -> "ServerConfig":
        known = [x.name for x in fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(f"{place} has the key {shown(key, '`')}, but the known ones are {known}.")
        return cls(**given)

    @property
    def models(self) -> list[str]:
        """The reward models that have weights; before [`with_recommended`], folders of sentences too."""
        return [x for x in self.reward_models if isinstance(x, str)]

    @property
    def n_sentences(self) -> int:
        """The largest number of sentences that are read for a request; before [`with_recommended`], not of folders."""
        return len(self.reward_models) - len(self.models) + self.max_sentences

    def infos(self) -> list[RewardInfo]:
        """Returns what is recorded about each reward model."""
        return [info_of(x) if isinstance(x, str) else RewardInfo(sentence=x["sentence"]) for x in self.reward_models]

    def with_recommended(self, infos: Sequence[RewardInfo]) -> "ServerConfig":
        """
        Fills in the settings that were left open, as the reward models recommend, and reads the folders of sentences.

        Raises:
            ValueError: if they need different references.
        """
        names = [shown_name(x) for x in self.reward_models]
        wanted = wanted_reference(infos, names) if self.reference == "auto" and infos else "base"
        settled = replace(
            self,
            reward_models=[
                x if info.sentence is None else {"name": name, "sentence": info.sentence}
                for x, name, info in zip(self.reward_models, names, infos, strict=True)
            ],
            alpha=recommended_alpha(infos) if self.alpha is None else self.alpha,
            reference=wanted if self.reference == "auto" else self.reference,
        )
        if settled.n_sentences and settled.reference != "base":
            raise settled._wrong("reference", '"base", because sentences are contrasted with the base')
        return settled

    def server_defaults(
        self,
        is_raw: bool = True,
        refuses_seeds: bool = False,
        max_length: int | None = None,
        vocab_size: int | None = None,
    ) -> ServerDefaults:
        """
        Returns what requests have to be checked against, once all settings are known.

        Args:
            is_raw (`bool`, *optional*, defaults to `True`):
                Whether the engine reports log-probabilities before guidance, by which beam search chooses.
            refuses_seeds (`bool`, *optional*, defaults to `False`):
                Whether a seed could end the engine.
            max_length, vocab_size (`int`, *optional*):
                The largest number of tokens in a text, and the number of logits of the served model, if known.
        """
        is_file = isinstance(self.presets, str)
        presets = {} if is_file else read_presets(self.presets or {}, RULES, len(self.reward_models))
        return ServerDefaults(
            reward_models=tuple(shown_name(x) for x in self.reward_models),
            alpha=tuple(self.alpha),
            target_kl=self.target_kl,
            refuses_bias=self.reference == "base",
            refuses_beams=is_raw,
            refuses_seeds=refuses_seeds,
            presets=tuple(presets.items()),
            presets_file=self.presets if is_file else None,
            sentences=tuple(None if isinstance(x, str) else x["sentence"] for x in self.reward_models),
            max_sentences=self.max_sentences,
            max_length=max_length,
            vocab_size=vocab_size,
        )

    def _wrong(self, name: str, rule: str) -> ValueError:
        return ValueError(
            f"`{name}` in `genarm` of `additional_config` is {shown(getattr(self, name))}, but must be {rule}."
        )


def shown_name(reward_model: str | dict[str, str]) -> str:
    """Returns the name that clients see: its Hub id, the last part of its folder, or that of a sentence."""
    if isinstance(reward_model, dict):
        return reward_model["name"]
    name_or_path = reward_model
    is_folder = Path(name_or_path).is_absolute() or Path(name_or_path).is_dir()
    return short_name(name_or_path) if is_folder else name_or_path


def _is_reward(value: Any) -> bool:
    """Returns whether a value names a reward model, or is a sentence."""
    if not isinstance(value, dict):
        return isinstance(value, str) and bool(value)
    is_known = {"sentence"} <= value.keys() <= {"sentence", "name"}
    return is_known and all(isinstance(x, str) and x.strip() for x in value.values())
