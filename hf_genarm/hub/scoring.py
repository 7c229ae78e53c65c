"""The rewards of the tokens of finished responses: no generation, one forward pass over each text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import shown
from ..functional import token_log_probs
from ..viewing.picture import Drawing
from ..viewing.tokens import Token, TokenText
from .causality import refuse_not_causal
from .kv_cache import CACHE, n_embeddings, network_of, new_cache
from .limits import fixed_length, n_positions, refuse_too_long, refuse_unknown_ids, why_no_cache

Messages = list[dict[str, str]]
Texts = Sequence[str] | Sequence[Messages]


@dataclass
class TokenRewards(Drawing):
    r"""
    Holds the rewards $\log\pi_r(y_t \mid x, y_{<t})$ of the tokens of one response, and their places in its text. It
    draws itself in notebooks, with `plot()` and with `to_ansi()`; [`TokenRewards.beside`] compares it with others.

    Parameters:
        text (`str`):
            The response as the model read it, to its end. For messages it has what the chat template adds to them.
        input_ids (`torch.LongTensor` of shape `(length,)`):
            Its tokens. The last one of a plain text is the end-of-text token, if the tokenizer has one.
        offsets (list of `tuple[int, int]`):
            Start and end of each token in `text`.
        rewards (`torch.FloatTensor` of shape `(length,)`):
            The reward of each token, in nats: its log-probability, minus that of the reference if it was trained so.
    """

    text: str
    input_ids: Tensor
    offsets: list[tuple[int, int]]
    rewards: Tensor

    def token_texts(self) -> list[TokenText]:
        tokens, last = [], 0
        for (start, end), reward in zip(self.offsets, self.rewards.tolist(), strict=True):
            # With what some tokenizers leave out between tokens; the end of the text has no characters.
            text = self.text[last:end] if end > start else "∎"
            tokens.append(Token(text, reward, (("reward", f"{reward:.2f} nats"),)))
            last = max(last, end)
        return [TokenText(tokens, "reward, nats")]


class ScoredTexts(Drawing, list[TokenRewards]):
    """Holds the [`TokenRewards`] of several responses: a plain `list` that draws them side by side, on one scale."""

    def token_texts(self) -> list[TokenText]:
        return [text for row in self for text in row.token_texts()]


@dataclass
class _Example:
    input_ids: list[int]
    start: int
    text: str
    offsets: list[tuple[int, int]]


def token_rewards(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Texts,
    responses: Texts,
    batch_size: int,
    chunk_length: int,
    show_progress: bool,
    reference: PreTrainedModel | None = None,
) -> ScoredTexts:
    """
    Computes the reward of each token of each response.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, a fast one.
        prompts (list of `str` or of messages):
            The prompts.
        responses (list of `str` or of messages):
            As many responses.
        batch_size (`int`):
            Number of texts in a forward pass. They are sorted by length first.
        chunk_length (`int`):
            Number of tokens of each text in a forward pass; a longer text takes several.
        show_progress (`bool`):
            Whether to show a progress bar.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            A model with the same tokens, whose log-probabilities are subtracted.

    Returns:
        [`ScoredTexts`], a list of [`TokenRewards`] in the order of the responses.

    Raises:
        TypeError: if a model is not a causal LM, or a prompt or a response is neither text nor a chat.
        ValueError: if there are not as many prompts as responses, a response has no token that follows another one,
            chats can't be written as text, a text is too long, or a number is not positive.
    """
    for name, value in (("batch_size", batch_size), ("chunk_length", chunk_length)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"`{name}` is {shown(value)}, but it is a number of texts or tokens: give 1 or more.")
    refuse_not_causal(model)
    if reference is not None:
        refuse_not_causal(reference, "reference")
    prompts, responses = listed("prompts", prompts), listed("responses", responses)
    if len(prompts) != len(responses):
        raise ValueError(f"There are {len(prompts)} prompts, but {len(responses)} responses. Give one prompt for each.")
    ends = end_token_ids(network_of(model).generation_config, tokenizer)
    examples = [_tokenize(tokenizer, ends, prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
    highest, n_known = max((max(x.input_ids) for x in examples), default=0), n_embeddings(model)
    if highest >= n_known:  # on a GPU the pass itself would only fail with an assertion
        raise ValueError(
            f"The tokenizer (`{tokenizer.name_or_path}`) gives the id {highest}, but the reward model has {n_known} "
            "embeddings. Load the tokenizer that it was trained with."
        )
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids))
    results: list[TokenRewards | None] = [None] * len(examples)
    with tqdm(total=len(examples), desc="Scoring", disable=not show_progress) as progress:
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            batch = [examples[index].input_ids for index in indices]
            log_probs = _log_probs(model, batch, chunk_length, "reward model")
            if reference is not None:
                log_probs = log_probs - _log_probs(reference, batch, chunk_length, "reference")
            for index, row in zip(indices, log_probs, strict=True):
                example = examples[index]
                ids = torch.tensor(example.input_ids[example.start :])
                rewards = row[example.start - 1 : len(example.input_ids) - 1]
                results[index] = TokenRewards(example.text, ids, example.offsets, rewards)
            progress.update(len(indices))
    return ScoredTexts(result for result in results if result is not None)


# What chat templates write after the end token of a response is neither trained on nor scored.
def end_token_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens at which generation stops: that of the tokenizer, and those that the model names."""
    named = generation_config.eos_token_id if generation_config is not None else None
    ends = named if isinstance(named, list) else [named]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


