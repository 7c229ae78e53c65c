"""The part of a model card that says how to steer: a setting, and what it was measured to do beside others."""

import re
from typing import Any

from .info import RewardInfo

PICTURE = "tuning.png"
_BEGIN, _END = "<!-- begin: hf-genarm tune -->", "<!-- end: hf-genarm tune -->"


def recommendation(info: RewardInfo, model_id: str) -> str:
    """
    Args:
        info ([`RewardInfo`]):
            Of a reward model, with what it recommends.
        model_id (`str`):
            Its Hub id or folder.

    Returns:
        `str`: a section of Markdown, or nothing if it recommends nothing.
    """
    setting = info.recommended
    if setting is None:
        return ""
    temperature = "" if setting["temperature"] == 1 else f", temperature={setting['temperature']:g}"
    lines = [
        _BEGIN,
        "## Recommended setting",
        "",
        f"{described(setting)}. Strength and reference are taken where no others are given; the",
        "temperature is an argument of `generate`.",
        "",
        "```python",
        f'processor = GenARMLogitsProcessor.from_pretrained("{model_id}", base_model=model)',
        f"output = model.generate(**inputs, logits_processor=[processor], do_sample=True, top_k=0{temperature})",
        "```",
    ]
    measured = setting["measured"]
    if measured.get("settings"):
        lines += [
            "",
            "It has the highest reward of the settings whose answers are at most "
            f"{measured['max_kl']:g} nats from the base.",
            f"One answer of up to {measured['max_new_tokens']} tokens to each of "
            f"{measured['n_prompts']} held-out prompts;",
            "means with their 95 % bootstrap intervals over prompts. KL: the divergence of what was sampled from",
            "from the base, summed over an answer, in nats. Perplexity: of all answers, under the base. Reward:",
            f"{measured['scorer']}.",
            "",
            *settings_table(setting),
            "",
            f"![Reward against divergence and perplexity]({PICTURE})",
        ]
    return "\n".join([*lines, _END, "", ""])


def described(setting: dict[str, Any]) -> str:
    """A setting in words."""
    if setting["alpha"] == 0:
        return f"unguided, temperature {setting['temperature']:g}"
    reference = 'reference `"base"`' if setting["reference"] else "no reference (Eq. 7)"
    return f"Strength {setting['alpha']:g}, {reference}, temperature {setting['temperature']:g}"


def settings_table(setting: dict[str, Any]) -> list[str]:
    """The settings that were measured, as a table in Markdown in which the given one is bold."""
    lines = [
        "| strength | reference | temperature | reward | KL per answer | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for row in setting["measured"]["settings"]:
        is_guided = row["alpha"] != 0
        cells = [
            f"{row['alpha']:g}",
            ("base" if row["reference"] else "none") if is_guided else "",
            f"{row['temperature']:g}",
            *(f"{row[x][0]:.{n}f} [{row[x][1]:.{n}f}, {row[x][2]:.{n}f}]" for x, n in MEASURES.items()),
        ]
        is_chosen = all(row[name] == setting[name] for name in ("alpha", "reference", "temperature"))
        lines.append("| " + " | ".join(f"**{cell}**" if is_chosen and cell else cell for cell in cells) + " |")
    return lines


# What is measured of each setting, and the decimals that it is told with
MEASURES = {"reward": 2, "kl": 1, "perplexity": 1}


def with_recommendation(card: str, section: str) -> str:
    """A card with the section in place of an earlier one, or else after its quick start."""
    if _BEGIN in card and _END in card:
        before, rest = card.split(_BEGIN, 1)
        return before + section.rstrip("\n") + rest.split(_END, 1)[1]
    place = re.search(r"^## How far to trust it$", card, re.MULTILINE)
    at = place.start() if place else len(card)
    return card[:at] + ("" if place else "\n\n") + section + card[at:]
