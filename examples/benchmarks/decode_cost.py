"""
What guidance costs: time per new token, guided over unguided, and peak memory, for each engine.

    python -m examples.benchmarks.decode_cost
    python -m examples.benchmarks.decode_cost --profile

All ways of decoding take turns within a round, each with prompts of its own. The time per token of a run is the median
over its steps after the prompt. Ratios are taken within a round; their median and range over the rounds are printed
and added to a JSON file. Peak memory is that of a process of its own, from the first token to the last.
"""

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedModel

from examples.benchmarks.measuring import add_record, cell, forget_peak_memory, memory_mb, run_for_memory, spread
from examples.small import output_file, sized
from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.demo import demo_model

ENGINES = ("fused", "shared", "separate")
TARGETS = {"qv": ["q_proj", "v_proj"], "all": "all-linear"}


class Clock(LogitsProcessor):
    """Notes the time of each step, after guidance."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def time_per_token(model: PreTrainedModel, processors: list[LogitsProcessor], batch_size: int, args) -> float:
    """Seconds; the reward models have never seen the prompts."""
    prompts = torch.randint(10, model.config.vocab_size, (batch_size, args.prompt_tokens))
    clock = Clock()
    model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        logits_processor=[*processors, clock],
        do_sample=False,
        min_new_tokens=args.new_tokens,  # suppresses the eos token
        max_new_tokens=args.new_tokens,
        pad_token_id=0,
    )
    return statistics.median(later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False))


def save_adapters(path: str, folder: Path, args) -> list[str]:
    """Random adapters: time doesn't depend on what they have learned."""
    names = []
    for index in range(max(args.adapters)):
        config = LoraConfig(r=args.rank, target_modules=TARGETS[args.targets], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).save_pretrained(folder / str(index))
        names.append(str(folder / str(index)))
    return names


def make_processor(engine: str, model: PreTrainedModel, names: list[str]) -> GenARMLogitsProcessor:
    base_model = None if engine == "separate" else model
    return GenARMLogitsProcessor.from_pretrained(names, base_model=base_model, alpha=1 / len(names))


def run_engine(engine: str, model: PreTrainedModel, processors: list[LogitsProcessor], batch_size: int, args) -> float:
    if engine != "shared":
        return time_per_token(model, processors, batch_size, args)
    # A hook on the base must be heard, so that its passes are its own; the weights are still shared.
    handle = model.register_forward_hook(lambda *_: None)
    try:
        return time_per_token(model, processors, batch_size, args)
    finally:
        handle.remove()


def measure_time(model: PreTrainedModel, names: list[str], args) -> list[dict]:
    results = []
    rounds = tqdm(total=len(args.batch_sizes) * len(args.adapters) * args.rounds, desc="rounds")
    arm = AutoregressiveRewardModel.from_pretrained(names[0]).model
    for n_adapters in args.adapters:
        processors = {engine: make_processor(engine, model, names[:n_adapters]) for engine in args.engines}
        for batch_size in args.batch_sizes:
            ratios: dict[str, list[float]] = {}
            for _ in range(args.rounds):
                seconds = {
                    engine: run_engine(engine, model, [processor], batch_size, args)
                    for engine, processor in processors.items()
                }
                seconds["rows"] = time_per_token(model, [], batch_size * (1 + n_adapters), args)
                unguided = time_per_token(model, [], batch_size, args)
                alone = unguided + n_adapters * time_per_token(arm, [], batch_size, args)
                for name, time_of_it in seconds.items():
                    ratios.setdefault(name, []).append(time_of_it / unguided)
                for name, time_of_it in (("over_rows", seconds.get("fused")), ("over_alone", seconds.get("separate"))):
                    if time_of_it is not None:
                        reference = seconds["rows"] if name == "over_rows" else alone
                        ratios.setdefault(name, []).append(time_of_it / reference)
                rounds.update()
            times = {name: spread(x) for name, x in ratios.items()}
            results.append({"batch_size": batch_size, "adapters": n_adapters, "time": times, "memory_mb": {}})
    return results


def peak_memory(engine: str, names: list[str], batch_size: int, args) -> float:
    """In megabytes, of a process that does nothing else."""
    options = ["--peak-memory-of", engine, *names, "--batch-sizes", str(batch_size)]
    options += ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
    return run_for_memory(__file__, options)


def print_peak_memory(engine: str, names: list[str], args) -> None:
    path = demo_model()
    model, _tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    processors: list[LogitsProcessor] = [make_processor(engine, model, names)] if engine != "unguided" else []
    forget_peak_memory()  # of loading
    run_engine(engine, model, processors, args.batch_sizes[0], args)
    print(memory_mb())


