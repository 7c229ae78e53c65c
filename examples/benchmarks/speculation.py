r"""
What drafts of the reward model gain: time per token, in greedy decoding and sampling, for one text at a time.

    python -m examples.benchmarks.speculation
    python -m examples.benchmarks.speculation --simulate

In each round, and for each prompt, all ways of decoding take turns: unguided; guided; guided, with drafts of the reward
model; and unguided, with transformers' own assisted decoding by the model that the reward model was trained from. Time
per token excludes the prompt. Ratios are taken within a round; their median and range are printed.

The base is SmolLM2-135M-Instruct, and the reward model its first layers (`make_shallow.py`). `--simulate` uses larger
bases with random weights, and accepts drafts at the rate `--acceptance`: times are real, texts are not.

The curves of the plot are arithmetic. Let a pass of the reward model cost $\rho$ passes of the base, one more row
in a pass of the base $c$, and let drafts be accepted at the rate $a$. Plain guidance costs $1 + \rho$ for each token.
With K drafts, a cycle costs $(K + 1)\rho + 1 + cK$ and writes $1 + a + \dots + a^K$ tokens, so drafts are faster by

$$S(a, \rho) = \max_K \frac{(1 + \rho)(1 + a + \dots + a^K)}{(K + 1)\rho + 1 + cK}$$
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation import utils

from examples.benchmarks.drafting import MODES, Bench
from examples.benchmarks.make_shallow import DISTILLED, shallow_reward_model
from examples.benchmarks.measuring import add_place, add_record, cell, load
from examples.pairs import DATA
from examples.small import output_file, sized
from hf_genarm import AutoregressiveRewardModel
from hf_genarm.demo import demo_model

ROW = 0.05  # the cost of one more row, for the curves


def conversations(tokenizer, n_tokens: int, n_prompts: int) -> list[torch.Tensor]:
    """Returns conversations of about `n_tokens` tokens, each a held-out question after some that were answered."""
    turns = [json.loads(line) for line in (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = []
    for index in range(n_prompts):
        messages: list[dict[str, str]] = []
        ids = None
        for turn in turns[7 * index :] + turns[: 7 * index]:
            question = turn["prompt"]
            options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            longer = tokenizer.apply_chat_template([*messages, *question], **options)["input_ids"]
            if ids is not None and longer.shape[1] > n_tokens:
                break
            ids, messages = longer, [*messages, *question, *turn["chosen"]]
        prompts.append(ids)
    return prompts


@torch.no_grad()
def expected_acceptance(
    base, arm, small, texts: list[torch.Tensor], n_prompt: list[int], alpha: float
) -> dict[str, dict[str, float]]:
    """
    Returns the expected acceptance of several draft distributions on guided texts: for sampling their overlap with the
    guided distribution, for greedy decoding the share of tokens at which the likeliest one is the same.
    """
    sums: dict[str, list[float]] = {}
    for text, start in zip(texts, n_prompt, strict=True):
        of = {
            name: model(input_ids=text).logits[0, start - 1 : -1].float().log_softmax(-1)
            for name, model in (("base", base), ("arm", arm), ("small", small))
        }
        target = (of["base"] + alpha * of["arm"]).softmax(-1)
        candidates = {
            "the reward model": of["arm"],
            "the reward model, sharpened by 1 + alpha": (1 + alpha) * of["arm"],
            "with its own shallow base in place of the base": of["small"] + alpha * of["arm"],
            "the shallow base alone": of["small"],
        }
        for name, scores in candidates.items():
            overlap = torch.minimum(target, scores.softmax(-1)).sum(-1).mean()
            same = (target.argmax(-1) == scores.argmax(-1)).float().mean()
            sums.setdefault(name, []).append(float(overlap))
            sums.setdefault(name + ", greedy", []).append(float(same))
    return {name: sum(values) / len(values) for name, values in sums.items()}  # type: ignore[misc]


def replay(acceptance: float) -> Callable:
    """Returns a substitute for the rule of `generate`, which accepts drafts at random at a given rate."""

    def rule(candidate_input_ids, candidate_logits, candidate_length, new_logits, *args: Any, **kwargs: Any):
        drafts = candidate_input_ids[:, -candidate_length:]
        n_taken = (torch.rand(candidate_length) < acceptance).cumprod(0).sum()
        return torch.cat([drafts[:, :n_taken], new_logits[:, n_taken].argmax(-1, keepdim=True)], dim=1), n_taken

    return rule


def random_base(times: int, small: PreTrainedModel) -> PreTrainedModel:
    """Returns a Llama with random weights and about `times` as many parameters as the small model."""
    hidden = sized(1024 if times < 12 else 1536, 32)
    config = LlamaConfig(
        vocab_size=small.config.vocab_size,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_attention_heads=8,
        num_hidden_layers=1,
        tie_word_embeddings=True,
        eos_token_id=small.config.eos_token_id,
        bos_token_id=small.config.bos_token_id,
    )
    with torch.device("meta"):
        one = LlamaForCausalLM(config)
        layer = sum(x.numel() for x in one.model.layers.parameters())
        head = one.num_parameters() - layer
    config.num_hidden_layers = max(round((times * small.num_parameters() - head) / layer), 1)
    return LlamaForCausalLM(config).eval()


def plot(results: list[dict], path: Path) -> None:
    """Plots what was measured over the speed-up that arithmetic gives."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    rates, costs = np.linspace(0, 0.95, 96), np.geomspace(0.03, 0.7, 80)
    a, cost = np.meshgrid(rates, costs)
    gains = [(1 + cost) * sum(a**i for i in range(k + 1)) / ((k + 1) * cost + 1 + ROW * k) for k in range(1, 9)]
    gain = np.maximum(np.max(gains, axis=0), 1.0)
    figure, axis = plt.subplots(figsize=(7, 4.4), dpi=160)
    levels = [1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0]
    filled = axis.contourf(a, cost, gain, levels=levels, cmap="Blues", alpha=0.7)
    figure.colorbar(filled, label="times as fast as plain guidance (arithmetic)")
    for row in results:
        gained = 1 / row["drafted_to_guided"][0]
        marker = "s" if row.get("simulated") else "o"
        axis.plot(row["acceptance"], row["cost"], marker, color="#d62728" if row["mode"] == "greedy" else "#ff7f0e")
        label = f"{gained:.2f}" + (" (simulated)" if row.get("simulated") else "")
        axis.annotate(label, (row["acceptance"], row["cost"]), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axis.set_yscale("log")
    axis.set_xlabel("rate at which drafts are accepted")
    axis.set_ylabel("cost of a pass of the reward model, in passes of the base")
    axis.set_title("Measured (numbers) on arithmetic (colours)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=sized([64, 512], [32]))
    parser.add_argument("--new-tokens", type=int, default=sized(64, 6))
    parser.add_argument("--rounds", type=int, default=sized(5, 1))
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument(
        "--drafts", type=int, help="a fixed number of drafts; chosen by how many are accepted as a default"
    )
    parser.add_argument("--simulate", action="store_true", help="larger bases of random weights instead")
    parser.add_argument("--times", type=int, nargs="+", default=[8, 16], help="the sizes of simulated bases")
    parser.add_argument(
        "--acceptance", type=float, default=0.6, help="the rate for simulated drafts, as measured with the real pair"
    )
    add_place(parser)
    parser.add_argument("--output", type=output_file, help="JSON file that the results are added to")
    parser.add_argument("--plot", type=output_file, help="PNG file, of all results in the JSON file")
    args = parser.parse_args()

    folder = shallow_reward_model()
    arm = AutoregressiveRewardModel.from_pretrained(str(folder), dtype=args.dtype, device_map=args.device)
    small = load(folder / DISTILLED, args)
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    prompts = {n: [x.to(args.device) for x in conversations(tokenizer, n, args.rounds)] for n in args.prompt_tokens}
    results: list[dict] = []
    if args.simulate:
        bar = tqdm(total=len(args.times) * len(prompts) * args.rounds, desc="rounds")
        for times in args.times:
            bench = Bench(random_base(times, arm.model).to(small.device, small.dtype), arm, small, args)
            with mock.patch.object(utils, "_speculative_sampling", replay(args.acceptance)):
                for n_tokens, of_length in prompts.items():
                    result = {"simulated": times, "prompt_tokens": n_tokens} | bench.compare("sampling", of_length, bar)
                    results.append(result)
            del bench
    else:
        base = load(demo_model(), args)
        bench = Bench(base, arm, small, args)
        bar = tqdm(total=len(MODES) * len(prompts) * args.rounds, desc="rounds")
        for n_tokens, of_length in prompts.items():
            for mode in MODES:
                results.append({"prompt_tokens": n_tokens} | bench.compare(mode, of_length, bar))
        shortest = prompts[min(prompts)]
        options = {"max_new_tokens": args.new_tokens, **MODES["sampling"]}
        guided = [base.generate(x, logits_processor=[bench.processor], **options) for x in shortest]
        results[0]["laws"] = expected_acceptance(
            base, arm.model, small, guided, [x.shape[1] for x in shortest], args.alpha
        )
        for name, rate in results[0]["laws"].items():
            print(f"{rate:.2f}  {name}")
    for result in results:
        # Guidance adds a pass of the reward model and the product to each token.
        result["cost"] = result["guided_to_unguided"][0] - 1
    print(table(results))
    add_record(args.output, __file__, results)
    if args.plot and args.output:
        records = json.loads(args.output.read_text(encoding="utf-8"))
        plot([row for record in records for row in record["results"]], args.plot)


def table(results: list[dict]) -> str:
    """Returns the table that is printed."""
    head = ["base", "prompt", "mode", "drafts", "accepted", "tokens per base pass", "reward passes per token"]
    head += ["guided / unguided", "drafted / guided", "drafted / unguided", "assisted unguided / unguided"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in results:
        base = f"simulated, {row['simulated']} times" if "simulated" in row else "SmolLM2-135M"
        cells = [base, str(row["prompt_tokens"]), row["mode"], f"{row['drafts']:.1f}", f"{row['acceptance']:.2f}"]
        names = ("tokens_per_base_pass", "reward_passes_per_token", "guided_to_unguided", "drafted_to_guided")
        cells += [cell(row.get(x)) for x in (*names, "drafted_to_unguided", "assisted_to_unguided")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
