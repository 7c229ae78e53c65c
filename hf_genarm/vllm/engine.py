"""Loading of guidance into an engine, as the configuration of the engine describes it."""

import logging
from importlib.metadata import entry_points
from typing import Any

import torch
from transformers import PreTrainedModel
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group

from ..hub.loading import download
from .attention import PagedKeysAndValues
from .batch_guidance import BatchGuidance
from .memory import n_tokens_that_fit
from .on_cpu import keys_and_values, use_linear_layers_of_vllm
from .paged_lm import PagedLM
from .request_settings import RequestSettings, ServerDefaults, request_settings
from .reward_lms import load_reward_lms
from .server_config import ServerConfig, shown_name
from .startup_checks import check_reward_models

logger = logging.getLogger("vllm.hf_genarm")  # below the logger that vLLM sets up

_NAME = "hf_genarm.vllm:GenARM"
# Tokens in a page, 16 where it is not said; on a CPU as many as vLLM's have.
_PAGE_SIZES = {"cpu": 128}


def load_guidance(vllm_config: VllmConfig, device: torch.device) -> tuple[BatchGuidance, ServerDefaults]:
    """
    Loads reward models and allocates their pages, so that the engine counts them when it measures memory.

    Returns:
        The guidance, and what its requests have to be checked against.

    Raises:
        ValueError: if the configuration is not possible. All that can be known without weights is checked first.
    """
    _refuse_twice(vllm_config.model_config.logits_processors or [])
    config = ServerConfig.from_additional_config(vllm_config.additional_config)
    model, most = vllm_config.model_config, vllm_config.scheduler_config.max_num_seqs
    if model.enable_prompt_embeds:
        raise ValueError("Reward models read tokens, and can't be served with `--enable-prompt-embeds`. Leave it out.")
    if model.is_multimodal_model and not model.multimodal_config.language_model_only:
        raise ValueError(
            "Reward models read text, and would not see images, sound or video. Start the engine with "
            "`--language-model-only`."
        )
    config = check_reward_models(config, model.model, model.tokenizer, model.max_model_len, model.trust_remote_code)

    own_reference = [config.reference] if config.reference not in (None, "base") else []
    # vLLM sets back the generator of a request whose prompt was read in part, which generators of CPUs can't do.
    refuses_seeds = device.type == "cpu" and vllm_config.scheduler_config.enable_chunked_prefill
    is_raw, size = model.logprobs_mode.startswith("raw"), model.get_vocab_size()
    defaults = config.server_defaults(is_raw, refuses_seeds, model.max_model_len, size)
    if not get_pp_group().is_last_rank:  # tokens are chosen in the last one
        return BatchGuidance([]), defaults
    n_weight_bytes = 0

    def make_lm(network: PreTrainedModel, name: str) -> PagedLM:
        nonlocal n_weight_bytes
        n_weight_bytes += sum(x.numel() * x.element_size() for x in network.parameters())
        network = network.to(device)  # type: ignore[arg-type]  # which mypy takes for a dtype
        memory = PagedKeysAndValues
        if device.type == "cpu":
            use_linear_layers_of_vllm(network)
            memory = keys_and_values(network)
        return PagedLM(network, model.max_model_len, chunk=config.chunk, name=name, memory=memory)

    loaded = load_reward_lms(
        [*config.models, *own_reference],
        model.model,
        model.tokenizer,
        size,
        make_lm,
        model.dtype if config.dtype is None else getattr(torch, config.dtype),
        model.trust_remote_code,
        and_served=config.n_sentences > 0,
    )
    n_texts = dict.fromkeys(loaded, 1)  # for each request
    reader: Any = loaded[-1] if config.n_sentences else None
    if reader is not None:
        n_texts[reader] = config.n_sentences
    per_token = sum(n * x.lm.bytes_per_token for x, n in n_texts.items())
    n_tokens = n_tokens_that_fit(config, per_token, model.max_model_len, most, device.type)
    page_size = _PAGE_SIZES.get(device.type, 16)
    for x, n in n_texts.items():
        # Rounded up, since the last page of a text is not full.
        x.lm.allocate(-(-n * n_tokens // page_size) * page_size, page_size)
    with_weights = iter(loaded)
    rewards = [next(with_weights) if isinstance(x, str) else reader for x in config.reward_models]
    reference: Any = next(with_weights) if own_reference else config.reference
    n_bytes = n_weight_bytes, sum(x.lm.n_bytes for x in loaded)
    _log_guidance(config, *n_bytes, n_tokens, vllm_config.parallel_config.tensor_parallel_size)
    return BatchGuidance(rewards, reference, reader), defaults


def settings_in_engine(params: SamplingParams, defaults: ServerDefaults) -> RequestSettings | None:
    """
    Returns the settings of a request that has come to the engine; `None` if it is not guided.

    The front end has checked them. If it has not, an error here would end the engine and with it all other requests.
    """
    try:
        settings = request_settings(params.extra_args, defaults)
    except ValueError as error:
        logger.error("A request that was not checked is answered without guidance: %s", error)
        return None
    return settings if settings.is_guided else None


def _log_guidance(config: ServerConfig, n_weight_bytes: int, n_bytes: int, n_tokens: int, n_processes: int) -> None:
    """Logs in one line that guidance is on, and how."""
    of_models = zip(config.reward_models, config.alpha, strict=True)
    rewards = ", ".join(f"{shown_name(x)}{_revision(x)} at {alpha:g}" for x, alpha in of_models)
    if config.max_sentences:
        rewards += f"{', and ' if rewards else ''}up to {config.max_sentences} sentences of a request"
    reference = config.reference if config.reference in (None, "base") else shown_name(config.reference)
    logger.info(
        "Guidance is on: %s%s; reference: %s; %.0f MB of weights%s, and %.0f MB of keys and values for %d tokens%s.",
        rewards,
        "" if config.target_kl is None else f", scaled to {config.target_kl:g} nats per token",
        reference or "none",
        n_weight_bytes / 1e6,
        ", with another copy of the base that reads sentences" if config.n_sentences else "",
        n_bytes / 1e6,
        n_tokens,
        "" if n_processes == 1 else f", in each of {n_processes} processes",
    )


def _revision(name: str | dict[str, str]) -> str:
    """Returns the commit of a reward model that comes from the Hub, for the log."""
    if isinstance(name, dict):
        return ""
    folder = download(name, patterns=["*.json"])
    return f" ({folder.name[:8]})" if folder.parent.name == "snapshots" else ""


def _refuse_twice(named: list[Any]) -> None:
    """Raises if the processor would be loaded twice, which would double all strengths silently."""
    installed = [x for x in entry_points(group="vllm.logits_processors") if x.value.startswith("hf_genarm.vllm")]
    if installed:
        raise ValueError(
            f"The entry point `{installed[0].name}` loads `{_NAME}` into every engine. Remove it, and give the name to "
            "the engines that it is meant for: `--logits-processors`."
        )
    ours = [x for x in named if (x if isinstance(x, str) else x.__module__).startswith("hf_genarm.vllm")]
    if len(ours) > 1:
        raise ValueError(f"`--logits-processors` has `{_NAME}` {len(ours)} times, but it must be there once.")
