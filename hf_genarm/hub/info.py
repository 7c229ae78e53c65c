"""What is recorded about a published reward model: a small JSON file next to the weights."""

import hashlib
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from transformers import PreTrainedTokenizerBase

from ..arguments import shown
from .base_weights import FINGERPRINT

INFO_NAME = "genarm_config.json"
FORMAT_VERSION = 1
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Strengths beyond it leave nothing of the base; what was measured is below 10.
_MAX_STRENGTH = 32
_PACKAGES = ("hf_genarm", "trl", "transformers", "peft", "torch", "datasets")


class GuidanceWarning(UserWarning):
    """Warns of a setting that works against guidance; `warnings.simplefilter("ignore", GuidanceWarning)` ends that."""


def _is_positive(value: float) -> bool:
    return 0 < value <= sys.float_info.max


def _is_loss(value: dict[str, Any]) -> bool:
    return isinstance(value.get("length_normalized", False), bool) and value.get("reference") in (None, "base")


def _is_setting(value: dict[str, Any]) -> bool:
    if value.keys() != {"alpha", "reference", "temperature", "measured"} or value["reference"] not in (None, "base"):
        return False
    is_number = [_has_type(value[name], float) and math.isfinite(value[name]) for name in ("alpha", "temperature")]
    in_range = all(is_number) and abs(value["alpha"]) <= _MAX_STRENGTH and 0 < value["temperature"] <= _MAX_STRENGTH
    return in_range and isinstance(value["measured"], dict) and _is_measured(value["measured"])


def _is_measured(value: dict[str, Any]) -> bool:
    """Returns whether settings and examples have the form that `hf-genarm tune` writes; both may be missing."""
    settings, examples = value.get("settings", []), value.get("examples", [])
    if not isinstance(settings, list) or not isinstance(examples, list):
        return False
    texts, numbers = ("prompt", "answer"), ("alpha", "temperature")
    intervals = ("reward", "kl", "perplexity")
    return (
        all(isinstance(x, dict) and all(isinstance(x.get(name), str) for name in texts) for x in examples)
        and all(
            isinstance(row, dict)
            and row.get("reference", "") in (None, "base")
            and all(_has_type(row.get(name), float) for name in numbers)
            and all(_has_type(row.get(name), list[float]) and len(row[name]) == 3 for name in intervals)
            for row in settings
        )
        and (
            not settings
            or (
                all(_has_type(value.get(name), float) for name in ("max_kl", "max_new_tokens", "n_prompts"))
                and isinstance(value.get("scorer"), str)
            )
        )
    )


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda value: re.fullmatch(pattern, value) is not None


# What a field must be in addition to its type; unknown ones, `None`, are left out.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (_is_positive, "a positive number"),
    "reward_scale": (_is_positive, "a positive number"),
    "loss": (_is_loss, "arguments of the trainer"),
    "recommended": (
        _is_setting,
        "`alpha` (from -32 to 32), `reference` (null or 'base'), `temperature` (above 0, at most 32) and what was "
        "`measured`, as `hf-genarm tune` writes them",
    ),
    "base_model": (lambda value: bool(value.strip()), "the id of a model"),
    "base_weights": (_matches(FINGERPRINT), "from `weights_fingerprint`"),
    "tokenizer": (_matches(r"sha256:[0-9a-f]{32}"), "from `tokenizer_fingerprint`"),
    "chat_template": (_matches(r"sha256:[0-9a-f]{32}"), "from `chat_template_fingerprint`"),
    "n_pairs": (lambda value: value >= 0, "a number of pairs"),
    "sentence": (lambda value: bool(value.strip()), "a text that asks for something"),
    "format_version": (lambda value: value >= 1, "1 or more"),
}


