"""Folders of others: what is harmless is loaded, what can't be is refused in a sentence, soon and without memory."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import random_prompts, save_adapter, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM
from zoo import tiny

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo
from hf_genarm.hub import adapter_config
from hf_genarm.hub.compatibility import generation_prompt
from hf_genarm.hub.sharing import merged, shares_weights

IDS = random_prompts(1, 6)
load = AutoregressiveRewardModel.from_pretrained


@pytest.fixture
def saved(tmp_path):
    tiny_llama(0).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "arm")
    return tmp_path


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def rewrite(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


OLD_BUFFERS = {
    "gpt2": {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)},
    "gpt_neo": {
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 8, 8).tril().bool(),
        "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
    },
    "codegen": {"transformer.h.0.attn.causal_mask": torch.ones(1, 1, 8, 8).tril()},
    "gpt_bigcode": {"transformer.h.0.attn.bias": torch.ones(8, 8).tril().bool()},
    "falcon": {"transformer.h.0.self_attention.maybe_rotary.inv_freq": torch.rand(4)},
    "xglm": {"model.embed_positions.weights": torch.rand(66, 16)},
}


@pytest.mark.parametrize("name", OLD_BUFFERS)
def test_buffers_of_old_files_are_left_out(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | OLD_BUFFERS[name], path, {"format": "pt"})
    torch.testing.assert_close(logits(load(tmp_path).model), logits(model))


@pytest.mark.parametrize("key", ["score.weight", "model.layers.0.attn.bias"])
def test_weights_that_a_model_lacks_are_still_refused(key, saved):
    path = saved / "base" / "model.safetensors"
    save_file(load_file(path) | {key: torch.rand(1, 16)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"has `{key}`, which"):
        load(saved / "base")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_that_is_none(text, saved):
    (saved / "base" / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    for folder in ("base", "arm"):
        with pytest.raises(ValueError, match="must be an index of shards"):
            load(saved / folder)


def test_several_adapters_in_a_folder(saved):
    (saved / "both").mkdir()
    for name in ("good", "short"):
        shutil.copytree(saved / "arm", saved / "both" / name)
    with pytest.raises(ValueError, match=r"several adapters: `good`, `short`.*subfolder=\"good\""):
        load(saved / "both")
    load(saved / "both", subfolder="short")


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_replication": [[0, 5]]}, r"repeats the layers \[0, 5\].*2 layers"),
        ({"layer_replication": [[-1, 2]]}, "repeats the layers"),
        ({"layer_replication": [[1, 1]]}, "repeats the layers"),
        ({"layer_replication": ["ab"]}, "repeats the layers"),
        ({"trainable_token_indices": [10**9]}, r"token 1000000000 .*48 tokens"),
        ({"trainable_token_indices": [-1]}, "token -1"),
        ({"trainable_token_indices": {"embed_tokens": [10**9]}}, "token 1000000000"),
    ],
    ids=str,
)
def test_values_out_of_range(values, message, has_base, saved):
    rewrite(saved / "arm" / "adapter_config.json", **values)
    base = AutoModelForCausalLM.from_pretrained(saved / "base") if has_base else None
    with pytest.raises(ValueError, match=message):
        load(saved / "arm", base)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save", "rank_pattern"])
def test_a_regular_expression_that_never_ends(field, saved, monkeypatch):
    monkeypatch.setattr(adapter_config, "_SECONDS", 1)
    pattern = r"(([a-z_.0-9])*)*(([a-z_.0-9])*)*!"
    value = {"modules_to_save": [pattern], "rank_pattern": {pattern: 2}}.get(field, pattern)
    rewrite(saved / "arm" / "adapter_config.json", **{field: value})
    with pytest.raises(ValueError, match=r"regular expression in its `adapter_config.json`"):
        load(saved / "arm")


def test_a_regular_expression_that_ends(saved):
    folder = save_adapter(saved / "base", saved / "other", target_modules=r"(?:.*?(?:self_attn).*?(?:q_proj|v_proj))")
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    assert shares_weights(load(folder, base).model, base)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_numbers_that_are_no_factors(dtype, saved):
    path = saved / "arm" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = min(tensors)
    save_file(tensors | {key: tensors[key].to(dtype)}, path, {"format": "pt"})
    for base in (None, AutoModelForCausalLM.from_pretrained(saved / "base")):
        with pytest.raises(ValueError, match="floating-point numbers"):
            load(saved / "arm", base)


def test_a_copy_in_4_bits_is_taken_to_be_the_base_that_is_given(saved, caplog):
    rewrite(saved / "arm" / "adapter_config.json", base_model_name_or_path="unsloth/tiny-llama-unsloth-bnb-4bit")
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    assert shares_weights(load(saved / "arm", base).model, base)
    assert "unsloth/tiny-llama-unsloth-bnb-4bit" in caplog.text


def test_a_path_and_what_is_none(saved):
    assert torch.equal(logits(load(Path(saved, "arm")).model), logits(load(str(saved / "arm")).model))
    for wrong in (None, 3, tiny_llama(0), ["a"]):
        with pytest.raises(TypeError, match="it is a Hub id or a folder"):
            load(wrong)


def test_a_copy_of_an_adapter_may_be_merged_and_the_one_that_shares_may_not(saved):
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    arm, before = load(saved / "arm", base), logits(base)
    expected = logits(arm.model)
    for model in (copy.deepcopy(arm.model).merge_and_unload(), merged(arm.model)):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    layers = [x for x in arm.model.modules() if hasattr(x, "lora_A")]
    assert layers
    refused = [arm.model.merge_adapter, arm.model.merge_and_unload, *(x.merge for x in layers)]
    for merge in refused:
        with pytest.raises(ValueError, match="would change the weights of the base model"):
            merge()
    assert torch.equal(logits(base), before)
    own = copy.deepcopy(arm.model)
    next(x for x in own.modules() if hasattr(x, "lora_A")).merge()
    assert torch.equal(logits(base), before)


# --- what it says about itself ---

SETTING = {"alpha": 1.0, "reference": "base", "temperature": 1.0, "measured": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 1e5},
        {"alpha": -50},
        {"temperature": 1e3},
        {"measured": {"settings": 3}},
        {"measured": {"settings": [3]}},
        {"measured": {"settings": [{"alpha": 1.0}]}},
        {"measured": {"examples": [{"prompt": 3}]}},
        {"measured": {"examples": "a"}},
    ],
    ids=str,
)
def test_recommendations_of_strangers(change):
    RewardInfo(recommended=SETTING)
    with pytest.raises(ValueError, match=r"^`recommended` is .*from -32 to 32.*as `hf-genarm tune` writes them"):
        RewardInfo(recommended=SETTING | change)


# --- tokens and templates ---


def other_tokenizer():
    """The same tokens under other ids."""
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    names = sorted(vocab, key=vocab.get)
    regular = names[3:]
    state["model"]["vocab"] = {name: index for index, name in enumerate([*names[:3], *reversed(regular)])}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    return tokenizer


@pytest.fixture
def two(tmp_path):
    """A base, and a reward model with embeddings of its own and other ids."""
    size = len(tiny_tokenizer())
    for name, seed in (("base", 0), ("arm", 1)):
        tiny_llama(seed, vocab_size=size).save_pretrained(tmp_path / name)
    return tmp_path


def test_ids_that_can_not_be_compared(two):
    def guide(**kwargs):
        base = AutoModelForCausalLM.from_pretrained(two / "base")
        return GenARMLogitsProcessor.from_pretrained(str(two / "arm"), base_model=base, **kwargs)

    with pytest.raises(ValueError, match=r"No tokenizer of the base .* Pass `tokenizer`"):
        guide()
    with pytest.raises(ValueError, match=r"No tokenizer of the reward model .* Save its tokenizer in its folder"):
        guide(tokenizer=tiny_tokenizer())
    other_tokenizer().save_pretrained(two / "arm")
    with pytest.raises(ValueError, match=r"No tokenizer of the base"):
        guide()
    assert guide(tokenizer=tiny_tokenizer())._vocab_maps[0] is not None
    tiny_tokenizer().save_pretrained(two / "base")
    assert guide()._vocab_maps[0] is not None
    tiny_tokenizer().save_pretrained(two / "arm")
    assert guide()._vocab_maps[0] is None


def test_the_same_embeddings_have_the_same_ids(saved):
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved / "base"), LoraConfig(init_lora_weights=False))
    model.merge_and_unload().save_pretrained(saved / "full")
    GenARMLogitsProcessor.from_pretrained(str(saved / "full"), base_model=base)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('The first message is that of the system.') }}",
        "{{ messages[1].content }}",
        "{{ messages[0].content }}{% if not add_generation_prompt %}<eos>{% else %}<bos>{% endif %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
    ids=["refuses", "fails", "ends otherwise", "adds nothing"],
)
def test_templates_whose_generation_prompt_is_not_known(template):
    tokenizer = tiny_tokenizer()
    assert generation_prompt(tokenizer)
    tokenizer.chat_template = template
    assert generation_prompt(tokenizer) is None


def test_ids_that_a_reward_model_lacks():
    arm = AutoregressiveRewardModel(tiny_llama(0), tiny_tokenizer())
    with pytest.raises(ValueError, match=r"gives the id \d+, but the reward model has 48 embeddings"):
        arm.score(["What"], [" is"])
