"""
Sequential Monte Carlo against the optimum over whole texts, on languages that can be written out.

    python -m examples.benchmarks.sequence_law

Base and reward model are tiny Llamas with random weights. A language is all texts of at most a few tokens, where one
token ends a text. Printed are, over the number of particles N, the total variation distance between the distribution of
texts and the optimum, for SMC and for the best of N texts of the base by the same reward, and the ratio of the
estimate of Z to Z; means over languages. At N = 1, SMC is guided sampling token by token. The distances of SMC are
lower estimates, since one half of the runs decides which texts are too likely; those of the best of N are exact.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from examples.benchmarks.measuring import add_record, save_over_logs
from examples.small import output_file, sized
from hf_genarm import GenARMLogitsProcessor, SMCOutput, smc_sample

PROMPT, PAD, EOS = [3, 4], 0, 1
ROWS_AT_ONCE = 16_384


def random_model(seed: int, n_tokens: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": n_tokens, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.4)).eval()


class Language:
    """
    All texts of a base and a reward model, with their probabilities and rewards.

    Args:
        base, arm ([`~transformers.PreTrainedModel`]):
            The base and the reward model.
        alpha (`float`):
            The strength.
        length (`int`):
            The longest text.
        temperature (`float`), top_k (`int`):
            The options of `generate`.

    Attributes:
        texts (list of list of `int`):
            All texts, padded.
        target (`torch.Tensor` of shape `(n_texts,)`):
            Unnormalised log-probabilities of the optimum; `log_z` normalises them.
        token_law, base_law (`torch.Tensor` of shape `(n_texts,)`):
            Log-probabilities of the texts when sampled token by token, and under the base.
        rewards (`torch.Tensor` of shape `(n_texts,)`):
            Log-probabilities under the reward model.
    """

    def __init__(self, base, arm, alpha: float, length: int, temperature: float = 1.0, top_k: int = 0):
        self.base, self.arm, self.alpha, self.length = base, arm, alpha, length
        self.options = {"temperature": temperature, "top_k": top_k}
        self.texts: list[list[int]] = []
        rows: list[Tensor] = []
        self._write([], torch.zeros(4, dtype=torch.float64), rows)
        self.target, self.token_law, self.base_law, self.rewards = torch.stack(rows).unbind(dim=1)
        self.log_z = self.target.logsumexp(dim=0)
        self._index = torch.full([base.config.vocab_size] * length, -1)
        for index, text in enumerate(self.texts):
            self._index[tuple(text)] = index

    def _write(self, text: list[int], sums: Tensor, rows: list[Tensor]) -> None:
        if len(text) == self.length or EOS in text:
            self.texts.append(text + [PAD] * (self.length - len(text)))
            rows.append(sums)
            return
        with torch.no_grad():
            ids = torch.tensor([PROMPT + text])
            base, arm = (model(ids).logits[0, -1].double().log_softmax(dim=-1) for model in (self.base, self.arm))
        factors = (base + self.alpha * arm) / self.options["temperature"]
        kept = factors.topk(self.options["top_k"] or len(factors)).indices
        guided = torch.full_like(factors, -torch.inf)
        guided[kept] = factors[kept].log_softmax(dim=-1)
        for token in kept.tolist():
            new = torch.stack([factors[token], guided[token], base[token], arm[token]])
            self._write([*text, token], sums + new, rows)

    def sample(self, n_runs: int, n_particles: int, processor=None, **options) -> SMCOutput:
        """Runs SMC for a batch of `n_runs` equal prompts."""
        ids = torch.tensor([PROMPT] * n_runs)
        processor = processor or GenARMLogitsProcessor(self.arm, self.alpha, base_model=self.base)
        options = (
            {"n_particles": n_particles, "max_new_tokens": self.length, "do_sample": True} | self.options | options
        )
        return self.base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=[processor],
            custom_generate=smc_sample,
            return_dict_in_generate=True,
            **options,
        )

    def distributions(self, output: SMCOutput) -> Tensor:
        """Returns the distribution of texts in each run, `(n_runs, n_texts)`: its particles with their weights."""
        written = output.particles[:, :, len(PROMPT) :]
        written = torch.nn.functional.pad(written, (0, self.length - written.shape[-1]), value=PAD)
        indices = self._index[tuple(written.unbind(dim=-1))]
        empty = torch.zeros(len(indices), len(self.texts), dtype=torch.float64)
        return empty.scatter_add_(1, indices, output.log_weights.double().exp())


def mean(values: Tensor) -> tuple[float, float]:
    """Returns the mean with its standard error."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def distance(distributions: Tensor, log_probs: Tensor) -> tuple[float, float]:
    """
    Returns the total variation distance from the mean of distributions `(n_runs, n_texts)` to another one, with its
    standard error. Each half of the runs decides which texts are too likely, and the other half measures by how much,
    so that noise does not count as distance.
    """
    target, halves = log_probs.exp(), distributions.chunk(2)
    parts = [
        (measured - target) @ (other.mean(dim=0) - target).sign() / 2 for other, measured in (halves, reversed(halves))
    ]
    return mean(torch.cat(parts))


