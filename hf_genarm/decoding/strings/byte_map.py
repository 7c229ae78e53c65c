"""How the vocabulary of a reward model lines up with that of the base where tokens are other strings: by bytes."""

from bisect import bisect_left
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...hub.token_bytes import spaces_after_special_tokens, spelled, token_bytes


class ByteMap:
    """
    Holds the bytes of the tokens of a base and of a reward model, and finds those of the latter that spell a string.

    Args:
        tokenizer, reward_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizers of the base and of the reward model.
        ends, reward_ends (set of `int`):
            The tokens of each that end a text.
        n_tokens (`int`):
            The number of tokens that the reward model knows.

    Attributes:
        of_base, of_reward (list of `bytes` or `None`):
            The bytes of each token, as [`token_bytes`] returns them.
        order (`np.ndarray` of shape `(n_spelling,)`):
            The tokens of the reward model that have bytes, sorted by these, so that those that begin with the same
            bytes follow each other.
        base_adds_space, reward_adds_space (`bool`):
            Whether the base, or the reward model, writes a space that is not there after a special token.

    Raises:
        ValueError: if the bytes of a token are not known, or the reward model has no token that ends a text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reward_tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        reward_ends: Collection[int],
        n_tokens: int,
    ):
        self.tokenizer, self.reward_tokenizer = tokenizer, reward_tokenizer
        self.ends, self.reward_ends = set(ends), {x for x in reward_ends if x < n_tokens}
        if not self.reward_ends:
            raise ValueError(
                f"The tokenizer of the reward model (`{reward_tokenizer.name_or_path}`) has no token that ends a text, "
                "so that it gives no reward to ends. Set `eos_token_id` in its generation config, or `eos_token` of "
                "its tokenizer."
            )
        self.of_base, self.of_reward = token_bytes(tokenizer), token_bytes(reward_tokenizer)
        for known, end_tokens in ((self.of_base, self.ends), (self.of_reward, self.reward_ends)):
            for token in end_tokens:
                if token < len(known):
                    known[token] = None  # an end is no text, also where it is not marked as special
        spelling = sorted((x, index) for index, x in enumerate(self.of_reward[:n_tokens]) if x)
        self._sorted = [x for x, _ in spelling]
        self.order = np.array([index for _, index in spelling], dtype=np.int64)
        self._longest = max(map(len, self._sorted), default=0)
        self._tokens: dict[bytes, list[int]] = {}
        for x, index in spelling:
            self._tokens.setdefault(x, []).append(index)
        self.base_adds_space = spaces_after_special_tokens(tokenizer, self.of_base)
        self.reward_adds_space = spaces_after_special_tokens(reward_tokenizer, self.of_reward)
        self._set_caches()

    def _set_caches(self) -> None:
        self.interval = lru_cache(2**16)(self._interval)
        self.pieces = lru_cache(2**16)(self._pieces)

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name not in ("interval", "pieces")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_caches()

    def _interval(self, start: bytes) -> tuple[int, int]:
        """Returns the first and the last place, exclusive, of the tokens that begin with some bytes."""
        stem = start.rstrip(b"\xff")
        first = bisect_left(self._sorted, start)
        return first, bisect_left(self._sorted, stem[:-1] + bytes([stem[-1] + 1])) if stem else len(self._sorted)

    def tokens_of(self, string: bytes) -> list[int]:
        """Returns the tokens of the reward model that are these bytes, most often one or none."""
        return self._tokens.get(string, [])

    def beginnings(self, string: bytes) -> list[tuple[int, bytes]]:
        """Returns the tokens that a string begins with, shorter ones first, each with the rest of the string."""
        lengths = range(1, min(len(string), self._longest) + 1)
        return [(token, string[n:]) for n in lengths for token in self.tokens_of(string[:n])]

    def _pieces(self, string: bytes) -> tuple[int, ...]:
        """Returns the tokens that the tokenizer of the reward model, or else the longest ones first, write a string."""
        try:
            ids = self.reward_tokenizer(string.decode(), add_special_tokens=False)["input_ids"]
        except UnicodeDecodeError:  # half a character
            ids = []
        if ids and spelled(self.of_reward, ids) == string:
            return tuple(ids)
        pieces = []
        while string:
            longest = self.beginnings(string)[-1:]
            if not longest:
                return ()
            ((token, string),) = longest
            pieces.append(token)
        return tuple(pieces)
