"""For the first model runner of vLLM, which tells a processor how the rows of its batch move."""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from .engine import guidance_of
from .guidance import Reading
from .requests import Wish, wish_of


@dataclass
class _Row:
    wish: Wish
    prompt: list[int]
    output: list[int]  # the list of the engine, which grows


class V1GenARM(LogitsProcessor):
    """
    See [`GenARM`]. The rows of prompts that the engine has not yet read to their end look like any others: reward
    models read the whole prompt at once, in parts of `chunk` tokens.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self._guidance, self._offer = guidance_of(vllm_config, device)
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        before = [row.wish for row in self._rows.values()]
        if process_dict_updates(self._rows, batch_update, self._new_row):
            after = {row.wish for row in self._rows.values()}
            for wish in before:
                if wish not in after:
                    self._guidance.release(wish)

    def apply(self, logits: Tensor) -> Tensor:
        readings = []
        for index, row in sorted(self._rows.items()):
            if -1 in row.output[-8:]:  # placeholders of asynchronous scheduling
                raise RuntimeError(
                    "The engine hides tokens that it has sampled. Give `hf_genarm.vllm:GenARM` by its name in "
                    "`--logits-processors`, or start with `--no-async-scheduling`."
                )
            readings.append(Reading(row.wish, row.prompt + row.output, len(row.prompt), [index]))
        return self._guidance(logits, readings)

    def _new_row(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> _Row | None:
        wish = wish_of(params.extra_args, self._offer)
        if not wish.is_guided:
            return None
        assert prompt is not None  # embeddings in its place are refused at the start
        return _Row(wish, prompt, output)
