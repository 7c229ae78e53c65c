"""
Draws one step of guided decoding, for light and dark pages: `docs/images/lockstep-light.svg` and `lockstep-dark.svg`.

    python docs/.build/diagram.py
"""

import math
from pathlib import Path

IMAGES = Path(__file__).parent.parent / "images"
INKS = {
    "light": {
        "text": "#1f2328",
        "line": "#8c959f",
        "box": "#f6f8fa",
        "base": "#0072b2",
        "reward": "#d55e00",
        "both": "#009e73",
    },
    "dark": {
        "text": "#e6edf3",
        "line": "#8b949e",
        "box": "#161b22",
        "base": "#56b4e9",
        "reward": "#e69f00",
        "both": "#2fc79a",
    },
}  # colours for colour-blind readers, too (Okabe and Ito)
TOKENS = ["lovely", "quiet", "loud", "dirty"]
BASE = [0.20, 0.35, 0.30, 0.15]
REWARD = [1.2, 0.5, -0.9, -1.2]  # log π_r - log π_ref


def guided(alpha: float = 1.0) -> list[float]:
    weights = [p * math.exp(alpha * r) for p, r in zip(BASE, REWARD, strict=True)]
    return [weight / sum(weights) for weight in weights]


def draw(ink: dict[str, str]) -> str:
    parts = []

    def text(
        x: float,
        y: float,
        content: str,
        size: int = 14,
        anchor: str = "middle",
        colour: str = "text",
        weight: str = "normal",
    ) -> None:
        style = f'font-size="{size}" text-anchor="{anchor}" fill="{ink[colour]}" font-weight="{weight}"'
        parts.append(f'<text x="{x}" y="{y}" {style}>{content}</text>')

    def box(x: float, y: float, width: float, height: float, colour: str) -> None:
        style = f'rx="8" fill="{ink["box"]}" stroke="{ink[colour]}" stroke-width="2"'
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" {style}/>')

    def arrow(path: str, colour: str = "line") -> None:
        parts.append(f'<path d="{path}" fill="none" stroke="{ink[colour]}" stroke-width="2" marker-end="url(#tip)"/>')

    def bars(x: float, middle: float, values: list[float], scale: float, colour: str) -> None:
        for index, value in enumerate(values):
            y, height = (middle - value * scale, value * scale) if value > 0 else (middle, -value * scale)
            parts.append(
                f'<rect x="{x + 30 * index}" y="{y:.1f}" width="22" height="{height:.1f}" fill="{ink[colour]}"/>'
            )
        parts.append(f'<path d="M{x - 4} {middle}H{x + 30 * len(values) - 4}" stroke="{ink["line"]}"/>')

    box(14, 120, 168, 60, "line")
    text(98, 144, "the text so far", 13)
    text(98, 166, "“The room was …”", 14, weight="bold")
    for y, name, note, colour in (
        (40, "base model", "frozen", "base"),
        (190, "reward model", "an adapter on the base", "reward"),
    ):
        box(240, y, 180, 72, colour)
        text(330, y + 26, name, 15, colour=colour, weight="bold")
        text(330, y + 45, note, 12)
        text(330, y + 62, "its own key-value cache", 12)
    arrow("M182 140C210 140 210 76 234 76")
    arrow("M182 160C210 160 210 226 234 226")
    arrow("M420 76H462")
    arrow("M420 226H462")
    bars(480, 110, BASE, 150, "base")
    text(538, 34, "π_base", 13, colour="base")
    bars(480, 230, REWARD, 22, "reward")
    text(538, 184, "α · (log π_r − log π_ref)", 13, colour="reward")
    arrow("M604 90C640 90 640 140 664 146")
    arrow("M604 226C640 226 640 172 664 160")
    text(626, 154, "+", 22, weight="bold")
    text(626, 170, "of logs", 11)
    bars(682, 190, guided(), 150, "both")
    text(740, 78, "π, the guided model", 13, colour="both", weight="bold")
    for index, token in enumerate(TOKENS):
        for x, y in ((480, 122), (480, 272), (682, 202)):
            place = f"translate({x + 13 + 30 * index} {y}) rotate(35)"
            parts.append(f'<text transform="{place}" font-size="11" fill="{ink["text"]}">{token}</text>')
    arrow("M740 262V316H98V186", "both")
    text(290, 306, "“lovely” is sampled, and both models read it: in lockstep", 13)
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{ink["line"]}"/></marker></defs>'
    )
    title = "<title>One step: base and reward model read the same text, and their log-probabilities are added.</title>"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 850 330" font-family="Helvetica, Arial, sans-serif">\n'
        + "\n".join([title, marker, *parts])
        + "\n</svg>\n"
    )


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, ink in INKS.items():
        (IMAGES / f"lockstep-{name}.svg").write_text(draw(ink), encoding="utf-8")


if __name__ == "__main__":
    main()
