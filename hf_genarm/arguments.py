"""What users give: one check for each kind of value, whose error has the name, the value and what it must be."""

import operator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def shown(value: Any) -> str:
    """Returns a value as part of a sentence, on one line; modules are shown by their class, since they are long."""
    if isinstance(value, nn.Module):
        return f"a `{type(value).__name__}`"
    return " ".join(f"{value!r:.160}".split())


def as_number(name: str, value: Any, rule: str) -> float:
    """
    Returns a number, which a scalar of PyTorch or NumPy is, too.

    Args:
        name (`str`), value, rule (`str`):
            The argument, what was given, and what it must be.

    Raises:
        TypeError: if it is none.
    """
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"`{name}` is {shown(value)}, but must be {rule}.") from error


def as_whole_number(name: str, value: Any, rule: str, least: int = 1, most: int = 2**63 - 1) -> int:
    """
    Returns a whole number, as for [`as_number`].

    Raises:
        TypeError: if it is none.
        ValueError: if it is less than `least` or more than `most`, which by default is what fits into 64 bits.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` is {shown(value)}, but must be {rule}.") from error
    if not least <= number <= most:
        raise ValueError(f"`{name}` is {value}, but must be {rule}.")
    return number


def refuse_no_seed(seed: int) -> None:
    """
    Raises:
        ValueError: if a whole number can't be the seed of random numbers.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"`seed` is {seed}, but must be from 0 to {2**31 - 1}.")


def as_tensor(name: str, value: Any, rule: str, dtype: torch.dtype | None = None) -> Tensor:
    """
    Returns a tensor of numbers: a tensor as it is, an array or nested lists in a dtype.

    Raises:
        TypeError: if it is none, or a tensor without values in memory.
    """
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else dtype).detach()
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"`{name}` is {shown(value)}, but must be {rule}.") from error
    return tensor


def refuse_no_tokenizer(name: str, value: Any) -> None:
    """
    Raises:
        TypeError: if a value is neither a tokenizer nor `None`.
    """
    if value is not None and not isinstance(value, PreTrainedTokenizerBase):
        raise TypeError(
            f"`{name}` is {shown(value)}, but must be a tokenizer of transformers. Load it: "
            "`AutoTokenizer.from_pretrained(...)`."
        )
