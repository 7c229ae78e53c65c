"""Loading: nothing is changed, nothing half-written acts, and no code runs."""

import ast
import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from oracle import Recompute
from peft import LoraConfig, PeftModel, PromptLearningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora_config
from safetensors.torch import load_file, save_file
from tiny import random_prompts, save_adapter, tiny_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, GuidanceWarning, RewardInfo
from hf_genarm.hub.base_weights import has_weights, weights_fingerprint
from hf_genarm.hub.sharing import shares_weights

IDS = random_prompts(2, 6)


@pytest.fixture
def saved(tmp_path):
    """A base with biases and an adapter on it, in folders."""
    tiny_llama(0, attention_bias=True).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "arm")
    return tmp_path


def load(folder, base=None, **kwargs):
    return AutoregressiveRewardModel.from_pretrained(str(folder), base, **kwargs).model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def rewrite(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- the base is left as it is ---

SHARED = {
    "bias": [{"bias": "none"}],
    "target_modules": [{"target_modules": ["q_proj", name]} for name in ("embed_tokens", "lm_head")],
    "use_dora": [{"use_dora": True}],
    "use_rslora": [{"use_rslora": True}],
    "lora_bias": [{"lora_bias": True}],
    "lora_dropout": [{"lora_dropout": 0.5}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "modules_to_save": [{"modules_to_save": [name]} for name in ("lm_head", "embed_tokens", "norm")],
    "trainable_token_indices": [{"trainable_token_indices": [3, 4, 5]}],
    "ensure_weight_tying": [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 4, 5], "ensure_weight_tying": True},
    ],
    "alora_invocation_tokens": [{"alora_invocation_tokens": IDS[0, 2:4].tolist()}],
    "layer_replication": [{"layer_replication": [(0, 2), (1, 2)]}],
    "rank_pattern": [{"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}],
    "layers_to_transform": [{"layers_to_transform": [1], "layers_pattern": "layers"}],
    "exclude_modules": [{"target_modules": "all-linear", "exclude_modules": ["o_proj"]}],
    "init_lora_weights": [{"init_lora_weights": init} for init in (True, False, "gaussian", "orthogonal", "eva")],
}
OWN = {
    "bias": [{"bias": "all"}, {"bias": "lora_only"}],
    "target_parameters": [{"target_modules": [], "target_parameters": ["q_proj.weight"]}],
    "init_lora_weights": [
        {"init_lora_weights": init} for init in ("olora", "pissa", "pissa_niter_4", "mica", "lora_ga")
    ],
    "kasa_config": [{"kasa_config": "KasaConfig"}],
    "velora_config": [{"velora_config": "VeloraConfig"}],
    "monteclora_config": [{"monteclora_config": "MontecloraConfig"}],
}
# They describe an adapter and don't change it, or go with one that is above.
WITH_OTHERS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
WITH_OTHERS |= {"inference_mode", "r", "lora_alpha", "layers_pattern", "alpha_pattern", "eva_config", "lora_ga_config"}
WITH_OTHERS |= {"megatron_core", "qalora_group_size", "runtime_config"}
# They need hardware, packages or other adapters; weights are not shared.
NOT_HERE = {"megatron_config", "loftq_config", "corda_config", "use_qalora", "use_bdlora", "arrow_config"}


def test_every_option_of_lora_is_tested():
    assert {x.name for x in fields(LoraConfig)} <= SHARED.keys() | OWN.keys() | WITH_OTHERS | NOT_HERE


OPTIONS = [(option, True, tied) for options in SHARED.values() for option in options for tied in (False, True)]
OPTIONS += [(option, False, tied) for options in OWN.values() for option in options for tied in (False, True)]
# Whether the two embeddings are one matters where one of them is trained.
OPTIONS = [x for x in OPTIONS if not x[2] or any(name in str(x[0]) for name in ("embed", "head", "token"))]


@pytest.mark.parametrize(("option", "is_shared", "tied"), OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_options_of_lora(tmp_path, option, is_shared, tied):
    """The base is what it was, bit by bit, and the adapter is what PEFT loads onto a copy of its own."""
    tiny_llama(0, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    try:
        option = {name: getattr(lora_config, x)() if str(x).endswith("Config") else x for name, x in option.items()}
        folder = save_adapter(tmp_path / "base", tmp_path / "arm", 1, **option)
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"not in this version of PEFT: {error}")
    torch.manual_seed(0)  # some initialisations draw numbers while they load
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before, unguided = {name: x.clone() for name, x in base.state_dict().items()}, logits(base)
    torch.manual_seed(0)
    arm = load(folder, base)
    processor = GenARMLogitsProcessor(arm, base_model=base)
    if option.get("bias") == "lora_only":  # which older versions of PEFT forget to save
        is_shared = not any(name.endswith(".bias") for name in load_file(Path(folder, "adapter_model.safetensors")))
    assert shares_weights(arm, base) == is_shared
    assert processor.engine in (("shared", "fused") if is_shared else ("separate",))
    if "pissa_niter_4" not in option.values():
        torch.testing.assert_close(logits(arm), logits(plain), atol=1e-5, rtol=0)
    assert "alora_invocation_tokens" in option or not torch.equal(logits(plain), unguided)
    if not option.keys() & {"alora_invocation_tokens", "layer_replication"} and "pissa_niter_4" not in option.values():
        output = base.generate(IDS, logits_processor=[processor], max_new_tokens=4)
        expected = base.generate(IDS, logits_processor=[Recompute([plain], [1.0])], max_new_tokens=4)
        assert output.tolist() == expected.tolist()
    assert torch.equal(logits(base), unguided)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_embeddings_that_an_adapter_was_not_trained_on(saved):
    """PEFT saves the embeddings below an adapter; those of a base that has others stay."""
    folder = save_adapter(saved / "base", saved / "arm", target_modules=["q_proj", "lm_head"])
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    expected = logits(load(folder, base))
    with torch.no_grad():
        base.lm_head.weight += 1
    before = base.lm_head.weight.clone()
    assert torch.equal(logits(load(folder, base)), expected)
    assert torch.equal(base.lm_head.weight, before)


SETTINGS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1, "target_modules": None},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 8},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PSOFT": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 1},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": IDS[0, :2].tolist()},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 8},
}
# All but those that are no adapters on weights, or need more than tokens, or packages.
KINDS = {x.value for x, make in PEFT_TYPE_TO_CONFIG_MAPPING.items() if not issubclass(make, PromptLearningConfig)}
KINDS -= {"LORA", "ADAMSS", "POLY", "SHADOW", "XLORA"}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_adapters(tmp_path, kind):
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | SETTINGS.get(kind, {})
    make = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    settings = {name: x for name, x in settings.items() if name in {y.name for y in fields(make)}}
    tiny_llama(0, attention_bias=True, num_key_value_heads=2).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), make(**settings))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "arm")
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "arm").eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    unguided = logits(base)
    torch.manual_seed(0)
    torch.testing.assert_close(logits(load(tmp_path / "arm", base)), logits(plain), atol=1e-5, rtol=0)
    assert not torch.equal(logits(plain), unguided)
    assert torch.equal(logits(base), unguided)


