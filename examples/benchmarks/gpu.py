"""
What guidance costs on one GPU, in nine minutes and without a network: the models have real sizes and random weights.

    python -m examples.benchmarks.gpu --output gpu.json
    python -m examples.benchmarks.gpu --device cpu --tiny      # a dry run

Each part has a time after which it begins nothing new, and what goes wrong in it is a row with the error. Results are
written as soon as a part is done. Parts: `machine` (kernel launches and copies), `exactness` (engines against whole
passes), `devices` (what users do with devices), `reads` (where the host waits for the GPU in each token), `time`
(milliseconds per token, and memory), `long` (long texts), `static` (a static cache, compiled by `generate`), `training`
(steps of 1B adapters).
"""

import argparse
import json
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor, PreTrainedModel

from examples.benchmarks.measuring import machine
from examples.small import output_file, sized
from hf_genarm import GenARMLogitsProcessor
from hf_genarm.demo import is_smoke
from hf_genarm.functional import guided_log_probs, kl_divergence, preference_loss, token_log_probs
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
        if self.is_cuda:
            torch.cuda.synchronize()

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


def part_machine(lab: Lab) -> Iterator[Row]:
    """Launches of an empty kernel, and the bandwidth of copies on the device."""
    x, n = torch.zeros(1, device=lab.device), lab.sized(10_000, 10)
    lab.wait()
    start = time.perf_counter()
    for _ in range(n):
        x.add_(1)
    yield {"what": "µs to launch a kernel", "value": 1e6 * (time.perf_counter() - start) / n}
    lab.wait()
    big = torch.zeros(lab.sized(2**30, 2**10), device=lab.device)
    start = time.perf_counter()
    for _ in range(5):
        big.clone()
        lab.wait()
    yield {"what": "GB/s of a copy", "value": 5 * 2 * big.nbytes / 1e9 / (time.perf_counter() - start)}


