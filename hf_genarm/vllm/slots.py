"""A causal LM that reads a changing set of texts, each at its own position, in one forward pass for all."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..hub.kv_cache import embeddings_of
from ..hub.limits import fixed_length, why_no_cache
from .attention import NAME, Packed, Part, SlotKeysAndValues


class SlotLM:
    """
    Next-token logits of a causal LM for a changing set of texts, at the cost of their new tokens only.

    The keys and values of each text are in a slot of its own, allocated once. A slot is keyed by the tokens that are in
    it: what a text shares with them is kept, the rest is read. So a request that was interrupted, drafts that are
    rejected and a conversation that goes on are all the same case. Nothing is padded: the new tokens of all texts are
    read one after the other in a single row.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            A decoder-only language model, which belongs to this object from now on.
        n_slots (`int`):
            The largest number of texts that are held at once.
        length (`int`):
            The largest number of tokens in a text.
        chunk (`int`, *optional*, defaults to 512):
            The largest number of tokens in a forward pass.
        name (`str`, *optional*):
            What to call it in errors.

    Raises:
        ValueError: if the network can't be run like this, or reads shorter texts only.
    """

    def __init__(self, network: PreTrainedModel, n_slots: int, length: int, chunk: int = 512, name: str = ""):
        self._network, self._chunk, self._name = network, chunk, name or type(network).__name__
        self._refuse_short(length)
        objection = why_no_cache(network)
        if objection is None and not getattr(network.config, "is_decoder", True):
            objection = "it reads texts both ways"
        if objection is not None:
            raise self._unfit(objection)
        self._memory = SlotKeysAndValues(n_slots, length)
        self._tokens: list[list[int]] = [[] for _ in range(n_slots)]  # what is in each slot
        self._held: dict[Hashable, int] = {}
        self._free = list(range(n_slots))  # the longest unused first
        self._check()

    @property
    def n_bytes(self) -> int:
        """Size of the cache."""
        return self._memory.n_bytes

    def release(self, owner: Hashable) -> None:
        """Frees the slot of a text. What is in it is kept for texts that begin alike, until the slot is needed."""
        if owner in self._held:
            self._free.append(self._held.pop(owner))

    @torch.inference_mode()
    def __call__(self, texts: Mapping[Any, list[int]], n_last: Sequence[int]) -> Tensor:
        """
        Args:
            texts (`dict`):
                The tokens of each text by its owner, who keeps a slot until it is released.
            n_last (sequence of `int`):
                For each text, after how many of its last tokens the next one is predicted; 1 unless it ends in drafts.

        Returns:
            `torch.Tensor` of shape `(sum of n_last, vocab_size)`: the logits, text by text.
        """
        waiting = []
        for (owner, text), n in zip(texts.items(), n_last, strict=True):
            slot = self._slot_of(owner, text)
            kept = min(shared_length(self._tokens[slot], text), len(text) - n)
            self._tokens[slot] = text[:kept]
            waiting.append((slot, kept, text, n))
        logits: dict[int, Tensor] = {}
        while waiting:
            room, parts = self._chunk, []
            # The shortest first: those that go on by a token are not held up by one that begins.
            for slot, start, text, n in sorted(waiting, key=lambda x: len(x[2]) - x[1]):
                end = min(len(text), start + room)
                if end < len(text):  # what is predicted from is read in one part
                    end = min(end, len(text) - n)
                if end > start:
                    parts.append((Part(slot, start, end), text, n if end == len(text) else 0))
                    room -= end - start
            if not parts:  # more drafts than fit into a part
                slot, start, text, n = waiting[0]
                parts.append((Part(slot, start, len(text)), text, n))
            logits |= self._read(parts)
            ends = {part.slot: part.end for part, _, _ in parts}
            waiting = [(slot, ends.get(slot, start), text, n) for slot, start, text, n in waiting]
            waiting = [x for x in waiting if x[1] < len(x[2])]
        return torch.cat([logits[self._held[owner]] for owner in texts])

    def _read(self, parts: list[tuple[Part, list[int], int]]) -> dict[int, Tensor]:
        """One forward pass; returns the logits that are wanted, by slot."""
        parts = sorted(parts, key=lambda x: (x[0].end - x[0].start > 1, x[0].slot))
        packed = Packed(self._memory, [part for part, _, _ in parts], self._network.device)
        ids = [token for part, text, _ in parts for token in text[part.start : part.end]]
        wanted: dict[int, int] = {}
        at: list[int] = []
        first = 0
        for part, _, n in parts:
            last = first + part.end - part.start
            if n:
                wanted[part.slot] = n
                at += range(last - n, last)
            first = last
        for part, _, _ in parts:  # an interrupted pass leaves some of it
            del self._tokens[part.slot][part.start :]
        output = self._network(
            input_ids=torch.tensor([ids], device=self._network.device),
            position_ids=packed.positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(at or [0], device=self._network.device),
            genarm_packed=packed,
        )
        for part, text, _ in parts:
            self._tokens[part.slot] = text[: part.end]
        return dict(zip(wanted, output.logits[0].split(list(wanted.values())), strict=True)) if wanted else {}

    def _slot_of(self, owner: Hashable, text: list[int]) -> int:
        if owner not in self._held:
            if not self._free:
                raise RuntimeError(f"All {len(self._tokens)} slots of {self._name} are held.")
            slot = max(self._free, key=lambda x: shared_length(self._tokens[x], text))  # the first of those alike
            self._free.remove(slot)
            self._held[owner] = slot
        return self._held[owner]

    def _refuse_short(self, length: int) -> None:
        config = self._network.config.get_text_config()
        longest = min(getattr(config, "max_position_embeddings", length), fixed_length(self._network))
        if longest < length:
            raise ValueError(
                f"{self._name} reads texts of up to {longest:g} tokens, but the server takes up to {length}. Start it "
                f"with `--max-model-len {longest:g}` or less, or use another reward model."
            )

    @torch.inference_mode()
    def _check(self) -> None:
        """Compares two texts that are read in parts with what the network says of them by itself; makes the slots."""
        n_tokens = len(embeddings_of(self._network))
        size = min(9, self._memory.length)
        texts = [[(7 * i + j * j) % n_tokens for j in range(size - i)] for i in range(min(2, len(self._tokens)))]
        device, owners = self._network.device, [object() for _ in texts]
        expected = [self._network(input_ids=torch.tensor([x], device=device)).logits[0, -1].float() for x in texts]
        try:
            self._network.set_attn_implementation(NAME)
            self({owner: x[:-2] for owner, x in zip(owners, texts, strict=True)}, [1] * len(texts))
            logits = self(dict(zip(owners, texts, strict=True)), [1] * len(texts)).float()
        except (NotImplementedError, ValueError, TypeError) as error:
            raise self._unfit(str(error)) from error
        for owner in owners:
            self.release(owner)
        for slot in range(len(self._tokens)):
            self._tokens[slot] = []
        off, largest = (logits - torch.stack(expected)).abs().max(), torch.stack(expected).abs().max()
        if not off <= torch.finfo(self._network.dtype).eps ** 0.5 * largest or not self._memory.n_bytes:
            raise self._unfit(f"read in parts, it says something else (logits differ by {off:.2g})")

    def _unfit(self, reason: str) -> ValueError:
        return ValueError(
            f"{self._name} (`{type(self._network).__name__}`) can't be served, because {reason}. Use a reward model "
            "whose attention goes through the attention interface of transformers, such as Llama, Qwen or Mistral."
        )


def shared_length(one: list[int], other: list[int]) -> int:
    """Number of leading tokens that two texts have in common."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:  # the first `low` are the same, and not all of the first `high + 1`
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
