"""The section of a model card that recommends a setting, with what it was measured to do compared with others."""

import re
from textwrap import fill
from typing import Any

from .info import RewardInfo

PICTURE = "tuning.png"
# What is measured of each setting, and the decimals that are shown of it
MEASURES = {"reward": 2, "kl": 1, "perplexity": 1}
_WIDTH = 120
_BEGIN, _END = "<!-- begin: hf-genarm tune -->", "<!-- end: hf-genarm tune -->"


def recommendation(info: RewardInfo) -> str:
    """
    Writes the section of a card on the recommended setting.

    Args:
        info ([`RewardInfo`]):
            What is recorded about a reward model.

    Returns:
        `str`: a section of Markdown, or nothing if it recommends nothing.
    """
    setting = info.recommended
    if setting is None:
        return ""
    taken = (
        f"{described(setting)}. `GenARMLogitsProcessor.from_pretrained` takes strength and reference where no others "
        f"are given. The temperature is an argument of `generate`: `do_sample=True, top_k=0, "
        f"temperature={setting['temperature']:g}`. `hf-genarm show` applies it, and `hf-genarm generate` with "
        "`--do_sample`."
    )
    lines = [_BEGIN, "## Recommended setting", "", fill(taken, _WIDTH)]
    measured = setting["measured"]
    if measured.get("settings"):
        fluent = ""
        if "max_perplexity" in measured:  # which settings of earlier versions were not chosen by
            fluent = (
                f", and at most {measured['max_perplexity']:g} times as perplexing as unguided text at temperature 1"
            )
        how = (
            f"Of those in the table that are at most {measured['max_kl']:g} nats from the base{fluent}, it has the "
            f"highest reward: {measured['scorer']}. One answer of up to {measured['max_new_tokens']} tokens to each of "
            f"{measured['n_prompts']} held-out prompts, those that it was chosen on; means with their 95 % bootstrap "
            "intervals over prompts. KL: the divergence from the base of the distributions that answers were drawn "
            "from, summed over an answer, in nats. Perplexity: of all answers, under the base."
        )
        picture = f"![Reward against divergence and perplexity]({PICTURE})"
        lines += ["", fill(how, _WIDTH), "", *settings_table(setting), "", picture]
    return "\n".join([*lines, _END, "", ""])


def described(setting: dict[str, Any]) -> str:
    """Returns a setting in words."""
    if setting["alpha"] == 0:
        return f"unguided, temperature {setting['temperature']:g}"
    reference = 'reference `"base"`' if setting["reference"] else "no reference (Eq. 7)"
    return f"Strength {setting['alpha']:g}, {reference}, temperature {setting['temperature']:g}"


def settings_table(setting: dict[str, Any]) -> list[str]:
    """Returns the settings that were measured, as a table in Markdown in which the given one is bold."""
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


def shown_on_the_hub(info: RewardInfo) -> list[dict[str, Any]] | None:
    """Returns the `widget` in the metadata of a card: prompts with answers at the recommended setting, if any."""
    if info.recommended is None:
        return None
    return [
        {"example_title": described(info.recommended), "text": x["prompt"], "output": {"text": x["answer"]}}
        for x in info.recommended["measured"].get("examples", [])
    ] or None


def with_recommendation(card: str, section: str) -> str:
    """Returns a card in which the section replaces an earlier one, or is added after the quick start."""
    card = re.sub(r"\nNo setting is recommended: .*\n", "", card)
    if _BEGIN in card and _END in card:
        before, rest = card.split(_BEGIN, 1)
        return before + section.rstrip("\n") + rest.split(_END, 1)[1]
    place = re.search(r"^## How far to trust it$", card, re.MULTILINE)
    at = place.start() if place else len(card)
    return card[:at] + ("" if place else "\n\n") + section + card[at:]