def profile(model: PreTrainedModel, names: list[str], args) -> None:
    """Where the time of guided steps goes. The profiler itself slows Python code down."""
    processor = make_processor("fused", model, names[:1])
    for batch_size in args.batch_sizes:
        profiler = cProfile.Profile()
        time_per_token(model, [processor], batch_size, args)
        profiler.runcall(time_per_token, model, [processor], batch_size, args)
        spent: dict[str, float] = {}
        for (_, _, name), (_, _, _, cumulative, _) in pstats.Stats(profiler).stats.items():
            spent[name] = max(spent.get(name, 0.0), cumulative)
        total = spent["generate"]
        processor_time = spent["join_next_pass"] + spent["guided_log_probs"] + spent["of"]
        parts = {
            "joint forward passes: products with the weights of the base": spent["_linear"],
            "joint forward passes: low-rank products of the adapter": spent["add"],
            "joint forward passes: joining and splitting the caches": spent["join"] + spent["split"],
            "prefill of base and reward model": spent["_prefill"] + processor_time - spent["join_next_pass"],
        }
        print(f"\nbatch {batch_size}, 1 adapter: share of the time of `generate`")
        for name, seconds in parts.items():
            print(f"  {seconds / total:6.1%}  {name}")


def compare_products(model: PreTrainedModel) -> None:
    """The linear layers of the model for a few rows, as torch computes them and as a joint pass does."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    ways = {
        "x W": lambda x, weight: torch.nn.functional.linear(x, weight),
        "W x": lambda x, weight: torch.mm(weight, x.T).T.contiguous(),
    }
    print("rows  x W / W x, time for all linear layers")
    for n_rows in (2, 3, 4, 8, 16, 32):
        inputs = {weight.shape[1]: torch.randn(n_rows, weight.shape[1]) for weight in weights}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(9):
            for name, way in ways.items():
                start = time.perf_counter()
                for weight in weights:
                    way(inputs[weight.shape[1]], weight)
                seconds[name].append(time.perf_counter() - start)
        ratios = [x / y for x, y in zip(*seconds.values(), strict=True)]
        print(f"{n_rows:4}  {cell(spread(ratios))}")


def table(results: list[dict], engines: list[str]) -> str:
    columns = [*engines, "rows", "over_rows", "over_alone"]
    head = {"rows": "unguided, as many rows", "over_rows": "fused / as many rows"}
    head |= {"over_alone": "separate / models alone"}
    names = ["batch", "adapters", *(head.get(x, x) for x in columns), "peak memory over unguided, MB"]
    lines = ["| " + " | ".join(names) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for row in results:
        memory = row["memory_mb"]
        extra = ", ".join(f"{x} {memory[x] - memory['unguided']:+.0f}" for x in engines) if memory else ""
        cells = " | ".join(cell(row["time"].get(x)) for x in columns)
        lines.append(f"| {row['batch_size']} | {row['adapters']} | {cells} | {extra} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=sized([1, 4, 16], [1]))
    parser.add_argument(
        "--adapters", type=int, nargs="+", default=sized([1, 2, 4], [1]), help="numbers of reward models"
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=sized(list(ENGINES), ["fused"]))
    parser.add_argument("--targets", choices=TARGETS, default="qv", help="layers with low-rank products")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=sized(128, 4))
    parser.add_argument("--new-tokens", type=int, default=sized(128, 4))
    parser.add_argument("--rounds", type=int, default=sized(3, 1))
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    parser.add_argument("--products", action="store_true", help="compare two ways of computing linear layers instead")
    parser.add_argument("--output", type=output_file, help="JSON file that the results are added to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-memory-of", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.peak_memory_of:
        engine, *names = args.peak_memory_of
        return print_peak_memory(engine, names, args)

    path = demo_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    if args.products:
        with torch.no_grad():
            return compare_products(model)
    with tempfile.TemporaryDirectory() as folder:
        names = save_adapters(path, Path(folder), args)
        if args.profile:
            return profile(model, names, args)
        results = measure_time(model, names, args)
        for row in [] if args.no_memory else tqdm(results, desc="memory"):
            used = names[: row["adapters"]]
            for engine in ("unguided", *args.engines):
                row["memory_mb"][engine] = peak_memory(engine, used, row["batch_size"], args)
    print(table(results, args.engines))
    add_record(args.output, __file__, results)
    return None


if __name__ == "__main__":
    main()
