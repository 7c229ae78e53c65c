"""From the configuration of an engine to its guidance."""

import logging
from importlib.metadata import entry_points
from typing import Any

import torch
from transformers import PreTrainedModel
from vllm.config import VllmConfig

from ..hub.loading import info_of
from . import notice
from .fast_linear import use_linear_layers_of_vllm
from .guidance import Guidance
from .loading import is_on, load
from .requests import Offer, ServerConfig
from .slots import SlotLM

logger = logging.getLogger(__name__)

_NAME = "hf_genarm.vllm:GenARM"


def guidance_of(vllm_config: VllmConfig, device: torch.device) -> tuple[Guidance, Offer]:
    """
    Loads reward models and allocates their slots, so that the engine counts them when it measures memory, and makes
    known what requests may ask for.

    Raises:
        ValueError: if the configuration is not possible.
    """
    _refuse_twice(vllm_config.model_config.logits_processors or [])
    given = ServerConfig.of(vllm_config.additional_config)
    config = given.with_recommended([info_of(name) for name in given.reward_models])
    model, most = vllm_config.model_config, vllm_config.scheduler_config.max_num_seqs
    if (given.reference, config.reference) == ("auto", "base"):
        others = [name for name in config.reward_models if not is_on(name, model.model)]
        if others:
            raise ValueError(
                f"The rewards of `{others[0]}` are less those of the model that it was trained from, which is not the "
                'served one. Choose in `genarm` of `additional_config`: `"reference": "base"`, `null`, or that model.'
            )
    if model.enable_prompt_embeds:
        raise ValueError("Reward models read tokens, and can't be served with `--enable-prompt-embeds`. Leave it out.")
    if model.is_multimodal_model and not model.multimodal_config.language_model_only:
        raise ValueError(
            "Reward models read text, and would not see images, sound or video. Start the engine with "
            "`--language-model-only`."
        )
    n_slots = most if config.slots is None else config.slots
    if n_slots < most:
        raise ValueError(
            f"`slots` in `genarm` of `additional_config` is {n_slots}, but the engine runs up to {most} requests at "
            f"once. Leave it out, or start the engine with `--max-num-seqs {n_slots}`."
        )

    def make_slots(network: PreTrainedModel, name: str) -> SlotLM:
        network = network.to(device)  # type: ignore[arg-type]  # which mypy takes for a dtype
        if device.type == "cpu":
            use_linear_layers_of_vllm(network)
        lm = SlotLM(network, n_slots, model.max_model_len, config.chunk, name)
        logger.info("%s: %d slots of %d tokens, %.0f MB.", name, n_slots, model.max_model_len, lm.n_bytes / 1e6)
        return lm

    own_reference = [config.reference] if config.reference not in (None, "base") else []
    loaded = load(
        [*config.reward_models, *own_reference],
        model.model,
        model.tokenizer,
        model.get_vocab_size(),
        make_slots,
        model.dtype if config.dtype is None else getattr(torch, config.dtype),
        model.trust_remote_code,
    )
    n_rewards = len(config.reward_models)
    reference: Any = loaded[-1] if own_reference else config.reference
    offer = Offer(
        reward_models=tuple(config.reward_models),
        alpha=tuple(config.alpha),
        target_kl=config.target_kl,
        refuses_bias=reference == "base",
    )
    notice.post(offer)
    return Guidance(loaded[:n_rewards], reference), offer


def _refuse_twice(named: list[Any]) -> None:
    """Twice as strong would be as silent as not at all."""
    installed = [x for x in entry_points(group="vllm.logits_processors") if x.value.startswith("hf_genarm.vllm")]
    if installed:
        raise ValueError(
            f"The entry point `{installed[0].name}` loads `{_NAME}` into every engine. Remove it, and give the name to "
            "the engines that it is meant for: `--logits-processors`."
        )
    ours = [x for x in named if (x if isinstance(x, str) else x.__module__).startswith("hf_genarm.vllm")]
    if len(ours) > 1:
        raise ValueError(f"`--logits-processors` has `{_NAME}` {len(ours)} times, but it must be there once.")
