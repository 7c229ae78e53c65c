"""The logits processor under its public name, for both model runners of vLLM."""

from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from . import notice
from .requests import keys_of, wish_of


class GenARM(V1LogitsProcessor, V2LogitsProcessor):
    r"""
    Guides requests to vLLM with autoregressive reward models ([GenARM](https://hf.co/papers/2410.08193), Eq. 7), each
    with its own strengths.

    It is given by name, `--logits-processors hf_genarm.vllm:GenARM`, and configured by
    `--additional-config '{"genarm": {"reward_models": …}}'` ([`~hf_genarm.vllm.requests.ServerConfig`]). A request has
    its strengths in `SamplingParams(extra_args={"genarm_alpha": 0.5})`, over HTTP in `vllm_xargs`:

    - `genarm_alpha`: a number, or a list with one for each reward model; at 0, the request is not guided
    - `genarm_target_kl`: the mean divergence per token, in nats, that strengths are scaled to

    The class picks the interface that an engine asks for: it is never made itself.
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
        Called for each request where it arrives.

        Raises:
            ValueError: if it asks for what can't be done; over HTTP this is status 400.
        """
        keys = keys_of(sampling_params.extra_args)
        offer = notice.find()
        if offer is None:
            if keys:
                raise ValueError(
                    f"`{min(keys)}` can't be checked, because the engine is not on the machine of its front end, or "
                    "has another `TMPDIR`. Run both on one machine, or leave the key out for the strengths of the "
                    "server."
                )
            return
        wish = wish_of(keys, offer)
        if offer.refuses_bias and wish.is_guided and sampling_params.logit_bias:
            raise ValueError(
                f"`logit_bias` is {sampling_params.logit_bias}, but the reward models of this server are contrasted "
                "with its base, of which the bias would become a part. Leave it out, or set `genarm_alpha` to 0."
            )