def test_no_random_numbers_are_drawn_for_the_check(saved):
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    torch.manual_seed(0)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "base"), saved / "arm")
    expected = torch.rand(1)
    torch.manual_seed(0)
    load(saved / "arm", base)
    assert torch.equal(torch.rand(1), expected)


# --- no code runs ---


class Touch:
    """What a pickle can do: write a file where it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def bomb(path, mark):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({"weights": Touch(mark)}))


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that a pickle writes; whatever reads one, by `torch.load` or by itself, runs it."""
    path = tmp_path / "it ran"
    monkeypatch.setattr(torch, "load", lambda file, *_, **__: pickle.loads(Path(file).read_bytes()))
    yield path
    assert not path.exists()


REFUSED = pytest.raises(ValueError, match=r"Pickled weights .* are refused")


@pytest.mark.parametrize("has_base", [False, True])
def test_a_pickled_adapter_beside_other_safetensors(saved, mark, has_base):
    (saved / "arm" / "adapter_model.safetensors").rename(saved / "arm" / "optimizer.safetensors")
    bomb(saved / "arm" / "adapter_model.bin", mark)
    with REFUSED:
        load(saved / "arm", AutoModelForCausalLM.from_pretrained(saved / "base") if has_base else None)


def test_a_pickle_beside_the_adapter(saved, mark):
    bomb(saved / "arm" / "adapter_model.bin", mark)
    load(saved / "arm")


def test_a_pickled_model_beside_other_safetensors(saved, mark):
    (saved / "base" / "model.safetensors").rename(saved / "base" / "other.safetensors")
    bomb(saved / "base" / "pytorch_model.bin", mark)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(saved / "base")


