"""The rewards of finished responses, one for each token: no generation, one forward pass over the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..functional import token_log_probs
from ..viewing.picture import Drawing
from ..viewing.tokens import Token, TokenText
from .cache import new_cache
from .end_of_turn import end_token_ids, length_to_end

Messages = list[dict[str, str]]
Texts = Sequence[str] | Sequence[Messages]


@dataclass
class TokenRewards(Drawing):
    r"""
    The rewards $\log\pi_r(y_t \mid x, y_{<t})$ of the tokens of one response, and where they stand in its text. It
    draws itself in notebooks, with `plot()` and with `to_ansi()`; [`TokenRewards.beside`] compares it with others.

    Parameters:
        text (`str`):
            The response as the model read it, to its end. For messages it has what the chat template adds to them.
        input_ids (`torch.LongTensor` of shape `(length,)`):
            Its tokens. The last one of a plain text is the end-of-text token, if the tokenizer has one.
        offsets (list of `tuple[int, int]`):
            Start and end of each token in `text`.
        rewards (`torch.FloatTensor` of shape `(length,)`):
            The reward of each token, in nats.
    """

    text: str
    input_ids: Tensor
    offsets: list[tuple[int, int]]
    rewards: Tensor

    def token_texts(self) -> list[TokenText]:
        tokens, last = [], 0
        for (start, end), reward in zip(self.offsets, self.rewards.tolist(), strict=True):
            # With what some tokenizers leave out between tokens; the end of the text has no characters of its own.
            text = self.text[last:end] if end > start else "∎"
            tokens.append(Token(text, reward, (("reward", f"{reward:.2f} nats"),)))
            last = max(last, end)
        return [TokenText(tokens, "reward, nats")]


class ScoredTexts(Drawing, list[TokenRewards]):
    """The [`TokenRewards`] of several responses: a plain `list` that draws them side by side, on one scale."""

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
) -> ScoredTexts:
    """
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

    Returns:
        [`ScoredTexts`], a list of [`TokenRewards`] in the order of the responses.

    Raises:
        ValueError: if there are not as many prompts as responses.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"There are {len(prompts)} prompts, but {len(responses)} responses. Give one prompt for each.")
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    ends = end_token_ids(network.generation_config, tokenizer)
    examples = [_tokenize(tokenizer, ends, prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids))
    results: list[TokenRewards | None] = [None] * len(examples)
    with tqdm(total=len(examples), desc="Scoring", disable=not show_progress) as progress:
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            log_probs = _log_probs(model, [examples[index].input_ids for index in indices], chunk_length)
            for index, row in zip(indices, log_probs, strict=True):
                example = examples[index]
                ids = torch.tensor(example.input_ids[example.start :])
                rewards = row[example.start - 1 : len(example.input_ids) - 1]
                results[index] = TokenRewards(example.text, ids, example.offsets, rewards)
            progress.update(len(indices))
    return ScoredTexts(result for result in results if result is not None)


def _tokenize(tokenizer: PreTrainedTokenizerBase, ends: set[int], prompt: Any, response: Any) -> _Example:
    """The tokens as in training: of prompt and response together, so that the boundary may lie within a token."""
    if isinstance(prompt, str):
        if not isinstance(response, str):
            raise ValueError("The prompt is text, but the response is a list of messages. Give both in the same form.")
        before, text = prompt, response
        encoded = tokenizer(before + text, return_offsets_mapping=True)
        input_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
            input_ids, offsets = [*input_ids, tokenizer.eos_token_id], [*offsets, (len(before + text),) * 2]
    else:
        turn = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        both = tokenizer.apply_chat_template([*prompt, *turn], tokenize=False)
        # Templates that write the prompt otherwise once it is answered share less of it.
        shared = next((i for i, (x, y) in enumerate(zip(before, both, strict=False)) if x != y), len(before))
        before, text = both[:shared], both[shared:]
        encoded = tokenizer(both, add_special_tokens=False, return_offsets_mapping=True)
        input_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    start = next(index for index, (_, end) in enumerate([*offsets, (0, len(before) + 1)]) if end > len(before))
    if offsets and offsets[-1] == (len(before),) * 2:  # an empty response: its end alone
        start = len(offsets) - 1
    start = max(start, 1)  # the first token of a text has nothing to be predicted from
    length = length_to_end(input_ids, start, ends)
    inside = [(max(low - len(before), 0), max(high - len(before), 0)) for low, high in offsets[start:length]]
    return _Example(input_ids[:length], start, text[: inside[-1][1]] if inside else text, inside)


@torch.no_grad()
def _log_probs(model: PreTrainedModel | PeftModel, texts: list[list[int]], chunk_length: int) -> Tensor:
    """Log-probabilities of the tokens after the first, `(len(texts), longest - 1)`; what is after an end is garbage."""
    longest = max(map(len, texts))
    input_ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=model.device)
    attention_mask = torch.tensor(
        [[*[1] * len(text), *[0] * (longest - len(text))] for text in texts], device=model.device
    )
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    cache = new_cache(network)
    step = longest if cache is None else chunk_length
    parts = [torch.empty(len(texts), 0)]  # all there is for texts of one token
    for first in range(0, longest - 1, step):
        last = min(first + step, longest - 1)
        inputs: dict[str, Any] = {"input_ids": input_ids[:, first:last], "attention_mask": attention_mask[:, :last]}
        inputs |= {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
        logits = model(**inputs).logits
        parts.append(token_log_probs(logits, input_ids[:, first + 1 : last + 1]).cpu())
    return torch.cat(parts, dim=1)
