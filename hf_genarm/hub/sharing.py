"""A second set of modules around the weights of a model, which costs no memory and changes nothing in the model."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

# With these options PEFT only adds to a model. Any other, also of versions to come, may change its weights.
_ADDS_ONLY = {"alora_invocation_tokens", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias"}
_ADDS_ONLY |= {"ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"}
_ADDS_ONLY |= {"init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "lora_alpha"}
_ADDS_ONLY |= {"lora_bias", "lora_dropout", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern"}
_ADDS_ONLY |= {"revision", "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora"}
# Other initialisations subtract the low-rank product from the weights of the base while an adapter is loaded.
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")

_MERGING = ("merge", "merge_adapter", "merge_and_unload")  # of layers, and of whole models


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Returns other modules around the same parameters and buffers, which changes of the model's own don't reach."""
    return copy.deepcopy(model, memo=_shared(model))


def _shared(model: nn.Module) -> dict[int, Any]:
    """
    Returns what copies of modules share, by its `id`: parameters, buffers, and what bitsandbytes keeps next to them,
    such as the scales of 8-bit weights, which their first forward pass takes from the parameter.

    Raises:
        ValueError: if FSDP has sharded the parameters.
    """
    if any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__):
        raise ValueError(
            "The base model is sharded by FSDP, so that other modules, as a sentence or an adapter needs them, can't "
            "share its weights. Use a reward model with weights of its own, or load the base on one device or with "
            "`device_map='auto'`."
        )
    kept = [x for module in model.modules() for x in vars(module).values() if _is_of_bitsandbytes(x)]
    return {id(x): x for x in [*model.parameters(), *model.buffers(), *kept]}


def _is_of_bitsandbytes(x: Any) -> bool:
    return type(x).__module__.startswith("bitsandbytes.")


