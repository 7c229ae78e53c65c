"""What [`gpu.py`](gpu.py) measures with: models of real sizes and random weights, and clocks of the device."""

import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerFast

from examples.benchmarks.measuring import wait
from hf_genarm.hub.sharing import frozen_twin

SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "0.3B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16},
    "tiny": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}
TARGETS = {"q,v": ["q_proj", "v_proj"], "all": "all-linear"}
Row = dict[str, Any]


class Lab:
    """Holds what all parts share: the device, the models made so far, and the time that is left for a part."""

    def __init__(self, device: str, is_tiny: bool):
        self.device, self.is_tiny = torch.device(device), is_tiny
        self.is_cuda = self.device.type == "cuda"
        self.vocab_size = 64 if is_tiny else 128_256
        self.deadline = 0.0
        self._models: dict[tuple, PreTrainedModel] = {}

    @property
    def has_time(self) -> bool:
        return time.perf_counter() < self.deadline

    def sized(self, usual: Any, tiny: Any) -> Any:
        return tiny if self.is_tiny else usual

    def model(self, size: str, dtype: torch.dtype = torch.bfloat16, spread: float = 0.02, seed: int = 0) -> Any:
        """Returns a Llama with random weights, made on the device."""
        key = size, dtype, spread, seed
        if key not in self._models:
            torch.manual_seed(seed)
            shape = SIZES["tiny" if self.is_tiny else size]
            heads = max(shape["num_attention_heads"] // 4, 1)
            names = {"vocab_size": self.vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
            config = LlamaConfig(
                **shape, **names, num_key_value_heads=heads, max_position_embeddings=16384, initializer_range=spread
            )
            with self.device:
                self._models[key] = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            self._models[key].requires_grad_(False)
        return self._models[key]

    def adapter(self, base: PreTrainedModel, targets: str, seed: int = 1) -> PeftModel:
        """Returns a random LoRA of rank 16 on the weights of a base, in float32, as PEFT loads it."""
        torch.manual_seed(seed)
        network, originals = frozen_twin(base)
        config = LoraConfig(r=16, target_modules=TARGETS[targets], init_lora_weights=False)
        model = get_peft_model(network, config).eval()
        for module in model.modules():
            own = {name: x for name, x in module._parameters.items() if x is not None}
            module._parameters.update({name: originals.get(x, x) for name, x in own.items()})
        return model.to(self.device)

    def forget(self) -> None:
        """Frees all models."""
        self._models.clear()
        self.free()

    def free(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        wait(self.device)

    def prompts(self, batch_size: int, length: int) -> torch.Tensor:
        return torch.randint(3, self.vocab_size, (batch_size, length), device=self.device)

    def allocated(self, peak: bool = False) -> float:
        """Returns gigabytes on the device."""
        if not self.is_cuda:
            return 0.0
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e9


class Clock(LogitsProcessor):
    """Records a point in the work of the device after each step."""

    def __init__(self, lab: Lab):
        self._lab, self._points = lab, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        point: Any = time.perf_counter()
        if self._lab.is_cuda:
            point = torch.cuda.Event(enable_timing=True)
            point.record()
        self._points.append(point)
        return scores

    def ms_per_token(self) -> float:
        """Returns the median over the steps after the prompt."""
        self._lab.wait()
        pairs = zip(self._points, self._points[1:], strict=False)
        return statistics.median(x.elapsed_time(y) if self._lab.is_cuda else 1000 * (y - x) for x, y in pairs)


class Recorder(LogitsProcessor):
    """Keeps the texts and the log-probabilities of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append((input_ids.clone(), scores.float().log_softmax(-1)))
        return scores


def run(base: Any, processors: list, prompts: torch.Tensor, n_tokens: int, **options: Any) -> torch.Tensor:
    """Returns the texts of one greedy `generate` call."""
    mask = {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0, "do_sample": False}
    length = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens}
    return base.generate(prompts, logits_processor=processors, **mask | length | options)


def time_of(lab: Lab, base: Any, processors: list, prompts: torch.Tensor, n_tokens: int, **options: Any) -> Row:
    """Returns milliseconds per token, and gigabytes: at the peak over before, and still there after the call."""
    lab.free()
    before, clock = lab.allocated(), Clock(lab)
    run(base, [*processors, clock], prompts, n_tokens, **options)
    row = {"ms_per_token": clock.ms_per_token(), "peak_gb": lab.allocated(peak=True) - before}
    return row | {"kept_gb": lab.allocated() - before}


def a_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of a few words, which trainers need to be made."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "A", "question", "?", "Yes", ".", "No", ",", "not", "at", "all"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
