"""The files of a published reward model that are made from templates: its card, and its `custom_generate`."""

from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .info import HUB_ID, RewardInfo
from .recommendation import recommendation, shown_on_the_hub

# What is measured on held-out pairs, and what else where the pairs or the weights allow it
METRICS = (
    "n_pairs",
    "pair_accuracy",
    "pair_accuracy_low",
    "pair_accuracy_high",
    "shorter_accuracy",
    "mean_margin",
    "rms_margin",
    "margin_length_correlation",
    "calibration_error",
    "n_length_matched",
)
OPTIONAL_METRICS = (
    "gain_over_shorter",
    "gain_over_shorter_low",
    "gain_over_shorter_high",
    "length_matched_accuracy",
    "length_matched_accuracy_low",
    "length_matched_accuracy_high",
    "contrast_accuracy",
    "contrast_accuracy_low",
    "contrast_accuracy_high",
    "contrast_rms_margin",
)
# What the Hub shows of them: first what was learned, if there is a base to compare with
RESULTS = {
    "contrast_accuracy": "Accuracy of what was learned",
    "pair_accuracy": "Pair accuracy",
    "shorter_accuracy": "Accuracy of the shorter",
}
_TEMPLATES = Path(__file__).parent / "templates"
REPOSITORY = "https://github.com/hf-genarm/hf_genarm"
TAGS = ["genarm", "autoregressive-reward-model", "reward-model", "trl"]


@dataclass
class Steered:
    """Holds what guidance at one strength did on held-out prompts. `effect` and `kl` are text, with their intervals."""

    alpha: float
    effect: str
    kl: str


def reward_model_card(
    info: RewardInfo,
    model_name: str,
    model_id: str,
    is_adapter: bool,
    *,
    tags: list[str] | None = None,
    license: str | None = None,
    language: str | None = None,
    effect_name: str | None = None,
    unguided: str | None = None,
    steered: list[Steered] | None = None,
    notes: str = "",
    command: str | None = None,
) -> ModelCard:
    """
    Writes the model card of a reward model from what was measured.

    Args:
        info ([`RewardInfo`]):
            What is known about the reward model.
        model_name (`str`):
            The title of the card.
        model_id (`str`):
            Hub id or folder, for the quick start.
        is_adapter (`bool`):
            Whether the weights are a PEFT adapter.
        tags (list of `str`, *optional*):
            Tags in addition to those that every reward model has.
        license, language (`str`, *optional*):
            For the Hub.
        effect_name (`str`, *optional*):
            What was measured in steered text.
        unguided (`str`, *optional*):
            The value of this measure for unguided text.
        steered (list of [`Steered`], *optional*):
            Its values at several strengths.
        notes (`str`, *optional*):
            Markdown that follows what was measured.
        command (`str`, *optional*):
            The command that made the model and the card.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    results, is_measured = None, info.metrics.keys() >= set(METRICS)
    if is_measured:
        results = [
            EvalResult(
                task_type="reward-modeling",
                task_name="Pairwise preference",
                dataset_type=info.dataset or "preference-pairs",
                dataset_name=f"{info.dataset or 'preference pairs'}, held out",
                metric_type=metric,
                metric_name=name,
                metric_value=round(info.metrics[metric], 4),
            )
            for metric, name in RESULTS.items()
            if metric in info.metrics
        ]
    card_data = ModelCardData(
        base_model=info.base_model,
        base_model_relation="adapter" if is_adapter and info.base_model else None,
        datasets=info.dataset if info.dataset and HUB_ID.fullmatch(info.dataset) else None,
        language=language,
        library_name="peft" if is_adapter else "transformers",
        license=license,
        model_name=model_name,
        # The default, text generation, would present a reward as a chat model.
        pipeline_tag=None,
        tags=[*TAGS, *(["conversational"] if info.chat_template else []), *(tags or [])],
        eval_results=results,
        widget=shown_on_the_hub(info),
    )
    return ModelCard.from_template(
        card_data,
        # As text: older versions of huggingface_hub read the file in the encoding of the locale.
        template_str=(_TEMPLATES / "model_card.md").read_text(encoding="utf-8"),
        info=info,
        metrics=info.metrics,
        is_measured=is_measured,
        model_name=model_name,
        model_id=model_id,
        is_adapter=is_adapter,
        effect_name=effect_name,
        unguided=unguided,
        steered=steered or [],
        notes=notes,
        command=command,
        recommendation=recommendation(info),
        install=_install(),
    )


def sentence_card(info: RewardInfo, name: str) -> ModelCard:
    """
    Writes the card of the folder of a sentence.

    Args:
        info ([`RewardInfo`]):
            What is known about it.
        name (`str`):
            The title of the card, and the Hub id or folder for the quick start.
    """
    card_data = ModelCardData(
        library_name="hf_genarm",
        model_name=name,
        pipeline_tag=None,
        tags=["genarm", "autoregressive-reward-model", "sentence"],
        widget=shown_on_the_hub(info),
    )
    return ModelCard.from_template(
        card_data,
        template_str=(_TEMPLATES / "sentence_card.md").read_text(encoding="utf-8"),
        info=info,
        model_name=name,
        recommendation=recommendation(info),
        install=_install(),
    )


def write_custom_generate(folder: str | Path, model_id: str) -> None:
    """
    Writes what `model.generate(custom_generate=..., trust_remote_code=True)` runs: guidance without an import.

    Args:
        folder (`str`):
            The folder of the reward model.
        model_id (`str`):
            Hub id or folder under which the reward model is loaded.
    """
    target = Path(folder, "custom_generate")
    target.mkdir(exist_ok=True)
    template = (_TEMPLATES / "custom_generate.py").read_text(encoding="utf-8")
    # Its Python literal, which is no code whatever characters are in it.
    code = template.replace('"{{ model_id }}"', ascii(model_id))
    (target / "generate.py").write_text(code, encoding="utf-8")
    # Transformers checks these lines by name and version, and knows no addresses.
    (target / "requirements.txt").write_text(f"hf_genarm>={version('hf_genarm')}\n", encoding="utf-8")


def _install() -> str:
    """Returns the command on a card that installs this package."""
    return f"pip install '{requirement()}'"


def requirement(extra: str | None = None) -> str:
    """
    Returns what pip installs this package by on another machine: from PyPI if it came from there, at least in this
    version; else, as long as there is no release, from its repository.

    Args:
        extra (`str`, *optional*):
            An extra, such as `"demo"`.
    """
    name = "hf_genarm" if extra is None else f"hf_genarm[{extra}]"
    # The record of an installation from anywhere but an index: https://peps.python.org/pep-0610
    is_released = distribution("hf_genarm").read_text("direct_url.json") is None
    return f"{name}>={version('hf_genarm')}" if is_released else f"{name} @ git+{REPOSITORY}"