def load_onto_shared_weights(base_model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """
    Loads an adapter into other modules around the same parameters and buffers as those of the base.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            The base, which is not changed, so that other threads can use it meanwhile.
        folder (`str`):
            The folder of an adapter for which [`why_adapter_changes_base`] is `None`.
    """
    network, originals = frozen_twin(base_model)
    model = PeftModel.from_pretrained(network, folder)
    for module in model.modules():
        own = {name: x for name, x in module._parameters.items() if x is not None}
        module._parameters.update({name: originals.get(x, x) for name, x in own.items()})
    shared = frozenset(id(x) for x in base_model.parameters())
    for module in model.modules():
        for name in _MERGING:
            if hasattr(type(module), name):
                vars(module)[name] = functools.partial(_merge_if_own, module, name, shared)
    return model


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Returns a copy of a model with the adapter merged into its weights; a model without an adapter as it is."""
    if not isinstance(model, PeftModel):
        return model
    return copy.deepcopy(model).merge_and_unload()


def _merge_if_own(module: nn.Module, name: str, shared: frozenset[int], *args: Any, **kwargs: Any) -> Any:
    """Merges an adapter into a model that is a copy, and refuses to merge into weights of the base."""
    if shared.isdisjoint(map(id, module.parameters())):
        return getattr(type(module), name)(module, *args, **kwargs)
    raise ValueError(
        f"`{name}` would change the weights of the base model, which this adapter shares. Merge a copy, "
        "`copy.deepcopy(model)`, or load it as a separate model, without `base_model`: "
        "`AutoregressiveRewardModel.from_pretrained(...)`."
    )


def frozen_twin(base_model: Any) -> tuple[Any, dict[nn.Parameter, nn.Parameter]]:
    """
    Returns a twin that PEFT may freeze, and the parameters of the model by those that replace them in the twin.

    Whether a weight is frozen can change the last bits of a forward pass.

    Raises:
        ValueError: if its parameters are sharded over processes.
    """
    if any(type(x).__name__ == "DTensor" for x in base_model.parameters()):
        raise ValueError(
            "The parameters of the base model are sharded over processes (`tp_plan` or FSDP), so that an adapter can't "
            "share them. Load it with weights of its own, `AutoregressiveRewardModel.from_pretrained(...)` without "
            "`base_model`, or load the base on one device or with `device_map='auto'`."
        )
    aliases = {x: nn.Parameter(x.detach(), requires_grad=False) for x in base_model.parameters() if x.requires_grad}
    shared = _shared(base_model) | {id(x): alias for x, alias in aliases.items()}
    return copy.deepcopy(base_model, memo=shared), {alias: x for x, alias in aliases.items()}


def without_adapter(model: PeftModel) -> PreTrainedModel:
    """
    Returns other modules around the same parameters, in which the adapter is off: unlike
    [`~peft.PeftModel.disable_adapter`], it doesn't change the model meanwhile.
    """
    base, _ = frozen_twin(model)
    if not model.active_peft_config.is_prompt_learning:  # which is left out with the model that is around the base
        base.disable_adapter_layers()
    return base.get_base_model()


def shares_weights(model: PreTrainedModel | PeftModel, base_model: PreTrainedModel) -> bool:
    """Returns whether a model has parameters that are also parameters of the base."""
    return not set(model.parameters()).isdisjoint(base_model.parameters())


def follow(model: PreTrainedModel | PeftModel, base_model: PreTrainedModel) -> None:
    """Moves what a model doesn't share with the base, such as its adapter, to the device of the base."""
    shared = {id(x) for x in base_model.parameters()}
    if len({x.device for x in base_model.parameters()}) > 1:  # each layer of the adapter is with its layer of the base
        return
    for module in model.modules():
        for name, x in [*module._parameters.items(), *module._buffers.items()]:
            if x is not None and id(x) not in shared and x.device != base_model.device:
                moved = x.detach().to(base_model.device)
                own = name in module._parameters
                setattr(module, name, nn.Parameter(moved, requires_grad=x.requires_grad) if own else moved)


def why_adapter_changes_base(base_model: PreTrainedModel, config: PeftConfig, folder: str | Path) -> str | None:
    """
    Returns why an adapter may change weights of the model that it is loaded onto, instead of only adding some; `None`
    if it doesn't.

    Args:
        base_model ([`~transformers.PreTrainedModel`]):
            The model that it would be loaded onto.
        config ([`~peft.PeftConfig`]):
            The configuration of the adapter.
        folder (`str`):
            Its folder.

    Raises:
        ValueError: if what is in the folder doesn't fit the model.
    """
    if not isinstance(config, LoraConfig):
        return f"it is not LoRA but {config.peft_type}"
    plain = vars(LoraConfig())
    unusual = [name for name, x in vars(config).items() if x and name not in _ADDS_ONLY and x != plain.get(name)]
    if config.init_lora_weights not in HARMLESS_INITS:
        unusual.append("init_lora_weights")
    if unusual:
        return f"`{unusual[0]}={getattr(config, unusual[0])!r}` may change the weights of the base"
    # Trained biases and embeddings are loaded into those of the base. What PEFT saves is what it loads.
    network, _ = frozen_twin(base_model)
    shared = {id(x) for x in [*network.parameters(), *network.buffers()]}
    with torch.device("meta"):  # no memory, and no random numbers
        adapter = PeftModel(network, copy.copy(config))
    loaded = {name: x for name, x in check_tensors(adapter, folder).items() if id(x) in shared}
    with safe_open(Path(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        # With an adapter on embeddings, PEFT saves those below it, too, as they were.
        replaced = [name for name, x in loaded.items() if not (is_plain(x) and file.get_tensor(name).to(x).equal(x))]
    return f"it replaces weights of the base, such as `{replaced[0]}`" if replaced else None


def is_plain(x: Tensor) -> bool:
    """Returns whether the numbers in a tensor can be read: it is not quantised, offloaded or sharded."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return type(x.data) is Tensor and x.dtype in floats and not x.is_meta


def adapter_tensors(model: PeftModel, with_embeddings: bool = False) -> dict[str, Tensor]:
    """Returns what PEFT saves and loads of an adapter: the parameters themselves, by their names in the file."""
    state = model.state_dict(keep_vars=True)
    return get_peft_model_state_dict(model, state, save_embedding_layers=with_embeddings)


def saved_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """
    Returns the shapes of the tensors in the folder of an adapter, by their names.

    Raises:
        ValueError: if the file is damaged.
    """
    path = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"`{path}` is damaged ({error}). Download or write it again.") from error


def check_tensors(model: PeftModel, folder: str | Path) -> dict[str, Tensor]:
    """
    Compares names and shapes of the tensors in the folder of an adapter with those of the adapter in a model.

    Returns:
        `dict[str, torch.Tensor]`: the parameters of the model that they are loaded into.

    Raises:
        ValueError: if the file is damaged, or the two differ.
    """
    path, expected, shapes = Path(folder, SAFETENSORS_WEIGHTS_NAME), adapter_tensors(model), saved_shapes(folder)
    if shapes.keys() - expected.keys():  # of a vocabulary that was extended
        embeddings = adapter_tensors(model, with_embeddings=True)
        expected |= {name: x for name, x in embeddings.items() if name in shapes}
    for name in sorted(shapes.keys() | expected.keys()):
        there, wanted = shapes.get(name), tuple(expected[name].shape) if name in expected else None
        if there != wanted:
            in_file, in_model = ("nothing" if x is None else f"the shape {x}" for x in (there, wanted))
            raise ValueError(
                f"`{path}` has {in_file} for `{name}`, but the adapter that its `adapter_config.json` describes has "
                f"{in_model} there on this model. Download or write both files again; those of an old version of PEFT "
                "are loaded and saved with PEFT first."
            )
    return expected
