"""The logits processor under its public name, for both model runners of vLLM."""

from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from .handshake import handshake
from .metrics import GUIDED_REQUESTS, REFUSED_REQUESTS
from .request_settings import ServerDefaults, genarm_keys, refuse_long, request_settings, shown
from .server_config import ENVIRONMENT


class GenARM(V1LogitsProcessor, V2LogitsProcessor):
    r"""
    Guides requests to vLLM with autoregressive reward models ([GenARM](https://hf.co/papers/2410.08193), Eq. 7), each
    with its own strengths.

    It is given by name, `--logits-processors hf_genarm.vllm:GenARM`, and configured by
    `--additional-config '{"genarm": {"reward_models": …}}'` ([`~hf_genarm.vllm.server_config.ServerConfig`]). A request
    has its strengths in `SamplingParams(extra_args={"genarm_alpha": 0.5})`, over HTTP in `vllm_xargs`:

    - `genarm_alpha`: a number, or a list with one for each reward model; at 0, the request is not guided
    - `genarm_target_kl`: the mean divergence per token, in nats, that strengths are scaled to
    - `genarm_preset`: the name of such settings in the configuration
    - `genarm_prompts`: what sentences read in place of the prompt, a list of token ids for each; over HTTP the
      front end makes it from `genarm_sentences`
    - `genarm_sentence_alpha`: the strengths of those sentences that the request adds

    The constructor returns a `V1GenARM` or a `V2GenARM`, for the model runner that calls it.
    """

    def __new__(cls, vllm_config: VllmConfig, *args: Any) -> Any:
        if len(args) == 2:  # device, is_pin_memory
            from .v1 import V1GenARM

            return V1GenARM(vllm_config, *args)
        from .v2 import V2GenARM

        return V2GenARM(vllm_config, *args)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """
        Checks the settings of a request where it arrives.

        Raises:
            ValueError: if they can't be met; over HTTP this is status 400.
        """
        try:
            is_guided = _check_all(sampling_params)
        except ValueError:
            REFUSED_REQUESTS.inc()
            raise
        GUIDED_REQUESTS.inc(is_guided)


def _check_all(params: SamplingParams) -> bool:
    """Raises if an engine of this front end can't meet the settings of a request; returns whether it is guided."""
    keys = genarm_keys(params.extra_args)
    engines = handshake.find()
    if not engines and (keys or params.logit_bias):
        what = min(keys) if keys else "logit_bias"
        raise ValueError(
            f"`{what}` can't be checked, because the engine is not on the machine of its front end, or has another "
            f"`TMPDIR`. Start the front end with the environment variable `{ENVIRONMENT}` set to the object "
            "`genarm` of `additional_config`, or leave the key out for the strengths of the server."
        )
    is_guided = False
    for defaults in engines:
        try:
            is_guided |= _check(params, defaults)
        except ValueError as error:
            if len(engines) == 1:
                raise
            raise ValueError(
                f"{error} This process has {len(engines)} engines with different guidance, and a request is "
                "checked against all of them. Run each engine in its own process."
            ) from error
    return is_guided


def _check(params: SamplingParams, defaults: ServerDefaults) -> bool:
    """Raises if an engine with these defaults can't meet the settings of a request; returns whether it is guided."""
    settings = request_settings(params.extra_args, defaults)
    refuse_long(settings, params.max_tokens, defaults)
    if defaults.refuses_bias and settings.is_guided and params.logit_bias:
        raise ValueError(
            f"`logit_bias` is {shown(params.logit_bias)}, but the reward models of this server are contrasted with its "
            "base, of which the bias would become a part. Leave it out, or set `genarm_alpha` to 0."
        )
    if defaults.refuses_seeds and params.seed is not None and params.temperature > 0:
        raise ValueError(
            f"`seed` is {params.seed}, but a seed ends the engine of vLLM's CPU build when a prompt is read in parts. "
            "Leave it out, or start the server with `--no-enable-chunked-prefill`."
        )
    # Only beam search of vLLM sets these parameters; a request over HTTP can't.
    is_beam = params.max_tokens == 1 and params.detokenize is False and params.watermarking is False
    if defaults.refuses_beams and settings.is_guided and is_beam and params.logprobs:
        raise ValueError(
            "Beam search can't be guided, because it chooses by log-probabilities of the base. Leave `use_beam_search` "
            "out, or start the server with `--logprobs-mode processed_logprobs`, which guides it by the strengths of "
            "the server."
        )
    return settings.is_guided
