"""
Finds out how to steer with a reward model: strength, reference and temperature, on held-out prompts.

    hf-genarm tune --arm my-arm --prompts prompts.jsonl --scorer my_scorer:reward --max_kl 20

Samples one answer to each prompt at each setting, measures reward, divergence from the base and perplexity under the
base, and recommends the setting with the highest mean reward whose mean divergence is at most `--max_kl` nats per
answer, if that is above the reward of the base alone. The setting and what was measured are written into
`genarm_config.json` and the card of `--arm`, if that is a folder, or else into `--output_dir`. What was sampled is kept
there, and not sampled again.
"""

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..decoding.processor import GenARMLogitsProcessor
from ..decoding.recommended import base_reference
from ..demo import DEMO_MODEL_ID, demo_model
from ..files import make_output_dir
from ..hub.card import reward_model_card
from ..hub.compatibility import tokenizers_to_align
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
from .judge import Judge
from .pairs import load_prompts, public_name
from .plots import plot_settings
from .prompts import last_text
from .scorer import load_scorer, scores_of
from .sweep import Answers, Setting, Sweep, base_id, fingerprint


@dataclass
class TuneArguments:
    """What to tune, on what, and within which limits."""

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
    base: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model to steer. Defaults to that of the adapter."}
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
    seed: int = field(default=0, metadata={"help": "Of the answers and of the intervals."})
    output_dir: str = field(default="tuning", metadata={"help": "Folder of the answers and of the report."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code from the Hub."})

    def __post_init__(self) -> None:
        if (self.scorer is None) == (self.pairs is None):
            raise ValueError(
                f"`scorer` is {self.scorer!r} and `pairs` is {self.pairs!r}, but one of them says what a good answer "
                "is: a function, or pairs that the reward model has not seen. Give one."
            )
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("n_examples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least {least}.")
        if self.max_prompts < 2:
            raise ValueError(f"`max_prompts` is {self.max_prompts}, but intervals take at least 2 prompts.")
        for name in ("alpha", "temperature"):
            if not all(0 < value < float("inf") for value in getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be positive numbers.")
        if not self.max_kl > 0:
            raise ValueError(f"`max_kl` is {self.max_kl}, but a divergence is positive.")


ARGUMENTS = (TuneArguments,)


def main(args: TuneArguments) -> None:
    make_output_dir(args.output_dir)
    target = Path(args.arm if Path(args.arm).is_dir() else args.output_dir)
    if not os.access(target, os.W_OK):
        raise ValueError(f"`{target}` can't be written to, where the recommended setting goes. Copy it, and tune that.")
    judge = None if args.pairs is None else Judge(args.pairs, Path(args.output_dir, "judge"))
    scorer = None if args.scorer is None else load_scorer(args.scorer)
    prompts = load_prompts(args.prompts, args.prompts_split)[: args.max_prompts]
    if len(prompts) < 2:
        raise ValueError(f"`{args.prompts}` has {len(prompts)} prompt, but intervals take at least 2.")
    model, tokenizer = load_base(args, has_chats=not isinstance(prompts[0], str))
    arm = AutoregressiveRewardModel.from_pretrained(args.arm, model, trust_remote_code=args.trust_remote_code)

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
    print("Its reward less that of the base, paired: {:+.2f} [{:+.2f}, {:+.2f}]".format(*gain))
    if gain[1] <= 0:
        print(
            "Nothing is recommended, as it can't be told from the base alone. Raise `--max_kl`, take more prompts, or "
            "train on more pairs."
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
        print(f"It is what `from_pretrained({args.arm!r})` uses from now on: {files} say so.")
    else:
        print(f"Upload {files} to `{args.arm}`, and it is what `from_pretrained` uses.")


def load_base(args: TuneArguments, has_chats: bool) -> tuple[Any, Any]:
    """
    The model to be steered and its tokenizer.

    Raises:
        ValueError: if there is none, or it can't write chats.
    """
    name = args.base
    if name is None:
        try:
            name = PeftConfig.from_pretrained(args.arm).base_model_name_or_path
        except ValueError as error:
            raise ValueError(f"`{args.arm}` is no adapter, which would name its base. Give it: `--base`.") from error
    path_or_id = demo_model() if name == DEMO_MODEL_ID else str(name)
    options: Any = {"trust_remote_code": args.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, padding_side="left", **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{name}` can't be loaded. Name the model to steer: `--base`. {error}") from error
    if has_chats and tokenizer.chat_template is None:
        raise ValueError(f"The prompts are messages, but `{name}` has no chat template. Give texts.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(path_or_id, **options)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def make_processor(
    name: str, arm: AutoregressiveRewardModel, model: Any, tokenizer: Any, reference: str
) -> GenARMLogitsProcessor:
    to_align = tokenizers_to_align([arm], [name], model, tokenizer)
    return GenARMLogitsProcessor(
        arm,
        base_model=model,
        reference=base_reference([arm], [name], model, to_align) if reference == "base" else None,
        tokenizer=tokenizer,
        reward_tokenizer=to_align,
    )


def statistics(answers: Answers, rewards: np.ndarray, seed: int) -> dict[str, list[float]]:
    """Mean reward, mean divergence, and perplexity of all tokens under the base, each with its 95 % interval."""
    surprise, n_tokens = -np.array(answers.base_log_prob), np.array(answers.n_tokens)
    draws = _resampled(len(rewards), seed)
    perplexities = np.exp(surprise[draws].sum(axis=1) / n_tokens[draws].sum(axis=1))
    perplexity = [float(np.exp(surprise.sum() / n_tokens.sum())), *np.quantile(perplexities, [0.025, 0.975]).tolist()]
    return {
        "reward": interval_of_mean(rewards, seed),
        "kl": interval_of_mean(np.array(answers.kl), seed),
        "perplexity": perplexity,
    }


def interval_of_mean(values: np.ndarray, seed: int) -> list[float]:
    """Mean, and its 95 % bootstrap interval over prompts."""
    means = values[_resampled(len(values), seed)].mean(axis=1)
    return [float(values.mean()), *np.quantile(means, [0.025, 0.975]).tolist()]


def _resampled(n: int, seed: int, n_resamples: int = 2_000) -> np.ndarray:
    """The same prompts for every setting."""
    return np.random.default_rng(seed).integers(n, size=(n_resamples, n))


def choose(rows: list[dict[str, Any]], max_kl: float) -> int:
    """
    Index of the guided setting with the highest mean reward whose mean divergence is at most `max_kl`.

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
    """The settings, to be read."""
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
    """Brings `genarm_config.json` and the card up to date; of a reward model on the Hub, copies of them."""
    info.save(folder)
    card = download(arm) / "README.md"
    if card.exists():
        text = with_recommendation(card.read_text(encoding="utf-8"), recommendation(info))
        widget = shown_on_the_hub(info)
        if widget or text.startswith("---\n"):  # what has no metadata and needs none stays as it is
            changed = ModelCard(text)
            changed.data["widget"] = widget
            text = str(changed)
        (folder / "README.md").write_text(text, encoding="utf-8")
    else:
        reward_model_card(info, Path(arm).name, arm, is_adapter).save(folder / "README.md")
