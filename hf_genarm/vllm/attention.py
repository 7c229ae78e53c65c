"""Attention of many texts at once, each at its own length, over keys and values in pages."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .text_pages import EMPTY_PAGE, HeldText

NAME = "genarm_pages"


class Part(NamedTuple):
    """Holds tokens of one text that are read together: those at the positions from `start` to `end`."""

    text: HeldText
    start: int
    end: int


class PagedKeysAndValues:
    """
    Keys and values of each layer, `(n_pages, page_size, n_heads, head_size)`, allocated when a layer is first run.

    Args:
        n_pages (`int`):
            Number of pages, in addition to one that stays empty.
        page_size (`int`):
            Number of tokens in a page.

    Attributes:
        smallest_page (`int`):
            The smallest possible number of tokens in a page.
    """

    smallest_page = 4

    def __init__(self, n_pages: int, page_size: int):
        self.n_pages, self.page_size = n_pages, page_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Size of the keys and values of one token, in all layers."""
        return sum(self._first(x).numel() * x.element_size() for layer in self._layers.values() for x in layer)

    @property
    def n_bytes(self) -> int:
        """Size of all keys and values."""
        return sum(x.numel() * x.element_size() for layer in self._layers.values() for x in layer)

    def packed(self, parts: Sequence[Part], device: torch.device) -> "Packed":
        """Returns what a forward pass reads, given its parts, at most one of each text, whose pages have room."""
        return _Grouped(self, parts, device)

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
            self._layers[index] = self._new(keys[0, :, 0]), self._new(values[0, :, 0])
        return self._layers[index]

    def resized(self, n_pages: int, page_size: int) -> "PagedKeysAndValues":
        """Allocates pages of another size and number, for the layers that were run."""
        other = type(self)(n_pages, page_size)
        other._layers = {
            i: (other._new(self._first(x)), other._new(self._first(y))) for i, (x, y) in self._layers.items()
        }
        return other

    def erase(self, pages: list[int]) -> None:
        """Sets the keys and values of pages to 0."""
        for keys, values in self._layers.values():
            keys[pages] = values[pages] = 0.0

    def _new(self, of_a_token: Tensor) -> Tensor:
        """Allocates keys or values, given those of a token, `(n_heads, head_size)`."""
        # Zeros, since what is masked is still multiplied, and by 0.
        return of_a_token.new_zeros(1 + self.n_pages, self.page_size, *of_a_token.shape)

    def _first(self, of_pages: Tensor) -> Tensor:
        """Returns the keys or values of a token."""
        return of_pages[0, 0]


