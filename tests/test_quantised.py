"""Quantised weights (torchao, bitsandbytes) and a quantised cache of the base (quanto), on the CPU."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import assert_same, generate, joint_passes, oracle
from pairs import STANDARD
from peft import LoraConfig, PeftModel
from support import ARM, BASE, BATCH
from tiny import save_adapter, tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer, GenARMLogitsProcessor

pytestmark = pytest.mark.slow

SIZE = {"hidden_size": 64, "intermediate_size": 128}  # what the kernels can take


def int8():
    from torchao.quantization import Int8WeightOnlyConfig  # takes seconds, and is in the extra `slow` only

    return TorchAoConfig(Int8WeightOnlyConfig())


def bits(n, **options):
    if n == 4:
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return BitsAndBytesConfig(**{f"load_in_{n}bit": True}, **options)


KINDS = {
    "int8 (torchao)": int8,
    "nf4 (bitsandbytes)": lambda: bits(4),
    "int8 (bitsandbytes)": lambda: bits(8, llm_int8_threshold=0.0),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """The folders of a base, of another model and of an adapter on the base."""
    folder = tmp_path_factory.mktemp("quantised")
    for seed, name in enumerate(("base", "arm")):
        tiny_llama(seed, hidden_size=64, intermediate_size=128, vocab_size=len(tokenizer)).save_pretrained(
            folder / name
        )
        tokenizer.save_pretrained(folder / name)
    adapter = save_adapter(str(folder / "base"), str(folder / "adapter"), target_modules="all-linear")
    return str(folder / "base"), str(folder / "arm"), adapter


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights(folders, kind):
    """A model with quantised weights of its own, and an adapter on those of the base, which is in the base's passes."""

    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=KINDS[kind]())

    base, ids = load(folders[0]), BATCH["input_ids"]
    arm, on_base = load(folders[1]), PeftModel.from_pretrained(load(folders[0]), folders[2]).eval()
    options = {"base_model": base, "quantization_config": KINDS[kind]()}
    separate = GenARMLogitsProcessor.from_pretrained(folders[1], **options)
    # Before the base has run: in 4 bits on CPUs, weights that have are damaged by `state_dict` (bitsandbytes 0.50).
    fused = GenARMLogitsProcessor.from_pretrained(folders[2], base_model=base)
    with torch.no_grad():
        assert (arm(ids).logits - AutoModelForCausalLM.from_pretrained(folders[1])(ids).logits).abs().max() > 0.1
    for processor, model, beams, engine in ((separate, arm, 1, "separate"), (fused, on_base, 2, "fused")):
        output = generate(base, [processor], BATCH, num_beams=beams)
        assert_same(output, generate(base, [oracle(BATCH, [model])], BATCH, num_beams=beams))
        assert processor.engine == engine
        assert (joint_passes(processor) > 0) == (engine == "fused")


def one_scale():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerTensor

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()))


@pytest.mark.parametrize("config", [lambda: bits(8), one_scale], ids=["outliers (bitsandbytes)", "one scale (torchao)"])
def test_layers_that_round_rows_together(folders, config, caplog):
    """In one pass with other rows, the base would have other logits."""
    caplog.set_level("INFO", "hf_genarm")
    base = AutoModelForCausalLM.from_pretrained(folders[0], quantization_config=config())
    processor = GenARMLogitsProcessor.from_pretrained(folders[2], base_model=base)
    generate(base, [processor], BATCH)
    assert processor.engine == "shared"
    assert joint_passes(processor) == 0
    assert "quantised layers of the base round each row of a batch in view of the others" in caplog.text


def test_an_adapter_is_trained_on_quantised_weights(folders, tmp_path, tokenizer):
    trainer = AutoregressiveRewardTrainer(
        model=folders[0],
        args=AutoregressiveRewardConfig(
            str(tmp_path / "arm"), report_to="none", gradient_checkpointing=False, max_steps=2, learning_rate=1e-2
        ),
        train_dataset=Dataset.from_dict(STANDARD),
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
    output = generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE)], BATCH, **options)
    assert_same(output, generate(BASE, [oracle(BATCH)], BATCH, **options))


def test_qlora(folders, tmp_path, tokenizer):
    """
    An adapter on 4-bit weights, as `BitsAndBytesConfig` and `--load_in_4bit` make them: the loss is that of the same
    weights in full precision, it falls, and what is saved is what was trained.
    """
    import bitsandbytes

    config = AutoregressiveRewardConfig(
        str(tmp_path / "arm"), report_to="none", disable_tqdm=True, max_steps=8, learning_rate=1e-2, logging_steps=1
    )
    trainer = AutoregressiveRewardTrainer(
        model=folders[0],
        args=config,
        train_dataset=Dataset.from_dict(STANDARD),
        processing_class=copy.deepcopy(tokenizer),
        quantization_config=bits(4),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)

    plain = AutoModelForCausalLM.from_pretrained(folders[0])
    original = plain.model.layers[0].mlp.up_proj.weight.clone()
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            quantised = trainer.model.get_base_model().get_submodule(name).base_layer.weight
            module.weight.data = bitsandbytes.functional.dequantize_4bit(quantised.data, quantised.quant_state)
    assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, original)
    batch = trainer.data_collator(list(trainer.train_dataset))
    oracle_trainer = AutoregressiveRewardTrainer(
        model=plain,
        args=config,
        train_dataset=Dataset.from_dict(STANDARD),
        processing_class=copy.deepcopy(tokenizer),
    )
    expected = oracle_trainer.compute_loss(plain, dict(batch))
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    # The adapter adds s B A to a weight, and B is 0: the gradient of B is s times that of the weight times A.
    lora = trainer.model.get_base_model().model.layers[0].mlp.up_proj
    (of_b,) = torch.autograd.grad(loss, lora.lora_B["default"].weight)
    (of_weight,) = torch.autograd.grad(expected, plain.model.layers[0].mlp.up_proj.weight)
    expected_of_b = lora.scaling["default"] * of_weight @ lora.lora_A["default"].weight.detach().float().T
    assert float((of_b.float() - expected_of_b).abs().max() / expected_of_b.abs().max()) < 0.02  # it is in bfloat16

    trainer.train()
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model()
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "arm")).state_dict()
    for name, value in trainer.model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(loaded[name], value.float()), name
