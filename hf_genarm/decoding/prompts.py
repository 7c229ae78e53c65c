"""Prompts that a model reads in place of the base's: its text is its own prompt, and then the common answer."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..arguments import as_tensor, shown
from ..hub.scoring import listed
from ..hub.sentence import with_sentence
from .own_prompt import OwnPrompt
from .padding import pad_token_id_of
from .strings.prompt_reader import PromptReader
from .texts import Text

_RULE = (
    "a dict with `input_ids` and `attention_mask` of shape (n_requests, length), as a tokenizer returns it with "
    '`padding=True, padding_side="left", return_tensors="pt"`'
)
_ENCODE = "`generate(**processor.encode(prompts), logits_processor=[processor])`"
# What `encode` decides itself, and templates don't know
_DECIDED = {"tokenize", "padding", "padding_side", "return_dict", "return_tensors", "truncation", "max_length"}


class OwnPrompts:
    """
    Holds the prompts of all models of a processor that read another one than the base.

    Args:
        sentences (sequence of `str` or `None`):
            For each reward model, the sentence that it puts into prompts, if it is a sentence.
        readers (sequence of [`PromptReader`] or `None`):
            For each, what writes prompts of the base in its tokens, if these are other strings.
    """

    def __init__(self, sentences: Sequence[str | None], readers: Sequence[PromptReader | None]):
        self._sentences, self._readers = list(sentences), list(readers)
        self._read: dict[int, tuple[Tensor, OwnPrompt]] = {}  # of the base's prompts of the last call
        self._rewards: list[OwnPrompt | None] = [None] * len(self._sentences)
        self._reference: OwnPrompt | None = None
        self._encoded: OwnPrompt | None = None  # the prompts of the base that they were made from

    def copy(self) -> "OwnPrompts":
        """Returns a copy with the same prompts; nothing in them is changed in place."""
        return copy.copy(self)

    @property
    def n_requests(self) -> int:
        """The number of requests whose prompts differ."""
        return max((len(x.input_ids) for x in (*self._rewards, self._reference) if x is not None), default=1)

    @property
    def rewards(self) -> list[dict[str, Tensor] | None] | None:
        """The prompt of each reward model, as it can be set; `None` if all read that of the base."""
        prompts = [_as_dict(x) for x in self._rewards]
        return None if all(x is None for x in prompts) else prompts

    @rewards.setter
    def rewards(self, prompts: Any) -> None:
        n_rewards = len(self._sentences)
        is_list = isinstance(prompts, list | tuple)
        given = list(prompts) if is_list else [prompts] * n_rewards
        if len(given) != n_rewards:
            raise ValueError(
                f"`prompts` has {len(given)} entries, but there are {n_rewards} reward models. Give one for each, "
                "`None` for those that read the prompt of the base, or a single one for all."
            )
        names = [f"prompts[{index}]" if is_list else "prompts" for index in range(n_rewards)]
        self._rewards = [None if x is None else _checked(name, x) for name, x in zip(names, given, strict=True)]
        self._encoded = None

    @property
    def reference(self) -> dict[str, Tensor] | None:
        """The prompt of the reference, as it can be set; `None` if it reads that of the base."""
        return _as_dict(self._reference)

    @reference.setter
    def reference(self, prompts: Any) -> None:
        self._reference = None if prompts is None else _checked("reference_prompts", prompts)

    def encode(
        self,
        prompts: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        reward_tokenizers: Sequence[PreTrainedTokenizerBase | None],
        **template_kwargs: Any,
    ) -> BatchEncoding:
        """
        Sets the prompts of all reward models that are sentences, and returns those of the base.

        Args:
            prompts, **template_kwargs:
                As for [`~GenARMLogitsProcessor.encode`].
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                That of the base.
            reward_tokenizers (list of [`~transformers.PreTrainedTokenizerBase`] or `None`):
                Those of the reward models, `None` where it is that of the base.
        """
        if tokenizer is None:
            raise ValueError(
                "The processor has no tokenizer, so that it can't encode text. Make it with that of the base, "
                "`tokenizer=AutoTokenizer.from_pretrained(...)`."
            )
        is_chat = isinstance(prompts, list | tuple) and prompts and all(isinstance(x, Mapping) for x in prompts)
        prompts = listed("prompts", [prompts] if isinstance(prompts, str) or is_chat else prompts)
        if not prompts:
            raise ValueError("`prompts` is empty, but it must have one text or chat at least.")
        inputs = encoded(prompts, tokenizer, **template_kwargs)
        template = template_kwargs.get("chat_template")
        rewards: list[BatchEncoding | None] = []
        for sentence, own, reader in zip(self._sentences, reward_tokenizers, self._readers, strict=True):
            if reader is not None:
                its_kwargs = {name: x for name, x in template_kwargs.items() if name != "chat_template"}
                _refuse_no_template(prompts, reader.tokenizer)
                rewards.append(encoded(prompts, reader.tokenizer, **its_kwargs))
                continue
            own = tokenizer if own is None else own
            asked = [] if sentence is None else [with_sentence(x, sentence, own, template) for x in prompts]
            rewards.append(encoded(asked, own, **template_kwargs) if asked else None)
        self.rewards = rewards
        self._encoded = _checked("prompts", inputs)
        return inputs

    def of(self, indices: Sequence[int], text: Text) -> tuple[list[OwnPrompt | None], OwnPrompt | None]:
        """
        Returns the prompts of some reward models, and that of the reference, for a text; `None` for that of the base.

        Raises:
            ValueError: if they belong to other prompts of the base, or a sentence has none.
        """
        rewards = [self._rewards[index] for index in indices]
        for index, prompt in zip(indices, rewards, strict=True):
            if prompt is None and self._sentences[index] is not None:
                raise ValueError(
                    f"Reward model {index} is the sentence {shown(self._sentences[index])}, which is put into prompts "
                    f"when they are encoded, but none were. Use {_ENCODE}, or set `processor.prompts`."
                )
        are_read = any(self._readers[index] is not None for index in indices)
        if self._reference is None and not any(rewards) and not are_read:
            return rewards, None
        named = {f"processor.prompts[{index}]": prompt for index, prompt in zip(indices, rewards, strict=True)}
        for name, prompt in (named | {"processor.reference_prompts": self._reference}).items():
            if prompt is not None:
                _refuse_other_rows(name, prompt, text)
        if len(set(text.n_new)) > 1 and text.run.outer is None:
            raise ValueError(
                f"The texts of this call have {sorted(set(text.n_new))} new tokens, but where models read prompts of "
                "their own, all texts must have begun together. Give the processor one batch at a time."
            )
        start = text.answer_start
        key = ("encoded", start, len(text.input_ids))
        if any(rewards) and self._encoded is not None and text.run.agreed.get(key) is not self._encoded:
            self._refuse_not_encoded(text.line.ids(start), self._encoded)
            if text.step is not None:
                text.run.agreed[key] = self._encoded
        for place, index in enumerate(indices):
            reader = self._readers[index]
            if rewards[place] is None and reader is not None:
                rewards[place] = self._read_by(index, reader, text)
        own = [x and replace(x, answer_start=start) for x in (*rewards, self._reference)]
        return own[:-1], own[-1]

    def _read_by(self, index: int, reader: PromptReader, text: Text) -> OwnPrompt:
        """Returns the prompts of the base in the tokens of a reward model, one for each request."""
        start, n_prompts = text.answer_start, text.run.root.n_prompts or len(text.input_ids)
        repeats = max(len(text.input_ids) // n_prompts, 1)
        prompts = text.line.ids(start)[::repeats].masked_fill(text.line.mask(start)[::repeats] == 0, -1)
        known = self._read.get(index)
        if known is None or not torch.equal(known[0], prompts):
            rows = [reader(row[row >= 0].tolist()) for row in prompts]
            known = prompts, _checked("prompts", _padded(rows, reader.tokenizer))
            self._read = self._read | {index: known}  # not in place, as copies share it
        return known[1]

    def _refuse_not_encoded(self, prompts: Tensor, encoded: OwnPrompt) -> None:
        """Refuses prompts of the base that are not those that the other prompts were made from."""
        repeats = len(prompts) // len(encoded.input_ids)
        ids, mask = (x.repeat_interleave(repeats, dim=0) for x in (encoded.input_ids, encoded.attention_mask))
        if ids.shape != prompts.shape or not torch.equal(ids * mask, prompts * mask):
            raise ValueError(
                "The prompts of this `generate` call are not those that `processor.encode` was last called with, so "
                f"that sentences would be read with other prompts than the base's. Use {_ENCODE}."
            )


def encoded(prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> BatchEncoding:
    """
    Tokenizes texts and chats for `generate`, padded on the left.

    Args:
        prompts (sequence of `str` or of messages):
            The prompts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            What tokenizes them.
        **template_kwargs:
            Passed to the chat template, such as `enable_thinking`.

    Returns:
        [`~transformers.BatchEncoding`], with `input_ids` and `attention_mask` of shape `(n_prompts, length)`.

    Raises:
        TypeError: if an argument is none of a chat template.
        ValueError: if a prompt has no tokens, or there is a plain text, which goes through no template.
    """
    decided = sorted(_DECIDED & template_kwargs.keys())
    if decided:
        raise TypeError(
            f"`{decided[0]}` is not for `encode`, which pads on the left and returns tensors. Leave it out."
        )
    adds = {"add_generation_prompt": not template_kwargs.get("continue_final_message", False)}
    rows = []
    for index, prompt in enumerate(prompts):
        is_text = isinstance(prompt, str)
        if is_text and template_kwargs:
            raise ValueError(
                f"`{next(iter(template_kwargs))}` is for a chat template, but `prompts[{index}]` is plain text. Leave "
                "it out, or give a chat."
            )
        text = prompt if is_text else tokenizer.apply_chat_template(prompt, tokenize=False, **adds | template_kwargs)
        row = tokenizer(text, add_special_tokens=is_text)["input_ids"]  # a template writes them itself
        if not row:
            raise ValueError(f"`prompts[{index}]` is {shown(prompt)}, which has no tokens. Give a text or a chat.")
        rows.append(row)
    return _padded(rows, tokenizer)


def _padded(rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Pads tokens on the left."""
    pad, length = pad_token_id_of(tokenizer) or 0, max(map(len, rows))
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})


