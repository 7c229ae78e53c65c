"""A causal LM whose key-value cache follows any sequence of `input_ids`."""

import inspect
import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..hub.causality import refuse_not_causal
from ..hub.kv_cache import CACHE, n_embeddings, network_of, new_cache
from ..hub.limits import (
    fixed_length,
    n_positions,
    refuse_too_long,
    refuse_unfilled_cache,
    refuse_unknown_ids,
    why_no_cache,
)
from .line import Line

logger = logging.getLogger(__name__)


class LockstepLM:
    """
    Returns the next-token logits of a causal LM for any `input_ids`, at the cost of the new tokens only.

    There is no notion of a step. The cache is keyed by the tokens that are in it: each row of a call is matched with
    the cached row that shares its longest prefix, the cache is reordered and cropped to what is shared, and the rest is
    forwarded. So beams that permute, drafts that are rejected and a new prompt are all the same case, and the result
    is always that of a forward pass from scratch. After a change of the model, call
    [`~LockstepLM.reset`], since the cache holds what the model has computed before.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder-only language model, which may be compiled. It is called, never changed.
        role (`str`, *optional*, defaults to `"reward model"`):
            What it is used as, for messages.

    Attributes:
        has_cache (`bool`):
            Whether it keeps a cache. Without one it reads the whole text for every token.

    Raises:
        TypeError: if the model is not a decoder-only causal LM.
    """

    # Assisted decoding calls again for the lengths that drafting went through; it has one row, and drafts are short.
    KEPT_LOGITS = 64

    def __init__(self, model: PreTrainedModel | PeftModel, role: str = "reward model"):
        network = network_of(model)
        refuse_not_causal(model, role)
        self.model, self._role = model, role
        # Of the class: an instance's may be wrapped, and `PeftModel.forward` takes anything.
        self._forward_args = set(inspect.signature(type(network).forward).parameters)
        self._network = network
        reason = why_no_cache(model)
        self.has_cache = reason is None
        self._fixed_length, self._n_positions = fixed_length(network), n_positions(model)
        if not self.has_cache:
            logger.warning(
                "`%s` as a %s reads the whole text again for every token, because %s: exact, but slow.",
                type(network).__name__,
                role,
                reason,
            )
        self._state: State | None = None
        self._knows_its_logits = False  # whether there is an embedding for each token that it scores

    def reset(self) -> None:
        """Forgets what has been read."""
        self.release()

    def release(self) -> None:
        """Gives back the memory of what has been read, when nothing continues it."""
        self._state = None

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        n_logits: int = 1,
        line: Line | None = None,
        is_translated: bool = False,
    ) -> Tensor:
        """
        Returns the logits that follow some texts.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
                Token ids, on any device.
            attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
                1 for tokens, 0 for padding. The last column must be all ones.
            n_logits (`int`, *optional*, defaults to 1):
                Number of last tokens whose logits are computed: several when a text is read together with its drafts.
            line ([`Line`], *optional*):
                What the texts are known by. Without it they are read on the host.
            is_translated (`bool`, *optional*, defaults to `False`):
                Whether they are written in other ids than those of the line.

        Returns:
            `torch.Tensor` of shape `(batch_size, vocab_size)`: the logits of the next token, in the dtype and on the
            device of the model's output.
        """
        line = Line(input_ids, attention_mask) if line is None else line
        first_token = line.padding.n_columns  # leading columns of padding alone are left out
        # Offloaded weights are on no device until they are needed; hooks then fetch the inputs too.
        device = input_ids.device if self.model.device.type == "meta" else self.model.device
        input_ids = input_ids[:, first_token:].to(device, torch.long)
        mask = attention_mask[:, first_token:].to(device) if line.padding.is_present else None
        length = input_ids.shape[1]
        if length > self._n_positions:
            longest = length if mask is None else int(mask.sum(dim=1).max())
            refuse_too_long(self._network, longest, self._n_positions, self._role)
        own_ids = input_ids if is_translated else line
        if length > self._fixed_length:
            self._refuse_unknown_ids(own_ids, line, length, length)
            return self._forward_from_scratch(input_ids, mask)[:, -1]

        # Put back only after success: an interrupted forward pass leaves a cache whose layers differ in length.
        state, self._state = self._state, None
        if state is None:
            state = self._new_state()
        rows, shared = _longest_shared_prefix(state, line, length)
        if rows is not None:
            state.select_rows(rows)
        if shared == length == state.length:
            state.line, state.tokens = line, None
        wanted = range(length - n_logits + 1, length + 1)
        if shared < length or any(at not in state.logits for at in wanted):
            # The logits of the last tokens are wanted, so at least those are forwarded.
            kept = min(shared, length - n_logits)
            if kept == 0 and state.logits:  # it shares nothing with the text
                state = self._new_state()
            # What follows a prompt was drawn from the tokens of the base, which the model has been found to score.
            if not (self._knows_its_logits and kept > 0 and (state.line is line or line.is_continuation)):
                self._refuse_unknown_ids(own_ids, line, length, length - kept)
            state.crop(kept)
            if self.has_cache:
                logits = self._forward(state, input_ids, mask, n_logits)
            else:
                logits = self._forward_from_scratch(input_ids, mask)
            state.extend(line, length, logits)
        self._state = state
        return state.logits[length]

    def take(self, line: Line, n_new: int) -> "State | None":
        """
        Takes the state out, so that another network can read the rest of a coming call.

        That is possible if it has read exactly the leading columns of the call; otherwise `None` is returned. Return it
        with [`~LockstepLM.put_back`], or it is computed again.

        Args:
            line ([`Line`]):
                The texts of the coming call.
            n_new (`int`):
                The number of their last columns that must not have been read.
        """
        state, length = self._state, line.length - line.padding.n_columns
        longest = min(self._fixed_length, self._n_positions)
        if state is None or not self.has_cache or length > longest:
            return None
        rows, shared = _longest_shared_prefix(state, line, length)
        if shared != length - n_new:
            return None
        self._state = None
        if rows is not None:
            state.select_rows(rows)
        state.crop(shared)
        return state

    def put_back(self, state: "State") -> None:
        """Puts back the state that was taken, with or without more in it."""
        self._state = state

    def _new_state(self) -> "State":
        """Returns a state that has read nothing."""
        cache = new_cache(self._network) if self.has_cache else None
        return State(DynamicCache() if cache is None else cache)

    def _refuse_unknown_ids(self, ids: Tensor | Line, line: Line, length: int, n_new: int) -> None:
        """Refuses ids without embeddings among the last columns of some texts."""
        if isinstance(ids, Line):
            ids = ids.ids(line.padding.n_columns + length)
        refuse_unknown_ids(self._network, ids[:, -n_new:], self._role)

    def _forward(self, state: "State", input_ids: Tensor, attention_mask: Tensor | None, n_logits: int) -> Tensor:
        """Reads what is not in the cache yet."""
        if attention_mask is None:
            positions = torch.arange(state.length, input_ids.shape[1], device=input_ids.device)
            positions = positions.expand(len(input_ids), -1)
        else:
            positions = position_ids(attention_mask)[:, state.length :]
        logits = self._call(
            {
                "input_ids": input_ids[:, state.length :],
                "attention_mask": attention_mask,
                "position_ids": positions,
                CACHE: state.cache,
                "use_cache": True,
            },
            n_logits,
        )
        refuse_unfilled_cache(self._network, state.cache, input_ids.shape[1])
        return logits

    def _forward_from_scratch(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Reads the whole texts without a cache, and row by row, since such a model may not support padding either."""
        rows = input_ids.split(1)
        if attention_mask is not None:
            rows = tuple(row[mask == 1][None] for row, mask in zip(input_ids, attention_mask, strict=True))
        logits = []
        for row in rows:
            if self._fixed_length < row.shape[1]:
                self._call({"input_ids": row[:, :1], "use_cache": False})  # forgets the longest text that it has read
            logits.append(self._call({"input_ids": row, "use_cache": False}))
        return torch.cat(logits)

    def _call(self, inputs: dict, n_logits: int = 1) -> Tensor:
        """Calls the model with the arguments that it has, and returns its last logits."""
        inputs["logits_to_keep"] = n_logits
        output = self.model(**{name: value for name, value in inputs.items() if name in self._forward_args})
        if not self._knows_its_logits:
            self._knows_its_logits = output.logits.shape[-1] <= n_embeddings(self._network)
        return output.logits[:, -n_logits:]


def position_ids(attention_mask: Tensor) -> Tensor:
    """Returns the position of each token in its text, as `generate` counts: padding is not part of the text."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)


@dataclass
class State:
    """
    Holds what has been read: how many columns of which texts, leading padding left out, the cache that they left, and
    the logits that followed some lengths.

    Parameters:
        cache ([`~transformers.DynamicCache`]):
            The cache.
        line ([`Line`], *optional*):
            What the texts are known by; `None` if there are none, or their rows were exchanged.
        tokens (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            What distinguishes texts without a line, on the host.
        length (`int`):
            The number of columns.
        logits (`dict`):
            By length, the logits that follow it.
    """

    cache: DynamicCache
    line: Line | None = None
    tokens: Tensor | None = None
    length: int = 0
    logits: dict[int, Tensor] = field(default_factory=dict)

    def first_tokens(self, length: int) -> Tensor:
        """Returns what distinguishes the texts in their first columns, on the host, `(batch_size, length)`."""
        if self.line is not None:
            return self.line.tokens(length)
        return torch.empty(0, 0) if self.tokens is None else self.tokens[:, :length]

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the rows by some of them, which are on the host."""
        self.tokens, self.line = self.first_tokens(self.length)[rows], None
        layers: Sequence[Any] = self.cache.layers
        on_device = next((x.keys.device for x in layers if x.keys is not None), rows.device)
        rows = rows.to(on_device, non_blocking=True)
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # for mypy, no tensor is a `torch.LongTensor`
        self.logits = {at: logits[rows.to(logits.device)] for at, logits in self.logits.items()}

    def crop(self, length: int) -> None:
        """Forgets what follows the first columns."""
        self.cache.crop(length - self.length)
        self.length = length
        self.logits = {at: logits for at, logits in self.logits.items() if at <= length}

    def extend(self, line: Line, length: int, logits: Tensor) -> None:
        """Records what the cache now holds; `logits[:, -n:]` follow the last n tokens."""
        self.line, self.tokens, self.length = line, None, length
        n_logits = logits.shape[1]
        new = {length - n_logits + 1 + index: logits[:, index] for index in range(n_logits)}
        oldest = length - LockstepLM.KEPT_LOGITS if len(logits) == 1 else length - 1
        self.logits = {at: value for at, value in (self.logits | new).items() if at > oldest}


def _longest_shared_prefix(state: State, line: Line, length: int) -> tuple[Tensor | None, int]:
    """Returns which cached row serves each row (`None`: its own) and how many leading columns serve all of them."""
    length = min(state.length, length)
    if state.line is line or length == 0:
        return None, length
    cached, wanted = state.first_tokens(length), line.tokens(length)
    if torch.equal(cached, wanted):
        return None, length
    cached_rows, wanted_rows = ([row.numpy().tobytes() for row in ids] for ids in (cached, wanted))

    def rows_at(n_columns: int) -> list[int] | None:
        n_bytes = n_columns * cached.element_size()
        row_of = {row[:n_bytes]: index for index, row in enumerate(cached_rows)}
        rows = [row_of.get(row[:n_bytes], -1) for row in wanted_rows]
        return None if -1 in rows else rows

    shared = bisect_left(range(1, length + 1), True, key=lambda n_columns: rows_at(n_columns) is None)
    rows = rows_at(shared) if shared else None
    return None if rows is None else torch.tensor(rows), shared
