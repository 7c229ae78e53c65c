"""Adapters that were trained with more tokens than their base has, as `chat_template_path` of TRL's trainers adds."""

from pathlib import Path

from peft import PeftConfig
from transformers import PreTrainedModel

from .cache import embeddings_of
from .sharing import saved_shapes


def n_added_tokens(network: PreTrainedModel, config: PeftConfig, folder: str | Path) -> int:
    """
    Number of rows that the embeddings of a base lack for an adapter.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            The base.
        config ([`~peft.PeftConfig`]):
            Of the adapter.
        folder (`str`):
            Its folder.
    """
    embeddings = (network.get_input_embeddings(), network.get_output_embeddings())
    names = [f"base_model.model.{name}." for name, module in network.named_modules() if module in embeddings]
    whole = [
        shape[0]
        for key, shape in saved_shapes(folder).items()
        if key.startswith(tuple(names)) and key.endswith(".weight") and "lora_" not in key
    ]
    values = [getattr(config, name, None) or [] for name in ("trainable_token_indices", "token_indices")]
    lists = [part for value in values for part in (value.values() if isinstance(value, dict) else [value])]
    trained = [index + 1 for tokens in lists for index in tokens]
    return max([*whole, *trained, 0]) - len(embeddings_of(network))