def _refuse_no_template(prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses chats for a reward model that reads them in its own template, but has none."""
    if tokenizer.chat_template is None and not all(isinstance(x, str) for x in prompts):
        raise ValueError(
            f"The prompts are chats, but the tokenizer of the reward model (`{tokenizer.name_or_path}`) has no chat "
            "template, in which it would read them. Set its `chat_template`, give plain texts, or set "
            "`processor.prompts`."
        )


def _as_dict(prompt: OwnPrompt | None) -> dict[str, Tensor] | None:
    return None if prompt is None else {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask}


def _checked(name: str, value: Any) -> OwnPrompt:
    """
    Returns the prompts that a user gives for one model.

    Raises:
        TypeError: if they are no tensors of ids and of a mask.
        ValueError: if these have other shapes, or are not padded on the left.
    """
    parts = ("input_ids", "attention_mask")
    if not isinstance(value, Mapping) or not all(part in value for part in parts):
        raise TypeError(f"`{name}` is {shown(value)}, but must be {_RULE}.")
    ids, mask = (as_tensor(f"{name}[{part!r}]", value[part], f"a tensor, in {_RULE}").cpu() for part in parts)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"`{name}['input_ids']` is of {ids.dtype}, but must be a tensor of integers, in {_RULE}.")
    if ids.ndim != 2 or ids.numel() == 0 or ids.shape != mask.shape:
        raise ValueError(
            f"`{name}` has `input_ids` of shape {tuple(ids.shape)} and an `attention_mask` of shape "
            f"{tuple(mask.shape)}, but must be {_RULE}."
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"`{name}['attention_mask']` has other values than 0 and 1: 1 is a token, 0 is padding.")
    if not mask.any(dim=1).all():
        row = int((~mask.any(dim=1)).nonzero()[0])
        raise ValueError(f"Row {row} of `{name}` is padding alone, but a model must read something. Give it a token.")
    if not mask[:, -1].all():
        raise ValueError(
            f"`{name}['attention_mask']` ends in 0: prompts are padded on the right, so that an answer would follow "
            "padding. Pad on the left: `tokenizer.padding_side = 'left'`."
        )
    first = int(mask.any(dim=0).nonzero()[0])  # leading columns of padding alone mean nothing
    return OwnPrompt(ids[:, first:].long(), mask[:, first:].long())


def _refuse_other_rows(name: str, prompt: OwnPrompt, text: Text) -> None:
    """Refuses prompts that are not one for each request of a call."""
    n_own, n_rows, n_prompts = len(prompt.input_ids), len(text.input_ids), text.run.root.n_prompts
    if n_rows % n_own or (n_prompts is not None and n_own != n_prompts):
        given = f"`generate` was given {n_prompts} prompts" if n_prompts is not None else f"there are {n_rows} texts"
        raise ValueError(
            f"`{name}` has {n_own} rows, one for each request, but {given}. Set it again, with one row for each prompt "
            "of the call, which its beams and returned sequences share, or to `None`."
        )
