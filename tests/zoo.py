"""Every causal LM of transformers as a tiny model: its config, shrunken by the names that its sizes go by."""

import dataclasses

import torch
from tiny import BOS, EOS, PAD, VOCAB_SIZE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIZES = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size"), VOCAB_SIZE),
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "initializer_range": 0.4,
    "dropout": 0.0,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads"), 2),
    "num_key_value_heads": 1,
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("layer_group_size", "attn_layer_period"), 2),
    "attn_layer_offset": 1,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
LATENT = ["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3"]
LATENT += ["sarvam_mla", "youtu", "diffllama", "dots3_note_text"]
HYBRID = ["jamba", "lfm3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"]
HYBRID += ["recurrent_gemma"]

# Bidirectional unless their configuration says otherwise, as users must set it; all others have their own default.
AS_DECODERS = ["bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"]
AS_DECODERS += ["reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"]
AS_DECODERS += ["xlm-roberta-xl", "xmod"]

# What some architectures need besides.
MORE = {
    **{name: {"num_key_value_heads": 2} for name in LATENT},
    **{name: {"num_hidden_layers": 4} for name in HYBRID},
    "bailing_hybrid": {"num_hidden_layers": 4, "num_key_value_heads": 2},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 4, "global_head_dim": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "hrm_text": {"initializer_range": 0.1},  # with larger ones, its cycles make rounding errors large
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"moe_topk": 2, "num_key_value_heads": 2, "num_layers": 1, "expert_ffn_hidden_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1},
    "minicpm3": {"num_key_value_heads": 2, "dim_model_base": 16},  # which its logits are multiplied by
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1},
    "qwen4_exp_text": {
        "num_hidden_layers": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "axial_pos_embds_dim": [8, 8],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "local"],
        "feed_forward_size": 16,
        "attention_head_size": 8,
        "local_attn_chunk_length": 8,
    },
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xlm": {"causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_d_state": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
}

# With networks for images or sound that have no such names; their decoders of text are here under names of their own.
MULTIMODAL = {"dots3_note", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2"}
MULTIMODAL |= {"moss_transcribe_diarize"}
# Bytes in patches; codes of sound; drafts of another model's states; attributes that its own config lacks.
OTHERS = {"blt", "moshi", "musicgen", "musicgen_melody", "gemma4_assistant", "gemma4_unified_assistant", "dbrx"}
# Whatever their configuration: each prediction of XLNet needs a mask of its own, CPM-Ant reads a prompt at once, and
# ProphetNet mixes up the relative positions of its tokens.
BIDIRECTIONAL = {"cpmant", "prophetnet", "xlnet"}
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MULTIMODAL - OTHERS - BIDIRECTIONAL)


def shrunken(config_class: type[PreTrainedConfig], **more) -> PreTrainedConfig:
    names = {field.name for field in dataclasses.fields(config_class)}
    sizes = {config_class.attribute_map.get(name, name): size for name, size in SIZES.items() if name not in names}
    sizes |= SIZES
    parts = {name: part for name, part in config_class.sub_configs.items() if issubclass(part, PreTrainedConfig)}
    sizes |= {name: shrunken(part, **MORE.get(part.model_type, {})).to_dict() for name, part in parts.items()}
    return config_class(**{name: size for name, size in sizes.items() if name in names} | more)


def tiny(name: str, **more) -> PreTrainedModel:
    """The causal LM of the type `name` with at most 5 million weights."""
    more = MORE.get(name, {}) | ({"is_decoder": True} if name in AS_DECODERS else {}) | more
    config = shrunken(CONFIG_MAPPING[name], **more)
    with torch.device("meta"):
        n_weights = sum(x.numel() for x in AutoModelForCausalLM.from_config(config).parameters())
    assert n_weights < 5e6, f"{name} has {n_weights} weights"
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(config).eval()
