"""Where a response ends: what chat templates write after its end token is neither trained on nor scored."""

from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedTokenizerBase


def end_token_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which generation stops: of the tokenizer, and those that the model names besides."""
    named = generation_config.eos_token_id if generation_config is not None else None
    ends = named if isinstance(named, list) else [named]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


def length_to_end(input_ids: Sequence[int], start: int, ends: set[int]) -> int:
    """
    Number of tokens up to and with the last end token of a response, which begins at `start`; all, if it has none.
    """
    last = next((at for at in range(len(input_ids) - 1, start - 1, -1) if input_ids[at] in ends), len(input_ids) - 1)
    return last + 1
