"""
Writes the tables of measured numbers in README.md and `docs/`, from the result files of the benchmarks.

    python docs/.build/numbers.py
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BENCHMARKS = ROOT / "examples" / "benchmarks"
SENTIMENT = "arm-smollm2-135m-sentiment"
AT_SAME_KL = (
    "GenARM: DPO loss, ratio",
    "DPO, a training run per point",
    "GenARM: Eq. 5, Eq. 7 (the paper)",
)
INTEL = "Intel, 1 core"  # the processor of most of the decoding times
OF_SENTENCE = "Steering by a sentence"
ON_QWEN = f"{OF_SENTENCE}: Qwen2.5-Coder-0.5B-Instruct"
BLOCK = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def spread(values: list[float]) -> str:
    """A median with its range, or a mean with its interval."""
    middle, low, high = values
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table without the columns that have no cell."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    head, rows = [head[i] for i in kept], [[row[i] for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def report_on(section: str) -> str:
    """The report on reward against divergence, from the heading of a section to the end."""
    text = (BENCHMARKS / "frontier" / "RESULTS.md").read_text(encoding="utf-8")
    return text[text.index(f"\n## {section}\n") :]


def of_report(section: str, after: str) -> str:
    """The first table of a section that follows the words `after`."""
    text = report_on(section)
    text = text[text.index(after) :]
    text = text[text.index("\n|") + 1 :].split("\n\n")[0]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    return table(head, rows)


def matched_kl(section: str = "Sentiment") -> str:
    return of_report(section, "### Reward at matched divergence")


def matched_kl_and_base(section: str) -> str:
    base = re.search(r"^The base has \S+ \[.*?\]\.", report_on(section), re.MULTILINE)[0]
    return f"{base}\n\n{matched_kl(section)}"


def at_same_kl(section: str, kl: float) -> str:
    head, _, *rows = [line.strip("| ").split(" | ") for line in matched_kl(section).splitlines()]
    # The first column, the names of methods, has no heading.
    values = {row[0]: row[head.index(f"KL {kl:g}") + 1] for row in rows}
    ours, dpo, eq7 = (values[name] for name in AT_SAME_KL)
    return (
        f"one adapter, with the base as reference {ours}; DPO, trained for it {dpo}; "
        f"without a reference (Eq. 7 of the paper) {eq7}"
    )


def differences(section: str = "Sentiment") -> str:
    return of_report(section, "Differences, paired")


def other_tokens() -> str:
    """The sentiment and the divergence of answers of another family, by strength."""
    cells = [[f"{row['alpha']:g}", spread(row["sentiment"]), spread(row["kl"])] for row in runs("strings")["answers"]]
    return table(["α", "sentiment", "KL per answer, nats"], cells)


def other_tokens_cost() -> str:
    """The time that rewards of strings take per token."""
    spent = runs("strings")["cost"]
    rows = [
        ["time per token, over that of the base", spread(spent["over_base"])],
        ["what guidance adds, over that with the tokens of the reward model", spread(spent["over_own_tokens"])],
    ]
    return table([f"SmolLM2-135M on Qwen2.5-Coder-0.5B, {processor(spent)}", ""], rows)


def runs(name: str) -> Any:
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


def processor(run: dict) -> str:
    """The maker of the processor that a run was made on, and how many of its cores."""
    machine = run["machine"]
    maker = "AMD" if "AMD" in machine["cpu"] else "Intel"
    return f"{maker}, {machine['threads']} core{'s' * (machine['threads'] > 1)}"


def decode_times() -> dict[tuple[str, bool, int, int], dict[str, str]]:
    """
    The times per token of each engine.

    The keys are: the processor, whether adapters are on all linear layers, the batch size, and the number of adapters.
    Times over the unguided base with the matrix products of joint passes are named `same …`; only processors of AMD
    have them.
    """
    return {  # later runs had more rounds
        (processor(run), "--targets all" in run["command"], result["batch_size"], result["adapters"]): {
            engine: spread(time)
            for engine, time in (
                *result["time"].items(),
                *((f"same {engine}", time) for engine, time in result.get("time_over_same_products", {}).items()),
            )
        }
        for run in runs("decode_cost")
        for result in run["results"]
        if "adapters" in result
    }


def decode_cost() -> str:
    times = decode_times()
    columns = {
        "same fused": "fused, same products",
        "same rows": "unguided, with as many rows, same products",
        "fused": "fused",
        "shared": "shared",
        "separate": "separate",
        "rows": "unguided, with as many rows",
    }
    columns = {name: head for name, head in columns.items() if any(name in cells for cells in times.values())}
    return table(
        ["processor", "batch", "reward models", *columns.values()],
        [
            [maker, f"{batch_size}{', all linear layers' * of_all}", str(n), *(cells.get(x, "") for x in columns)]
            for (maker, of_all, batch_size, n), cells in sorted(
                times.items(), key=lambda row: (row[0][0] != INTEL, row)
            )
        ],
    )


def sentence_cost() -> str:
    """The times per token of the base with sentences, over the base alone and over as many unguided rows."""
    results = [(processor(run), x) for run in runs("decode_cost") for x in run["results"] if "sentences" in x]
    heads = {"unguided": "over unguided", "rows": "over unguided with as many rows"}
    return table(
        ["processor", "sentences", *heads.values()],
        [[maker, str(x["sentences"]), *(spread(x["time_over"][name]) for name in heads)] for maker, x in results],
    )


def cost() -> str:
    """The few rows of `decode_cost` that answer what guidance costs."""
    times = decode_times()
    rows = [
        ["a LoRA adapter on the base, one text at a time", times[INTEL, False, 1, 1]["fused"]],
        ["the same, 16 texts at a time", times[INTEL, False, 16, 1]["fused"]],
        ["four of them, one text at a time", times[INTEL, False, 1, 4]["fused"]],
        ["a separate model as large as the base", times[INTEL, False, 1, 1]["separate"]],
    ]
    return table(["reward model, on one core of an Intel Xeon", "time per token, over unguided"], rows)


def train_cost() -> str:
    (run,) = runs("train_cost")
    return table(
        ["tokens, prompt + response", "speed", "peak memory"],
        [
            [
                result["shape"].replace("+", " + "),
                spread(result["speed"]["one row"]),
                f"{result['memory_mb']['one row'] / result['memory_mb']['naive']:.2f}",
            ]
            for result in run["results"]
        ],
    )


def effects(card: str) -> dict[str, str]:
    """The effect of an adapter on generated text at each strength, read from its card."""
    return dict(re.findall(r"^\| (unguided|α = [\d.]+) \| (\S+ \[.*?\]) \|", card, re.MULTILINE))


def headline() -> str:
    card = (ROOT / "model_cards" / SENTIMENT / "README.md").read_text(encoding="utf-8")
    effect, control = effects(card), re.search(r"only sharpens the base: (\S+ \[.*?\])", card)[1]
    pairs = json.loads((ROOT / "model_cards" / SENTIMENT / "genarm_config.json").read_text(encoding="utf-8"))["metrics"]
    learned = spread([pairs[f"contrast_accuracy{end}"] for end in ("", "_low", "_high")])
    times = decode_times()[INTEL, False, 1, 1]
    train = runs("train_cost")[0]["results"][0]
    make = f"`python -m model_cards.make_sentiment` ([card](model_cards/{SENTIMENT}/README.md))"
    return table(
        ["", "", "command"],
        [
            [
                "reward (sentiment) at the same KL from the base, 8 nats per answer",
                f"{at_same_kl('Sentiment', 8)} ([results](docs/results.md))",
                "`python -m examples.benchmarks.frontier.run`",
            ],
            [
                "detoxification (probability of no toxicity) at the same KL, 1.5 nats",
                f"{at_same_kl('Detoxification', 1.5)} ([results](docs/results.md#detoxification))",
                "the same, `--only detox`",
            ],
            [
                "sentiment of Qwen2.5-Coder-0.5B-Instruct, whose tokens are other strings",
                f"{on_qwen()} ([results](docs/results.md#steering-by-a-sentence))",
                "the same, `--only sentences_on_base`",
            ],
            [
                "sentiment (VADER, −1 to 1) of answers on topics that the reward model never saw",
                f"unguided {effect['unguided']}, guided at α = 1 without a reference {effect['α = 1.0']}, "
                f"control (guided by an untrained adapter) {control}",
                make,
            ],
            [
                "accuracy on held-out pairs of what was learned (adapter minus base)",
                f"{learned}; of length alone {pairs['shorter_accuracy']:.2f}",
                "the same",
            ],
            [
                "time per token over unguided, batch 1, LoRA reward model",
                f"{times['fused']}; two unguided rows {times['rows']} ([on AMD](docs/speed.md#what-it-costs))",
                "`python -m examples.benchmarks.decode_cost`",
            ],
            [
                f"training step, over TRL's `CPOTrainer` ({train['shape'].replace('+', ' + ')} tokens)",
                f"{spread(train['speed']['one row'])} times as fast, "
                f"{train['memory_mb']['one row'] / train['memory_mb']['naive']:.2f} of the memory",
                "`python -m examples.benchmarks.train_cost`",
            ],
        ],
    )


def on_qwen() -> str:
    """The sentiment of answers of Qwen, unguided and by what steers it."""
    rows = (line.split(" | ") for line in of_report(ON_QWEN, "### Every setting").splitlines())
    rewards = {(method.strip("| "), strength): reward for method, strength, reward, *_ in rows}
    names = {
        "unguided": ("base", ""),
        "prompted with a sentence": ("a sentence", "α = 1"),
        "steered by it at α = 3": ("a sentence", "α = 3"),
        "by the SmolLM2-135M adapter at α = 1": ("the published adapter", "α = 1"),
    }
    return ", ".join(f"{name} {rewards[key]}" for name, key in names.items())


def capability() -> str:
    report = json.loads((BENCHMARKS / "capability.json").read_text(encoding="utf-8"))
    rows = [["", "chance", f"{report['chance']:.3f}", ""]]
    for row in report["rows"]:
        change = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["change"]) if row["alpha"] else ""
        accuracy = "{:.3f} [{:.3f}, {:.3f}]".format(*row["accuracy"])
        form = "the base as reference" if row["reference"] else "no reference (Eq. 7)"
        rows.append([f"{row['alpha']:g}", form if row["alpha"] else "unguided", accuracy, change])
    return table(["α", "steered by", "accuracy", "minus unguided, paired"], rows)


def sequence_law() -> str:
    first, *rows = runs("sequence_law")[0]["results"]
    cells = [
        [str(row["n"]), f"{row['smc'][0]:.3f} [{row['smc'][1]:.3f}, {row['smc'][2]:.3f}]", f"{row['best_of_n']:.2f}"]
        for row in rows
    ]
    return table(
        ["N", "distance of N particles", "distance of the best of N"],
        [["token by token", f"{first['token_law']:.2f}", ""], *cells],
    )


def answers() -> str:
    """One question, and three answers of each kind."""
    report = json.loads((ROOT / "examples" / "answers.json").read_text(encoding="utf-8"))
    sentence, adapter = (f"{report['strengths'][name]:g}" for name in ("sentence", "adapter"))
    head = [
        "unguided",
        f"with the sentence *{report['sentence']}* at α = {sentence}",
        f"with an adapter for positive sentiment, trained on 333 pairs, at α = {adapter}",
    ]
    columns = [report["answers"][kind] for kind in ("unguided", "sentence", "adapter")]
    return table(head, [list(row) for row in zip(*columns, strict=True)])


def speculation() -> str:
    rows = []
    for run in runs("speculation"):
        for result in run["results"]:
            base = (
                f"simulated, {result['simulated']} times the reward model" if "simulated" in result else "SmolLM2-135M"
            )
            cells = [f"{result['acceptance']:.2f}", spread(result["tokens_per_base_pass"])]
            ratios = ("guided_to_unguided", "drafted_to_guided", "drafted_to_unguided")
            cells += [spread(result[ratio]) for ratio in ratios]
            rows.append([base, str(result["prompt_tokens"]), result["mode"], *cells])
    head = ["base", "prompt", "", "drafts accepted", "tokens per base pass"]
    return table([*head, "guided / unguided", "drafted / guided", "drafted / unguided"], rows)


def serving() -> str:
    names = ("guided_over_unguided", "ideal", "of_ideal")
    rows = [
        [
            processor(run).split(",")[0],
            "pages" if "of_ideal_with_the_cost_of_pages" in row else "a slot for each text",
            str(row["requests"]),
            *(spread(row[name]) for name in names),
        ]
        for run in runs("serving")
        for row in run["results"]
    ]
    head = ["processor", "keys and values in", "requests at once"]
    return table([*head, "guided / unguided throughput", "ideal", "share of the ideal"], rows)


def training_defaults() -> str:
    rows = [row for run in runs("training_defaults") for row in run["results"]]
    names = {"words": "one word", "sentiment": "a sentence"}
    return table(
        [
            "model",
            "pairs",
            "answers of",
            "steps",
            "learning rate",
            "held-out pairs right",
            "apart",
            "chosen",
            "KL at α = 1",
        ],
        [
            [
                row["model"].removesuffix("-Instruct"),
                str(row["pairs"]),
                names[row["data"]],
                str(row["steps"]),
                f"{row['learning_rate']:.1e}".replace("e-0", "e-"),
                spread(row["accuracy"]),
                f"{row['nats_apart']:.1f}",
                f"{row['nats_of_chosen']:+.1f}".replace("-", "−"),
                f"{row['kl_guided'][0]:.1f}" if "kl_guided" in row else "",
            ]
            for row in sorted(rows, key=lambda x: (-len(x["model"]), x["data"], x["pairs"], x["learning_rate"]))
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "answers": answers,
    "capability": capability,
    "cost": cost,
    "decode_cost": decode_cost,
    "sentence_cost": sentence_cost,
    "train_cost": train_cost,
    "differences": differences,
    "differences_detox": partial(differences, "Detoxification"),
    "headline": headline,
    "judges": partial(of_report, "Harmlessness", "### Judges"),
    "matched_kl": matched_kl,
    "other_tokens": other_tokens,
    "other_tokens_cost": other_tokens_cost,
    "matched_kl_harmlessness": partial(matched_kl_and_base, "Harmlessness"),
    "sentence": partial(of_report, OF_SENTENCE, "### For positive answers, by strength"),
    "sentence_and_adapter": partial(of_report, OF_SENTENCE, "### A sentence or an adapter"),
    "sentence_brevity": partial(of_report, OF_SENTENCE, "### For short answers, by strength"),
    "sentence_differences": partial(differences, OF_SENTENCE),
    "sentence_differences_on_qwen": partial(differences, ON_QWEN),
    "sentence_on_qwen": partial(of_report, ON_QWEN, "### For positive answers, by strength"),
    "sentence_and_adapter_on_qwen": partial(of_report, ON_QWEN, "### A sentence or an adapter"),
    "sentence_brevity_on_qwen": partial(of_report, ON_QWEN, "### For short answers, by strength"),
    "sequence_law": sequence_law,
    "serving": serving,
    "speculation": speculation,
    "training_defaults": training_defaults,
    "two_objectives": partial(of_report, "Two objectives", "Hypervolume"),
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The text of a page, with the tables that the result files give."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def main() -> None:
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
