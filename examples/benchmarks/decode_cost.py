"""
What guidance costs: time per new token, guided over unguided, and peak memory, for each engine.

    python -m examples.benchmarks.decode_cost
    python -m examples.benchmarks.decode_cost --profile
    python -m examples.benchmarks.decode_cost --sentences 1 2 --batch-sizes 1

All ways of decoding take turns within a round, each with its own prompts. The time per token of a run is the median
over its steps after the prompt. Ratios are taken within a round; their median and range over the rounds are printed and
added to a JSON file. Peak memory is that of a separate process, from the first token to the last.

There are two baselines. On processors of AMD, a joint pass of base and adapters computes its linear layers as `W x` for
few rows, which is much faster there than torch's own `x W`; that is no gain from guidance. *Same products* is the ratio
to an unguided base that computes its linear layers as joint passes do: what guidance costs. The other ratios are to the
base as it is.
"""

import argparse
import cProfile
import functools
import inspect
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LogitsProcessor, PreTrainedModel

from examples.benchmarks.measuring import add_record, cell, forget_peak_memory, memory_mb, run_for_memory, spread
from examples.small import output_file, sized
from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.decoding.fusion import joint_cache, joint_network
from hf_genarm.demo import demo_model

ENGINES = ("fused", "shared", "separate")
TARGETS = {"qv": ["q_proj", "v_proj"], "all": "all-linear"}


class Clock(LogitsProcessor):
    """Records the time of each step, after guidance."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


def time_per_token(model: PreTrainedModel, processors: list[LogitsProcessor], batch_size: int, args) -> float:
    """Returns seconds. The prompts are new ones, which the reward models have not read before."""
    prompts = torch.randint(10, model.config.vocab_size, (batch_size, args.prompt_tokens), device=model.device)
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
    """Saves random adapters: time doesn't depend on what they have learned."""
    names = []
    for index in range(max(args.adapters)):
        config = LoraConfig(r=args.rank, target_modules=TARGETS[args.targets], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).save_pretrained(folder / str(index))
        names.append(str(folder / str(index)))
    return names


def make_processor(engine: str, model: PreTrainedModel, names: list[str]) -> GenARMLogitsProcessor:
    base_model = None if engine == "separate" else model
    place = {"dtype": model.dtype, "device_map": str(model.device)} if engine == "separate" else {}
    return GenARMLogitsProcessor.from_pretrained(names, base_model=base_model, alpha=1 / len(names), **place)


def run_engine(engine: str, model: PreTrainedModel, processors: list[LogitsProcessor], batch_size: int, args) -> float:
    if engine != "shared":
        return time_per_token(model, processors, batch_size, args)
    # A joint pass would skip this hook, so base and reward model run separately. They still share their weights.
    handle = model.register_forward_hook(lambda *_: None)
    try:
        return time_per_token(model, processors, batch_size, args)
    finally:
        handle.remove()


