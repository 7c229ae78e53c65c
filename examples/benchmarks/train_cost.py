"""
What training costs: time and peak memory of a step, forward and backward, over the naive form of the same loss.

    python -m examples.benchmarks.train_cost
    python -m examples.benchmarks.train_cost --heads       # the last layer alone

*Naive* is TRL's `CPOTrainer` with the same loss, which reads both texts of a pair in full and computes logits for every
token. *Two rows* is `AutoregressiveRewardTrainer` for models that can't share prefixes, and *one row* is what it does
otherwise, where that saves time. All ways take turns within a round, on the same pairs of random tokens. Ratios are
taken within a round; their median and range over the rounds are printed. Peak memory is that of a separate process,
minus what it used before its step.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.trainer.utils import selective_log_softmax

from examples.benchmarks.measuring import (
    add_place,
    add_record,
    cell,
    forget_peak_memory,
    load,
    memory_mb,
    run_for_memory,
    spread,
    wait,
)
from examples.small import output_file, sized
from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer
from hf_genarm.demo import demo_model
from hf_genarm.functional import selected_log_probs

WAYS = ("naive", "two rows", "one row")
TARGETS = {"qv": ["q_proj", "v_proj"], "all": "all-linear"}
PAIR = {"prompt": ["A question?"], "chosen": [" Yes."], "rejected": [" No, not at all."]}


def step_of_demo(way: str, folder: str, args) -> Callable[[list[list[int]], list[list[int]], int], torch.Tensor]:
    """Returns [`make_step`] for an adapter on the demo model."""
    model = load(demo_model(), args)
    torch.manual_seed(args.seed)
    config = LoraConfig(r=args.rank, target_modules=TARGETS[args.targets], init_lora_weights=False)
    model, tokenizer = get_peft_model(model, config), AutoTokenizer.from_pretrained(demo_model())
    return make_step(way, model, tokenizer, folder, args.gradient_checkpointing)


def make_step(
    way: str, model: Any, tokenizer: Any, folder: str, checkpointing: bool
) -> Callable[[list[list[int]], list[list[int]], int], torch.Tensor]:
    """Returns a function of chosen, rejected and the length of their prompts that returns the loss."""
    device = model.device
    options = {"output_dir": folder, "report_to": "none", "gradient_checkpointing": checkpointing, "bf16": False}
    options |= {"use_cpu": device.type == "cpu"}
    data = {"train_dataset": Dataset.from_dict(PAIR), "processing_class": tokenizer}
    if way == "naive":
        # The sigmoid loss of CPO without its likelihood term is that of an autoregressive reward model.
        options |= {"loss_type": "sigmoid", "cpo_alpha": 0.0, "beta": 0.05}
        naive = CPOTrainer(model=model, args=CPOConfig(**options), **data)

        def naive_step(chosen, rejected, prompt_length):
            batch = {}
            for side, texts in (("chosen", chosen), ("rejected", rejected)):
                ids = torch.tensor(texts, device=device)
                labels = ids.clone()
                labels[:, :prompt_length] = -100
                parts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
                batch |= {f"{side}_{name}": value for name, value in parts.items()}
            return naive.get_batch_loss_metrics(naive.model, batch)[0]

        return naive_step

    trainer = AutoregressiveRewardTrainer(model=model, args=AutoregressiveRewardConfig(**options), **data)
    if way == "two rows":
        trainer._pair_log_probs._may_share = False

    def step(chosen, rejected, prompt_length):
        pairs = [
            {"chosen_ids": one, "rejected_ids": other, "genarm_prompt_length": prompt_length}
            for one, other in zip(chosen, rejected, strict=True)
        ]
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(pairs)))

    return step


def random_pairs(prompt_length: int, response_length: int, args) -> tuple[list[list[int]], list[list[int]], int]:
    n_tokens = sized(49_000, 250)
    prompts = torch.randint(10, n_tokens, (args.pairs, prompt_length))
    responses = torch.randint(10, n_tokens, (2, args.pairs, response_length))
    chosen, rejected = (torch.cat([prompts, own], dim=1).tolist() for own in responses)
    return chosen, rejected, prompt_length


def measure(args) -> list[dict]:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        steps = {way: step_of_demo(way, folder, args) for way in WAYS}
        tolerance = 1e-4 if args.dtype == "float32" else 0.05
        progress = tqdm(total=len(args.shapes) * (args.rounds + 1), desc="rounds")
        for shape in args.shapes:
            prompt_length, response_length = map(int, shape.split("+"))
            ratios: dict[str, list[float]] = {way: [] for way in WAYS[1:]}
            for number in range(args.rounds + 1):
                pairs = random_pairs(prompt_length, response_length, args)
                seconds, losses = {}, {}
                for way, step in steps.items():
                    start = time.perf_counter()
                    loss = step(*pairs)
                    loss.backward()
                    wait(args.device)
                    seconds[way], losses[way] = time.perf_counter() - start, loss.item()
                for way, loss in losses.items():
                    if abs(loss - losses["naive"]) > tolerance * losses["naive"]:
                        raise RuntimeError(f"The loss of `{way}` is {loss}, and not {losses['naive']}, the naive one.")
                for way in WAYS[1:] if number > 0 else ():  # the first round warms up
                    ratios[way].append(seconds["naive"] / seconds[way])
                progress.update()
            speed = {way: spread(x) for way, x in ratios.items()}
            results.append({"shape": shape, "speed": speed, "memory_mb": {}})
    for row in tqdm(results, desc="memory"):
        for way in WAYS:
            options = ["--peak-memory-of", way, "--shapes", row["shape"], "--pairs", str(args.pairs)]
            options += ["--rank", str(args.rank), "--targets", args.targets]
            options += ["--device", args.device, "--dtype", args.dtype]
            options += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
            row["memory_mb"][way] = run_for_memory(__file__, options)
    return results


def print_peak_memory(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if args.peak_memory_of in WAYS:
            loss_of = step_of_demo(args.peak_memory_of, folder, args)
            pairs = random_pairs(*map(int, args.shapes[0].split("+")), args)
            loss_of(*random_pairs(8, 2, args)).backward()  # gradients and the buffers of libraries are there now
            step = lambda: loss_of(*pairs).backward()  # noqa: E731
        else:
            step = head_step(args.peak_memory_of, args)
        forget_peak_memory(args.device)
        before = memory_mb(args.device, in_use=True)
        step()
        print(memory_mb(args.device) - before)


def heads() -> dict[str, Callable[[torch.Tensor, torch.nn.Linear, torch.Tensor], torch.Tensor]]:
    """Returns ways to compute log-probabilities of tokens from hidden states."""
    ways = {
        "selected_log_probs": lambda x, head, ids: selected_log_probs(head(x), torch.arange(len(ids)), ids),
        "cross_entropy": lambda x, head, ids: -torch.nn.functional.cross_entropy(head(x), ids, reduction="none"),
        "TRL's selective_log_softmax": lambda x, head, ids: selective_log_softmax(head(x), ids),
    }
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Fused
    except ImportError:
        print("This version of TRL has no fused head.")
    else:
        ways["TRL's fused head"] = lambda x, head, ids: Fused.apply(
            x, head.weight, None, ids, 1.0, 8192, None, 1.0, ()
        )[0]
    return ways


def head_step(way: str, args) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Returns a function that runs the last layer forward and backward for all response tokens of a batch."""
    head = load(demo_model(), args).lm_head
    head.weight.requires_grad_(False)
    n_tokens = 2 * args.pairs * int(args.shapes[0].split("+")[1])
    place = {"device": args.device, "dtype": head.weight.dtype}
    hidden = torch.randn(n_tokens, head.in_features, requires_grad=True, **place)
    ids = torch.randint(0, head.out_features, (n_tokens,), device=args.device)
    return lambda: torch.autograd.grad(heads()[way](hidden, head, ids).sum(), hidden)


