"""Test-time alignment of Hugging Face language models with autoregressive reward models (GenARM)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoding.particles import SMCOutput, smc_sample
    from .decoding.processor import GenARMLogitsProcessor
    from .hub.info import GuidanceWarning, RewardInfo
    from .hub.reward_model import AutoregressiveRewardModel
    from .training.config import AutoregressiveRewardConfig
    from .training.trainer import AutoregressiveRewardTrainer

__version__ = "0.2.0"

__all__ = [
    "AutoregressiveRewardConfig",
    "AutoregressiveRewardModel",
    "AutoregressiveRewardTrainer",
    "GenARMLogitsProcessor",
    "GuidanceWarning",
    "RewardInfo",
    "SMCOutput",
    "smc_sample",
]

# Loaded on first use, so that steering does not pay for the import of `trl`.
_MODULES = {
    "AutoregressiveRewardConfig": "training.config",
    "AutoregressiveRewardModel": "hub.reward_model",
    "AutoregressiveRewardTrainer": "training.trainer",
    "GenARMLogitsProcessor": "decoding.processor",
    "GuidanceWarning": "hub.info",
    "RewardInfo": "hub.info",
    "SMCOutput": "decoding.particles",
    "smc_sample": "decoding.particles",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