def best_of_n(language: Language, n: int) -> Tensor:
    """Returns the log-probabilities of the text with the highest reward among n texts of the base."""
    order = language.rewards.argsort()
    below = language.base_law[order].exp().cumsum(dim=0).clamp(max=1.0) ** n
    best = torch.empty_like(below)
    best[order] = below.diff(prepend=below.new_zeros(1))
    return best.log()


def total_variation(log_probs: Tensor, others: Tensor) -> float:
    return 0.5 * float((log_probs.exp() - others.exp()).abs().sum())


def measure(language: Language, n_particles: int, n_runs: int, processor=None) -> dict[str, tuple[float, float]]:
    distributions, ratios = [], []
    while (n_left := n_runs - sum(map(len, distributions))) > 0:
        output = language.sample(min(n_left, max(ROWS_AT_ONCE // n_particles, 1)), n_particles, processor)
        distributions.append(language.distributions(output))
        ratios.append((output.log_z.double() - language.log_z).exp())
    optimum = language.target - language.log_z
    return {"smc": distance(torch.cat(distributions), optimum), "z": mean(torch.cat(ratios))}


def over_languages(values: list[tuple[float, float]]) -> list[float]:
    """Returns the mean with its 95 % interval."""
    centre = sum(x for x, _ in values) / len(values)
    error = 1.96 * sum(e**2 for _, e in values) ** 0.5 / len(values)
    return [centre, centre - error, centre + error]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--languages", type=int, default=sized(8, 2))
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--length", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--particles", type=int, nargs="+", default=sized([1, 2, 4, 8, 16, 32, 64], [1, 4]))
    parser.add_argument(
        "--texts", type=int, default=sized(40_000, 400), help="texts that are sampled for each number of particles"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_file, help="JSON file that the results are added to")
    parser.add_argument("--plot", type=output_file, help="PNG file")
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + 2 * args.languages, 2)
    models = [[random_model(seed + index, args.tokens) for index in (0, 1)] for seed in seeds]
    languages = [Language(*pair, args.alpha, args.length) for pair in models]
    torch.manual_seed(args.seed)
    optima = [language.target - language.log_z for language in languages]
    token_law = over_languages(
        [(total_variation(x.token_law, optimum), 0.0) for x, optimum in zip(languages, optima, strict=True)]
    )[0]
    print(f"{args.languages} languages; total variation of sampling token by token, exact: {token_law:.4f}")
    print("  N   SMC, total variation          best of N   estimate of Z / Z")
    results = []
    for n in args.particles:
        of_languages = [measure(language, n, max(args.texts // n, 2)) for language in languages]
        best = [(total_variation(best_of_n(x, n), y), 0.0) for x, y in zip(languages, optima, strict=True)]
        row = {"n": n, "best_of_n": over_languages(best)[0]}
        row |= {name: over_languages([x[name] for x in of_languages]) for name in ("smc", "z")}
        results.append(row)
        smc, z = ("{:.4f} [{:.4f}, {:.4f}]".format(*row[name]) for name in ("smc", "z"))
        print(f"{n:3d}   {smc}      {row['best_of_n']:.4f}      {z}")
    add_record(args.output, __file__, [{"token_law": token_law}, *results])
    if args.plot:
        plot(results, token_law, args.plot)


def plot(results: list[dict], token_law: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), dpi=130)
    numbers = [row["n"] for row in results]
    centres, lows, highs = zip(*(row["smc"] for row in results), strict=True)
    axis.axhline(token_law, color="#888888", linewidth=1, label="token by token (exact)")
    axis.plot(numbers, [token_law / n for n in numbers], ":", color="#1f77b4", label="falling as 1 / N")
    axis.plot(numbers, [row["best_of_n"] for row in results], "s-", color="#d95f02", label="best of N (exact)")
    axis.plot(numbers, centres, "o-", color="#1f77b4", label="SMC with N particles")
    axis.fill_between(numbers, lows, highs, color="#1f77b4", alpha=0.2, linewidth=0)
    axis.set(xscale="log", yscale="log", xlabel="texts written for each one that is returned, N")
    axis.set_title("Total variation distance to the optimum over whole texts")
    save_over_logs(figure, axis, numbers, path)


if __name__ == "__main__":
    main()
