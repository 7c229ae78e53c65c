"""For the second model runner of vLLM, which has the tokens of its requests on the device."""

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from .engine import guidance_of
from .guidance import Reading
from .requests import Wish, wish_of


class V2GenARM(LogitsProcessor):
    """See [`GenARM`]. Reward models read a prompt in step with the engine, and drafts of speculative decoding too."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState):
        self._guidance, self._offer = guidance_of(vllm_config, req_states.device)
        self._states = req_states
        self._wishes: dict[int, Wish] = {}  # by the slots of the engine

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        if req_idx in self._wishes:
            self._guidance.release(self._wishes.pop(req_idx))
        wish = wish_of(sampling_params.extra_args, self._offer)
        if wish.is_guided:
            self._wishes[req_idx] = wish
        return wish.is_guided

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        if not any(int(slot) in self._wishes for slot in ctx.idx_mapping_np):
            return logits
        slots, tokens, positions = torch.stack(
            [x.to(torch.int64) for x in (ctx.expanded_idx_mapping, ctx.input_ids, ctx.pos)]
        ).tolist()
        rows: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            if slot in self._wishes:
                rows.setdefault(slot, []).append(row)
        longest = max(positions[of_slot[0]] for of_slot in rows.values())
        known = self._states.all_token_ids.gpu[list(rows)][:, :longest].tolist()
        prompt_lengths = self._states.prompt_len.np
        readings = [
            # Drafts are only among the tokens of this step.
            Reading(
                self._wishes[slot],
                read[: positions[of_slot[0]]] + [tokens[row] for row in of_slot],
                int(prompt_lengths[slot]),
                of_slot,
            )
            for (slot, of_slot), read in zip(rows.items(), known, strict=True)
        ]
        return self._guidance(logits, readings)