def length_to_end(input_ids: Sequence[int], start: int, ends: set[int]) -> int:
    """Returns the number of tokens of a text up to the last end token of its response; all, if it has none."""
    last = next((at for at in range(len(input_ids) - 1, start - 1, -1) if input_ids[at] in ends), len(input_ids) - 1)
    return last + 1


def listed(name: str, texts: Any) -> list:
    """Returns texts as a list, and refuses what is neither text nor a chat."""
    if isinstance(texts, str | bytes | Mapping | Tensor) or not isinstance(texts, Iterable):
        raise TypeError(
            f"`{name}` is {shown(texts)}, but it must be a list of texts or of chats. Put it in a list: `[...]`."
        )
    texts = list(texts)
    for index, text in enumerate(texts):
        is_chat = isinstance(text, list | tuple) and text and all(isinstance(message, Mapping) for message in text)
        if not isinstance(text, str) and not is_chat:
            raise TypeError(
                f"`{name}[{index}]` is {shown(text)}, but it must be a `str` or a list of messages such as "
                '`[{"role": "user", "content": "Hello"}]`.'
            )
        try:
            json.dumps(text, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}[{index}]` is {shown(text)}, which has half a character. Mend its text."
            ) from error
    return texts


def _tokenize(tokenizer: PreTrainedTokenizerBase, ends: set[int], prompt: Any, response: Any) -> _Example:
    """Tokenizes as in training: prompt and response together, so that the boundary may lie within a token."""
    if isinstance(prompt, str):
        if not isinstance(response, str):
            raise ValueError("The prompt is text, but the response is a list of messages. Give both in the same form.")
        before, text = prompt, response
        encoded = tokenizer(before + text, return_offsets_mapping=True)
        input_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
            input_ids, offsets = [*input_ids, tokenizer.eos_token_id], [*offsets, (len(before + text),) * 2]
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"The prompt is a chat, but the tokenizer (`{tokenizer.name_or_path}`) has no chat template. Set "
                "`tokenizer.chat_template` to the one that the reward model was trained with, or give text."
            )
        turn = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
        before = str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
        both = str(tokenizer.apply_chat_template([*prompt, *turn], tokenize=False))
        # Some templates write the prompt in another way once it is answered; less of it is shared then.
        shared = next((i for i, (x, y) in enumerate(zip(before, both, strict=False)) if x != y), len(before))
        before, text = both[:shared], both[shared:]
        encoded = tokenizer(both, add_special_tokens=False, return_offsets_mapping=True)
        input_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    start = next(index for index, (_, end) in enumerate([*offsets, (0, len(before) + 1)]) if end > len(before))
    if offsets and offsets[-1] == (len(before),) * 2:  # an empty response: its end alone
        start = len(offsets) - 1
    start = max(start, 1)  # the first token of a text has nothing to be predicted from
    length = length_to_end(input_ids, start, ends)
    if start >= length:
        raise ValueError(
            f"The response {response!r} to the prompt {prompt!r} has no token that follows another one, so that "
            "nothing predicts it. Leave it out, or give a prompt."
        )
    inside = [(max(low - len(before), 0), max(high - len(before), 0)) for low, high in offsets[start:length]]
    return _Example(input_ids[:length], start, text[: inside[-1][1]], inside)


@torch.no_grad()
def _log_probs(model: PreTrainedModel | PeftModel, texts: list[list[int]], chunk_length: int, role: str) -> Tensor:
    """Returns log-probabilities of all tokens but the first, `(len(texts), longest - 1)`; ignore those after an end."""
    longest, network = max(map(len, texts)), network_of(model)
    refuse_too_long(network, longest, n_positions(model), role)
    fixed = longest <= fixed_length(network)
    if not fixed and len(texts) > 1:  # the other texts in the batch would change it
        rows = [_log_probs(model, [text], chunk_length, role)[0] for text in texts]
        return pad_sequence(rows, batch_first=True)
    input_ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=model.device)
    refuse_unknown_ids(network, input_ids, role)  # a reference may know fewer than the reward model
    attention_mask = torch.tensor(
        [[*[1] * len(text), *[0] * (longest - len(text))] for text in texts], device=model.device
    )
    cache = new_cache(network) if fixed and why_no_cache(model) is None else None
    step, parts = longest if cache is None else chunk_length, []
    if not fixed:
        model(input_ids=input_ids[:, :1], use_cache=False)  # forgets the longest text that it has read
    for first in range(0, longest - 1, step):
        last = longest if cache is None else min(first + step, longest - 1)
        inputs: dict[str, Any] = {"input_ids": input_ids[:, first:last], "attention_mask": attention_mask[:, :last]}
        inputs |= {"use_cache": False} if cache is None else {CACHE: cache, "use_cache": True}
        following = input_ids[:, first + 1 : last + 1]
        logits = model(**inputs).logits[:, first - last :]  # without those of prompt tuning
        parts.append(token_log_probs(logits[:, : following.shape[1]], following).cpu())
    return torch.cat(parts, dim=1)
