"""What a pass of the base belongs to, and what it reads."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .line import CacheMark, Line, is_beginning


class Run:
    """
    Stands for one `generate` call, or one custom decoding loop: all memory is keyed by runs.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`):
            The prompts, with what was drafted before the first pass of the base.
        cache ([`~transformers.Cache`], *optional*):
            The cache of the base.
        is_custom_loop (`bool`, *optional*, defaults to `False`):
            Whether it is known by its tokens alone, since the base was not watched.

    Attributes:
        depth (`int`):
            How many `generate` calls of the base were running inside each other, its own included.
        n_prompts (`int`, *optional*):
            The number of prompts that `generate` was given, of which each can have several rows.
        outer ([`Run`], *optional*):
            The run in which this one began, if this one continues its texts, as drafts do.
        step ([`Step`], *optional*):
            Its latest pass.
        drafts_itself (`bool`):
            Whether the base drafts for itself in it.
        is_over (`bool`):
            Whether its `generate` call has returned.
        n_hidden (`int`):
            Number of tokens that the base has read and `generate` was not given: they are in its cache, or embedded.
        other_inputs (list of `str`):
            What the base reads in addition to tokens, such as `pixel_values`.
        attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
            The mask of the prompts, and of some of what follows, in the first pass.
        line ([`Line`], *optional*):
            The texts of its first pass, which all later ones are padded as.
        has_usual_positions (`bool`):
            Whether the base is known to number the tokens of its texts from 0.
        agreed (`dict`):
            What was checked against the prompts, and need not be checked at later steps.
    """

    def __init__(self, input_ids: Tensor, cache: Any = None, is_custom_loop: bool = False):
        self._input_ids, self.prompt_length = input_ids, input_ids.shape[1]
        self._cache: Callable[[], Any] = (lambda: None) if cache is None else weakref.ref(cache)
        self.is_custom_loop, self.depth = is_custom_loop, 0
        self.n_prompts: int | None = None
        self.outer: Run | None = None
        self.step: Step | None = None
        self.is_over = False
        self.has_begun = False  # when the base drafts for itself, that comes before its first pass
        self.drafts_itself = False
        self.n_hidden = 0
        self.other_inputs: list[str] = []
        self.attention_mask = torch.ones_like(input_ids)
        self.line: Line | None = None
        self.has_usual_positions = False
        self.agreed: dict[Any, Any] = {}

    @property
    def prompt(self) -> Tensor:
        """The prompts, `(batch_size, prompt_length)`."""
        return self._input_ids[:, : self.prompt_length]

    @property
    def root(self) -> "Run":
        """The outermost of the runs that it continues, or itself."""
        return self if self.outer is None else self.outer.root

    def extend_prompt(self, input_ids: Tensor) -> Tensor:
        """Adds the next part of a prompt that is read in parts, and returns all of it so far."""
        self._input_ids = torch.cat([self._input_ids, input_ids], dim=1)
        self.prompt_length = self._input_ids.shape[1]
        self.line = None
        return self._input_ids

    @property
    def cache(self) -> Any:
        """The cache of the base, if there is one and something still uses it."""
        return self._cache()

    def uses(self, cache: Any) -> bool:
        """Returns whether this is the cache of the run."""
        return cache is not None and self.cache is cache

    def is_continued_by(self, input_ids: Tensor) -> bool:
        """Returns whether texts `(batch_size, length)` begin with the prompts."""
        is_longer = len(input_ids) == len(self._input_ids) and input_ids.shape[1] >= self.prompt_length
        return is_longer and torch.equal(input_ids[:, : self.prompt_length], self.prompt)

    def mask_of(self, input_ids: Tensor) -> Tensor:
        """Returns the mask of texts that begin with the prompts."""
        new = input_ids.new_ones(len(input_ids), input_ids.shape[1] - self.prompt_length)
        return torch.cat([self.attention_mask[:, : self.prompt_length], new], dim=1)


class Step:
    """
    Stands for one forward pass of the base, as `prepare_inputs_for_generation` was called for it.

    Attributes:
        run ([`Run`]):
            The `generate` call that it belongs to.
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            All tokens that the base has read after this pass.
        attention_mask (`torch.LongTensor` of shape `(batch_size, length)`):
            Which of these tokens are not padding.
        is_first (`bool`):
            Whether it is the first pass of the run, over the prompt.
        line ([`Line`]):
            The texts that it reads.
        logits (`torch.Tensor` of shape `(batch_size, n, vocab_size)`, *optional*):
            What the base returned for the last n tokens, before any processor, if logits are kept.
    """

    # Of a prompt only the last logits are used; drafts are shorter than this.
    KEPT_LOGITS = 64

    def __init__(self, run: Run, input_ids: Tensor, mask: Tensor | None, is_first: bool, read: Tensor, line: Line):
        self.run, self.input_ids, self.is_first, self.line = run, input_ids, is_first, line
        # `generate` drops a mask of ones.
        self.attention_mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device).long()
        run.step = self
        if is_first or input_ids.shape[1] <= run.prompt_length:  # the masks of later drafts are inferred
            run.attention_mask = self.attention_mask
        self.read = read  # the very tensor that goes to `forward`
        self.logits: Tensor | None = None
        self._cache: CacheMark | None = None

    def end(self) -> None:
        """Records the cache as the pass has left it, so that a later one is known to continue these texts."""
        if self._cache is None:
            self._cache = CacheMark(self.run.cache)

    def is_continued_by(self, input_ids: Tensor, cache: Any) -> bool:
        """Returns whether longer texts are known to begin with these, since the base continues its cache as it was."""
        is_longer = len(input_ids) == len(self.input_ids) and input_ids.shape[1] > self.input_ids.shape[1]
        return is_longer and self._cache is not None and self.run.uses(cache) and self._cache.is_on(cache)

    def mask_of(self, input_ids: Tensor) -> Tensor | None:
        """Returns the mask `(batch_size, length)` of texts that this pass has read; `None` for other texts."""
        length = input_ids.shape[1]
        is_read = len(input_ids) == len(self.input_ids) and length <= self.input_ids.shape[1]
        if not is_read or self.attention_mask.shape != self.input_ids.shape:
            return None
        if not is_beginning(input_ids, self.input_ids) and not torch.equal(input_ids, self.input_ids[:, :length]):
            return None
        return self.attention_mask[:, :length]

    def base_logits(self, length: int) -> Tensor | None:
        """Returns the logits of the base `(batch_size, vocab_size)` after `length` tokens, if they were kept."""
        ahead = self.input_ids.shape[1] - length
        if self.logits is None or not 0 <= ahead < self.logits.shape[1]:
            return None
        return self.logits[:, -1 - ahead]
