"""
The cases of TRL's own tests of `RewardTrainer`, on a causal LM.

Those about a classification head have no counterpart: `num_labels`, a trained `score` head, and
`center_rewards_coefficient`, which is refused.
"""

import copy
import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from pairs import STANDARD, TEMPLATES, TOOLS, conversational, implicit
from peft import LoraConfig, get_peft_model
from tiny import save_llama, tiny_llama, tiny_model
from transformers import GPTNeoXConfig, Qwen2Config, Qwen3MoeConfig

from hf_genarm.hub.card import TAGS
from hf_genarm.training.preference_data import DataCollatorForPairs

FORMATS = {
    "standard": STANDARD,
    "conversational": conversational(True),
    "standard, implicit prompt": implicit(),
    "conversational, implicit prompt": conversational(False),
}


@pytest.fixture
def folder(tmp_path):
    """A model by its name."""
    return save_llama(tmp_path / "base")


def assert_trains(trainer):
    """All that is to be trained changes, and nothing else."""
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert trainable
    assert changed == trainable


# --- the collator ---

PAIRS = [{"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5]}, {"chosen_ids": [6, 7], "rejected_ids": [8]}]


@pytest.mark.parametrize(("pad_token_id", "multiple", "width"), [(0, None, 3), (999, None, 3), (0, 4, 4)])
@pytest.mark.parametrize("n_pairs", [1, 2])
@pytest.mark.parametrize("margins", [None, [0.1, 0.2]])
def test_collator(pad_token_id, multiple, width, n_pairs, margins):
    pairs = [pair | {"genarm_prompt_length": 1 + index} for index, pair in enumerate(PAIRS[:n_pairs])]
    if margins is not None:
        pairs = [pair | {"margin": margin} for pair, margin in zip(pairs, margins, strict=False)]
    batch = DataCollatorForPairs(pad_token_id, multiple)(pairs)
    texts = [pair[f"{side}_ids"] for side in ("chosen", "rejected") for pair in pairs]
    assert batch["input_ids"].tolist() == [ids + [pad_token_id] * (width - len(ids)) for ids in texts]
    assert batch["attention_mask"].tolist() == [[1] * len(ids) + [0] * (width - len(ids)) for ids in texts]
    assert batch["genarm_prompt_length"].tolist() == [1, 2][:n_pairs]
    if margins is not None:
        torch.testing.assert_close(batch["margin"], torch.tensor(margins[:n_pairs]))


# --- models ---


@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3MoeConfig, GPTNeoXConfig])
def test_architectures(make_trainer, tokenizer, config_class):
    experts = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = tiny_model(
        config_class.model_type, vocab_size=len(tokenizer), **(experts if config_class is Qwen3MoeConfig else {})
    )
    assert_trains(make_trainer(model=model))


