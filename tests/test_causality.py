"""Causality is tested, not read from the configuration: nothing else may decide whether a model can be used."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import random_prompts, tiny_llama, tiny_tokenizer
from zoo import AS_DECODERS, tiny

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.hub.causality import refuse_not_causal
from hf_genarm.hub.kv_cache import CACHE

BIDIRECTIONAL = {
    **{f"{name} as on the Hub": (name, {"is_decoder": False}) for name in AS_DECODERS if name != "reformer"},
    **{f"{name}, is_causal=False": (name, {"is_causal": False}) for name in ("llama", "qwen3", "gpt2", "gpt_neox")},
    "gemma 3": ("gemma3_text", {"use_bidirectional_attention": True}),
    "XLM as on the Hub": ("xlm", {"causal": False, "init_std": 0.4}),
    "XLNet": ("xlnet", {}),
    "CPM-Ant": ("cpmant", {}),
}


def leaks(model):
    """Whether the last of eight random tokens changes logits before it."""
    ids = random_prompts(1, 8)
    other = ids.clone()
    other[0, -1] = ids[0, -1] - 1
    with torch.no_grad():
        one, two = (model(input_ids=x, use_cache=False).logits[:, :-1] for x in (ids, other))
    return not torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_bidirectional_models_are_refused(kind, dtype):
    name, settings = BIDIRECTIONAL[kind]
    model = tiny(name, **settings)
    assert leaks(model)
    with pytest.raises(TypeError, match="is bidirectional"):
        refuse_not_causal(model.to(dtype))


def test_prophetnet_leaks_more_than_rounding():
    """Without an adapter it is less than the test of a few tokens could see, but not because it is rounding."""
    leaked = []
    for dtype in (torch.float32, torch.float64):
        model = tiny("prophetnet").to(dtype)
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config).eval().to(dtype)
        ids = random_prompts(2, 8)
        ids[1, :-1] = ids[0, :-1]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        leaked.append(float((logits[0] - logits[1]).abs().max()))
    assert leaked[0] > 1e-5
    assert leaked[0] == pytest.approx(leaked[1], rel=0.1)
    with pytest.raises(TypeError, match="`ProphetNetForCausalLM` is bidirectional"):
        refuse_not_causal(model)


def test_the_refusal_names_the_setting():
    with pytest.raises(TypeError, match=r"`BertLMHeadModel` is bidirectional \(`config\.is_decoder=False`\).*reward"):
        GenARMLogitsProcessor(tiny("bert", is_decoder=False))
    with pytest.raises(TypeError, match=r"`LlamaForCausalLM` is bidirectional \(`config\.is_causal=False`\)"):
        GenARMLogitsProcessor(tiny_llama(0, is_causal=False))


def test_pythia_is_causal_whatever_its_configuration_says():
    model = tiny("gpt_neox")
    assert model.config.is_decoder is False
    assert not leaks(model)
    GenARMLogitsProcessor(model)


def test_scores_of_bidirectional_models_are_refused():
    model = tiny_llama(0, vocab_size=len(tiny_tokenizer()), is_causal=False)
    with pytest.raises(TypeError, match="is bidirectional"):
        AutoregressiveRewardModel(model, tiny_tokenizer()).score(["What"], [" is"])


def test_a_cache_that_does_not_hold_what_was_read(monkeypatch):
    model = tiny_llama(0)
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    # As custom code may: it keeps nothing of what it has read.
    kept = {"cache": None} if CACHE == "cache" else {"past_key_values": None}
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: forward(*args, **kwargs | kept))
    with pytest.raises(TypeError, match="key-value cache"):
        refuse_not_causal(model)


def adapted(config):
    return get_peft_model(tiny_llama(0), config)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_llama(0),
        lambda: tiny_llama(0).to(torch.float16),
        lambda: tiny_llama(0, max_position_embeddings=4, rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
        lambda: adapted(LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)),
        lambda: adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        lambda: tiny("recurrent_gemma"),
        lambda: tiny("reformer"),
    ],
    ids=["Llama", "float16", "dynamic", "LoRA", "prompt tuning", "recurrent", "random hashes"],
)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_disturbed(make, training):
    model = make().train(training)
    model.base_model.eval()  # parts of a model may differ
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy({name: vars(module) for name, module in model.named_modules()})
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    refuse_not_causal(model)
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in model.modules()] == modes
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        for key, value in {**before[name]["_parameters"], **before[name]["_buffers"]}.items():
            now = getattr(module, key)
            assert (now is None) == (value is None)
            assert value is None or torch.equal(now, value)
        for key, value in before[name].items():
            if isinstance(value, int | float | str | torch.Tensor):
                assert torch.as_tensor(vars(module)[key] == value).all()


def test_a_model_is_tested_once():
    model, calls = tiny_llama(0), []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    refuse_not_causal(model)
    assert len(calls) == 3
    refuse_not_causal(model)
    refuse_not_causal(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    assert len(calls) == 3


def test_weights_in_several_dtypes():
    """As QLoRA has them, whose forward pass needs autocast."""
    model = tiny_llama(0).bfloat16()
    model.lm_head.float()
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.tensor([[5, 6]]))
    refuse_not_causal(model)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16, torch.float32}
