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
    Computes next-token logits of a causal LM for a changing set of texts, at the cost of their new tokens only.

    The keys and values of each text are in its slot; all slots are allocated once. A slot is keyed by the tokens that
    are in it: what a text shares with them is kept, the rest is read. So a request that was interrupted, drafts that
    are rejected and a conversation that continues are all the same case. Nothing is padded: the new tokens of all texts
    are read one after the other in a single row.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            A decoder-only language model, which this object changes and nothing else may use any more.
        n_slots (`int`):
            The largest number of texts that are held at once.
        length (`int`):
            The largest number of tokens in a text.
        chunk (`int`, *optional*, defaults to 512):
            The largest number of tokens in a forward pass.
        name (`str`, *optional*):
            Its name in errors.

    Raises:
        ValueError: if the network can't be run like this, or can't read texts of this length.
    """

    def __init__(self, network: PreTrainedModel, n_slots: int, length: int, chunk: int = 512, name: str = ""):
        self._network, self._chunk, self._name = network, chunk, name or type(network).__name__
        self._n_tokens, self._n_logits = len(embeddings_of(network)), len(network.get_output_embeddings().weight)
        positions = getattr(network.config.get_text_config(), "max_position_embeddings", length)
        refuse_short(self._name, min(positions, fixed_length(network)), length)
        objection = why_no_cache(network)
        if objection is None and not getattr(network.config, "is_decoder", True):
            objection = "it is bidirectional"
        if objection is not None:
            raise self._unfit(objection)
        self._memory = SlotKeysAndValues(n_slots, length)
        self._tokens: list[list[int]] = [[] for _ in range(n_slots)]  # what is in each slot
        self._held: dict[Hashable, int] = {}
        self._objections: dict[Hashable, str] = {}
        self._free = list(range(n_slots))  # the longest unused first
        self._check()

    @property
    def n_bytes(self) -> int:
        """Size of the cache."""
        return self._memory.n_bytes

    @property
    def n_slots(self) -> int:
        """Number of texts that are held at once."""
        return len(self._tokens)

    @property
    def n_tokens(self) -> int:
        """Number of tokens that it can read."""
        return self._n_tokens

    def objection(self, owner: Hashable) -> str | None:
        """Returns why the text of an owner could not be read the last time; `None` if it was."""
        return self._objections.get(owner)

    def release(self, owner: Hashable) -> None:
        """Frees the slot of a text. What is in it is kept for texts that begin alike, until the slot is needed."""
        self._objections.pop(owner, None)
        if owner in self._held:
            self._free.append(self._held.pop(owner))

    @torch.inference_mode()
    def erase(self, owner: Hashable) -> None:
        """Clears the slot of a text whose keys or values are not finite: 0 times NaN would reach the next text."""
        if owner in self._held:
            self._tokens[self._held[owner]] = []
            self._memory.erase(self._held[owner])

    @torch.inference_mode()
    def __call__(self, texts: Mapping[Any, list[int]], n_last: Sequence[int]) -> Tensor:
        """
        Reads what is new in some texts, and predicts what follows them.

        Args:
            texts (`dict`):
                The tokens of each text by its owner, which holds a slot until it is released.
            n_last (sequence of `int`):
                For each text, after how many of its last tokens the next one is predicted; 1 unless it ends in drafts.

        Returns:
            `torch.Tensor` of shape `(sum of n_last, vocab_size)`: the logits, text by text; NaN for a text that can't
            be read, whose [`objection`] is the reason, so that it does not fail the others.
        """
        waiting, n_of_unread = [], {}
        for (owner, text), n in zip(texts.items(), n_last, strict=True):
            slot = self._hold_slot(owner, text)
            kept = 0 if slot is None else min(shared_length(self._tokens[slot], text), len(text) - n)
            objection = self._objection(slot, text, text[max(kept, 0) :])
            if slot is None or objection is not None:
                self._objections[owner], n_of_unread[owner] = str(objection), n
                continue
            self._objections.pop(owner, None)
            self._tokens[slot] = text[:kept]
            waiting.append((slot, kept, text, n))
        logits: dict[int, Tensor] = {}
        while waiting:
            room, parts = self._chunk, []
            # The shortest first: those that grow by a token are not held up by one that begins.
            for slot, start, text, n in sorted(waiting, key=lambda x: len(x[2]) - x[1]):
                end = min(len(text), start + room)
                if end < len(text):  # the last n tokens, after which logits are needed, are read in one part
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
        nothing = embeddings_of(self._network).new_full((1, self._n_logits), torch.nan)
        return torch.cat(
            [
                nothing.expand(n_of_unread[owner], -1) if owner in n_of_unread else logits[self._held[owner]]
                for owner in texts
            ]
        )

    def _read(self, parts: list[tuple[Part, list[int], int]]) -> dict[int, Tensor]:
        """Runs one forward pass, and returns the logits that are wanted, by slot."""
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

    def _hold_slot(self, owner: Hashable, text: list[int]) -> int | None:
        """Returns the slot of an owner, a new one with the longest start of its text in it; `None` if none is free."""
        if owner not in self._held and self._free:
            slot = max(
                self._free, key=lambda x: shared_length(self._tokens[x], text)
            )  # the longest unused of equal ones
            self._free.remove(slot)
            self._held[owner] = slot
        return self._held.get(owner)

    def _objection(self, slot: int | None, text: list[int], new: list[int]) -> str | None:
        """Returns why a text can't be read, `None` if it can; its tokens were checked before, except the `new` ones."""
        if slot is None:
            return f"all {self.n_slots} slots are held"
        if len(text) > self._memory.length:
            return f"its {len(text)} tokens are more than the {self._memory.length} that can be read"
        if not new or min(new) < 0:
            return "the engine hides tokens that it has sampled; start it with `--no-async-scheduling`"
        if max(new) >= self._n_tokens:
            return f"it has the token {max(new)}, but only those below {self._n_tokens} are known"
        return None

    @torch.inference_mode()
    def _check(self) -> None:
        """Allocates the slots, and compares two texts that are read in parts with a forward pass of the whole texts."""
        size = min(9, self._memory.length)
        texts = [[(7 * i + j * j) % self._n_tokens for j in range(size - i)] for i in range(min(2, len(self._tokens)))]
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
            raise self._unfit(f"its logits differ when a text is read in parts (by {off:.2g})")

    def _unfit(self, reason: str) -> ValueError:
        """Returns the error for a network that can't be run in slots."""
        return ValueError(
            f"{self._name} (`{type(self._network).__name__}`) can't be served, because {reason}. Use a reward model "
            "whose attention goes through the attention interface of transformers, such as Llama, Qwen or Mistral."
        )


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the number of leading tokens that two texts have in common."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:  # the first `low` are the same, and not all of the first `high + 1`
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def refuse_short(name: str, longest: float, length: float) -> None:
    """
    Checks that a reward model can read the texts of a server.

    Args:
        name (`str`):
            Name of the reward model in the error.
        longest, length (`float`):
            Number of tokens that the reward model reads, and that the server takes.

    Raises:
        ValueError: if it can't.
    """
    if longest < length:
        raise ValueError(
            f"{name} reads texts of up to {longest:g} tokens, but the server takes up to {length:g}. Start it with "
            f"`--max-model-len {longest:g}` or less, or use another reward model."
        )
