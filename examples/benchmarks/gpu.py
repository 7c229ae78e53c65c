"""
What guidance costs on one GPU, in nine minutes and without a network: the models have real sizes and random weights.

    python -m examples.benchmarks.gpu --output gpu.json
    python -m examples.benchmarks.gpu --device cpu --tiny      # a dry run

Each part has a time after which it begins nothing new, and what goes wrong in it is a row with the error. Results are
written as soon as a part is done. Parts: `machine` (kernel launches and copies), `exactness` (engines against whole
passes), `devices` (what users do with devices), `reads` (where the host waits for the GPU in each token), `time`
(milliseconds per token, and memory), `long` (long texts), `static` (a static cache, compiled by `generate`), `training`
(steps of 1B adapters, and those of TRL's `CPOTrainer`).
"""

import argparse
import json
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from examples.benchmarks.gpu_lab import Lab, Recorder, Row, a_tokenizer, run, time_of
from examples.benchmarks.measuring import machine
from examples.small import output_file, sized
from hf_genarm import GenARMLogitsProcessor
from hf_genarm.demo import is_smoke
from hf_genarm.functional import guided_log_probs, kl_divergence


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
    """A step of an adapter on 1B, forward and backward, over that of TRL's `CPOTrainer` with the same loss."""
    from examples.benchmarks.train_cost import WAYS, make_step  # decoding needs none of the libraries for training

    base, tokenizer, n_pairs = lab.model("1B"), a_tokenizer(), lab.sized(8, 2)
    with tempfile.TemporaryDirectory() as folder:
        steps = {way: make_step(way, lab.adapter(base, "q,v"), tokenizer, folder, checkpointing=False) for way in WAYS}
        for prompt, answer in lab.sized(((512, 128), (128, 512), (64, 64)), ((4, 4),)):
            texts = torch.cat(2 * [lab.prompts(n_pairs, prompt)]), lab.prompts(2 * n_pairs, answer)
            chosen, rejected = torch.cat(texts, dim=1).cpu().chunk(2)
            for way, step in steps.items():
                if not lab.has_time:
                    return
                seconds = []
                for _ in range(3):
                    lab.free()
                    before, start = lab.allocated(), time.perf_counter()
                    loss = step(chosen.tolist(), rejected.tolist(), prompt)
                    loss.backward()
                    lab.wait()
                    seconds.append(time.perf_counter() - start)
                row = {"way": way, "prompt": prompt, "answer": answer, "ms": 1000 * min(seconds), "loss": loss.item()}
                yield row | {"peak_gb": lab.allocated(peak=True) - before}


PARTS: dict[str, tuple[Callable[[Lab], Iterator[Row]], float]] = {
    "machine": (part_machine, 20),
    "exactness": (part_exactness, 60),
    "devices": (part_devices, 15),
    "reads": (part_reads, 25),
    "time": (part_time, 190),
    "long": (part_long, 30),
    "static": (part_static, 80),
    "training": (part_training, 110),
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