def part_exactness(lab: Lab) -> Iterator[Row]:
    """The largest difference from whole passes, in nats, in float32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    base = lab.model("0.3B", torch.float32, spread=0.1)
    arms = [lab.adapter(base, "all", seed) for seed in (1, 2)]
    other = lab.model("0.3B", torch.float32, spread=0.1, seed=7)
    ways: dict[str, tuple[list, Row, Row]] = {
        "fused": (arms[:1], {}, {}),
        "fused, two rewards": (arms, {}, {}),
        "fused, reference": (arms[:1], {"reference": "base"}, {}),
        "separate": ([other], {}, {}),
        "separate, static cache": ([other], {}, {"cache_implementation": "static"}),
    }
    for name, (models, settings, options) in ways.items():
        if not lab.has_time:
            return
        processor, recorder = GenARMLogitsProcessor(models, 1.0, base_model=base, **settings), Recorder()

        run(base, [processor, recorder], lab.prompts(2, 12), lab.sized(24, 4), **options)
        worst = 0.0
        for input_ids, scores in recorder.seen:
            with torch.no_grad():
                logits = [m(input_ids=input_ids, use_cache=False).logits[:, -1].float() for m in (base, *models)]
            own, *rewards = (x.log_softmax(-1) for x in logits)
            rewards = [x - own for x in rewards] if settings else rewards
            expected = guided_log_probs(own, rewards, [1.0] * len(rewards))
            worst = max(worst, (scores - expected).abs().max().item())
        yield {"way": name, "engine": processor.engine, "max_difference": worst}
    base8 = lab.model("8B")
    prompts = lab.prompts(4, 32)
    with torch.no_grad():
        alone, together = (base8(x).logits[:4, -1].float().log_softmax(-1) for x in (prompts, prompts.repeat(2, 1)))
    yield {
        "way": "bf16, KL of the same rows in a larger batch",
        "max_difference": kl_divergence(alone, together).max().item(),
    }


def part_devices(lab: Lab) -> Iterator[Row]:
    """What users do with devices: whether it runs."""
    base, arm = lab.model("0.3B"), lab.adapter(lab.model("0.3B"), "q,v")
    prompts, n = lab.prompts(2, 8), 4
    cases: dict[str, Callable[[], Any]] = {
        "ids on the CPU": lambda: run(base, [GenARMLogitsProcessor(arm, base_model=base)], prompts.cpu(), n),
        "strengths on the GPU": lambda: run(
            base, [GenARMLogitsProcessor(arm, torch.ones(2, 1, device=lab.device), base_model=base)], prompts, n
        ),
        "mask on the CPU": lambda: run(
            base, [GenARMLogitsProcessor(arm, attention_mask=torch.ones(2, 8), base_model=base)], prompts, n
        ),
        "target_kl": lambda: run(base, [GenARMLogitsProcessor(arm, target_kl=0.1, base_model=base)], prompts, n),
        "sampled": lambda: run(base, [GenARMLogitsProcessor(arm, base_model=base)], prompts, n, do_sample=True),
    }
    for name, case in cases.items():
        try:
            case()
            yield {"case": name, "result": "runs"}
        except Exception as error:
            yield {"case": name, "result": f"{type(error).__name__}: {error}"}


def part_reads(lab: Lab) -> Iterator[Row]:
    """Where the host waits for the device, counted over eight tokens."""
    if not lab.is_cuda:
        return
    base = lab.model("0.3B")
    arm, other = lab.adapter(base, "q,v"), lab.model("0.3B", seed=7)
    for name, processors in (
        ("unguided", []),
        ("fused", [GenARMLogitsProcessor(arm, base_model=base)]),
        ("fused, target_kl", [GenARMLogitsProcessor(arm, target_kl=0.1, base_model=base)]),
        ("separate", [GenARMLogitsProcessor(other, base_model=base)]),
    ):
        counts = []
        for n in (8, 16):
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run(base, processors, lab.prompts(1, 8), n)
            torch.cuda.set_sync_debug_mode("default")
            synchronising = (x for x in caught if "synchroniz" in str(x.message))
            counts.append(Counter(f"{Path(x.filename).name}:{x.lineno}" for x in synchronising))
        places = {place: (n - counts[0][place]) / 8 for place, n in counts[1].items() if n > counts[0][place]}
        yield {"way": name, "reads_per_token": sum(places.values()), "places": places}


def part_time(lab: Lab) -> Iterator[Row]:
    """Milliseconds per token of an 8B base, two rounds."""
    base, n_tokens = lab.model("8B"), lab.sized(32, 4)
    ways: dict[str, Callable[[], tuple[list, int]]] = {
        "unguided": lambda: ([], 1),
        "unguided, twice the rows": lambda: ([], 2),
        "fused, q,v": lambda: ([GenARMLogitsProcessor(lab.adapter(base, "q,v"), base_model=base)], 1),
        "fused, all": lambda: ([GenARMLogitsProcessor(lab.adapter(base, "all"), base_model=base)], 1),
        "separate, 1B": lambda: ([GenARMLogitsProcessor(lab.model("1B"), base_model=base)], 1),
    }
    made = {name: make() for name, make in ways.items()}
    for batch_size in lab.sized((1, 8, 32, 128), (1,)):
        for number in range(2):
            for name, (processors, repeats) in made.items():
                if not lab.has_time:
                    return
                prompts = lab.prompts(batch_size * repeats, lab.sized(128, 8))
                row = time_of(lab, base, processors, prompts, n_tokens)
                yield {"way": name, "batch_size": batch_size, "round": number} | row


def part_long(lab: Lab) -> Iterator[Row]:
    """Milliseconds per token after long prompts."""
    base = lab.model("8B")
    arm = GenARMLogitsProcessor(lab.adapter(base, "q,v"), base_model=base)
    for name, processors in (("unguided", []), ("fused, q,v", [arm])):
        if lab.has_time:
            prompts = lab.prompts(*lab.sized((8, 8192), (1, 32)))
            yield {"way": name} | time_of(lab, base, processors, prompts, lab.sized(8, 3))


def part_static(lab: Lab) -> Iterator[Row]:
    """A static cache, which `generate` compiles on CUDA."""
    base = lab.model("1B")
    static: Row = {"cache_implementation": "static"}
    other = lab.model("0.3B")
    for name, models in (("unguided", []), ("adapter", [lab.adapter(base, "q,v")]), ("separate", [other])):
        if not lab.has_time:
            return
        processors = [GenARMLogitsProcessor(models, base_model=base)] if models else []
        prompts = lab.prompts(1, lab.sized(64, 8))
        run(base, processors, prompts, 4, **static)  # compiles
        engine = processors[0].engine if processors else "none"
        yield {"way": name, "engine": engine} | time_of(lab, base, processors, prompts, lab.sized(32, 4), **static)


def part_training(lab: Lab) -> Iterator[Row]:
    """A step of an adapter on 1B, in bf16: all tokens of both texts, as two rows, forward and backward."""
    base = lab.model("1B")
    model = lab.adapter(base, "q,v").train()
    for prompt, answer in lab.sized(((512, 128), (128, 512), (64, 64)), ((4, 4),)):
        if not lab.has_time:
            return
        ids = lab.prompts(lab.sized(16, 4), prompt + answer)
        for parameter in model.parameters():
            parameter.grad = None
        seconds = []
        for _ in range(3):
            lab.free()
            before, start = lab.allocated(), time.perf_counter()
            logits = model(input_ids=ids, logits_to_keep=answer + 1).logits[:, :-1]
            chosen, rejected = token_log_probs(logits, ids[:, -answer:]).sum(-1).chunk(2)
            preference_loss(chosen - rejected).mean().backward()
            lab.wait()
            seconds.append(time.perf_counter() - start)
        row = {"prompt": prompt, "answer": answer, "ms": 1000 * min(seconds)}
        yield row | {"peak_gb": lab.allocated(peak=True) - before}


PARTS: dict[str, tuple[Callable[[Lab], Iterator[Row]], float]] = {
    "machine": (part_machine, 20),
    "exactness": (part_exactness, 60),
    "devices": (part_devices, 15),
    "reads": (part_reads, 25),
    "time": (part_time, 190),
    "long": (part_long, 30),
    "static": (part_static, 80),
    "training": (part_training, 60),
}


def measure(lab: Lab, names: list[str], budget: float, write: Callable[[dict], None]) -> dict[str, list[Row]]:
    """Runs the parts one after the other, and writes what is known after each."""
    results: dict[str, list[Row]] = {}
    end = time.perf_counter() + budget
    for name in names:
        part, seconds = PARTS[name]
        lab.deadline = min(time.perf_counter() + seconds, end)
        rows = results[name] = []
        try:
            for row in part(lab) if lab.has_time else ():
                rows.append(row)
        except Exception as error:
            rows.append({"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc().splitlines()[-3]})
        write(results)
        if name in ("devices", "long"):
            lab.forget()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=sized("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", default=is_smoke(), help="models of no size, for a dry run")
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=output_file, help="JSON file that the results are added to")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here. A dry run without one: --device cpu --tiny")
    warnings.simplefilter("ignore")
    lab = Lab(args.device, args.tiny)
    about = machine() | {"transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d")}
    about |= {"device": torch.cuda.get_device_name() if lab.is_cuda else args.device, "is_tiny": args.tiny}
    records = json.loads(args.output.read_text(encoding="utf-8")) if args.output and args.output.exists() else []

    def write(results: dict) -> None:
        if args.output:
            text = json.dumps([*records, {"machine": about, "results": results}], indent=1)
            args.output.write_text(text + "\n", encoding="utf-8")

    for name, rows in measure(lab, args.parts, args.budget, write).items():
        print(f"\n{name}")
        for row in rows:
            print("  " + ", ".join(f"{x} {y:.4g}" if isinstance(y, float) else f"{x} {y}" for x, y in row.items()))


if __name__ == "__main__":
    main()
