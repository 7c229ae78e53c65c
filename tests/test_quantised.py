"""Quantised weights (torchao) and a quantised cache of the base (quanto), on the CPU."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from support import ARM, BATCH
from test_support import assert_same, generate, oracle
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, TorchAoConfig

from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer, GenARMLogitsProcessor

pytestmark = pytest.mark.slow


def int8():
    from torchao.quantization import Int8WeightOnlyConfig  # takes seconds, and is in the extra `dev` only

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A base and a reward model with int8 weights, and the folder of the latter."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    config = int8()
    models = []
    for seed, name in enumerate(("base", "arm")):
        folder = tmp_path_factory.mktemp("quantised") / name
        tiny_llama(seed, **sizes).save_pretrained(folder)
        models.append(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))
    return *models, str(folder)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beam search"])
def test_quantised_weights(quantised, options):
    base, arm, folder = quantised
    ids = BATCH["input_ids"]
    with torch.no_grad():
        assert (arm(ids).logits - AutoModelForCausalLM.from_pretrained(folder)(ids).logits).abs().max() > 0.1
    config = int8()
    for processor in (
        GenARMLogitsProcessor(arm),
        GenARMLogitsProcessor.from_pretrained(folder, quantization_config=config),
    ):
        output = generate([processor], BATCH, base=base, **options)
        assert_same(output, generate([oracle(BATCH, [arm])], BATCH, base=base, **options))


def test_an_adapter_is_trained_on_quantised_weights(quantised, tokenizer, tmp_path):
    tiny_llama(0, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    trainer = AutoregressiveRewardTrainer(
        model=str(tmp_path / "base"),
        args=AutoregressiveRewardConfig(
            str(tmp_path / "arm"), report_to="none", gradient_checkpointing=False, max_steps=2, learning_rate=1e-2
        ),
        train_dataset=Dataset.from_dict({"prompt": ["How? "] * 2, "chosen": ["Fine."] * 2, "rejected": ["Cold."] * 2}),
        processing_class=tokenizer,
        quantization_config=int8(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    weight = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert "Int8" in type(weight).__name__
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


def test_a_quantised_cache_of_the_base():
    cache = {"backend": "quanto", "q_group_size": 8, "residual_length": 4, "nbits": 4}
    options = {"cache_implementation": "quantized", "cache_config": cache}
    output = generate([GenARMLogitsProcessor(ARM)], BATCH, **options)
    assert_same(output, generate([oracle(BATCH)], BATCH, **options))