def test_a_model_by_name(make_trainer, folder):
    assert_trains(make_trainer(model=folder, processing_class=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype(make_trainer, folder, dtype):
    trainer = make_trainer(model=folder, model_init_kwargs={"dtype": dtype}, learning_rate=0.1)
    assert_trains(trainer)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("given_as", ["peft_config", "PeftModel"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["no checkpointing", "reentrant", "not reentrant"])
def test_peft(make_trainer, tokenizer, given_as, checkpointing):
    options = {"gradient_checkpointing": checkpointing is not None}
    if checkpointing is not None:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    model = tiny_llama(vocab_size=len(tokenizer))
    if given_as == "PeftModel":
        trainer = make_trainer(model=get_peft_model(model, LoraConfig()), num_train_epochs=2, **options)
    else:
        trainer = make_trainer(model=model, peft_config=LoraConfig(), num_train_epochs=2, **options)
    assert_trains(trainer)


# PEFT looks for experts by the names that other models have.
@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft.tuners.tuners_utils")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_peft_on_experts(make_trainer, tokenizer):
    experts = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    model = tiny_model("qwen3_moe", vocab_size=len(tokenizer), **experts)
    config = LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj", "lm_head"])
    assert_trains(make_trainer(model=model, peft_config=config, num_train_epochs=2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(make_trainer, reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_trains(make_trainer(**options))


# --- data ---


@pytest.mark.parametrize("name", FORMATS)
def test_formats(make_trainer, name):
    assert_trains(make_trainer(FORMATS[name]))


@pytest.mark.parametrize("suffix", ["ids", "input_ids"])
def test_tokenised_data(make_trainer, tokenizer, suffix):
    data = {f"{side}_{suffix}": [tokenizer(text)["input_ids"] for text in implicit()[side]] for side in implicit()}
    if suffix == "input_ids":
        with pytest.warns(FutureWarning, match="will not be supported in v1"):
            trainer = make_trainer(data)
    else:
        trainer = make_trainer(data)
    assert {"chosen_ids", "rejected_ids"} <= set(trainer.train_dataset.column_names)
    assert not {"chosen_input_ids", "rejected_input_ids"} & set(trainer.train_dataset.column_names)
    assert_trains(trainer)


@pytest.mark.parametrize("name", FORMATS)
def test_streams(make_trainer, name):
    data = FORMATS[name]
    rows = [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
    assert_trains(make_trainer(IterableDataset.from_generator(lambda: iter(rows)), max_steps=3))


@pytest.mark.parametrize("explicit", [True, False])
def test_template_arguments(make_trainer, tokenizer, explicit):
    template = TEMPLATES["a default system prompt and tools"][0]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    kwargs = [{"shout": bool(index % 2)} for index in range(3)]
    trainer = make_trainer(conversational(explicit) | {"chat_template_kwargs": kwargs}, processing_class=tokenizer)
    assert trainer.processing_class.chat_template == template
    for index, row in enumerate(trainer.train_dataset):
        expected = "<bos>USER: " if index % 2 else "<bos>user: "
        assert expected in tokenizer.decode(row["chosen_ids"])
    assert_trains(trainer)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
def test_tool_calls(make_trainer, tokenizer, tools):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATES["a default system prompt and tools"][0]
    trainer = make_trainer(conversational(True) | {"tools": [tools] * 3}, processing_class=tokenizer)
    assert "Tells the weather." in tokenizer.decode(trainer.train_dataset[0]["chosen_ids"])
    assert_trains(trainer)


def test_a_chat_template_from_a_file(make_trainer, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}<eos>{% endfor %}")
    trainer = make_trainer(conversational(True), chat_template_path=str(path), save_steps=1)
    assert_trains(trainer)
    saved = tmp_path / "arm" / "checkpoint-3" / "chat_template.jinja"
    assert saved.read_text() == path.read_text()


def test_a_chat_template_from_a_tokenizer(make_trainer, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<turn>"], special_tokens=True)
    other.chat_template = tokenizer.chat_template.replace("<bos>", "<turn>")
    other.save_pretrained(tmp_path / "other")
    trainer = make_trainer(conversational(True), chat_template_path=str(tmp_path / "other"))
    assert trainer.processing_class.decode(trainer.train_dataset[0]["chosen_ids"]).startswith("<turn>user")
    assert_trains(trainer)


def test_margins(make_trainer):
    assert_trains(make_trainer(STANDARD | {"margin": [len(text) for text in STANDARD["chosen"]]}))


# --- evaluation ---


def test_evaluation_of_raw_data(make_trainer):
    trainer = make_trainer(implicit(), max_steps=1)
    trainer.train()
    assert trainer.evaluate(eval_dataset=Dataset.from_dict(implicit()))["eval_loss"] > 0


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_in_training(make_trainer, several, streaming):
    dataset = Dataset.from_dict(implicit())
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    dataset = {"one": dataset, "two": dataset} if several else dataset
    trainer = make_trainer(implicit(), eval_dataset=dataset, eval_strategy="steps", eval_steps=2)
    trainer.train()
    for name in ("eval_one", "eval_two") if several else ("eval",):
        assert any(logs.get(f"{name}_loss", 0) > 0 for logs in trainer.state.log_history)


def test_metrics_of_the_user(make_trainer):
    dataset = Dataset.from_dict(implicit())
    trainer = make_trainer(implicit(), eval_dataset=dataset, compute_metrics=lambda prediction: {"my_metric": 0.123})
    assert trainer.evaluate()["eval_my_metric"] == 0.123
    assert trainer.reward_info.metrics == {}


@pytest.mark.parametrize("peft_config", [None, LoraConfig()], ids=["full", "LoRA"])
def test_tags(make_trainer, peft_config):
    assert set(TAGS) <= set(make_trainer(peft_config=peft_config).model.model_tags)
