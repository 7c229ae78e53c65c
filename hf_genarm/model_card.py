"""The model card of a trained autoregressive reward model."""

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


def reward_model_card(
    model_name: str,
    hub_model_id: str | None,
    base_model: str | None,
    dataset_name: str | None,
    tags: list[str],
    is_adapter: bool,
    beta: float,
    metrics: dict[str, float],
) -> ModelCard:
    """
    Writes the card of a reward model from what the trainer knows.

    Args:
        model_name (`str`):
            Name of the model, the title of the card.
        hub_model_id (`str`, *optional*):
            Its Hub id, for the quick start.
        base_model (`str`, *optional*):
            Hub id of the model that was trained, or that the adapter belongs to.
        dataset_name (`str`, *optional*):
            Hub id of the preference data.
        tags (list of `str`):
            Tags for the Hub.
        is_adapter (`bool`):
            Whether the weights are a PEFT adapter.
        beta (`float`):
            The scale of the reward in the loss.
        metrics (`dict[str, float]`):
            What the last evaluation measured, by name; may be empty.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    card_data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name,
        library_name="peft" if is_adapter else "transformers",
        model_name=model_name,
        tags=tags,
        # The default, text generation, would present a reward as a chat model.
        pipeline_tag=None,
        base_model_relation="adapter" if is_adapter and base_model else None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).parent / "templates" / "model_card.md"),
        model_name=model_name,
        model_id=hub_model_id or model_name,
        base_model=base_model,
        dataset_name=dataset_name,
        is_adapter=is_adapter,
        beta=beta,
        metrics=metrics,
        versions={name: version(name) for name in ("hf_genarm", "trl", "transformers", "peft", "torch", "datasets")},
    )
