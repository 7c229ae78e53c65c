"""The logits processor for the second model runner of vLLM, which has the tokens of requests on the device."""

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from .batch_guidance import GuidedRequest
from .engine import load_guidance, settings_in_engine
from .handshake import handshake
from .metrics import EngineMetrics
from .request_settings import RequestSettings


class V2GenARM(LogitsProcessor):
    """
    Guides the batches of the second model runner; see [`GenARM`]. Reward models read a prompt in step with the engine,
    and drafts of speculative decoding too.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState):
        self._guidance, self._defaults = load_guidance(vllm_config, req_states.device)
        self._states = req_states
        self._settings: dict[int, RequestSettings] = {}  # by the slots of the engine
        self._metrics = EngineMetrics(self._guidance)
        handshake.post(self, self._defaults)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Puts a request into a slot of the engine, in place of an earlier one; returns whether it is guided."""
        if req_idx in self._settings:
            self._guidance.release(self._settings.pop(req_idx))
        settings = settings_in_engine(sampling_params, self._defaults)
        if settings is not None:
            self._settings[req_idx] = settings
        return settings is not None

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Guides the rows of guided requests."""
        if not any(int(slot) in self._settings for slot in ctx.idx_mapping_np):
            return logits
        slots, tokens, positions = torch.stack(
            [x.to(torch.int64) for x in (ctx.expanded_idx_mapping, ctx.input_ids, ctx.pos)]
        ).tolist()
        rows: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            if slot in self._settings:
                rows.setdefault(slot, []).append(row)
        longest = max(positions[of_slot[0]] for of_slot in rows.values())
        known = self._states.all_token_ids.gpu[list(rows)][:, :longest].tolist()
        prompt_lengths = self._states.prompt_len.np
        requests = [
            # Drafts are only among the tokens of this step.
            GuidedRequest(
                self._settings[slot],
                read[: positions[of_slot[0]]] + [tokens[row] for row in of_slot],
                int(prompt_lengths[slot]),
                of_slot,
            )
            for (slot, of_slot), read in zip(rows.items(), known, strict=True)
        ]
        guided = self._guidance(logits, requests)
        self._metrics.update()
        return guided
