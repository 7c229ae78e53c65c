"""What the choices in training an ARM do, with everything else as it is in the headline."""

from functools import partial

from bench import Bench, Step
from intervals import cell
from judges import judge, n_words, oracle, read, second_judge
from methods import GENARM, NORMALISED, choose, guided, mean
from prompts import dev_prompts, sentiment_pairs
from report import table
from settings import VARIANTS
from training import train_arm


def steps(bench: Bench) -> list[Step]:
    size, work = bench.size, []
    for key, (_, objective, share) in VARIANTS.items():
        n_pairs = int(share * size.n_pairs)
        train = partial(train_arm, bench, sentiment_pairs(n_pairs), **objective)

        def method(key=key):
            alpha = choose(bench, GENARM)
            return guided(bench, f"arm-{key}", alpha=alpha), {"α": alpha}

        work.append(bench.training(f"arm-{key}", 0.6 * n_pairs * size.n_epochs, train))
        work.append(bench.sampling(f"dev-ablation-{key}", dev_prompts(size.n_dev_prompts), method, GENARM.cost))
    return work


def section(bench: Bench) -> str:
    default = bench.answers(GENARM.dev_cell(choose(bench, GENARM)))
    runs = {"as in the headline": default}
    runs["length-normalised, β_r = 2"] = bench.answers(NORMALISED.dev_cell(choose(bench, GENARM)))
    runs |= {name: bench.answers(f"dev-ablation-{key}") for key, (name, _, _) in VARIANTS.items()}
    rows = []
    for name, answers in runs.items():
        reward = mean(judge(oracle, answers))
        rows.append(
            [
                name,
                cell(reward),
                "" if answers is default else cell(reward - mean(judge(oracle, default))),
                cell(mean(judge(second_judge, answers))),
                cell(mean(read("kl", answers)), 1),
                cell(mean(judge(n_words, answers)), 1),
            ]
        )
    return "\n\n".join(
        [
            "## Ablations",
            f"The ARM of seed 0, one thing changed at a time, at α = {choose(bench, GENARM):g} on the "
            f"{bench.size.n_dev_prompts} dev prompts. Fewer pairs are also fewer steps.",
            table(["", "oracle", "less the first row", "second judge", "KL per answer, nats", "words"], rows),
        ]
    )
