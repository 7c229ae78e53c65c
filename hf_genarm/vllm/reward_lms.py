"""The reward models of a server, in their pages and in the vocabulary of the served model."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..decoding.vocab import VocabMap
from ..hub.compatibility import has_same_ids
from ..hub.limits import why_no_cache
from ..hub.loading import base_of, short_name
from ..hub.reward_model import AutoregressiveRewardModel, find_tokenizer
from ..hub.sharing import merged
from .paged_lm import PagedLM


class RewardLM:
    """
    Computes next-token log-probabilities of a reward model or reference, in the ids of the served model.

    Args:
        lm ([`PagedLM`]):
            The model.
        vocab_size (`int`):
            Number of logits of the served model.
        vocab_map ([`VocabMap`], *optional*):
            How the vocabularies line up; `None` where the ids are the same.
        reward_vocab_size (`int`, *optional*):
            Number of logits of the model, needed with a map.

    Attributes:
        lm ([`PagedLM`]):
            The model.
        no_tokens (`torch.BoolTensor` of shape `(vocab_size,)`, *optional*):
            The logits of the served model that belong to no token of this one.
    """

    def __init__(self, lm: PagedLM, vocab_size: int, vocab_map: VocabMap | None = None, reward_vocab_size: int = 0):
        self.lm, self._vocab_size, self._vocab_map = lm, vocab_size, vocab_map
        self.no_tokens: Tensor | None = None
        if vocab_map is not None:
            # The ids go the same way as log-probabilities; float32 holds them exactly.
            ids = vocab_map.base_log_probs(torch.arange(reward_vocab_size, dtype=torch.float32)[None], vocab_size)[0]
            self.no_tokens = ids.isnan()
            self._ids = ids.nan_to_num(0.0).long()  # a prompt may have ids that are no token, but no text has

    def log_probs(self, texts: Mapping[Any, list[int]], n_last: Sequence[int]) -> Tensor:
        """
        Predicts what follows some texts.

        Args:
            texts, n_last:
                As for [`PagedLM`], in ids of the served model.

        Returns:
            `torch.FloatTensor` of shape `(sum of n_last, vocab_size)`: 0 where the model has no token, NaN for a text
            that it can't read.
        """
        if self._vocab_map is None:
            return self.lm(texts, n_last).float().log_softmax(dim=-1)
        own = {owner: self._own_ids(text) for owner, text in texts.items()}
        log_probs = self.lm(own, n_last).float().log_softmax(dim=-1)
        aligned = self._vocab_map.base_log_probs(log_probs, self._vocab_size)
        assert self.no_tokens is not None
        self.no_tokens = self.no_tokens.to(aligned.device)
        return aligned.masked_fill(self.no_tokens, 0.0)

    def _own_ids(self, text: list[int]) -> list[int]:
        """Returns a text in the ids of this model; ids beyond the logits of the served model stay unknown."""
        ids = torch.tensor(text)
        own = self._ids[ids.clamp(0, self._vocab_size - 1)]
        own = torch.where(ids >= self._vocab_size, ids.clamp(min=self.lm.n_ids), own)
        return torch.where(ids < 0, ids, own).tolist()

    def objection(self, owner: Hashable) -> str | None:
        """Returns why the text of an owner could not be read the last time; `None` if it was."""
        return self.lm.objection(owner)

    def release(self, owner: Hashable) -> None:
        """Gives up a text."""
        self.lm.release(owner)

    def erase(self, owner: Hashable) -> None:
        """Clears the pages of a text whose keys or values are not finite."""
        self.lm.erase(owner)


def load_reward_lms(
    names: Sequence[str],
    served: str,
    tokenizer_name: str,
    vocab_size: int,
    make_lm: Callable[[PreTrainedModel, str], PagedLM],
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    *,
    and_served: bool = False,
) -> list[RewardLM]:
    """
    Loads reward models, or a reference, to be read in pages.

    Args:
        names (sequence of `str`):
            Hub ids or folders.
        served, tokenizer_name (`str`):
            The model that is served and its tokenizer, Hub ids or folders.
        vocab_size (`int`):
            Number of logits of the served model.
        make_lm (callable):
            Makes the [`PagedLM`] of a network, given its name.
        dtype (`torch.dtype`):
            Data type of the weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the repositories.
        and_served (`bool`, *optional*, defaults to `False`):
            Whether the served model itself is loaded as the last one, to read sentences.

    Raises:
        ValueError: if one of them can't be loaded or served, or lacks tokens of the served model.
    """
    tokenizer = find_tokenizer(tokenizer_name, trust_remote_code=trust_remote_code)
    # An adapter on the served model is loaded onto a copy of its weights, if they are those that it was trained on.
    are_on_served = [is_on(name, served) for name in names]
    base = None
    if any(are_on_served) or and_served:
        base = AutoModelForCausalLM.from_pretrained(
            served, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        ).eval()
    models = []
    for name, is_on_served in zip(names, are_on_served, strict=True):
        own: dict[str, Any] = {} if is_on_served else {"dtype": dtype}
        arm = AutoregressiveRewardModel.from_pretrained(
            name, base if is_on_served else None, trust_remote_code=trust_remote_code, **own
        )
        models.append(_with_pages(arm, name, tokenizer, vocab_size, make_lm, dtype))
    if and_served and base is not None:  # the last, because nothing else may use its modules then
        arm = AutoregressiveRewardModel(base, tokenizer)
        models.append(_with_pages(arm, served, tokenizer, vocab_size, make_lm, dtype))
    return models


def is_on(name: str, served: str) -> bool:
    """Returns whether a reward model is an adapter that names the served model as its base."""
    return short_name(base_of(name)) == short_name(served)


def refuse_lacking(name: str, lacking: Iterable[str]) -> None:
    """
    Checks that a reward model has all tokens of the served model.

    Args:
        name (`str`):
            Name of the reward model in the error.
        lacking (iterable of `str`):
            The tokens that it lacks.

    Raises:
        ValueError: if there is one.
    """
    tokens = sorted(lacking)
    if tokens:
        raise ValueError(
            f"`{name}` lacks tokens of the served model, such as {tokens[:5]}: it could not read a text "
            "that has one. Use a reward model trained with the tokenizer of the served model."
        )


def _with_pages(
    arm: AutoregressiveRewardModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    make_lm: Callable[[PreTrainedModel, str], PagedLM],
    dtype: torch.dtype,
) -> RewardLM:
    """Makes a copy of a reward model that is read in pages, and aligns its vocabulary."""
    objection = why_no_cache(arm.model)
    if objection is not None:
        raise ValueError(f"`{name}` can't be served, because {objection}. Use another reward model.")
    network: Any = merged(arm.model)
    network = network.to(dtype).eval().requires_grad_(False)
    reward_vocab_size = network.get_output_embeddings().weight.shape[0]
    if tokenizer is None or arm.tokenizer is None:
        if reward_vocab_size != vocab_size:
            raise ValueError(
                f"`{name}` scores {reward_vocab_size} tokens, but the served model has {vocab_size}, and without the "
                "tokenizers of both they can't be aligned. Use a reward model with the tokenizer of the served model."
            )
        vocab_map = None
    else:
        vocab_map = None if has_same_ids(arm, vocab_size, tokenizer) else VocabMap(tokenizer, arm.tokenizer)
    model = RewardLM(make_lm(network, f"`{name}`"), vocab_size, vocab_map, reward_vocab_size)
    if model.no_tokens is not None and tokenizer is not None:
        has_none = model.no_tokens
        refuse_lacking(
            name, [x for x, index in tokenizer.get_vocab().items() if index >= vocab_size or has_none[index]]
        )
    return model
