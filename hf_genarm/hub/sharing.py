"""A second set of modules around the weights of a model: it costs no memory, and the model never notices."""

import copy
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

# Other initialisations subtract the low-rank product from the weights of the base while an adapter is loaded.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Other modules around the very parameters and buffers of a model, that nothing done to its modules reaches."""
    return copy.deepcopy(model, memo={id(x): x for x in [*model.parameters(), *model.buffers()]})


def load_onto_shared_weights(base_model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """
    Loads an adapter into other modules around the very parameters and buffers of the base model.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            It stays as it is, also for threads that use it meanwhile.
        folder (`str`):
            The folder of an adapter for which [`why_it_changes`] is `None`.
    """
    # PEFT freezes what it is given, and whether a weight is frozen shows in the last bits of a forward pass.
    aliases = {x: nn.Parameter(x.detach(), requires_grad=False) for x in base_model.parameters() if x.requires_grad}
    shared = {id(x): aliases.get(x, x) for x in [*base_model.parameters(), *base_model.buffers()]}
    model = PeftModel.from_pretrained(copy.deepcopy(base_model, memo=shared), folder)
    originals = {alias: x for x, alias in aliases.items()}
    for module in model.modules():
        module._parameters.update({name: originals.get(x, x) for name, x in module._parameters.items()})
    return model


def shares_weights(model: PreTrainedModel | PeftModel, base_model: PreTrainedModel) -> bool:
    """Whether a model is a second set of modules around the weights of the base model."""
    return model.get_input_embeddings().weight is base_model.get_input_embeddings().weight


def follow(model: PreTrainedModel | PeftModel, base_model: PreTrainedModel) -> None:
    """Moves what a model that shares the weights of the base has of its own to the device of the base."""
    shared = {id(x) for x in base_model.parameters()}
    if len({x.device for x in base_model.parameters()}) > 1:  # each layer of it is where it was put
        return
    for module in model.modules():
        for name, x in [*module._parameters.items(), *module._buffers.items()]:
            if x is not None and id(x) not in shared and x.device != base_model.device:
                moved = x.detach().to(base_model.device)
                own = name in module._parameters
                setattr(module, name, nn.Parameter(moved, requires_grad=x.requires_grad) if own else moved)


def why_it_changes(base_model: PreTrainedModel, config: PeftConfig, folder: str | Path) -> str | None:
    """
    Why an adapter may change weights of the model that it is loaded onto, instead of only adding some; `None` if it
    doesn't.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            The model that it would be loaded onto.
        config ([`~peft.PeftConfig`]):
            Of the adapter.
        folder (`str`):
            Its folder.
    """
    if not isinstance(config, LoraConfig):
        return f"it is not LoRA but {config.peft_type}"
    if config.init_lora_weights not in _HARMLESS_INITS:
        return f"`init_lora_weights={config.init_lora_weights!r}` changes the weights of the base"
    if config.target_parameters:
        return "`target_parameters` are changed in place"
    # Trained biases, embeddings and whole modules are saved under the names of those that they replace.
    own = base_model.state_dict().keys()
    with safe_open(Path(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        replaced = [name for name in file.keys() if name.removeprefix("base_model.model.") in own]  # noqa: SIM118
    return f"it replaces weights of the base, such as `{replaced[0]}`" if replaced else None
