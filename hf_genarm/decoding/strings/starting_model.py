"""The model that rewards of strings are contrasted with: the one that the reward model was trained from."""

import warnings
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel

from ...hub.info import GuidanceWarning
from ...hub.kv_cache import n_embeddings, network_of
from ...hub.reward_model import AutoregressiveRewardModel
from ...hub.sharing import without_adapter


class StartingModel(NamedTuple):
    """
    Holds what the rewards of one reward model are contrasted with.

    Parameters:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The model; `None` if they are not contrasted.
        is_off (`bool`):
            Whether it is the reward model with its adapter off.
    """

    model: PreTrainedModel | PeftModel | None
    is_off: bool = False


def starting_model(given: Any, reference: Any, are_all_foreign: bool) -> StartingModel:
    """
    Returns what the rewards of strings of a reward model are contrasted with; if that is nothing, warns.

    Args:
        given ([`AutoregressiveRewardModel`], [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward model.
        reference (`"base"`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `None`):
            The reference of the processor. `"base"` is the model that each reward model was trained from.
        are_all_foreign (`bool`):
            Whether the tokens of all reward models are other strings than those of the base.

    Raises:
        ValueError: if the starting model is not known, or the reference has other tokens.
    """
    model = given.model if isinstance(given, AutoregressiveRewardModel) else given
    name = network_of(model).config.name_or_path
    if reference is None:
        warnings.warn(
            f"`reference` is `None`, but the tokens of `{name}` are other strings than those of the base. Its rewards "
            "are then log-probabilities of strings, of which shorter ones never have less, so that they favour short "
            'tokens, whatever the reward model has learned. Use `reference="base"`, the contrast with the model that '
            "it was trained from.",
            GuidanceWarning,
            stacklevel=4,
        )
        return StartingModel(None)
    if not isinstance(reference, str):
        if not are_all_foreign or n_embeddings(reference) != n_embeddings(model):
            raise ValueError(
                f"The reference has {n_embeddings(reference)} tokens, but `{name}` has {n_embeddings(model)}, which "
                "are other strings than those of the base, and it is contrasted with a model that has the same ones. "
                'Use `reference="base"`, which is the model that each reward model was trained from.'
            )
        return StartingModel(reference)
    if isinstance(model, PeftModel):
        return StartingModel(without_adapter(model), is_off=True)
    if isinstance(given, AutoregressiveRewardModel) and given._reference is not None:
        return StartingModel(given._reference)
    raise ValueError(
        f"The tokens of `{name}` are other strings than those of the base, so that its rewards are contrasts with the "
        "model that it was trained from, which is not known, since all weights were trained. Pass that model: "
        "`reference=AutoModelForCausalLM.from_pretrained(...)`; or `reference=None` for none."
    )
