"""How the vocabulary of a reward model lines up with that of the base model: by the strings of the tokens."""

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import refuse_no_tokenizer
from ..hub.compatibility import lacking_tokens
from ..hub.kv_cache import n_embeddings, network_of
from ..hub.scoring import end_token_ids
from .late_checks import LateChecks
from .strings.byte_map import ByteMap


class VocabMap:
    """
    Carries token ids from the base model's vocabulary to a reward model's, and log-probabilities back.

    The two may number their tokens differently, pad their embeddings to other sizes, and have added tokens that the
    other lacks, such as a pad token. The regular tokens must be the same strings: a reward model that splits text
    into other pieces has no probability for the base model's next token ([`ByteMap`] is for those).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the base model.
        reward_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the reward model.

    Raises:
        ValueError: if a regular token of the base model is not in the reward model's vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reward_tokenizer: PreTrainedTokenizerBase):
        vocab, reward_vocab = tokenizer.get_vocab(), reward_tokenizer.get_vocab()
        missing = lacking_tokens(tokenizer, reward_tokenizer)
        if missing:
            raise ValueError(
                f"The tokenizers of the base model (`{tokenizer.name_or_path}`, {len(vocab)} tokens) and of the reward "
                f"model (`{reward_tokenizer.name_or_path}`, {len(reward_vocab)} tokens) differ: {len(missing)} tokens "
                f"of the base model, such as {missing[:5]}, are unknown to the reward model. Here, probabilities are "
                "multiplied token by token: use a reward model trained with the tokenizer of the base model, or "
                "`generate` of transformers, in which any reward model steers any base."
            )
        shared = [(index, reward_vocab[token]) for token, index in vocab.items() if token in reward_vocab]
        self._base_ids, self._reward_ids = torch.tensor(shared, dtype=torch.long).T
        # By numbers of logits: tokens that were added to a tokenizer alone have no logit.
        self._with_logits: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self._tokens: Mapping[int, str] = {index: token for token, index in vocab.items()}
        self._lookup = torch.full((max(vocab.values()) + 1,), -1)
        self._lookup[self._base_ids] = self._reward_ids

    def reward_ids(self, input_ids: Tensor, attention_mask: Tensor, checks: LateChecks | None = None) -> Tensor:
        """
        Returns the same text in the reward model's ids. Padding, which the reward model never sees, becomes 0.

        Args:
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, length)`)
            checks ([`LateChecks`], *optional*):
                What raises the error; by default it is raised at once.

        Raises:
            ValueError: if the text has a token that the reward model lacks.
        """
        self._lookup = self._lookup.to(input_ids.device)
        text = input_ids.long().masked_fill(attention_mask == 0, int(self._base_ids[0]))
        reward_ids = self._lookup[text.clamp(min=0, max=len(self._lookup) - 1)]
        is_unknown = (reward_ids < 0) | (text < 0) | (text >= len(self._lookup))

        def refuse() -> None:
            index = int(text[is_unknown][0])
            raise ValueError(
                f"The text contains the token {self._tokens.get(index, '')!r} (id {index}), which is not in the "
                "vocabulary of the reward model. Leave it out of the prompt and suppress it in `generate` "
                f"(`suppress_tokens=[{index}]`), or use a reward model that knows it."
            )

        if checks is not None:
            checks.add(is_unknown.any(), refuse)
        elif is_unknown.any():
            refuse()
        return reward_ids.masked_fill((attention_mask == 0) | is_unknown, 0)

    def base_log_probs(self, log_probs: Tensor, vocab_size: int) -> Tensor:
        """
        Returns log-probabilities in the order of the base model's ids, NaN for tokens without a reward.

        Args:
            log_probs (`torch.Tensor` of shape `(batch_size, reward_vocab_size)`):
                Next-token log-probabilities of the reward model.
            vocab_size (`int`):
                Number of logits of the base model.

        Returns:
            `torch.Tensor` of shape `(batch_size, vocab_size)`.
        """
        key = (vocab_size, log_probs.shape[-1], log_probs.device)
        if key not in self._with_logits:
            has_logits = (self._base_ids < vocab_size) & (self._reward_ids < log_probs.shape[-1])
            ids = self._base_ids[has_logits], self._reward_ids[has_logits]
            self._with_logits[key] = ids[0].to(log_probs.device), ids[1].to(log_probs.device)
        base_ids, reward_ids = self._with_logits[key]
        aligned = log_probs.new_full((len(log_probs), vocab_size), torch.nan)
        aligned[:, base_ids] = log_probs[:, reward_ids]
        return aligned


def vocab_maps(
    tokenizer: PreTrainedTokenizerBase | None,
    reward_tokenizer: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None,
    models: Sequence[PreTrainedModel | PeftModel],
    base_model: PreTrainedModel | None = None,
) -> list[VocabMap | ByteMap | None]:
    """
    Returns how each reward model's vocabulary lines up with that of the base: by the strings of tokens, or where these
    are other ones, by their bytes; `None` where the ids are the same.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            That of the base model.
        reward_tokenizer ([`~transformers.PreTrainedTokenizerBase`] or a list of them, *optional*):
            That of each reward model, or of all; `None` where it is that of the base.
        models (sequence of [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward models.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The base.

    Raises:
        TypeError: if one is no tokenizer.
        ValueError: if tokenizers are missing, or do not line up.
    """
    refuse_no_tokenizer("tokenizer", tokenizer)
    if not isinstance(reward_tokenizer, list | tuple):
        refuse_no_tokenizer("reward_tokenizer", reward_tokenizer)
    if tokenizer is None or reward_tokenizer is None:
        if reward_tokenizer is not None:
            raise ValueError(
                "`reward_tokenizer` is given, but `tokenizer` is not, and one is aligned with the other. Pass both."
            )
        return [None] * len(models)
    if isinstance(reward_tokenizer, PreTrainedTokenizerBase):
        reward_tokenizer = [reward_tokenizer] * len(models)
    reward_tokenizers = list(reward_tokenizer)
    if len(reward_tokenizers) != len(models):
        raise ValueError(
            f"`reward_tokenizer` has {len(reward_tokenizers)} tokenizers, but there are {len(models)} reward models. "
            "Give one for each, or a single one for all."
        )
    for other in reward_tokenizers:
        refuse_no_tokenizer("reward_tokenizer", other)
    maps: list[VocabMap | ByteMap | None] = []
    for other, model in zip(reward_tokenizers, models, strict=True):
        if other is None or not lacking_tokens(tokenizer, other):
            maps.append(None if other is None else VocabMap(tokenizer, other))
            continue
        ends = end_token_ids(None if base_model is None else network_of(base_model).generation_config, tokenizer)
        reward_ends = end_token_ids(network_of(model).generation_config, other)
        maps.append(ByteMap(tokenizer, other, ends, reward_ends, n_embeddings(model)))
    return maps