def compare_heads(args) -> None:
    steps = {way: head_step(way, args) for way in heads()}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(args.rounds + 1):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            wait(args.device)
            seconds[way].append(time.perf_counter() - start)
    print("Time, and peak memory in MB, of the last layer; ratios to `selected_log_probs`:")
    for way, times in seconds.items():
        ratios = [x / y for x, y in zip(times[1:], seconds["selected_log_probs"][1:], strict=True)]
        options = ["--peak-memory-of", way, "--shapes", args.shapes[0], "--pairs", str(args.pairs)]
        options += ["--device", args.device, "--dtype", args.dtype]
        print(f"  {way:<28} {cell(spread(ratios))}   {run_for_memory(__file__, options):.0f}")


def table(results: list[dict]) -> str:
    lines = ["| prompt + response | " + " | ".join(f"speed, {way}" for way in WAYS[1:]) + " | peak memory, MB |"]
    lines.append("|---|---|---|---|")
    for row in results:
        memory = ", ".join(f"{way} {row['memory_mb'][way]:.0f}" for way in WAYS)
        share = row["memory_mb"]["one row"] / max(1, row["memory_mb"]["naive"])  # a tiny model takes none
        speeds = " | ".join(cell(row["speed"][way]) for way in WAYS[1:])
        lines.append(f"| {row['shape']} | {speeds} | {memory} ({share:.2f}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=sized(["256+64", "64+64", "16+64"], ["4+4"]), help="tokens of prompt+response"
    )
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a batch")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", choices=TARGETS, default="qv", help="layers with low-rank products")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=sized(9, 1))
    add_place(parser)
    parser.add_argument("--heads", action="store_true", help="compare ways to compute log-probabilities instead")
    parser.add_argument("--output", type=output_file, help="JSON file that the results are added to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.peak_memory_of:
        return print_peak_memory(args)
    if args.heads:
        return compare_heads(args)
    results = measure(args)
    print(table(results))
    add_record(args.output, __file__, results)
    return None


if __name__ == "__main__":
    main()