@pytest.mark.parametrize("where", ["the base of an adapter", "a model"])
def test_a_pickled_model(saved, mark, where):
    (saved / "base" / "model.safetensors").unlink()
    bomb(saved / "base" / "pytorch_model.bin", mark)
    with pytest.raises((ValueError, OSError), match="safetensors"):
        load(saved / {"the base of an adapter": "arm", "a model": "base"}[where])


@pytest.mark.parametrize("where", ["the base of an adapter", "a model"])
def test_a_pickled_shard_in_the_index(saved, mark, where):
    tensors = load_file(saved / "base" / "model.safetensors")
    (saved / "base" / "model.safetensors").unlink()
    (saved / "base" / "other.safetensors").write_bytes(b"")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model.bin")}
    (saved / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    bomb(saved / "base" / "pytorch_model.bin", mark)
    with REFUSED:
        load(saved / {"the base of an adapter": "arm", "a model": "base"}[where])


def test_a_base_that_is_an_adapter_itself(saved, mark):
    save_adapter(saved / "base", saved / "first")
    (saved / "first" / "adapter_model.safetensors").unlink()
    bomb(saved / "first" / "adapter_model.bin", mark)
    rewrite(saved / "arm" / "adapter_config.json", base_model_name_or_path=str(saved / "first"))
    with pytest.raises(ValueError, match=r"is an adapter itself. Merge that"):
        load(saved / "arm")


@pytest.mark.parametrize("folder", ["arm", "base"])
def test_pickles_cannot_be_requested(saved, folder):
    with pytest.raises(ValueError, match="`use_safetensors` is False"):
        load(saved / folder, use_safetensors=False)


CODE = "from pathlib import Path\nPath({!r}).touch()\n"


@pytest.mark.parametrize("what", ["model", "base", "tokenizer"])
def test_remote_code_neither_runs_nor_asks(saved, mark, monkeypatch, what):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    (saved / "base" / "remote.py").write_text(CODE.format(str(mark)))
    if what == "tokenizer":
        classes = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["remote.Mine", None]}}
        (saved / "base" / "tokenizer_config.json").write_text(json.dumps(classes))
        base = AutoModelForCausalLM.from_pretrained(saved / "base")
        GenARMLogitsProcessor.from_pretrained(str(saved / "arm"), base_model=base)
    else:
        auto_map = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}
        rewrite(saved / "base" / "config.json", model_type="mine", auto_map=auto_map)
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(saved / {"model": "base", "base": "arm"}[what])
    assert not asked


# --- all of it, or nothing ---


def damage(folder, how):
    path = next(Path(folder).glob("*model.safetensors"))
    tensors = load_file(path)
    name = sorted(tensors)[1]
    if how == "missing":
        del tensors[name]
    elif how == "renamed":
        tensors[f"{name}_2"] = tensors.pop(name)
    elif how == "too many":
        tensors["one.more"] = torch.ones(2)
    elif how == "shape":
        tensors[name] = torch.ones(3, *tensors[name].shape)
    else:
        tensors[name].view(-1)[-1] = {"NaN": torch.nan, "infinite": -torch.inf}[how]
    save_file(tensors, path, {"format": "pt"})
    return "one.more" if how == "too many" else name


