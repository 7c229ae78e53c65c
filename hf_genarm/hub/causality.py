"""A test on a few tokens whether a model is causal, which its configuration doesn't show reliably."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .kv_cache import CACHE, n_embeddings, network_of, new_cache
from .limits import fixed_length, why_no_cache

_LENGTH = 6
# Differences of logits that rounding doesn't reach, in parts of their spread: in float32, and in lower precision.
_BETWEEN_ROWS = (1e-4, 0.02)
_WITH_A_CACHE = (1e-2, 0.1)
# Its tokens take relative positions from other tokens of the text (transformers 5.16 to 5.24), with small weights too
# little to be seen here.
_MIXING = ("prophetnet",)
# What configurations call it, with the value that makes a model bidirectional
_SETTINGS = {"is_decoder": False, "is_causal": False, "causal": False, "use_bidirectional_attention": True}

_known: WeakSet[PreTrainedModel] = WeakSet()  # found to be causal


def take_as_causal(model: PreTrainedModel) -> None:
    """Records that a model is causal, since other modules around the same weights are: it is not tested."""
    _known.add(model)


def refuse_not_causal(model: PreTrainedModel | PeftModel, role: str = "reward model") -> None:
    """
    Refuses a model that is not a causal LM: a change of the last token must not change logits before it, and reading
    with a key-value cache must give the logits of reading at once.

    A model is tested once, in three passes over six tokens. Neither random numbers nor anything in the model change.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A model that may be quantised, offloaded or on several devices. An adapter that puts something before the
            text is left out.
        role (`str`, *optional*, defaults to `"reward model"`):
            What it is used as, for messages.

    Raises:
        TypeError: if it is an encoder-decoder or a classifier, is bidirectional, or its cache gives other logits.
    """
    network = network_of(model)
    if network in _known:
        return
    name, config = type(network).__name__, network.config
    if config.is_encoder_decoder or not network.can_generate():
        raise TypeError(
            f"`{name}` can't be a {role}, of which log-probabilities are used: it is no decoder-only causal LM. Load "
            "one with `AutoModelForCausalLM`."
        )
    texts = _texts(network)
    with torch.no_grad(), _left_as_it_is(network), _one_dtype(network, texts.device.type):
        whole = _logits(network, texts)
        is_mixing = config.model_type in _MIXING
        if is_mixing or not _is_close(whole[0, :-1], whole[1, :-1], network, _BETWEEN_ROWS):
            # Only for families that go by it; others, such as GPT-NeoX, are causal whatever it is.
            set_to = {key: getattr(config, key, None) for key in _SETTINGS}
            cause = [f"`config.{key}={value}`" for key, value in set_to.items() if value is _SETTINGS[key]]
            raise TypeError(
                f"`{name}` is bidirectional{' (' + ', '.join(cause) + ')' if cause else ''}: a token changes what the "
                "model predicts before it, so that its log-probabilities are no predictions. Train and load it as a "
                f"causal LM (`is_decoder=True` for BERT and its like), or use another {role}."
            )
        if why_no_cache(network) is None and fixed_length(network) >= _LENGTH:
            cache, half = new_cache(network), _LENGTH // 2
            parts = [
                _logits(network, part, **{CACHE: cache, "use_cache": True})
                for part in (texts[:, :half], texts[:, half:])
            ]
            if not _is_close(torch.cat(parts, dim=1), whole, network, _WITH_A_CACHE):
                raise TypeError(
                    f"`{name}` can't be a {role}: with a key-value cache it returns other logits than for the "
                    "whole text at once. If its code is custom, correct how it uses the cache; otherwise update "
                    "transformers."
                )
    _known.add(network)


def _texts(network: PreTrainedModel) -> Tensor:
    """Returns two texts that differ in their last token, `(2, _LENGTH)`, without the special tokens of the model."""
    vocab_size = n_embeddings(network)
    special = {x for name, x in vars(network.config.get_text_config()).items() if name.endswith(("_id", "_index"))}
    spread = [(index * vocab_size) // (_LENGTH + 2) for index in range(1, _LENGTH + 2)]
    ids = [next((x for x in range(at, vocab_size) if x not in special), at) for at in spread]
    # Offloaded weights are on no device until they are needed; hooks then fetch the inputs too.
    device = torch.device("cpu") if network.device.type == "meta" else network.device
    return torch.tensor([ids[:-1], [*ids[:-2], ids[-1]]], device=device)


def _logits(network: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Tensor:
    # Of the class: compiled for these few tokens, or seen by hooks of others, it would be of no use.
    output = type(network).forward(network, input_ids=input_ids, **({"use_cache": False} | kwargs))
    logits: Tensor = output.logits[:, -input_ids.shape[1] :].float()
    return logits


def _one_dtype(network: PreTrainedModel, device_type: str) -> torch.autocast:
    """Lets a model with weights in several dtypes be read, as it is trained: some layers are in float32 for QLoRA."""
    dtypes = {x.dtype for x in network.parameters() if x.is_floating_point()}
    half = next((x for x in (torch.bfloat16, torch.float16) if x in dtypes), torch.bfloat16)
    return torch.autocast(device_type, half, enabled=len(dtypes) > 1 and half in dtypes)


def _is_close(one: Tensor, other: Tensor, network: PreTrainedModel, tolerances: tuple[float, float]) -> bool:
    is_exact = network.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(one.device.type)
    is_exact = is_exact and getattr(network.config, "quantization_config", None) is None
    worst = ((one - other).square().mean(dim=-1).sqrt() / other.std(dim=-1)).max()
    # What is not finite is refused elsewhere, by its name.
    return not worst.isfinite() or bool(worst <= tolerances[0 if is_exact else 1])


@contextmanager
def _left_as_it_is(network: PreTrainedModel) -> Iterator[None]:
    """Puts a model into evaluation mode; at the end, restores everything that its modules hold."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in network.modules()]
    devices = {x.device for x in network.parameters() if x.device.type == "cuda"}
    is_quantised = getattr(network.config, "quantization_config", None) is not None
    with torch.random.fork_rng([device.index for device in devices]):
        for module, _, _ in before:
            # In evaluation, 4-bit layers of bitsandbytes on a CPU repack their weights for good.
            is_training = is_quantised and isinstance(module, nn.Linear)
            if module.training != is_training:
                module.training = is_training
        try:
            yield
        finally:
            for module, values, buffers in before:
                for name in vars(module).keys() - values.keys():
                    del vars(module)[name]
                vars(module).update({name: x for name, x in values.items() if vars(module).get(name) is not x})
                # Dynamic rotary embeddings replace theirs with the length of a text.
                module._buffers.update({name: x for name, x in buffers.items() if module._buffers[name] is not x})
