"""A causal LM that reads a changing set of texts, each at its own position, in one forward pass for all."""

import logging
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..hub.kv_cache import embeddings_of
from ..hub.limits import fixed_length, why_no_cache
from .attention import NAME, PagedKeysAndValues, Part
from .text_pages import HeldText, TextPages

logger = logging.getLogger("vllm.hf_genarm")


@dataclass(eq=False)
class _Wanted:
    """Holds a text that is to be read, and after how many of its last tokens logits are wanted."""

    text: HeldText
    tokens: list[int]
    n_last: int


class PagedLM:
    """
    Computes next-token logits of a causal LM for a changing set of texts, at the cost of their new tokens only.

    The keys and values of a text are in pages, all of which are allocated at once. A text is known by its tokens: what
    it shares with those that were read is kept, the rest is read. So a request that was interrupted, drafts that are
    rejected, a conversation that continues, and texts that were dropped because pages are short are all the same case.
    Nothing is padded: the new tokens of all texts are read one after the other in a single row.

    An owner stands for a text, and may be any hashable object: the text need not be that of a request, as where a
    reward model has a prompt of its own.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            A decoder-only language model, which this object changes and nothing else may use any more.
        length (`int`):
            The largest number of tokens in a text.
        n_tokens (`int`, *optional*):
            Number of tokens that pages are allocated for; by [`allocate`] where it is not known yet.
        chunk (`int`, *optional*, defaults to 512):
            The largest number of tokens in a forward pass.
        name (`str`, *optional*):
            Its name in errors.
        memory (subclass of [`PagedKeysAndValues`], *optional*):
            What keeps and reads the keys and values.

    Attributes:
        bytes_per_token (`int`):
            Size of the keys and values of a token.
        pages ([`TextPages`]):
            The pages and the texts in them.
        n_ids (`int`):
            Number of different tokens that it can read.
        n_read (`int`):
            Number of tokens that were read.

    Raises:
        ValueError: if the network can't be run like this, or can't read texts of this length.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        length: int,
        n_tokens: int | None = None,
        chunk: int = 512,
        name: str = "",
        memory: type[PagedKeysAndValues] = PagedKeysAndValues,
    ):
        self._network, self._length, self._chunk = network, length, chunk
        self._name = name or type(network).__name__
        self.n_ids = len(embeddings_of(network))
        positions = getattr(network.config.get_text_config(), "max_position_embeddings", length)
        refuse_short(self._name, min(positions, fixed_length(network)), length)
        objection = why_no_cache(network)
        if objection is None and not getattr(network.config, "is_decoder", True):
            objection = "it is bidirectional"
        if objection is not None:
            raise self._unfit(objection)
        self.n_read = 0
        self._objections: dict[Hashable, str] = {}
        self.pages, self._memory = TextPages(8, memory.smallest_page), memory(8, memory.smallest_page)
        self._n_logits = self._check()
        self.bytes_per_token = self._memory.bytes_per_token
        if n_tokens is not None:
            self.allocate(n_tokens)

    def allocate(self, n_tokens: int, page_size: int = 16) -> None:
        """
        Allocates pages, and forgets all texts.

        Args:
            n_tokens (`int`):
                Number of tokens that there is room for.
            page_size (`int`, *optional*, defaults to 16):
                Number of tokens in a page.

        Raises:
            ValueError: if a text of the largest length would not fit.
        """
        n_pages = n_tokens // page_size
        if n_pages * page_size < self._length:
            raise ValueError(f"{n_tokens} tokens in pages of {page_size} hold no text of {self._length}.")
        self.pages, self._memory = TextPages(n_pages, page_size), self._memory.resized(n_pages, page_size)
        self.n_read = 0

    @property
    def n_bytes(self) -> int:
        """Size of the keys and values."""
        return self._memory.n_bytes

    def objection(self, owner: Hashable) -> str | None:
        """Returns why the text of an owner could not be read the last time; `None` if it was."""
        return self._objections.get(owner)

    def release(self, owner: Hashable) -> None:
        """Gives up a text. It is kept for texts that begin alike, until its pages are needed."""
        self._objections.pop(owner, None)
        self.pages.release(owner)

    @torch.inference_mode()
    def erase(self, owner: Hashable) -> None:
        """Clears the pages of a text whose keys or values are not finite: 0 times NaN would reach the next text."""
        text = self.pages.get(owner)
        if text is not None:
            self._erase(text)

    @torch.inference_mode()
    def __call__(self, texts: Mapping[Any, list[int]], n_last: Sequence[int]) -> Tensor:
        """
        Reads what is new in some texts, and predicts what follows them.

        Args:
            texts (`dict`):
                The tokens of each text by its owner, which holds the text until it is released.
            n_last (sequence of `int`):
                For each text, after how many of its last tokens the next one is predicted; 1 unless it ends in drafts.

        Returns:
            `torch.Tensor` of shape `(sum of n_last, vocab_size)`: the logits, text by text; NaN for a text that can't
            be read, whose [`objection`] is the reason, so that it does not fail the others.
        """
        wanted: dict[Hashable, _Wanted | int] = {}
        for (owner, tokens), n in zip(texts.items(), n_last, strict=True):
            text = self.pages.hold(owner, tokens)
            del text.tokens[max(len(tokens) - n, 0) :]
            objection = self._objection(tokens, tokens[len(text.tokens) :])
            if objection is None:
                self._objections.pop(owner, None)
                wanted[owner] = _Wanted(text, tokens, n)
            else:
                self._objections[owner], wanted[owner] = objection, n
        logits: dict[HeldText, Tensor] = {}
        # The shortest first: those that grow by a token are not held up by one that begins, nor dropped for it.
        waiting = sorted(
            (x for x in wanted.values() if isinstance(x, _Wanted)), key=lambda x: len(x.tokens) - len(x.text.tokens)
        )
        n_dropped = self.pages.n_dropped
        while waiting:
            fit: dict[HeldText, _Wanted] = {}
            for x in waiting:
                if self.pages.reserve(x.text, len(x.tokens), fit):
                    fit[x.text] = x
            assert fit  # there is room for one
            logits |= self._read_to_the_end(fit.values())
            waiting = [x for x in waiting if x.text not in fit]
            for text in fit:  # whose pages the next ones may get
                if waiting and logits[text].isnan().any():
                    self._erase(text)
        if self.pages.n_dropped > n_dropped == 0:
            logger.warning(
                "The texts of running requests don't fit into the memory of %s, %.0f MB, so that some are read again, "
                "which is slow. Raise `reward_memory` or `slots` in `genarm`, or lower `--max-num-seqs`.",
                self._name,
                self.n_bytes / 1e6,
            )
        weight = embeddings_of(self._network)
        return torch.cat(
            [
                logits[x.text] if isinstance(x, _Wanted) else weight.new_full((x, self._n_logits), torch.nan)
                for x in wanted.values()
            ]
        )

    def _read_to_the_end(self, wanted: Collection[_Wanted]) -> dict[HeldText, Tensor]:
        """Reads texts that have their pages, in passes of at most `chunk` tokens; returns the logits of each."""
        logits: dict[HeldText, Tensor] = {}
        while waiting := [x for x in wanted if len(x.text.tokens) < len(x.tokens)]:
            room, ends = self._chunk, {}
            for x in waiting:
                start = len(x.text.tokens)
                end = min(len(x.tokens), start + room)
                if end < len(x.tokens):  # the last n tokens, after which logits are needed, are read in one part
                    end = min(end, len(x.tokens) - x.n_last)
                if end > start:
                    ends[x] = end
                    room -= end - start
            if not ends:  # more drafts than fit into a part
                ends[waiting[0]] = len(waiting[0].tokens)
            logits |= self._read(ends)
        return logits

    def _read(self, ends: Mapping[_Wanted, int]) -> dict[HeldText, Tensor]:
        """Runs one forward pass, to a position in each text, and returns the logits that are wanted."""
        of_texts = {x.text: x for x in ends}
        parts = [Part(x.text, len(x.text.tokens), end) for x, end in ends.items()]
        packed = self._memory.packed(parts, self._network.device)
        ids = [token for part in packed.parts for token in of_texts[part.text].tokens[part.start : part.end]]
        rows: dict[HeldText, range] = {}
        last = 0
        for part in packed.parts:
            last += part.end - part.start
            if part.end == len(of_texts[part.text].tokens):
                rows[part.text] = range(last - of_texts[part.text].n_last, last)
        at = [row for of_text in rows.values() for row in of_text]
        output = self._network(
            input_ids=torch.tensor([ids], device=self._network.device),
            position_ids=packed.positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(at or [0], device=self._network.device),
            genarm_packed=packed,
        )
        # Only now: an interrupted pass has read nothing.
        for part in packed.parts:
            part.text.tokens += of_texts[part.text].tokens[part.start : part.end]
        self.n_read += len(ids)
        return dict(zip(rows, output.logits[0].split([len(x) for x in rows.values()]), strict=True)) if rows else {}

    def _erase(self, text: HeldText) -> None:
        """Sets the pages of a text to 0."""
        self._memory.erase(text.pages)
        text.tokens.clear()

    def _objection(self, text: list[int], new: list[int]) -> str | None:
        """Returns why a text can't be read, `None` if it can; its tokens were checked before, except the `new` ones."""
        if len(text) > self._length:
            return f"its {len(text)} tokens are more than the {self._length} that can be read"
        if not new or min(new) < 0:
            return "the engine hides tokens that it has sampled; start it with `--no-async-scheduling`"
        if max(new) >= self.n_ids:
            return f"it has the token {max(new)}, but only those below {self.n_ids} are known"
        return None

    @torch.inference_mode()
    def _check(self) -> int:
        """Compares two texts that are read in parts with a forward pass of the whole texts; returns their width."""
        size = min(2 * self._memory.page_size + 1, self._length)
        texts = [[(7 * i + j * j) % self.n_ids for j in range(size - i)] for i in range(min(2, size))]
        device, owners = self._network.device, [object() for _ in texts]
        expected = [self._network(input_ids=torch.tensor([x], device=device)).logits[0, -1].float() for x in texts]
        try:
            self._network.set_attn_implementation(NAME)
            self({owner: x[: max(1, len(x) - 2)] for owner, x in zip(owners, texts, strict=True)}, [1] * len(texts))
            logits = self(dict(zip(owners, texts, strict=True)), [1] * len(texts)).float()
        except (NotImplementedError, ValueError, TypeError) as error:
            raise self._unfit(str(error)) from error
        off, largest = (logits - torch.stack(expected)).abs().max(), torch.stack(expected).abs().max()
        if not off <= torch.finfo(self._network.dtype).eps ** 0.5 * largest or not self._memory.n_bytes:
            raise self._unfit(f"its logits differ when a text is read in parts (by {off:.2g})")
        return logits.shape[1]

    def _unfit(self, reason: str) -> ValueError:
        """Returns the error for a network that can't be run in pages."""
        return ValueError(
            f"{self._name} (`{type(self._network).__name__}`) can't be served, because {reason}. Use a reward model "
            "whose attention goes through the attention interface of transformers, such as Llama, Qwen or Mistral."
        )


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
