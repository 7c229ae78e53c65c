"""
How far sampling token by token is from the optimum over whole texts, on languages that can be written out.

    python -m examples.benchmarks.token_law

Guided decoding normalises at each token. The optimum of `E[r] - β KL(π‖π_base)` normalises once per text; the two
differ by the weight Π Z_t. Base and reward model are random tables of next-token logits, for all texts of a few tokens.
Printed are, over the KL temperature β = β_r / α, the total variation distance between the two distributions of texts,
and which share of the optimum's gain over the base token-level sampling has; medians with their range over languages.
"""

import argparse
from itertools import product
from pathlib import Path

import torch

from examples.benchmarks.measuring import cell, save_over_logs, spread
from examples.small import output_file, sized
from hf_genarm.functional import guided_log_probs

BETA_R = 0.05


def random_tables(n_tokens: int, length: int, scale: float, generator: torch.Generator) -> list[torch.Tensor]:
    """Returns tables of the next-token logits after each prefix, one table per length of the prefix."""
    return [scale * torch.randn(n_tokens**at, n_tokens, generator=generator) for at in range(length)]


def text_log_probs(tables: list[torch.Tensor], n_tokens: int) -> torch.Tensor:
    """Returns the log-probabilities of all texts."""
    total = torch.zeros(1)
    for table in tables:  # texts in the order of `product`: each prefix is followed by every token
        total = (total[:, None] + table.log_softmax(-1)).flatten()
    assert len(total) == len(list(product(range(n_tokens), repeat=len(tables))))
    return total


def compare(alpha: float, base: list[torch.Tensor], arm: list[torch.Tensor], n_tokens: int) -> tuple[float, float]:
    """Returns the distance from the optimum, and the share of its gain, for one language."""
    guided = [
        guided_log_probs(scores, [logits.log_softmax(-1)], [alpha]) for scores, logits in zip(base, arm, strict=True)
    ]
    guided_texts, base_texts, reward = (text_log_probs(x, n_tokens) for x in (guided, base, arm))
    optimum = (base_texts + alpha * reward).log_softmax(0)

    def objective(log_probs: torch.Tensor) -> float:
        """Returns E[r] - β KL(π‖π_base) with r = β_r log π_r, divided by β."""
        return float((log_probs.exp() * (alpha * reward - (log_probs - base_texts))).sum())

    distance = 0.5 * float((guided_texts.exp() - optimum.exp()).abs().sum())
    gain = (objective(guided_texts) - objective(base_texts)) / (objective(optimum) - objective(base_texts))
    return distance, gain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--languages", type=int, default=sized(50, 3))
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1.5, help="standard deviation of the logits")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=output_file, help="PNG file")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    sizes = (args.tokens, args.length, args.scale, generator)
    pairs = [(random_tables(*sizes), random_tables(*sizes)) for _ in range(args.languages)]
    print("alpha   beta    total variation      share of the optimum's gain")
    rows = []
    for alpha in args.alphas:
        distances, gains = zip(*(compare(alpha, base, arm, args.tokens) for base, arm in pairs), strict=True)
        rows.append((BETA_R / alpha, spread(list(distances)), spread(list(gains))))
        print(f"{alpha:5.2f}   {BETA_R / alpha:.3f}   {cell(rows[-1][1])}    {cell(rows[-1][2])}")
    if args.plot:
        plot(rows, args.plot)


def plot(rows: list, path: Path) -> None:
    """Plots both numbers over β."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), dpi=130)
    betas = [beta for beta, *_ in rows]
    for index, (name, colour) in enumerate((("total variation distance", "#d95f02"), ("share of the gain", "#1f77b4"))):
        medians, lows, highs = zip(*(row[1 + index] for row in rows), strict=True)
        axis.plot(betas, medians, "o-", color=colour, label=name)
        axis.fill_between(betas, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axis.set(xscale="log", xlabel="KL temperature β = β_r / α", ylim=(0, 1.02))
    axis.set_title("Sampling token by token against the optimum over whole texts")
    save_over_logs(figure, axis, betas, path)


if __name__ == "__main__":
    main()
