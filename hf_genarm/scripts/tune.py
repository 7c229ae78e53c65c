"""
Finds the strength, reference and temperature to steer with, on held-out prompts.

    hf-genarm tune --arm my-arm --prompts prompts.jsonl --scorer my_scorer:reward --max_kl 20

Samples one answer to each prompt at each setting, measures reward, divergence from the base and perplexity under the
base, and recommends the setting with the highest mean reward whose mean divergence is at most `--max_kl` nats per
answer, if that is above the reward of the base alone. The setting and what was measured are written into
`genarm_config.json` and the card of `--arm`, if that is a folder, or else into `--output_dir`. Sampled answers are kept
there, and are not sampled again.
"""

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard
from peft import PeftModel
from tqdm import tqdm

from ..arguments import refuse_no_seed
from ..bootstrap import interval, mean_with_interval, resampled_means
from ..decoding.assembly import assemble
from ..decoding.processor import GenARMLogitsProcessor
from ..decoding.recommended import base_reference
from ..files import make_output_dir
from ..hub.card import reward_model_card
from ..hub.info import INFO_NAME, RewardInfo
from ..hub.loading import download
from ..hub.recommendation import (
    MEASURES,
    PICTURE,
    described,
    recommendation,
    shown_on_the_hub,
    with_recommendation,
)
from ..hub.reward_model import AutoregressiveRewardModel
from .guided_model import BaseArguments
from .judge import Judge
from .pairs import load_prompts, public_name
from .plots import plot_settings
from .prompts import last_text
from .scorer import load_scorer, scores_of
from .sweep import Answers, Setting, Sweep, base_id, fingerprint


