"""The logits processor for the first model runner of vLLM, which reports how the rows of its batch move."""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from .batch_guidance import GuidedRequest
from .engine import load_guidance, settings_in_engine
from .handshake import handshake
from .metrics import EngineMetrics
from .request_settings import RequestSettings


@dataclass
class _Row:
    """Holds a row of the batch that is guided."""

    settings: RequestSettings
    prompt: list[int]
    output: list[int]  # the list of the engine, which grows


class V1GenARM(LogitsProcessor):
    """
    Guides the batches of the first model runner; see [`GenARM`]. Rows whose prompts the engine has not yet read to
    their end look like any others: reward models read the whole prompt at once, in parts of `chunk` tokens.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self._guidance, self._defaults = load_guidance(vllm_config, device)
        self._rows: dict[int, _Row] = {}
        self._metrics = EngineMetrics(self._guidance)
        handshake.post(self, self._defaults)

    def is_argmax_invariant(self) -> bool:
        """Returns `False`, since guidance changes greedy texts too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the rows of the batch, and frees what is held for requests that have left it."""
        before = [row.settings for row in self._rows.values()]
        if process_dict_updates(self._rows, batch_update, self._new_row):
            after = {row.settings for row in self._rows.values()}
            for settings in before:
                if settings not in after:
                    self._guidance.release(settings)

    def apply(self, logits: Tensor) -> Tensor:
        """Guides the rows of guided requests."""
        requests = [
            GuidedRequest(row.settings, row.prompt + row.output, len(row.prompt), [index])
            for index, row in sorted(self._rows.items())
        ]
        guided = self._guidance(logits, requests)
        self._metrics.update()
        return guided

    def _new_row(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> _Row | None:
        """Returns what a new row is guided by; `None` if it is not guided."""
        settings = settings_in_engine(params, self._defaults)
        if settings is None or prompt is None:  # embeddings in place of a prompt are refused at the start
            return None
        return _Row(settings, prompt, output)
