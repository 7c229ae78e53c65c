"""Loading and checks of the model that is trained, a causal LM or an adapter on one."""

import copy
from typing import Any

from peft import PeftConfig, PeftModel, TaskType
from torch.nn import Module
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..hub.causality import refuse_not_causal
from ..hub.kv_cache import network_of
from ..hub.sharing import HARMLESS_INITS
from .config import AutoregressiveRewardConfig


def load_model_to_train(
    model_id: str, args: AutoregressiveRewardConfig, quantization_config: QuantizationConfigMixin | None
) -> PreTrainedModel:
    """
    Loads a causal LM, as TRL's trainers load theirs.

    Raises:
        ValueError: if the checkpoint lacks weights of a causal LM, or the quantisation is given twice.
    """
    init_kwargs: Any = args.model_init_kwargs or {}  # `RewardConfig` has made it a dict
    kwargs = {"trust_remote_code": args.trust_remote_code, **init_kwargs}
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "`quantization_config` is given both to the trainer and in `args.model_init_kwargs`. Keep the first."
            )
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # each process holds the whole model
    auto_class: Any = AutoModelForCausalLM
    loaded: Any = create_model_from_path(model_id, auto_class, **kwargs, output_loading_info=True)
    model, loading = loaded
    named = model.config.architectures or ["model of another kind"]
    missing = [name for name, _ in model.named_parameters() if name in loading["missing_keys"]]
    # Tied to its embeddings, the LM head of a classifier is not missing.
    if missing or any(name.endswith("Classification") for name in named):
        raise ValueError(
            f"`{model_id}` is the checkpoint of a {', '.join(named)}{f'; it lacks {missing}' if missing else ''}, but "
            "an autoregressive reward model starts from a causal LM, whose log-probabilities are the rewards. Pass the "
            "causal LM that it was made from."
        )
    check_causal_lm(model)
    return model


def check_causal_lm(model: Any) -> None:
    """
    Refuses a model that is not a decoder-only causal LM, whatever is in its configuration.

    Raises:
        TypeError: if the model is of another kind, or a token changes predictions before it.
    """
    is_model = isinstance(model, Module)
    if not is_model:
        raise TypeError(
            f"`model` is a `{type(model).__name__}`, but must be the Hub id or folder of a causal LM as a `str`, or "
            "the model itself. TRL's `RewardTrainer` has no `model_init`: make a trainer for each trial."
        )
    if not is_deepspeed_zero3_enabled():  # spread over processes, weights can't be used before the first step
        refuse_not_causal(model)


def as_config(args: Any, model: str | PreTrainedModel | PeftModel) -> AutoregressiveRewardConfig:
    """
    Returns the arguments of the trainer. If there are none, they are the defaults, with a folder named after the model.

    Raises:
        TypeError: if they are the arguments of another trainer.
    """
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(network_of(model).config)
        return AutoregressiveRewardConfig(f"{model_id.split('/')[-1]}-ARM")
    if not isinstance(args, AutoregressiveRewardConfig):
        raise TypeError(
            f"`args` is a `{type(args).__name__}`, but must be an `AutoregressiveRewardConfig`, which takes the "
            "arguments of `RewardConfig` and those of the reward, such as `beta`."
        )
    return args


def as_causal_lm(peft_config: PeftConfig) -> PeftConfig:
    """
    Returns the same configuration with the task type of a causal LM, which `AutoPeftModel` needs to load the adapter.

    Raises:
        ValueError: if its task type is another one.
    """
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            f"`peft_config.task_type` is {peft_config.task_type}, but an autoregressive reward model is a causal LM. "
            "Use `task_type='CAUSAL_LM'`."
        )
    peft_config = copy.deepcopy(peft_config)  # TRL appends to its lists
    peft_config.task_type = TaskType.CAUSAL_LM
    return peft_config


def check_active_adapter(model: PeftModel) -> None:
    """
    Refuses a model whose active adapter couldn't be loaded from where it is saved, or isn't trained.

    Raises:
        ValueError: if the model has such an adapter.
    """
    if model.active_adapters != ["default"]:
        raise ValueError(
            f"The model has the adapters {list(model.peft_config)}, and {model.active_adapters} are active, but only "
            "an adapter with the name 'default' is loaded again from the folder that it is saved in. Load yours under "
            "that name, `PeftModel.from_pretrained(base, folder, is_trainable=True)`; merge one that it builds on into "
            "the base: `base = model.merge_and_unload()`."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "All weights of the model are frozen, but an adapter is to be trained. Load it with "
            "`PeftModel.from_pretrained(base, folder, is_trainable=True)`, or give `peft_config=LoraConfig()`."
        )


def check_adapter(model: PreTrainedModel | PeftModel, args: AutoregressiveRewardConfig) -> None:
    """
    Refuses an adapter that PEFT can't train with the given arguments.

    Raises:
        ValueError: if the model has such an adapter.
    """
    if not isinstance(model, PeftModel):
        return
    config: Any = model.active_peft_config
    if args.gradient_checkpointing and config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(
            f"The adapter is of the type `{config.peft_type.value}`, a cache, which doesn't go together with gradient "
            "checkpointing, the default of TRL's trainers. Set `gradient_checkpointing=False`."
        )
    bias, init = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", True)
    changes = "bias" if bias != "none" else "init_lora_weights" if init not in HARMLESS_INITS else None
    if changes is not None and args.reference is not None:
        raise ValueError(
            f"`reference` is {args.reference!r}, but the adapter has `{changes}={getattr(config, changes)!r}`, which "
            "changes weights of the base itself, so that there is no base without it. Leave that at its default."
        )
    is_tied = network_of(model).config.get_text_config().tie_word_embeddings
    if is_tied and getattr(config, "trainable_token_indices", None) and "lm_head" in (config.modules_to_save or []):
        raise ValueError(
            "The LM head of the model is tied to its embeddings, and PEFT can't train tokens of the embeddings "
            "(`trainable_token_indices`) together with a copy of the head (`modules_to_save=['lm_head']`), as "
            "`chat_template_path` does if it adds tokens. Add them yourself: `model, tokenizer, added = "
            "trl.clone_chat_template(model, tokenizer, path)`, and "
            "`LoraConfig(trainable_token_indices={'embed_tokens': added})`."
        )
