"""
Finds the strength, reference and temperature to steer with, on held-out prompts.

    hf-genarm tune --arm my-arm --prompts prompts.jsonl --scorer my_scorer:reward --max_kl 20

Samples one answer to each prompt at each setting, and measures reward, divergence from the base and perplexity under
the base. Of the settings that are fluent, those whose perplexity is at most `--max_perplexity` times that of unguided
text at temperature 1, and near the base, whose mean divergence is at most `--max_kl` nats per answer, it recommends the
one with the highest mean reward, if that is above the reward of the base alone at the same temperature.

The setting and what was measured are written into `genarm_config.json` and the card of `--arm`, if that is a folder, or
else into `--output_dir`; `--sentence "You are kind."` tunes a sentence, of which `--output_dir` becomes the folder.
Sampled answers are kept there, and are not sampled again. `--json` prints what was measured.
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard
from peft import PeftModel
from tqdm import tqdm

from ..bootstrap import interval, mean_with_interval, resampled_means
from ..decoding.assembly import assemble
from ..decoding.processor import GenARMLogitsProcessor
from ..decoding.recommended import base_reference, with_tokens_of
from ..files import make_output_dir
from ..hub.card import reward_model_card, sentence_card
from ..hub.info import INFO_NAME
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
from .arguments import TuneArguments
from .judge import Judge
from .pairs import load_prompts, public_name
from .plots import plot_settings
from .prompts import last_text
from .scorer import load_scorer, scores_of
from .sweep import Answers, Setting, Sweep, base_id, fingerprint

N_RESAMPLES = 2_000


def main(args: TuneArguments) -> dict[str, Any]:
    """Returns what was measured, and what is `recommended`, which is `None` if nothing is better than the base."""
    make_output_dir(args.output_dir)
    is_folder = args.arm is not None and Path(args.arm).is_dir()
    target = Path(str(args.arm) if is_folder else args.output_dir)
    if not os.access(target, os.W_OK):
        raise ValueError(
            f"`{target}` can't be written to, but the setting goes there. Copy the folder, and tune the copy."
        )
    judge = None if args.pairs is None else Judge(args.pairs, Path(args.output_dir, "judge"))
    scorer = None if args.scorer is None else load_scorer(args.scorer)
    prompts = load_prompts(args.prompts, args.prompts_split)[: args.max_prompts]
    if len(prompts) < 2:
        raise ValueError(f"`{args.prompts}` has {len(prompts)} prompt, but intervals need at least 2.")
    base = args.load([] if args.arm is None else [args.arm])
    model, tokenizer = base.model, base.tokenizer
    if not isinstance(prompts[0], str) and tokenizer.chat_template is None:
        raise ValueError(f"The prompts are messages, but `{base.name}` has no chat template. Give texts.")
    name = args.arm or str(args.sentence)
    arm = load(args, model, tokenizer)

    scored_by = f"`{args.scorer}`"
    if judge is not None:
        judging = judge.train(model, tokenizer, base_id(model))
        scorer, scored_by = judging.as_reward_func(args.batch_size), judge.described(judging)
    assert scorer is not None

    # On the base, Eq. 7 is the reference "base" at other strengths and temperatures.
    is_on_base = isinstance(arm.model, PeftModel) or args.sentence is not None
    references = args.reference or (["base"] if is_on_base else ["none"])
    processors = {x: make_processor(name, arm, model, tokenizer, x) for x in references}
    temperatures = sorted(set(args.temperature) | {1.0}, reverse=True)
    settings = [Setting(0.0, None, x) for x in temperatures]
    settings += [
        Setting(alpha, None if reference == "none" else reference, temperature)
        for reference in references
        for temperature in args.temperature
        for alpha in sorted(set(args.alpha or []))
    ]
    folder = Path(args.output_dir, "answers")
    sweep = Sweep(model, tokenizer, prompts, folder, args.max_new_tokens, args.batch_size, args.seed)
    arm_id, measured = args.sentence or fingerprint(arm.model), []
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
    index = choose(rows, args.max_kl, args.max_perplexity)
    unguided = settings.index(Setting(0.0, None, settings[index].temperature))
    gain = interval_of_mean(measured[index][1] - measured[unguided][1], args.seed)
    print(
        f"\n{described(rows[index])}: the highest reward at a KL of at most {args.max_kl:g} nats per answer and a "
        f"perplexity of at most {args.max_perplexity:g} times that of unguided text at temperature 1."
    )
    print("Its reward minus that of the base at the same temperature, paired: {:+.2f} [{:+.2f}, {:+.2f}]".format(*gain))
    result = {"recommended": None, "gain": gain, "settings": rows}
    if gain[1] <= 0:
        print(
            "Nothing is recommended, because the gain over the base alone is not clearly above zero. Raise `--max_kl` "
            "or `--max_perplexity`, take more prompts, or train on more pairs."
        )
        return result
    n_examples = min(args.n_examples, len(prompts))
    shown = np.linspace(0, len(prompts), n_examples, endpoint=False, dtype=int)
    arm.info.recommended = asdict(settings[index]) | {
        "measured": {
            "scorer": scored_by,
            "prompts": public_name(args.prompts),
            "n_prompts": len(prompts),
            "max_new_tokens": args.max_new_tokens,
            "max_kl": args.max_kl,
            "max_perplexity": args.max_perplexity,
            "seed": args.seed,
            "settings": rows,
            "examples": [{"prompt": last_text(prompts[i]), "answer": measured[index][0].texts[i]} for i in shown],
        }
    }
    write(arm, args.arm, target)
    if picture.exists() and target != picture.parent:
        shutil.copy(picture, target)
    files = f"`{INFO_NAME}`, `README.md` and `{PICTURE}` in {target}"
    if is_folder or args.arm is None:
        print(f"`from_pretrained({str(target)!r})` uses strength and reference from now on: they are in {files}.")
    else:
        print(f"Upload {files} to `{args.arm}`, and `from_pretrained` uses strength and reference.")
    temperature = settings[index].temperature
    print(f"The temperature is an argument of `generate`: `do_sample=True, top_k=0, temperature={temperature:g}`.")
    return result | {"recommended": asdict(settings[index])}


def load(args: TuneArguments, model: Any, tokenizer: Any) -> AutoregressiveRewardModel:
    """Loads what is tuned, a reward model or a sentence."""
    if args.arm is None:
        return AutoregressiveRewardModel.from_sentence(str(args.sentence), model, tokenizer)
    return AutoregressiveRewardModel.from_pretrained(
        args.arm, model, base_tokenizer=tokenizer, trust_remote_code=args.trust_remote_code
    )


def make_processor(
    name: str, arm: AutoregressiveRewardModel, model: Any, tokenizer: Any, reference: str
) -> GenARMLogitsProcessor:
    """Makes the processor of all settings with a reference, `"none"` or `"base"`."""
    parts = assemble([arm], [name], model, tokenizer, alpha=1.0, reference=None)
    if reference == "base":
        aligned = parts.reward_tokenizer or [None]
        parts.reference = base_reference([arm], [name], model, with_tokens_of(tokenizer, aligned), aligned)
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


def choose(rows: list[dict[str, Any]], max_kl: float, max_perplexity: float) -> int:
    """
    Returns the index of the guided setting with the highest mean reward of those that are near the base and fluent.

    Args:
        rows (list of `dict`):
            The settings, with the means of `reward`, `kl` and `perplexity`, each the first of a list.
        max_kl (`float`):
            The largest divergence.
        max_perplexity (`float`):
            The largest perplexity, as a multiple of that of unguided text at temperature 1.

    Raises:
        ValueError: if there is none.
    """
    guided = {index: row for index, row in enumerate(rows) if row["alpha"]}
    (unguided,) = (row["perplexity"][0] for row in rows if not row["alpha"] and row["temperature"] == 1)
    near = {index: row for index, row in guided.items() if row["kl"][0] <= max_kl}
    if not near:
        raise ValueError(
            f"No setting is within `max_kl` {max_kl:g}: the least divergence is "
            f"{min(row['kl'][0] for row in guided.values()):.1f} nats per answer. Try smaller strengths (`--alpha`), "
            "or raise `--max_kl`."
        )
    fluent = {index: row for index, row in near.items() if row["perplexity"][0] <= max_perplexity * unguided}
    if not fluent:
        raise ValueError(
            f"No setting within `max_kl` {max_kl:g} is within `max_perplexity` {max_perplexity:g}: the least "
            f"perplexity is {min(row['perplexity'][0] for row in near.values()) / unguided:.2f} times that of unguided "
            "text. Try smaller strengths (`--alpha`) or lower temperatures (`--temperature`), or raise "
            "`--max_perplexity`."
        )
    return max(fluent, key=lambda index: fluent[index]["reward"][0])


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


def write(arm: AutoregressiveRewardModel, name: str | None, folder: Path) -> None:
    """
    Updates `genarm_config.json` and the card of a folder; of a reward model on the Hub, writes copies of them, and of a
    sentence, which has no name, a folder that can be loaded.
    """
    arm.info.save(folder)
    card = (folder if name is None else download(name)) / "README.md"
    if card.exists():
        text = with_recommendation(card.read_text(encoding="utf-8"), recommendation(arm.info))
        widget = shown_on_the_hub(arm.info)
        if widget or text.startswith("---\n"):  # a card without metadata stays without, if there is nothing to add
            changed = ModelCard(text)
            changed.data["widget"] = widget
            text = str(changed)
        (folder / "README.md").write_text(text, encoding="utf-8")
    elif name is None:
        sentence_card(arm.info, folder.name).save(folder / "README.md")
    else:
        is_adapter = isinstance(arm.model, PeftModel)
        reward_model_card(arm.info, Path(name).name, name, is_adapter).save(folder / "README.md")
