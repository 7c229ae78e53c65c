"""What a published reward model says about itself: a small JSON file beside the weights."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

INFO_NAME = "genarm_config.json"
FORMAT_VERSION = 1
_PACKAGES = ("hf_genarm", "trl", "transformers", "peft", "torch", "datasets")


@dataclass
class RewardInfo:
    r"""
    What is needed to use a reward model well, and can't be read from its weights. `None` means unknown.

    Parameters:
        beta (`float`, *optional*):
            Scale of the reward in the training loss, $\beta_r$. Decoding at `alpha` realises the KL temperature
            $\beta_r / \alpha$.
        loss (`dict[str, Any]`):
            The arguments of the loss that were not left at their defaults, such as `{"length_normalized": True}`.
        reward_scale (`float`, *optional*):
            Root mean square of $\log\pi_r(y_w \mid x) - \log\pi_r(y_l \mid x)$ on held-out pairs, in nats; of the
            means over tokens, if the loss is length-normalised.
        objective (`str`, *optional*):
            What is rewarded, in a few words.
        description (`str`, *optional*):
            What is rewarded and what is not, in a few sentences.
        base_model (`str`, *optional*):
            Hub id of the model that was trained, or that the adapter belongs to.
        base_model_revision (`str`, *optional*):
            Commit of that model.
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
        versions (`dict[str, str]`):
            Of the packages that made it.
        format_version (`int`):
            Of this file.
    """

    beta: float | None = None
    loss: dict[str, Any] = field(default_factory=dict)
    reward_scale: float | None = None
    objective: str | None = None
    description: str | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    dataset: str | None = None
    n_pairs: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def save(self, folder: str | Path) -> None:
        """Writes `genarm_config.json`."""
        Path(folder, INFO_NAME).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "RewardInfo":
        """
        Reads a `genarm_config.json`.

        Raises:
            ValueError: if it is not valid, or of a newer format.
        """
        try:
            values = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"`{path}` is not valid JSON ({error}). Download or write it again.") from error
        if values.get("format_version", 0) > FORMAT_VERSION:
            raise ValueError(
                f"`{path}` has format {values['format_version']}, and this version of hf_genarm reads formats up to "
                f"{FORMAT_VERSION}. Update it: `pip install -U hf_genarm`."
            )
        unknown = values.keys() - {x.name for x in fields(cls)}
        if unknown:
            raise ValueError(f"`{path}` has fields that its format does not know: {sorted(unknown)}. Remove them.")
        return cls(**values)


def package_versions() -> dict[str, str]:
    """The versions of the packages that make a reward model."""
    return {name: version(name) for name in _PACKAGES}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for two tokenizers with the same tokens under the same ids."""
    return _fingerprint(json.dumps(sorted(tokenizer.get_vocab().items())))


def chat_template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The same for two tokenizers with the same chat template; `None` without one."""
    return None if tokenizer.chat_template is None else _fingerprint(str(tokenizer.chat_template))


def _fingerprint(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:32]