class Packed:
    """
    Parts of some texts, one after the other in a single row: what a forward pass reads.

    Args:
        memory ([`PagedKeysAndValues`]):
            Where keys and values are kept.
        parts (sequence of [`Part`]):
            The parts in the order in which they are read.
        device (`torch.device`):
            Device of the network.

    Attributes:
        positions (`torch.LongTensor` of shape `(n_tokens,)`):
            The position of each token in its text.
        places (`torch.LongTensor` of shape `(n_tokens,)`):
            The place of each token among those of all pages.
    """

    def __init__(self, memory: PagedKeysAndValues, parts: Sequence[Part], device: torch.device):
        self.memory, self.parts, size = memory, parts, memory.page_size
        positions = [position for part in parts for position in range(part.start, part.end)]
        pages = [part.text.pages[position // size] for part in parts for position in range(part.start, part.end)]
        self.positions = torch.tensor(positions, device=device)
        self.places = torch.tensor(pages, device=device) * size + self.positions % size

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """
        Writes the keys and values of the new tokens of a layer into their pages, and reads those of their texts.

        Args:
            index (`int`):
                Which layer.
            query, key, value (`torch.Tensor` of shape `(1, n_heads, n_tokens, head_size)`):
                Those of the new tokens.
            scaling (`float`, *optional*):
                Factor of the products; by default that of the head size.
            window (`int`, *optional*):
                How far a token sees.

        Returns:
            `torch.Tensor` of shape `(n_tokens, n_heads, head_size)`: what the tokens attend to.
        """
        raise NotImplementedError


class _Group(NamedTuple):
    """Holds parts with the same number of tokens, of texts with about the same number of pages."""

    rows: slice  # of the tokens in the pass
    n_texts: int
    pages: Tensor | slice  # (n_texts, n_pages), or pages that follow one another and are read in place
    distances: Tensor  # (n_texts, n_new, n_keys), how far each new token is behind each of its text


class _Grouped(Packed):
    """Parts that are read with PyTorch's attention, those of about the same length together."""

    def __init__(self, memory: PagedKeysAndValues, parts: Sequence[Part], device: torch.device):
        size = memory.page_size
        groups: dict[tuple[int, int], list[Part]] = {}
        for part in parts:
            # Texts of a group differ less than twofold in length, so that little of what is read is masked.
            n_pages = -(-part.end // size)
            groups.setdefault((part.end - part.start, (n_pages - 1).bit_length()), []).append(part)
        super().__init__(memory, [part for group in groups.values() for part in group], device)
        self.groups, first = [], 0
        for (n_new, _), group in groups.items():
            last = first + n_new * len(group)
            own = self.positions[first:last].view(len(group), n_new)
            self.groups.append(_group(group, slice(first, last), own, size))
            first = last
        self._masks: dict[tuple[int | None, int], list[Tensor]] = {}

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Reads and extends pages, as [`Packed.attend`]."""
        keys, values = self.memory.layer(index, key, value)
        keys.flatten(0, 1)[self.places] = key[0].transpose(0, 1)
        values.flatten(0, 1)[self.places] = value[0].transpose(0, 1)
        n_kv_heads, n_shared = key.shape[1], query.shape[1] // key.shape[1]
        outputs = []
        for group, mask in zip(self.groups, self.masks(window, n_shared), strict=True):
            # Heads that share keys are further queries of these, so that nothing is repeated.
            own = query[0, :, group.rows].unflatten(0, (n_kv_heads, n_shared)).unflatten(2, (group.n_texts, -1))
            attended = nn.functional.scaled_dot_product_attention(
                own.permute(2, 0, 1, 3, 4).flatten(2, 3),
                _of_texts(keys, group),
                _of_texts(values, group),
                attn_mask=mask,
                scale=scaling,
            )
            # From (n_texts, n_kv_heads, n_shared * n_new, head_size) to (n_texts * n_new, n_heads, head_size)
            attended = attended.unflatten(2, (n_shared, -1)).flatten(1, 2)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)

    def masks(self, window: int | None, n_shared: int) -> list[Tensor]:
        """
        Returns which tokens are seen, for each group; layers of a kind share it.

        Args:
            window (`int`, *optional*):
                How far a token sees.
            n_shared (`int`):
                Number of heads that share keys, each with its own queries.

        Returns:
            list of `torch.BoolTensor` of shape `(n_texts, 1, n_shared * n_new, n_keys)`.
        """
        if (window, n_shared) not in self._masks:
            seen = [group.distances >= 0 for group in self.groups]
            if window is not None:
                seen = [x & (group.distances < window) for x, group in zip(seen, self.groups, strict=True)]
            self._masks[window, n_shared] = [x.repeat(1, n_shared, 1)[:, None] for x in seen]
        return self._masks[window, n_shared]


def _group(parts: list[Part], rows: slice, positions: Tensor, size: int) -> _Group:
    """Returns the pages and distances of parts that are read together."""
    n_pages = max(-(-part.end // size) for part in parts)
    tables = [(part.text.pages[:n_pages] + [EMPTY_PAGE] * n_pages)[:n_pages] for part in parts]
    flat = [page for table in tables for page in table]
    pages: Tensor | slice = torch.tensor(flat, device=positions.device)
    if flat == list(range(flat[0], flat[0] + len(flat))):
        pages = slice(flat[0], flat[0] + len(flat))
    distances = positions[:, :, None] - torch.arange(n_pages * size, device=positions.device)
    return _Group(rows, len(parts), pages, distances)


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
    Reads and extends pages, as an attention function of transformers ([`~transformers.AttentionInterface`]).

    Args:
        query (`torch.Tensor` of shape `(1, n_heads, n_tokens, head_size)`):
            Queries of all parts. The other arguments are those of all such functions.
        genarm_packed ([`Packed`]):
            The parts. The models of transformers hand arguments that they don't know down to here.
    """
    if genarm_packed is None or softcap is not None or s_aux is not None:
        raise NotImplementedError("its attention has more than a softmax over keys")
    index: Any = module.layer_idx
    return genarm_packed.attend(index, query, key, value, scaling, sliding_window)[None], None


def _of_texts(of_pages: Tensor, group: _Group) -> Tensor:
    """Returns the keys or values of the texts of a group, `(n_texts, n_heads, n_keys, head_size)`."""
    pages = of_pages[group.pages] if isinstance(group.pages, slice) else of_pages.index_select(0, group.pages)
    return pages.view(group.n_texts, -1, *pages.shape[2:]).transpose(1, 2)


AttentionInterface.register(NAME, attend)
