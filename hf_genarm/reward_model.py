"""How an autoregressive reward model is loaded: a PEFT adapter or a full model, from the Hub or a folder."""

import contextlib
import logging
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from .sharing import load_onto_shared_weights, why_it_changes

logger = logging.getLogger(__name__)

# What `from_pretrained` needs to find a file; everything else says how to load the weights of the language model.
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load_reward_model(
    pretrained_model_name_or_path: str, base_model: PreTrainedModel | None = None, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """
    Loads an autoregressive reward model for inference.

    An adapter that was trained on `base_model` shares its weights: the reward model is a second set of modules around
    the *same* parameters, with the adapter in it. No weight is copied, and `base_model` itself is not touched.

    Args:
        pretrained_model_name_or_path (`str`):
            Hub id or local folder of a PEFT adapter or of a full causal LM.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The model to be steered. Its weights are shared if it is a plain model (no `PeftModel`), its name is that of
            the adapter's `base_model_name_or_path` (whatever stands before the last `/`), and no argument asks for
            other weights.
        **kwargs:
            Passed to `from_pretrained`: `revision`, `subfolder`, `token`, `dtype`, `device_map`, …
            For an adapter, `revision` and `subfolder` are those of the adapter, and the arguments about weights are
            those of the model that it is loaded onto.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], in evaluation mode.
    """
    hub_kwargs = {name: kwargs.pop(name) for name in _HUB_KWARGS if name in kwargs}
    if find_adapter_config_file(pretrained_model_name_or_path, **hub_kwargs) is None:
        logger.info("%s: engine `separate`, because it is not an adapter.", pretrained_model_name_or_path)
        return AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **hub_kwargs, **kwargs)

    adapter = PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
    trained_on = adapter.base_model_name_or_path
    objection = _why_not_shared(base_model, trained_on, kwargs)
    if base_model is not None and objection is None:
        objection = why_it_changes(base_model, adapter, pretrained_model_name_or_path, **hub_kwargs)
    if base_model is not None and objection is None:
        model = load_onto_shared_weights(base_model, pretrained_model_name_or_path, **hub_kwargs)
    else:
        logger.info(
            "%s: engine `separate`, with weights of its own, because %s.", pretrained_model_name_or_path, objection
        )
        base_kwargs = {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}
        network = AutoModelForCausalLM.from_pretrained(trained_on, revision=adapter.revision, **base_kwargs, **kwargs)
        model = PeftModel.from_pretrained(network, pretrained_model_name_or_path, **hub_kwargs)
    return model.eval()


def find_tokenizer(*names_or_paths: str, token: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the first of these folders or repositories that has one."""
    for name_or_path in names_or_paths:
        with contextlib.suppress(OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, token=token)
            # For a folder of weights alone, some architectures get one that knows nothing but its special tokens.
            if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
                return tokenizer
    return None


def generation_prompt_ids(
    pretrained_model_name_or_path: str, tokenizer: PreTrainedTokenizerBase, token: str | None = None
) -> list[int] | None:
    """
    The tokens with which the chat template asks for an answer, if the card of the reward model has the tag
    `conversational`, which the trainer gives to those that were trained on chats.
    """
    card = Path(pretrained_model_name_or_path, "README.md")
    try:
        tags = ModelCard.load(card if card.exists() else pretrained_model_name_or_path, token=token).data.tags or []
    except (OSError, ValueError):  # no card, or none within reach
        return None
    if "conversational" not in tags or tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "?"}]
    question = tokenizer.apply_chat_template(chat, tokenize=False)
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(asked.removeprefix(question), add_special_tokens=False)["input_ids"]


def _why_not_shared(base_model: PreTrainedModel | None, trained_on: str, kwargs: dict[str, Any]) -> str | None:
    if base_model is None:
        return "no `base_model` was given"
    if kwargs:
        return f"arguments ask for other weights ({', '.join(kwargs)})"
    if isinstance(base_model, PeftModel) or base_model._hf_peft_config_loaded:
        return "the base has an adapter of its own"
    if not base_model.name_or_path or _short_name(base_model.name_or_path) != _short_name(trained_on):
        return f"it was trained on `{trained_on}`, and the base is `{base_model.name_or_path}`"
    return None


def _short_name(name_or_path: str) -> str:
    """`SmolLM2-135M` for `HuggingFaceTB/SmolLM2-135M`, `/models/SmolLM2-135M` and a folder of the Hub's cache."""
    parts = PurePath(name_or_path).parts
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].split("--")[-1] if cached else parts[-1]
