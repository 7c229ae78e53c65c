"""What a reward model is trained from: a causal LM, or an adapter on one."""

import copy
from typing import Any

from accelerate.utils import is_peft_model
from peft import PeftConfig, PeftModel, TaskType
from torch.nn import Module
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..hub.kv_cache import network_of
from ..hub.sharing import HARMLESS_INITS
from .config import AutoregressiveRewardConfig


def load_causal_lm(
    model_id: str, args: AutoregressiveRewardConfig, quantization_config: QuantizationConfigMixin | None
) -> PreTrainedModel:
    """
    Loads what is to be trained, as TRL's trainers do.

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
    Raises:
        TypeError: if the model is not a decoder-only causal LM.
    """
    is_model = isinstance(model, Module)
    if not is_model:
        raise TypeError(
            f"`model` is a `{type(model).__name__}`, but must be the Hub id or folder of a causal LM as a `str`, or "
            "the model itself. TRL's `RewardTrainer` has no `model_init`: make a trainer for each trial."
        )
    network: Any = model.get_base_model() if is_peft_model(model) else model
    if network.config.is_encoder_decoder or not network.can_generate():
        raise TypeError(
            f"`model` is a `{type(network).__name__}`, but an autoregressive reward model is a decoder-only causal LM, "
            "whose log-probabilities are the rewards. Load it with `AutoModelForCausalLM`, or pass its id."
        )


def as_config(args: Any, model: str | PreTrainedModel | PeftModel) -> AutoregressiveRewardConfig:
    """
    The arguments; without any, those of TRL's trainers, named after the model.

    Raises:
        TypeError: if they are of another trainer.
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
    The same adapter, said to be that of a causal LM: without that, `AutoPeftModel` can't load what is published.

    Raises:
        ValueError: if it is said to be for another task.
    """
    if peft_config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            f"`peft_config.task_type` is {peft_config.task_type}, but an autoregressive reward model is a causal LM. "
            "Use `task_type='CAUSAL_LM'`."
        )
    peft_config = copy.deepcopy(peft_config)  # TRL appends to its lists
    peft_config.task_type = TaskType.CAUSAL_LM
    return peft_config


def check_adapter(model: PreTrainedModel | PeftModel, args: AutoregressiveRewardConfig) -> None:
    """
    Raises:
        ValueError: if a model has an adapter that PEFT can't train so.
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
    if changes is not None and (args.reference is not None or args.decode_alpha is not None):
        name = "decode_alpha" if args.reference is None else "reference"
        raise ValueError(
            f"`{name}` is {getattr(args, name)!r}, but the adapter has `{changes}={getattr(config, changes)!r}`, which "
            "changes weights of the base itself, so that there is no base without it. Leave that at its default."
        )
    is_tied = network_of(model).config.get_text_config().tie_word_embeddings
    if is_tied and getattr(config, "trainable_token_indices", None) and "lm_head" in (config.modules_to_save or []):
        raise ValueError(
            "The LM head of the model is tied to its embeddings, and PEFT can't train tokens of these "
            "(`trainable_token_indices`) beside a copy of that (`modules_to_save=['lm_head']`), which is what "
            "`chat_template_path` asks for if it adds tokens. Add them yourself: `model, tokenizer, added = "
            "trl.clone_chat_template(model, tokenizer, path)`, and "
            "`LoraConfig(trainable_token_indices={'embed_tokens': added})`."
        )
