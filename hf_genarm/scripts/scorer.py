"""Reward functions of the user, as TRL's `GRPOTrainer` takes them: found by name, and called with answers."""

import importlib
import sys
from collections.abc import Callable, Sequence

import numpy as np

from .prompts import completion_of

Scorer = Callable[..., Sequence[float]]


def load_scorer(name: str) -> Scorer:
    """
    Imports the function that `module:function` names.

    Raises:
        ValueError: if there is no such function.
    """
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise ValueError(f"`scorer` is {name!r}, but must be `module:function`, such as `my_scorer:reward`.")
    if "" not in sys.path:  # as for `python -m`; the command itself has the folder of its script there
        sys.path.insert(0, "")
    try:
        scorer = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`scorer` is {name!r}, which can't be imported: {error}. Name a module of this folder or of an installed "
            "package, and a function in it."
        ) from error
    if not callable(scorer):
        raise ValueError(f"`scorer` is {name!r}, which is a {type(scorer).__name__}, but must be a function.")
    return scorer


def scores_of(scorer: Scorer, name: str, prompts: list, texts: list[str]) -> np.ndarray:
    """
    Returns the scores of answers, which are passed as texts or messages, like their prompts.

    Raises:
        ValueError: if the function doesn't return a finite number for each.
    """
    completions = [completion_of(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    scores = np.array(scorer(prompts=prompts, completions=completions), dtype=float)
    if scores.shape != (len(texts),) or not np.isfinite(scores).all():
        raise ValueError(
            f"The scorer {name} returned {scores.tolist()!r:.80} for {len(texts)} answers, but must return a finite "
            "number for each. Correct it; the answers are kept."
        )
    return scores
