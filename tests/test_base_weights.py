"""A fingerprint is the same for copies of a model, and another one for whatever computes something else."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import VOCAB_SIZE, random_prompts, save_adapter, tiny_llama
from transformers import AutoModelForCausalLM
from zoo import tiny

from hf_genarm import AutoregressiveRewardModel, RewardInfo
from hf_genarm.hub.base_weights import has_weights, weights_fingerprint
from hf_genarm.hub.sharing import shares_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def saved(tmp_path):
    """A base with biases and an adapter on it, in folders."""
    tiny_llama(0, attention_bias=True).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "arm")
    return tmp_path


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


@pytest.mark.parametrize("native", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("std", [0.4, 0.02, 1e-4])
def test_copies_in_any_dtype(native, dtype, std):
    make = lambda seed: tiny_llama(seed, initializer_range=std).to(native)  # noqa: E731
    copies = [make(0).to(x) for x in DTYPES]
    fingerprint = weights_fingerprint(make(0).to(dtype))
    assert all(has_weights(x, fingerprint) for x in copies)
    assert not any(has_weights(make(1).to(x), fingerprint) for x in DTYPES)


def test_adapters_are_not_part_of_it(saved):
    expected = weights_fingerprint(load(saved))
    for option in ({}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}):
        folder = save_adapter(saved / "base", saved / "other", **option)
        model = PeftModel.from_pretrained(load(saved), folder)
        assert has_weights(model, expected)
        assert has_weights(load(saved), weights_fingerprint(model))
        assert not has_weights(tiny_llama(1, attention_bias=True), weights_fingerprint(model))
    assert not has_weights(model.merge_and_unload(), expected)


def test_tokens_may_be_added(saved):
    model = load(saved)
    model.resize_token_embeddings(64)
    expected = weights_fingerprint(model)
    model.resize_token_embeddings(70)
    assert has_weights(model, expected)
    model.resize_token_embeddings(200)
    assert has_weights(model, expected)  # whose rows are known
    assert has_weights(load(saved), weights_fingerprint(model))  # which lacks rows
    with torch.no_grad():
        model.model.embed_tokens.weight[30] = 1
    assert not has_weights(model, expected)


def scale(*names):
    def change(model):
        for name, x in model.named_parameters():
            if any(part in name for part in names):
                x.mul_(1.01)

    return change


def a_head(model):
    model.model.layers[1].self_attn.q_proj.weight[:8] = 0


def a_row(model):
    model.model.embed_tokens.weight[VOCAB_SIZE - 1] = 1


def an_expert(model):
    model.model.layers[1].mlp.experts.gate_up_proj[11].mul_(1.05)


CHANGES = {
    "norms": ("llama", scale("layernorm")),
    "the last norm": ("llama", scale("model.norm")),
    "layer 70": ("deep", scale("layers.70.")),
    "biases": ("biased", scale("bias")),
    "a head": ("llama", a_head),
    "the last embedding": ("llama", a_row),
    "an expert": ("experts", an_expert),
    "light training": ("llama", lambda model: [x.mul_(1 + 1e-3 * torch.randn_like(x)) for x in model.parameters()]),
}
MODELS = {
    "llama": lambda: tiny_llama(0),
    "deep": lambda: tiny_llama(0, num_hidden_layers=80),
    "biased": lambda: tiny_llama(0, attention_bias=True),
    "experts": lambda: tiny("mixtral", num_local_experts=16),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_tensor_counts(change, dtype):
    kind, do = CHANGES[change]
    model = MODELS[kind]()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("bias"):
                x.normal_()
    fingerprint = weights_fingerprint(model)
    assert has_weights(model.to(dtype), fingerprint)
    with torch.no_grad():
        do(model)
    assert not has_weights(model, fingerprint)
    if change != "light training":  # which rounding hides there
        assert not has_weights(model.to(torch.float16), fingerprint)


SETTINGS = {
    "rope_theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "scaled rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "rms_norm_eps": ("llama", {"rms_norm_eps": 1e-2}),
    "hidden_act": ("llama", {"hidden_act": "gelu"}),
    "softcap": ("gemma2", {"final_logit_softcapping": 5.0}),
    "sliding window": ("mistral", {"sliding_window": 3}),
    "experts per token": ("mixtral", {"num_experts_per_tok": 2}),
    "scaling": ("granite", {"logits_scaling": 2.0}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_count(setting):
    name, values = SETTINGS[setting]
    plain, other, ids = tiny(name), tiny(name, **values), random_prompts(1, 8)
    with torch.no_grad():
        assert not torch.allclose(plain(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-3)
    assert has_weights(tiny(name), weights_fingerprint(plain))
    assert has_weights(other, weights_fingerprint(plain)) is False


def test_an_adapter_is_not_fused_with_a_base_of_another_rope_theta(saved):
    RewardInfo(base_weights=weights_fingerprint(load(saved))).save(saved / "arm")
    other = tiny_llama(0, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    arm = AutoregressiveRewardModel.from_pretrained(str(saved / "arm"), other).model
    assert not shares_weights(arm, other)
    assert arm.config.rope_parameters["rope_theta"] == 1e4


# Of `tiny_llama(0)`, written by the version before
OLD = (
    "bf16:"
    "ad3d8dbe84bed33d25bd0cbd4e3efbbd20be0f3f1d3fa13e033e493e81bec73ef13e483f1abe39bfbf3ef4bec13e633d56be653e8c3d4b"
    "3fd23e05bfa03dc4be613ed9bd393f3fbe8cbe18bf0fbda1bce63ef53e1cbe323e39beb53e143fd8befabbcebe1f3e6b3db43d5dbdcf3e"
    "213ed5be27be0c3faf3eb1beeebec9bec2be09be3f3f98be9abe073f0a3f1fbf1fbd89bec73e29bfefbd0c3f12beec3e043f46bd83bd85"
    "befcbd3f3f93bea53e043e3f3e3f3e3dbfa33d93be31bec33d303db4be123e2a3e793e213e073f18be1e3f963e86bee03ebabe6c3ebabc"
    "b8be9a3e3fbf4ebd3abb42be9d3b47bd0abd9d3ed93e903e823e7bbefa3d07beab3e85beaabe463e86bc3ebe663e36bc71be8c3e2c3f17"
    "3f99be353e29be953e083e6b3d16bf343eb63ecfbe48bfbcbe483d45bfadbc5e3e1bbfae3e073e0a3f4abd9e3e8fbe113f71be7cbfa93e"
    "733e9abdf43e22be51be77bee83e1abf8cbc01bf213e90bf9fbebdbedfbe03bdcdbe233d0b3c733e2ebea0bd3f3d5e3ec3bd8cbe15bfe5"
    "3e923d393ef4be91be503e123d8cbd93be053fda3d1abf443e393ecf3e3a3d8bbea1befe3d993ecf3de9bef0be1e3f69beddbeebbec93e"
    "dbbcecbe29be5f3e443f403ec1bd9ebe3abd9bbe9abf06bea53e3f3f14bf45bdaf3e12bf523fd03d5e3d94bc493ed9be6abdcb3e4e3fb7"
    "bde0bd58bf9f3e123fbf3e253eb8bed6be"
)


def test_fingerprints_of_the_version_before():
    RewardInfo(base_weights=OLD)
    for dtype in DTYPES:
        assert has_weights(tiny_llama(0).to(dtype), OLD)
        assert has_weights(tiny_llama(1).to(dtype), OLD) is False
    adapted = get_peft_model(tiny_llama(0), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert has_weights(adapted, OLD)


def test_weights_that_can_not_be_read():
    model = tiny_llama(0)
    known = weights_fingerprint(model)
    model.config.quantization_config = {"quant_method": "gptq"}
    assert weights_fingerprint(model) is None
    assert weights_fingerprint(tiny_llama(0).to("meta")) is None
    for fingerprint in (known, OLD):
        assert has_weights(model, fingerprint) is None
    assert has_weights(tiny_llama(0), None) is None
