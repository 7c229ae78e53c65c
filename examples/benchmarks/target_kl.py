"""
Whether `target_kl` holds the divergence from the base, on SmolLM2-135M-Instruct with two shipped reward models.

    python -m examples.benchmarks.target_kl         # about 10 minutes on 2 cores

Answers to held-out prompts are sampled at temperature 1 under one seed. Printed is the mean divergence per token of the
guided from the unguided distributions, at strength 1, where it depends on the reward model, and with several targets;
with 95 % bootstrap intervals over prompts. Answers shorter than `--min-tokens` have too little to average, and are left
out.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from examples.benchmarks.measuring import add_place, load
from examples.pairs import held_out_prompts
from examples.quickstart import Steering
from examples.small import fitting_adapter, output_file, sized
from hf_genarm import GenARMLogitsProcessor
from hf_genarm.bootstrap import mean_with_interval
from hf_genarm.demo import demo_model

ROOT = Path(__file__).parent.parent.parent
NAMES = ("sentiment", "brevity")


def divergences(processor: GenARMLogitsProcessor, steer: Steering, min_tokens: int) -> list[np.ndarray]:
    """Returns the divergence at each token, including the end, for each answer that is long enough."""
    processor.keeps_statistics = True
    answers = steer.sample([processor])
    sequences = torch.cat([steer.inputs["input_ids"], answers], dim=1)
    columns = processor.statistics(sequences)
    texts: dict[int, list[float]] = {}
    ended: set[int] = set()
    for text, token, kl in zip(columns["sequence"], columns["token"], columns["kl"], strict=True):
        if text not in ended:
            texts.setdefault(text, []).append(kl)
        if token == steer.tokenizer.eos_token_id:
            ended.add(text)
    return [np.array(values) for values in texts.values() if len(values) >= min_tokens]


def plot(runs: dict[str, list[np.ndarray]], path: Path) -> None:
    """Plots the running mean of each text, for all texts of a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4 * len(runs), 3.6), dpi=130, sharey=True)
    for axis, (name, texts) in zip(axes, runs.items(), strict=True):
        for values in texts:
            axis.plot(np.cumsum(values) / np.arange(1, len(values) + 1), color="#1f77b4", alpha=0.2, linewidth=0.8)
        axis.set(xlabel="token", title=name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("KL per token so far, nats")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.1, 0.3, 0.6])
    parser.add_argument("--n-prompts", type=int, default=36)
    parser.add_argument("--min-tokens", type=int, default=sized(16, 1))
    parser.add_argument("--max-new-tokens", type=int, default=sized(48, 4))
    parser.add_argument("--seed", type=int, default=0)
    add_place(parser)
    parser.add_argument("--plot", type=output_file, help="PNG file")
    args = parser.parse_args()
    model = load(demo_model(), args)
    tokenizer = AutoTokenizer.from_pretrained(demo_model(), padding_side="left")
    steer = Steering(model, tokenizer, held_out_prompts(args.n_prompts), args.max_new_tokens, args.seed)
    steer.inputs = steer.inputs.to(args.device)
    runs: dict[str, list[np.ndarray]] = {}
    with tqdm(total=len(NAMES) * (1 + len(args.targets)), desc="Generating") as progress:
        for name in NAMES:
            folder = fitting_adapter(str(ROOT / "model_cards" / f"arm-smollm2-135m-{name}"))
            processor = GenARMLogitsProcessor.from_pretrained(folder, base_model=model)
            for target in (None, *args.targets):
                processor.target_kl = target
                setting = "α = 1" if target is None else f"target {target}"
                runs[f"{name}, {setting}"] = divergences(processor, steer, args.min_tokens)
                progress.update()
    print(f"\n{'':<24} texts  KL per token, nats       of one text, 5 % to 95 %")
    for name, texts in runs.items():
        means = np.array([values.mean() for values in texts])
        low, high = np.quantile(means, [0.05, 0.95])
        mean = "{:.3f} [{:.3f}, {:.3f}]".format(*mean_with_interval(means, seed=args.seed))
        print(f"{name:<24} {len(texts):5}  {mean}     {low:.3f} to {high:.3f}")
    if args.plot:
        shown = [f"{name}, {x}" for name in NAMES for x in ("α = 1", f"target {args.targets[:2][-1]}")]
        plot({name: runs[name] for name in shown}, args.plot)


if __name__ == "__main__":
    main()