@contextmanager
def products_of_joint_passes(model: PreTrainedModel) -> Iterator[None]:
    """Lets a model compute its linear layers as joint passes do where torch is slow for few rows."""
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    for layer in layers:
        vars(layer)["forward"] = functools.partial(joint_network._linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def measure_round(
    model: PreTrainedModel,
    arm: PreTrainedModel,
    processors: dict[str, GenARMLogitsProcessor],
    n_adapters: int,
    batch_size: int,
    args: argparse.Namespace,
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the ratios of one round: over the base as it is, and over the base with joint passes' products."""
    n_rows = batch_size * (1 + n_adapters)
    seconds = {engine: run_engine(engine, model, [x], batch_size, args) for engine, x in processors.items()}
    seconds["rows"] = time_per_token(model, [], n_rows, args)
    unguided = time_per_token(model, [], batch_size, args)
    alone = unguided + n_adapters * time_per_token(arm, [], batch_size, args)
    ratios = {name: time_of_it / unguided for name, time_of_it in seconds.items()}
    if "fused" in seconds:
        ratios["over_rows"] = seconds["fused"] / seconds["rows"]
    if "separate" in seconds:
        ratios["over_alone"] = seconds["separate"] / alone
    if not joint_network.slow_for_few_rows(torch.device("cpu")):  # the products are the same anyway
        return ratios, {}
    with products_of_joint_passes(model):
        same = {"rows": time_per_token(model, [], n_rows, args), "unguided": unguided}
        unguided_same = time_per_token(model, [], batch_size, args)
    same |= {"fused": seconds["fused"]} if "fused" in seconds else {}
    return ratios, {name: time_of_it / unguided_same for name, time_of_it in same.items()}


def measure_time(model: PreTrainedModel, names: list[str], args) -> list[dict]:
    """
    Measures all batch sizes and numbers of adapters.

    Returns:
        list of `dict`: `time` holds ratios to the time of the base as it is, `time_over_same_products` to that of the
        base with the products of joint passes, `unguided` in it being the base as it is, unless the products are the
        same; each with its range.
    """
    results = []
    bar = tqdm(total=len(args.batch_sizes) * len(args.adapters) * args.rounds, desc="rounds")
    arm = AutoregressiveRewardModel.from_pretrained(names[0], dtype=model.dtype).model.to(args.device)
    for n_adapters in args.adapters:
        processors = {engine: make_processor(engine, model, names[:n_adapters]) for engine in args.engines}
        for batch_size in args.batch_sizes:
            rounds = []
            for _ in range(args.rounds):
                rounds.append(measure_round(model, arm, processors, n_adapters, batch_size, args))
                bar.update()
            time_, same = ({name: spread([x[name] for x in of]) for name in of[0]} for of in zip(*rounds, strict=True))
            result = {"batch_size": batch_size, "adapters": n_adapters, "memory_mb": {}}
            results.append(result | {"time": time_, "time_over_same_products": same})
    return results


def measure_sentences(model: PreTrainedModel, args: argparse.Namespace) -> list[dict]:
    """Measures a base with sentences, whose prompts are longer than its own, against as many unguided rows."""
    results = []
    for n_sentences in args.sentences:
        processor = GenARMLogitsProcessor.from_sentences(["Be kind."] * n_sentences, model, alpha=1 / n_sentences)
        for batch_size in args.batch_sizes:
            rounds = []
            for _ in tqdm(range(args.rounds), desc=f"{n_sentences} sentences, batch {batch_size}"):
                prompts = torch.randint(10, model.config.vocab_size, (batch_size, args.prompt_tokens + 16))
                processor.prompts = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
                seconds = time_per_token(model, [processor], batch_size, args)
                unguided = time_per_token(model, [], batch_size, args)
                rows = time_per_token(model, [], batch_size * (1 + n_sentences), args)
                rounds.append({"unguided": seconds / unguided, "rows": seconds / rows})
                if joint_network.slow_for_few_rows(torch.device("cpu")):  # else the products are the same anyway
                    with products_of_joint_passes(model):
                        same = time_per_token(model, [], batch_size * (1 + n_sentences), args)
                    rounds[-1]["same rows"] = seconds / same
            ratios = {name: spread([x[name] for x in rounds]) for name in rounds[0]}
            results.append({"batch_size": batch_size, "sentences": n_sentences, "time_over": ratios})
            row = f"batch {batch_size}, {n_sentences} sentences: time per token over"
            print(row, ", ".join(f"{name} {cell(value)}" for name, value in ratios.items()))
    return results


def peak_memory(engine: str, names: list[str], batch_size: int, args) -> float:
    """Returns megabytes, measured in a process that does nothing else."""
    options = ["--peak-memory-of", engine, *names, "--batch-sizes", str(batch_size)]
    options += ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
    options += ["--device", args.device, "--dtype", args.dtype]
    return run_for_memory(__file__, options)


def print_peak_memory(engine: str, names: list[str], args) -> None:
    path = demo_model()
    model, _tokenizer = load(path, args), AutoTokenizer.from_pretrained(path)
    processors: list[LogitsProcessor] = [make_processor(engine, model, names)] if engine != "unguided" else []
    forget_peak_memory()  # of loading
    run_engine(engine, model, processors, args.batch_sizes[0], args)
    is_cuda = model.device.type == "cuda"
    print(torch.cuda.max_memory_allocated() / 2**20 if is_cuda else memory_mb())


def load(path: str, args: argparse.Namespace) -> PreTrainedModel:
    """Loads the base, on the device and in the dtype of the arguments."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype)).to(args.device)


def profile(model: PreTrainedModel, names: list[str], args) -> None:
    """Prints where the time of guided steps goes. The profiler itself slows Python code down."""
    processor = make_processor("fused", model, names[:1])
    for batch_size in args.batch_sizes:
        profiler = cProfile.Profile()
        time_per_token(model, [processor], batch_size, args)
        profiler.runcall(time_per_token, model, [processor], batch_size, args)
        spent = functools.partial(seconds_in, pstats.Stats(profiler))
        parts = {
            "joint passes: low-rank products of the adapter": spent(joint_network.LowRankProduct.add),
            "joint passes: joining and splitting the caches": spent(joint_cache.join) + spent(joint_cache.split),
            "the prompt, read by the base": spent(GenerationMixin._prefill),
            "the processor, which reads the prompt with the reward model": spent(GenARMLogitsProcessor.__call__),
        }
        if joint_network.slow_for_few_rows(torch.device("cpu")):  # else torch's own layers are called
            parts["joint passes: products with the weights of the base"] = spent(joint_network._linear)
        total = spent(GenerationMixin.generate)
        print(f"\nbatch {batch_size}, 1 adapter: share of the time of `generate`")
        for name, seconds in parts.items():
            print(f"  {seconds / total:6.1%}  {name}")


def seconds_in(stats: pstats.Stats, function: Callable) -> float:
    """Returns the time spent in a function and in what it calls. Other functions of the same name don't count."""
    code = inspect.unwrap(function).__code__
    _, _, _, cumulative, _ = stats.stats[code.co_filename, code.co_firstlineno, code.co_name]  # type: ignore[attr-defined]
    return cumulative


def compare_products(model: PreTrainedModel) -> None:
    """Times the linear layers of the model for few rows, as torch computes them and as `W x`, as in joint passes."""
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
    same = {"fused": "fused, same products", "rows": "unguided, as many rows, same products"}
    same |= {"unguided": "unguided, torch's products over the same"}
    same = same if any(row["time_over_same_products"] for row in results) else {}
    plain = {engine: engine for engine in engines} | {"rows": "unguided, as many rows"}
    plain |= {"over_rows": "fused / as many rows", "over_alone": "separate / models alone"}
    names = ["batch", "adapters", *same.values(), *plain.values(), "peak memory over unguided, MB"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in results:
        memory = row["memory_mb"]
        extra = ", ".join(f"{x} {memory[x] - memory['unguided']:+.0f}" for x in engines) if memory else ""
        cells = [cell(row["time_over_same_products"].get(x)) for x in same] + [cell(row["time"].get(x)) for x in plain]
        lines.append("| " + " | ".join([str(row["batch_size"]), str(row["adapters"]), *cells, extra]) + " |")
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    parser.add_argument("--sentences", type=int, nargs="+", help="measure these numbers of sentences instead")
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
    model = load(path, args)
    if args.products:
        with torch.no_grad():
            return compare_products(model)
    if args.sentences:
        add_record(args.output, __file__, measure_sentences(model, args))
        return None
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
