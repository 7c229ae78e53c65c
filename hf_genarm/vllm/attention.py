"""Attention of many texts at once, each at its own length, over keys and values that stay where they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "genarm_slots"


class Part(NamedTuple):
    """Holds tokens of one text that are read together: text[start:end], into a slot."""

    slot: int
    start: int
    end: int


class SlotKeysAndValues:
    """
    Keys and values of each layer, `(n_slots, n_heads, length, head_size)`, allocated when a layer is first run.

    Args:
        n_slots (`int`):
            Number of texts.
        length (`int`):
            Number of tokens that a text can have.
    """

    def __init__(self, n_slots: int, length: int):
        self.n_slots, self.length = n_slots, length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def n_bytes(self) -> int:
        """Size of all keys and values."""
        return sum(x.numel() * x.element_size() for layer in self._layers.values() for x in layer)

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """
        Returns the keys and values of a layer.

        Args:
            index (`int`):
                Which layer.
            keys, values (`torch.Tensor` of shape `(1, n_heads, n, head_size)`):
                Some of that layer, for their shapes and data type.
        """
        if index not in self._layers:
            # Zeros, since what is masked is still multiplied, and by 0.
            self._layers[index] = (
                keys.new_zeros(self.n_slots, keys.shape[1], self.length, keys.shape[3]),
                values.new_zeros(self.n_slots, values.shape[1], self.length, values.shape[3]),
            )
        return self._layers[index]

    def erase(self, slot: int) -> None:
        """Sets the keys and values of a slot to 0."""
        for keys, values in self._layers.values():
            keys[slot] = values[slot] = 0.0


@dataclass
class Packed:
    """
    Parts of some texts, one after the other in a single row: what a forward pass reads.

    Parameters:
        memory ([`SlotKeysAndValues`]):
            Where keys and values are kept.
        parts (sequence of [`Part`]):
            The parts, at most one of each slot; those of one token come first, in the order of their slots.
        device (`torch.device`):
            Device of the network.
    """

    memory: SlotKeysAndValues
    parts: Sequence[Part]
    device: torch.device
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = [part.end - part.start for part in self.parts]
        self.n_singles = sum(length == 1 for length in lengths)
        assert all(length == 1 for length in lengths[: self.n_singles])
        positions = [position for part in self.parts for position in range(part.start, part.end)]
        slots = [part.slot for part, length in zip(self.parts, lengths, strict=True) for _ in range(length)]
        self.positions = torch.tensor(positions, device=self.device)
        self.slots = torch.tensor(slots, device=self.device)
        self.longest_single = max((part.end for part in self.parts[: self.n_singles]), default=0)
        # Neighbouring slots are read in place, others are gathered.
        of_singles = slots[: self.n_singles]
        self.slots_of_singles: Any = self.slots[: self.n_singles]
        if of_singles and of_singles == list(range(of_singles[0], of_singles[0] + self.n_singles)):
            self.slots_of_singles = slice(of_singles[0], of_singles[0] + self.n_singles)

    def mask(self, positions: Tensor, length: int, window: int | None) -> Tensor:
        """Returns which of `length` tokens each position sees, `(n_positions, length)`; layers of a kind share it."""
        key = (positions.data_ptr(), len(positions), length, window)
        if key not in self._masks:
            distances = positions[:, None] - torch.arange(length, device=self.device)
            seen = distances >= 0
            self._masks[key] = seen if window is None else seen & (distances < window)
        return self._masks[key]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    genarm_packed: Packed | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    Reads and extends slots, as an attention function of transformers ([`~transformers.AttentionInterface`]).

    Args:
        query (`torch.Tensor` of shape `(1, n_heads, n_tokens, head_size)`):
            Queries of all parts. The other arguments are those of all such functions.
        genarm_packed ([`Packed`]):
            The parts. The models of transformers hand arguments that they don't know down to here.
    """
    if genarm_packed is None or softcap is not None or s_aux is not None:
        raise NotImplementedError("its attention has more than a softmax over keys")
    packed = genarm_packed
    index: Any = module.layer_idx
    keys, values = packed.memory.layer(index, key, value)
    keys[packed.slots, :, packed.positions] = key[0].transpose(0, 1)
    values[packed.slots, :, packed.positions] = value[0].transpose(0, 1)
    n_tokens, n_heads, n_kv_heads = query.shape[2], query.shape[1], key.shape[1]
    # Heads that share keys are further queries of these, so that nothing is repeated: (n_kv_heads, n_shared, n_tokens).
    queries = query[0].unflatten(0, (n_kv_heads, n_heads // n_kv_heads))
    output = query.new_empty(n_tokens, n_heads, values.shape[-1])

    n_singles, length = packed.n_singles, packed.longest_single
    if n_singles:
        slots = packed.slots_of_singles
        mask = packed.mask(packed.positions[:n_singles], length, sliding_window)
        attended = nn.functional.scaled_dot_product_attention(
            queries[:, :, :n_singles].permute(2, 0, 1, 3),
            keys[slots, :, :length],
            values[slots, :, :length],
            attn_mask=mask[:, None, None],
            scale=scaling,
        )
        output[:n_singles] = attended.flatten(1, 2)
    first = n_singles
    for part in packed.parts[n_singles:]:
        last = first + part.end - part.start
        mask = packed.mask(packed.positions[first:last], part.end, sliding_window)
        attended = nn.functional.scaled_dot_product_attention(
            queries[:, :, first:last].flatten(1, 2)[None],
            keys[part.slot, None, :, : part.end],
            values[part.slot, None, :, : part.end],
            attn_mask=mask.repeat(n_heads // n_kv_heads, 1),
            scale=scaling,
        )
        output[first:last] = attended[0].view(n_heads, last - first, -1).transpose(0, 1)
        first = last
    return output[None], None


AttentionInterface.register(NAME, attend)