DAMAGES = ["missing", "renamed", "too many", "shape", "NaN", "infinite"]


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("option", [{}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_a_damaged_adapter(saved, how, has_base, option):
    save_adapter(saved / "base", saved / "arm", **option)
    base = AutoModelForCausalLM.from_pretrained(saved / "base") if has_base else None
    name = damage(saved / "arm", how)
    with pytest.raises(ValueError, match=f"`{name}"):
        load(saved / "arm", base)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_model(saved, how):
    name = damage(saved / "base", how)
    with pytest.raises(ValueError, match=f"`{name}"):
        load(saved / "base")


@pytest.mark.parametrize("how", ["missing", "renamed", "shape", "NaN"])
def test_a_damaged_base_of_an_adapter(saved, how):
    name = damage(saved / "base", how)
    with pytest.raises(ValueError, match=f"`{name}"):
        load(saved / "arm")


def test_a_file_that_was_cut(saved):
    path = saved / "arm" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load(saved / "arm", AutoModelForCausalLM.from_pretrained(saved / "base"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_is_no_reward_model(tmp_path, tied):
    base = tiny_llama(0, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1).save_pretrained(tmp_path / "c")
    with pytest.raises(ValueError, match="score.weight" if tied else "lm_head.weight"):
        load(tmp_path / "c")


# --- what an adapter says about itself ---


@pytest.mark.parametrize("name", [None, "", " ", ".", "/", 5, ["base"]], ids=repr)
@pytest.mark.parametrize("has_base", [False, True])
def test_a_base_without_a_name(saved, name, has_base):
    rewrite(saved / "arm" / "adapter_config.json", base_model_name_or_path=name)
    base = AutoModelForCausalLM.from_pretrained(saved / "base") if has_base else None
    with pytest.raises(ValueError, match="must be the Hub id or the folder"):
        load(saved / "arm", base)


def test_a_base_that_has_moved(saved):
    rewrite(saved / "arm" / "adapter_config.json", base_model_name_or_path="/not/here/base")
    with pytest.raises(ValueError, match="`/not/here/base`, which is no folder here"):
        load(saved / "arm")


@pytest.mark.parametrize("text", ["", "[]", "5", '{"peft_type": "MINE"}', "[" * 100_000, "\udcff"], ids=lambda x: x[:9])
def test_a_config_that_peft_can_not_read(saved, text):
    (saved / "arm" / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="is no configuration that this version of PEFT can read"):
        load(saved / "arm")


def setting(**values):
    return {"alpha": 1.0, "reference": "base", "temperature": 0.7, "measured": {}} | values


BAD_VALUES = {
    "beta": [-0.1, 0, True, "high", float("nan"), float("inf"), [1], {}],
    "reward_scale": [-1.0, 0, False, "1", float("nan")],
    "loss": [None, [], "sigmoid", {"length_normalized": "no"}, {"length_normalized": None}, {"reference": "me"}],
    "recommended": [[], "strong", {"alpha": 1.0}, setting(alpha="1"), setting(reference="me"), setting(temperature=0)],
    "metrics": [None, [], {"pair_accuracy": "good"}, {"pair_accuracy": None}, {"pair_accuracy": True}],
    "versions": [None, {"trl": 1}],
    "n_pairs": [-1, 1.5, True, "3"],
    "objective": [5, [], True],
    "sentence": [5, [], True, "", " "],
    "description": [5],
    "dataset": [5],
    "base_model": ["", " ", 5],
    "base_model_revision": [5],
    "base_weights": ["", "bf16:", "bf16:xyz", "bf16:123", "fp8:1234", 5],
    "tokenizer": ["", "abc", 5],
    "chat_template": ["sha256:", 5],
    "format_version": [None, "1", 0, -1, 1.0, True, [1]],
}


def test_every_field_is_tested():
    assert BAD_VALUES.keys() == {x.name for x in fields(RewardInfo)}


@pytest.mark.parametrize(("name", "value"), [(x, y) for x, values in BAD_VALUES.items() for y in values], ids=str)
def test_invalid_values(saved, name, value):
    path = saved / "arm" / "genarm_config.json"
    path.write_text(json.dumps({"format_version": 1} | {name: value}))
    with pytest.raises(ValueError, match=f"genarm_config.json` is not valid: `{name}` is "):
        load(saved / "arm")
    with pytest.raises(ValueError, match=f"^`{name}` is "):
        RewardInfo(**{name: value})
    info = RewardInfo()
    setattr(info, name, value)
    with pytest.raises(ValueError, match=f"^`{name}` is "):
        info.save(saved)


@pytest.mark.parametrize("text", [b"[]", b"5", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b""], ids=str)
def test_a_file_that_holds_no_fields(saved, text):
    (saved / "arm" / "genarm_config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"genarm_config.json` (is not valid JSON|holds .*, but must hold an object)"):
        load(saved / "arm")


def test_valid_values(tmp_path):
    info = RewardInfo(beta=1, reward_scale=1e-9, metrics={"n_pairs": 3, "correlation": float("nan")}, n_pairs=0)
    info.recommended = setting()
    info.objective = "Wärme, 溫暖"
    info.save(tmp_path)
    again = RewardInfo.load(tmp_path / "genarm_config.json")
    assert again.metrics.pop("correlation") != info.metrics.pop("correlation")  # both are NaN
    assert again == info
    (tmp_path / "genarm_config.json").write_text("{}")
    assert RewardInfo.load(tmp_path / "genarm_config.json") == RewardInfo()


# --- whose weights ---


def tuned(base):
    """Another model under the same name."""
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return base


@pytest.mark.parametrize("kind", ["the base", "bfloat16", "another name", "tuned", "merged", "injected", "unknown"])
def test_an_adapter_on_another_base_under_the_same_name(saved, kind, recwarn):
    """The reward is that of the adapter on the weights that it was trained on, whatever base it steers."""
    fingerprint = weights_fingerprint(AutoModelForCausalLM.from_pretrained(saved / "base"))
    RewardInfo(base_weights=None if kind == "unknown" else fingerprint).save(saved / "arm")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "base"), saved / "arm").eval()
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    if kind == "bfloat16":
        base = AutoModelForCausalLM.from_pretrained(saved / "base", dtype=torch.bfloat16)
        expected = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(saved / "base", dtype=torch.bfloat16), saved / "arm"
        )
    elif kind == "another name":
        base.name_or_path = "elsewhere"
    elif kind == "tuned":
        tuned(base)
    elif kind != "the base":
        other = save_adapter(saved / "base", saved / "other", 5)
        base = PeftModel.from_pretrained(base, other)
        base = base.merge_and_unload() if kind == "merged" else base.get_base_model()
        assert base.name_or_path == str(saved / "base")
    arm = load(saved / "arm", base)
    assert (logits(arm, IDS) - logits(expected, IDS)).abs().max() < 1e-5
    assert shares_weights(arm, base) == (kind in ("the base", "bfloat16", "another name"))
    assert not [x for x in recwarn if issubclass(x.category, GuidanceWarning)]


def test_the_base_in_the_folder_was_replaced(saved):
    RewardInfo(base_weights=weights_fingerprint(tiny_llama(0, attention_bias=True))).save(saved / "arm")
    load(saved / "arm")
    tuned(tiny_llama(0, attention_bias=True)).save_pretrained(saved / "base")
    with pytest.warns(GuidanceWarning, match="was trained on other weights than those of"):
        load(saved / "arm")
    with pytest.warns(GuidanceWarning, match="was trained on other weights than those of"):
        load(saved / "arm", AutoModelForCausalLM.from_pretrained(saved / "base"))


def test_what_was_trained_knows_its_base(make_trainer, tokenizer, tmp_path):
    base = tiny_llama(vocab_size=len(tokenizer))
    trainer = make_trainer(model=base, peft_config=LoraConfig(bias="lora_only"), max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "arm")
    saved = RewardInfo.load(tmp_path / "arm" / "genarm_config.json").base_weights
    assert has_weights(tiny_llama(vocab_size=len(tokenizer)), saved)
    assert make_trainer(model=trainer.model, max_steps=1).reward_info.base_weights == saved
    assert make_trainer(max_steps=1).reward_info.base_weights is None  # the weights that are trained


# --- any language ---

ROOT = Path(__file__).parent.parent
FILES = [path for folder in ("hf_genarm", "examples", "model_cards") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_encodings_are_named(path):
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
        # `os.open` opens bytes, and the files of a distribution are read in UTF-8.
        others = name == "os.open" or name.startswith("distribution(")
        if name.split(".")[-1] in ("open", "read_text", "write_text") and not others:
            modes = [x.value for x in call.args if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            # `os.open` gives a number, which is opened as text afterwards.
            named = any(x.arg == "encoding" for x in call.keywords) or ast.unparse(call.func) == "os.open"
            assert named or {"rb", "r+b", "wb"} & set(modes), f"line {call.lineno}: {ast.unparse(call)}"


def test_other_languages_where_the_locale_is_ascii(saved):
    script = """
import sys
from hf_genarm import AutoregressiveRewardModel
assert open(sys.argv[1] + "/probe", "w").encoding.lower() in ("ascii", "ansi_x3.4-1968"), "the locale is not ASCII"
arm = AutoregressiveRewardModel.from_pretrained(sys.argv[1] + "/arm")
arm.info.objective = "W\\u00e4rme"
for _ in range(2):  # the second time, there is a card
    arm.save_pretrained(sys.argv[1] + "/copy")
assert AutoregressiveRewardModel.from_pretrained(sys.argv[1] + "/copy").info == arm.info
"""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", script, str(saved)], env=environment, check=True)
    assert "Wärme" in (saved / "copy" / "README.md").read_text(encoding="utf-8")