@dataclass
class TuneArguments(BaseArguments):
    """Chooses what to tune, on which prompts, and within which limits."""

    arm: str = field(metadata={"help": "Hub id or folder of a reward model."})
    prompts: str = field(
        metadata={"help": "Hub id, folder or file (JSONL, CSV, …) with a column `prompt` of texts or messages."}
    )
    scorer: str | None = field(
        default=None,
        metadata={
            "help": "`module:function`, a reward function as TRL's GRPOTrainer takes it: of `prompts` and "
            "`completions`, one number for each."
        },
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a scorer, preference pairs that the reward model has not seen: a judge is trained on "
            "them. A reward model can't be its own judge."
        },
    )
    prompts_split: str = field(default="train", metadata={"help": "Split of the prompts. A file has this one only."})
    max_kl: float = field(
        default=20.0, metadata={"help": "Largest mean divergence from the base that is recommended, nats per answer."}
    )
    alpha: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0], metadata={"help": "Strengths to try."}
    )
    reference: list[str] | None = field(
        default=None,
        metadata={
            "help": "References to try: 'none' (Eq. 7) and 'base'. Defaults to both for an adapter.",
            "choices": ["none", "base"],
        },
    )
    temperature: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "Temperatures to try."})
    max_prompts: int = field(default=64, metadata={"help": "Take the first different prompts only."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer."})
    n_examples: int = field(
        default=0, metadata={"help": "Answers at the recommended setting that the card shows, evenly from all prompts."}
    )
    batch_size: int = field(default=32, metadata={"help": "Answers that are written at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the answers and of the intervals."})
    output_dir: str = field(default="tuning", metadata={"help": "Folder of the answers and of the report."})

    def __post_init__(self) -> None:
        if (self.scorer is None) == (self.pairs is None):
            raise ValueError(
                f"`scorer` is {self.scorer!r} and `pairs` is {self.pairs!r}, but one of them defines what a good "
                "answer is: a function, or pairs that the reward model has not seen. Give one."
            )
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("n_examples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least {least}.")
        refuse_no_seed(self.seed)
        if self.max_prompts < 2:
            raise ValueError(f"`max_prompts` is {self.max_prompts}, but intervals need at least 2 prompts.")
        for name in ("alpha", "temperature"):
            if not all(0 < value < float("inf") for value in getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be positive numbers.")
        if not self.max_kl > 0:
            raise ValueError(f"`max_kl` is {self.max_kl}, but a divergence is positive.")


ARGUMENTS = (TuneArguments,)
N_RESAMPLES = 2_000


def main(args: TuneArguments) -> None:
    make_output_dir(args.output_dir)
    target = Path(args.arm if Path(args.arm).is_dir() else args.output_dir)
    if not os.access(target, os.W_OK):
        raise ValueError(
            f"`{target}` can't be written to, but the setting goes there. Copy the folder, and tune the copy."
        )
    judge = None if args.pairs is None else Judge(args.pairs, Path(args.output_dir, "judge"))
    scorer = None if args.scorer is None else load_scorer(args.scorer)
    prompts = load_prompts(args.prompts, args.prompts_split)[: args.max_prompts]
    if len(prompts) < 2:
        raise ValueError(f"`{args.prompts}` has {len(prompts)} prompt, but intervals need at least 2.")
    base = args.load([args.arm])
    model, tokenizer = base.model, base.tokenizer
    if not isinstance(prompts[0], str) and tokenizer.chat_template is None:
        raise ValueError(f"The prompts are messages, but `{base.name}` has no chat template. Give texts.")
    arm = AutoregressiveRewardModel.from_pretrained(
        args.arm, model, base_tokenizer=tokenizer, trust_remote_code=args.trust_remote_code
    )

    scored_by = f"`{args.scorer}`"
    if judge is not None:
        judging = judge.train(model, tokenizer, base_id(model))
        scorer, scored_by = judging.as_reward_func(args.batch_size), judge.described(judging)
    assert scorer is not None

    references = args.reference or (["base", "none"] if isinstance(arm.model, PeftModel) else ["none"])
    processors = {x: make_processor(args.arm, arm, model, tokenizer, x) for x in references}
    temperatures = sorted(set(args.temperature) | {1.0}, reverse=True)
    settings = [Setting(0.0, None, x) for x in temperatures]
    settings += [
        Setting(alpha, None if reference == "none" else reference, temperature)
        for reference in references
        for temperature in args.temperature
        for alpha in sorted(set(args.alpha))
    ]
    folder = Path(args.output_dir, "answers")
    sweep = Sweep(model, tokenizer, prompts, folder, args.max_new_tokens, args.batch_size, args.seed)
    arm_id, measured = fingerprint(arm.model), []
    with tqdm(total=sweep.n_batches * len(settings), desc="Answering") as progress:
        for setting in settings:
            processor = processors[setting.reference or "none"] if setting.alpha else None
            answers = sweep(setting, processor, arm_id if processor else None, progress.update)
            measured.append((answers, scores_of(scorer, scored_by, prompts, answers.texts)))

    rows = [
        asdict(setting) | statistics(answers, rewards, args.seed)
        for setting, (answers, rewards) in zip(settings, measured, strict=True)
    ]
    picture = Path(args.output_dir, PICTURE)
    plot_settings(rows, args.max_kl, "reward", str(picture))
    print(table(rows))
    index = choose(rows, args.max_kl)
    gain = interval_of_mean(measured[index][1] - measured[0][1], args.seed)
    print(f"\n{described(rows[index])}: the highest reward at a KL of at most {args.max_kl:g} nats per answer.")
    print("Its reward minus that of the base, paired: {:+.2f} [{:+.2f}, {:+.2f}]".format(*gain))
    if gain[1] <= 0:
        print(
            "Nothing is recommended, because the gain over the base alone is not clearly above zero. Raise `--max_kl`, "
            "take more prompts, or train on more pairs."
        )
        return
    n_examples = min(args.n_examples, len(prompts))
    shown = np.linspace(0, len(prompts), n_examples, endpoint=False, dtype=int)
    arm.info.recommended = asdict(settings[index]) | {
        "measured": {
            "scorer": scored_by,
            "prompts": public_name(args.prompts),
            "n_prompts": len(prompts),
            "max_new_tokens": args.max_new_tokens,
            "max_kl": args.max_kl,
            "seed": args.seed,
            "settings": rows,
            "examples": [{"prompt": last_text(prompts[i]), "answer": measured[index][0].texts[i]} for i in shown],
        }
    }
    write(arm.info, args.arm, target, isinstance(arm.model, PeftModel))
    if picture.exists() and target != picture.parent:
        shutil.copy(picture, target)
    files = f"`{INFO_NAME}`, `README.md` and `{PICTURE}` in {target}"
    if Path(args.arm).is_dir():
        print(f"`from_pretrained({args.arm!r})` uses this setting from now on: it is written into {files}.")
    else:
        print(f"Upload {files} to `{args.arm}`, and `from_pretrained` uses this setting.")


def make_processor(
    name: str, arm: AutoregressiveRewardModel, model: Any, tokenizer: Any, reference: str
) -> GenARMLogitsProcessor:
    """Makes the processor of all settings with a reference, `"none"` or `"base"`."""
    parts = assemble([arm], [name], model, tokenizer, alpha=1.0, reference=None)
    if reference == "base":
        parts.reference = base_reference([arm], [name], model, parts.reward_tokenizer)
    return GenARMLogitsProcessor(**vars(parts))


def statistics(answers: Answers, rewards: np.ndarray, seed: int) -> dict[str, list[float]]:
    """Returns mean reward, mean divergence, and perplexity of all tokens under the base, with 95 % intervals."""
    surprise, n_tokens = -np.array(answers.base_log_prob), np.array(answers.n_tokens)
    means = resampled_means(np.stack([surprise, n_tokens], axis=1), N_RESAMPLES, seed)
    return {
        "reward": interval_of_mean(rewards, seed),
        "kl": interval_of_mean(np.array(answers.kl), seed),
        "perplexity": [float(np.exp(surprise.sum() / n_tokens.sum())), *interval(np.exp(means[:, 0] / means[:, 1]))],
    }


def interval_of_mean(values: np.ndarray, seed: int) -> list[float]:
    """Returns the mean over prompts, and its 95 % interval."""
    return list(mean_with_interval(values, N_RESAMPLES, seed))


def choose(rows: list[dict[str, Any]], max_kl: float) -> int:
    """
    Returns the index of the guided setting with the highest mean reward whose mean divergence is at most `max_kl`.

    Raises:
        ValueError: if there is none.
    """
    guided = [index for index, row in enumerate(rows) if row["alpha"]]
    within = [index for index in guided if rows[index]["kl"][0] <= max_kl]
    if not within:
        least = min(rows[index]["kl"][0] for index in guided)
        raise ValueError(
            f"No setting is within `max_kl` {max_kl:g}: the least divergence is {least:.1f} nats per answer. Try "
            "smaller strengths (`--alpha`), or raise `--max_kl`."
        )
    return max(within, key=lambda index: rows[index]["reward"][0])


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the settings and what was measured as a table of text."""
    lines = [f"\n  {'alpha':>6} {'reference':>9} {'temp.':>6}   {'reward':<22} {'KL per answer':<22} perplexity"]
    for row in rows:
        reference = (row["reference"] or "none") if row["alpha"] else ""
        reward, kl, perplexity = (
            "{:.{n}f} [{:.{n}f}, {:.{n}f}]".format(*row[name], n=n) for name, n in MEASURES.items()
        )
        lines.append(
            f"  {row['alpha']:>6g} {reference:>9} {row['temperature']:>6g}   {reward:<22} {kl:<22} {perplexity}"
        )
    return "\n".join(lines)


def write(info: RewardInfo, arm: str, folder: Path, is_adapter: bool) -> None:
    """Updates `genarm_config.json` and the card of a folder; for a reward model on the Hub, writes copies of them."""
    info.save(folder)
    card = download(arm) / "README.md"
    if card.exists():
        text = with_recommendation(card.read_text(encoding="utf-8"), recommendation(info))
        widget = shown_on_the_hub(info)
        if widget or text.startswith("---\n"):  # a card without metadata stays without, if there is nothing to add
            changed = ModelCard(text)
            changed.data["widget"] = widget
            text = str(changed)
        (folder / "README.md").write_text(text, encoding="utf-8")
    else:
        reward_model_card(info, Path(arm).name, arm, is_adapter).save(folder / "README.md")