@dataclass
class RewardInfo:
    r"""
    Holds what is needed to use a reward model well, and can't be read from its weights. `None` means unknown.

    Parameters:
        beta (`float`, *optional*):
            Scale of the reward in the training loss, $\beta_r$. Decoding at `alpha` realises the KL temperature
            $\beta_r / \alpha$.
        loss (`dict[str, Any]`):
            The arguments of the loss that were not left at their defaults, such as `{"length_normalized": True}`.
        reward_scale (`float`, *optional*):
            Root mean square of $\log\pi_r(y_w \mid x) - \log\pi_r(y_l \mid x)$ on held-out pairs, in nats; of the
            means over tokens, if the loss is length-normalised, and of $\log\pi_r - \log\pi_\text{base}$, if it was
            trained on that.
        objective (`str`, *optional*):
            What is rewarded, in a few words.
        description (`str`, *optional*):
            What is rewarded and what is not, in a few sentences.
        base_model (`str`, *optional*):
            Hub id of the model that was trained, or that the adapter belongs to.
        base_model_revision (`str`, *optional*):
            Commit of that model.
        base_weights (`str`, *optional*):
            Fingerprint of the weights that the adapter was trained on, or that the rewards of a full model are
            contrasted with, from [`weights_fingerprint`].
        tokenizer (`str`, *optional*):
            Fingerprint of the vocabulary, from [`tokenizer_fingerprint`].
        chat_template (`str`, *optional*):
            Fingerprint of the chat template that the training data went through; `None` if it was plain text.
        dataset (`str`, *optional*):
            Hub id or name of the preference data.
        n_pairs (`int`, *optional*):
            Number of pairs that were trained on.
        metrics (`dict[str, float]`):
            What was measured on held-out pairs, by name.
        recommended (`dict[str, Any]`, *optional*):
            How to steer with it: `alpha`, `reference` (`"base"` or `None`), the `temperature` of `generate`, and what
            they were `measured` to do, all as `hf-genarm tune` writes them.
        sentence (`str`, *optional*):
            What a reward model without weights puts into the prompt of the base.
        versions (`dict[str, str]`):
            The versions of the packages that made it.
        format_version (`int`):
            The version of the format of this file.

    Raises:
        ValueError: if a value is not what its field holds.
    """

    beta: float | None = None
    loss: dict[str, Any] = field(default_factory=dict)
    reward_scale: float | None = None
    objective: str | None = None
    description: str | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    base_weights: str | None = field(default=None, repr=False)  # of more than a thousand characters
    tokenizer: str | None = None
    chat_template: str | None = None
    dataset: str | None = None
    n_pairs: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    recommended: dict[str, Any] | None = None
    sentence: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, (holds, rule) = getattr(self, name), _RULES.get(name, (lambda _: True, ""))
            if not _has_type(value, hint) or (value is not None and not holds(value)):
                expected = hint.__name__ if isinstance(hint, type) else hint
                raise ValueError(f"`{name}` is {shown(value)}, but must be `{expected}`{rule and ': ' + rule}.")

    @property
    def reference(self) -> str | None:
        r"""
        `"base"` if its rewards are $\log\pi_r - \log\pi_\text{base}$, because it was trained on them, or is a sentence;
        else `None`.
        """
        return "base" if self.sentence is not None else self.loss.get("reference")

    @property
    def title(self) -> str | None:
        """What it rewards, in a few words: its objective, or its sentence; `None` if neither is recorded."""
        if self.objective is None and self.sentence is not None:
            return f"“{textwrap.shorten(self.sentence, 40, placeholder='…')}”"
        return self.objective

    @property
    def is_for_chats(self) -> bool | None:
        """Whether it was trained on texts in a chat template, or on plain text; `None` if that is unknown."""
        if self.chat_template is not None:
            return True
        return False if self.versions else None  # the trainer records both, and nothing else records versions

    def save(self, folder: str | Path) -> None:
        """Writes `genarm_config.json`."""
        checked = asdict(replace(self))
        if self.sentence is None:  # so that earlier versions, which know no sentences, read all others
            del checked["sentence"]
        Path(folder, INFO_NAME).write_text(json.dumps(checked, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "RewardInfo":
        """
        Reads a `genarm_config.json`.

        Raises:
            ValueError: if it is not valid, or of a newer format.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`{path}` is not valid JSON ({error}). Download or write it again.") from error
        if not isinstance(values, dict):
            raise ValueError(f"`{path}` holds {values!r:.60}, but must hold an object. Download or write it again.")
        newer = values.get("format_version")
        if isinstance(newer, int) and newer > FORMAT_VERSION:
            raise ValueError(
                f"`{path}` has format {newer}, and this version of hf_genarm reads formats up to {FORMAT_VERSION}. "
                "Update it: `pip install -U hf_genarm`."
            )
        unknown = values.keys() - {x.name for x in fields(cls)}
        if unknown:
            raise ValueError(f"`{path}` has fields that its format does not have: {sorted(unknown)}. Remove them.")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"`{path}` is not valid: {error} Correct it, or download it again.") from error


def _has_type(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a type such as `float | None` or `dict[str, Any]`. A `bool` is no number."""
    if hint is Any:  # which JSON can hold
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        is_json = value is None or isinstance(value, str | bool | int | float | list | dict)
        return is_json and all(isinstance(key, str | int) and _has_type(x, Any) for key, x in inner)
    if get_origin(hint) is dict:
        of_key, of_value = get_args(hint)
        items = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_has_type(key, of_key) and _has_type(x, of_value) for key, x in items)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_has_type(x, get_args(hint)[0]) for x in value)
    if get_args(hint):
        return any(_has_type(value, x) for x in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, float | int if hint is float else hint)


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that make a reward model."""
    return {name: version(name) for name in _PACKAGES}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash that two tokenizers share if they have the same tokens under the same ids."""
    return _fingerprint(json.dumps(sorted(tokenizer.get_vocab().items())))


def chat_template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns a hash that two tokenizers share if they have the same chat template; `None` without one."""
    return None if tokenizer.chat_template is None else _fingerprint(str(tokenizer.chat_template))


def _fingerprint(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:32]
