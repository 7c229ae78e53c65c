"""Test-time alignment of Hugging Face language models with autoregressive reward models (GenARM)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advice import GuidanceWarning
    from .config import AutoregressiveRewardConfig
    from .logits_process import GenARMLogitsProcessor
    from .reward_info import RewardInfo
    from .reward_model import AutoregressiveRewardModel
    from .trainer import AutoregressiveRewardTrainer

__version__ = "0.1.0"

__all__ = [
    "AutoregressiveRewardConfig",
    "AutoregressiveRewardModel",
    "AutoregressiveRewardTrainer",
    "GenARMLogitsProcessor",
    "GuidanceWarning",
    "RewardInfo",
]

# Loaded on first use, so that steering does not pay for the import of `trl`.
_MODULES = {
    "AutoregressiveRewardConfig": "config",
    "AutoregressiveRewardModel": "reward_model",
    "AutoregressiveRewardTrainer": "trainer",
    "GenARMLogitsProcessor": "logits_process",
    "GuidanceWarning": "advice",
    "RewardInfo": "reward_info",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
