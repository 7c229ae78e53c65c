"""Plots of a training run, an evaluation and tuned settings, which are left out if matplotlib is missing."""

from typing import Any

import numpy as np
from transformers.utils import is_matplotlib_available, logging

from ..training.metrics import is_right

logger = logging.get_logger(__name__)

BLUE, ORANGE, GREY = "#1f77b4", "#d95f02", "0.5"
COLORS = [BLUE, ORANGE, "#1b9e77", "#7570b3"]


def plot_training(log_history: list[dict[str, Any]], path: str, is_contrast: bool = False) -> None:
    """
    Draws loss and accuracy over the steps, in training and on held-out pairs.

    The accuracy on held-out pairs is that of what was learned, where there is a base to compare with. In training it is
    that of the reward.

    Args:
        log_history (list of `dict`):
            `trainer.state.log_history`.
        path (`str`):
            Where to write the picture.
        is_contrast (`bool`, *optional*, defaults to `False`):
            Whether the reward is a contrast with the base, so that its accuracy is that of what was learned.
    """
    figure, axes = _figure(path, "training")
    if figure is None:
        return
    training = [logs for logs in log_history if "loss" in logs and "accuracy" in logs]
    held_out = [logs for logs in log_history if "eval_pair_accuracy" in logs]
    accuracy = "contrast_accuracy" if any("eval_contrast_accuracy" in x for x in held_out) else "pair_accuracy"
    is_learned = is_contrast or accuracy == "contrast_accuracy"
    label = "training" if is_contrast or not is_learned else "training, of the reward"
    for axis, measure in ((axes[0], "loss"), (axes[1], "accuracy")):
        axis.xaxis.get_major_locator().set_params(integer=True)
        # With marks, since a short run has few points
        axis.plot([x["step"] for x in training], [x[measure] for x in training], ".-", color=BLUE, label=label)
    axes[0].set(xlabel="step", ylabel="loss")
    axes[1].set(xlabel="step", ylabel="learned accuracy" if is_learned else "pair accuracy", ylim=(-0.02, 1.02))
    axes[1].axhline(0.5, color=GREY, linestyle=":", label="chance")
    if held_out:
        steps = [x["step"] for x in held_out]
        axes[0].plot(steps, [x["eval_loss"] for x in held_out], "o-", color=ORANGE, label="held out")
        share, low, high = (np.array([x[f"eval_{accuracy}{end}"] for x in held_out]) for end in ("", "_low", "_high"))
        axes[1].errorbar(steps, share, [share - low, high - share], fmt="o-", color=ORANGE, capsize=4, label="held out")
        shorter = held_out[-1]["eval_shorter_accuracy"]
        axes[1].axhline(max(shorter, 1 - shorter), color=GREY, linestyle="--", label="by length alone")
    _save(figure, axes, path)


def plot_evaluation(margin: np.ndarray, longer: np.ndarray, path: str) -> None:
    """
    Draws the margins of pairs against the difference in length of their responses, and the calibration of the margins.

    Args:
        margin (`np.ndarray` of shape `(n_pairs,)`):
            Reward of chosen minus rejected.
        longer (`np.ndarray` of shape `(n_pairs,)`):
            Tokens of chosen minus rejected.
        path (`str`):
            Where to write the picture.
    """
    figure, axes = _figure(path, "evaluation")
    if figure is None:
        return
    axes[0].scatter(longer, margin, s=10, alpha=0.4, color=BLUE, linewidth=0, label="a pair")
    axes[0].axhline(0, color=GREY, linestyle=":", label="chosen and rejected alike")
    axes[0].set(xlabel="tokens of chosen minus rejected", ylabel="reward of chosen minus rejected")

    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = is_right(margin)
    order = np.array_split(np.argsort(confidence), min(8, len(margin)))
    means = [confidence[part].mean() for part in order]
    shares = np.array([right[part].mean() for part in order])
    error = 1.96 * np.sqrt(shares * (1 - shares) / np.array([len(part) for part in order]))
    axes[1].errorbar(means, shares, error, fmt="o", color=ORANGE, capsize=4, label="an eighth of the pairs")
    axes[1].plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", label="calibrated")
    axes[1].set(xlabel="confidence σ(|margin|)", ylabel="pair accuracy", ylim=(-0.02, 1.02))
    _save(figure, axes, path)


def plot_settings(rows: list[dict[str, Any]], max_kl: float, reward_name: str, path: str) -> None:
    """
    Draws reward against the divergence from the base and against perplexity under the base, with strengths as labels.

    Args:
        rows (list of `dict`):
            For each setting `alpha`, `reference`, `temperature`, and `reward`, `kl` and `perplexity`, each a mean with
            its interval.
        max_kl (`float`):
            The limit of the divergence.
        reward_name (`str`):
            The label of the reward.
        path (`str`):
            Where to write the picture.
    """
    figure, axes = _figure(path, "settings")
    if figure is None:
        return
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault((row["reference"], row["temperature"]) if row["alpha"] else (), []).append(row)
    colors, several = iter(COLORS * len(kinds)), len({row["temperature"] for row in rows}) > 1
    for kind, of_kind in kinds.items():
        label = {(): "unguided", ("base",): 'reference "base"', (None,): "no reference (Eq. 7)"}[kind[:1]]
        label += f", temperature {kind[1]:g}" if kind and several else ""
        color = next(colors) if kind else GREY
        for axis, measure in zip(axes, ("kl", "perplexity"), strict=True):
            (x, low, high), (y, lower, upper) = (
                np.array([row[name] for row in of_kind]).T for name in (measure, "reward")
            )
            # The mean of equal values may lie outside of its interval, by the last digit.
            errors = [np.maximum([at - first, last - at], 0) for at, first, last in ((x, low, high), (y, lower, upper))]
            axis.errorbar(x, y, errors[1], errors[0], fmt="o-", color=color, capsize=3, alpha=0.8, label=label)
            for at, reward, row in zip(x, y, of_kind, strict=True):
                text = f"{row['alpha']:g}" if kind else f"T {row['temperature']:g}" * several
                axis.annotate(text, (at, reward), xytext=(4, 4), textcoords="offset points")
    axes[0].axvline(max_kl, color=GREY, linestyle=":", label="limit")
    axes[0].set(xlabel="divergence from the base, nats per answer", ylabel=reward_name)
    axes[1].set(xlabel="perplexity under the base", ylabel=reward_name, xscale="log")
    _save(figure, axes, path, one_legend=True)


def _figure(path: str, kind: str) -> tuple[Any, Any]:
    if not is_matplotlib_available():
        logger.warning(
            "There is no plot of the %s, because matplotlib is not installed: `pip install matplotlib`.", kind
        )
        return None, None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, 2, figsize=(10, 4), dpi=130)


def _save(figure: Any, axes: Any, path: str, one_legend: bool = False) -> None:
    """Writes the picture, with a legend in each part, or with one for both below them."""
    from matplotlib import pyplot as plt

    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        if not one_legend:
            axis.legend(frameon=False)
    figure.tight_layout()
    if one_legend:
        figure.legend(
            *axes[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0)
        )
    figure.savefig(path, bbox_inches="tight" if one_legend else None)
    plt.close(figure)
