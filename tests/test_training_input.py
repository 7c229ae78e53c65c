"""Values, columns and adapters that a trainer can't use are refused with the value, the rule and the way out."""

import math
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import CHOSEN, PROMPTS, REJECTED, STANDARD, conversational, implicit, message
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardConfig, GuidanceWarning
from hf_genarm.training import columns

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
NUMBERS = ["beta", "label_smoothing", "target_margin", "sft_coefficient"]
OWN = [*NUMBERS, "loss_type", "length_normalized", "reference", "truncation_mode", "custom_generate"]
OWN += ["objective", "description", "dataset_name"]


def config(**values):
    return AutoregressiveRewardConfig("arm", report_to="none", bf16=False, **values)


# --- values ---


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "0.1", None, True, [0.1], 10**400, torch.tensor(0.1)])
def test_numbers(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` is .*, but must"):
        config(**{name: value})
    assert getattr(config(**{name: np.float32(0.25)}), name) == 0.25


def test_an_argument_that_is_no_more():
    with pytest.raises(TypeError, match="unexpected keyword argument 'decode_alpha'"):
        config(decode_alpha=1.0)


ANYTHING = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3)),
    *(st.lists(st.floats(), max_size=2), st.dictionaries(st.text(max_size=2), st.integers(), max_size=1)),
    st.sampled_from(["hinge", "base", "keep_end", "sigmoid", 10**400, -0.0, 0.3]),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(OWN), ANYTHING, min_size=1, max_size=3))
def test_any_value_works_or_is_refused_by_its_name(values):
    assert set(OWN) < {field.name for field in fields(AutoregressiveRewardConfig)}
    try:
        args, refusal = config(**values), None
    except ValueError as error:
        args, refusal = None, str(error)
    if args is None:
        assert any(f"`{name}`" in refusal for name in values), refusal
        assert "must" in refusal or "belongs to" in refusal
        return
    assert args.beta > 0
    assert all(type(getattr(args, name)) is float and math.isfinite(getattr(args, name)) for name in NUMBERS)
    assert all(isinstance(getattr(args, name), str | None) for name in ("objective", "description", "dataset_name"))


# --- columns ---

MESSAGE = {"role": "assistant", "content": "It was fine."}
MALFORMED = {
    "a number": (1.5, "`float`"),
    "None": (None, "is None.*Leave such pairs out"),
    "one message": (MESSAGE, r"is a dict with the keys \['role', 'content'\].*into a list"),
    "from and value": ([{"from": "gpt", "value": "It was fine."}], "`from` and `value`.*Convert them"),
    "tokens": ([1, 2, 3], "a list of `int`.*`chosen_ids`"),
    "a list of texts": (["It was fine."], "a list of `str`"),
    "no message": ([], "an empty list"),
    "a message without a role": ([{"role": None, "content": "It was fine."}], "has the message.*Rename its keys"),
    "a message without content": ([{"role": "assistant", "content": None}], "has the message"),
    "a content that is a number": ([{"role": "assistant", "content": 3}], "has the message"),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answers(make_trainer, name, streaming, order):
    value, message = MALFORMED[name]
    for column in ("chosen", "rejected", "prompt"):
        pair = {"prompt": "How was it? ", "chosen": "It was late.", "rejected": "It was fine.", column: value}
        pair = dict(list(pair.items())[::order])
        stream = IterableDataset.from_generator(lambda pair=pair: iter([pair]))
        data = stream if streaming else Dataset.from_list([pair])
        with pytest.raises(ValueError, match=rf"In pair 0 of the train dataset, `{column}` .*{message}"):
            make_trainer(data, max_steps=1)


def test_a_malformed_pair_in_the_middle(make_trainer):
    rows = [{"prompt": PROMPTS[0], "chosen": f"Fine, {index}.", "rejected": f"Late, {index}."} for index in range(40)]
    rows[30]["rejected"] = None
    for options in ({"data": Dataset.from_list(rows)}, {"eval_dataset": Dataset.from_list(rows)}):
        with pytest.raises(ValueError, match=r"In pair 30 of the (train|eval) dataset, `rejected` is None"):
            make_trainer(**options)
    trainer = make_trainer(IterableDataset.from_generator(lambda: iter(rows)), max_steps=1)
    with pytest.raises(ValueError, match=r"In pair 30 of the train dataset, `rejected` is None"):
        list(trainer.train_dataset)


@pytest.mark.parametrize("kind", ["text prompt", "text answer", "chat prompt"])
def test_texts_next_to_messages(make_trainer, kind):
    chat = conversational(True)
    data = {"text prompt": {**chat, "prompt": PROMPTS}, "text answer": {**chat, "rejected": REJECTED}}
    data["chat prompt"] = {**STANDARD, "prompt": chat["prompt"]}
    with pytest.raises(ValueError, match=r"is text.*but they must all be of one kind.*'role': 'user'"):
        make_trainer(data[kind])


def test_a_prompt_before_whole_chats(make_trainer):
    """It would be read twice."""
    data = conversational(False) | {"prompt": conversational(True)["prompt"]}
    with pytest.raises(ValueError, match=r"begin with the message .*of `prompt`.*remove_columns\('prompt'\)"):
        make_trainer(data)
    with_system = [message("system", "Be kind.") + prompt for prompt in data["prompt"]]
    with pytest.raises(ValueError, match="begin with the message"):
        make_trainer(data | {"prompt": with_system})
    # A system prompt alone is no part of these chats.
    trainer = make_trainer(data | {"prompt": [message("system", "Be kind.")] * 3})
    assert trainer.processing_class.decode(trainer.train_dataset[0]["chosen_ids"]).count("How was") == 1


def test_a_prompt_before_whole_texts(make_trainer):
    with pytest.warns(GuidanceWarning, match=r"All answers of the train dataset begin with their `prompt`"):
        make_trainer({"prompt": PROMPTS, **implicit()})


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("column", ["messages", "completion"])
def test_text_pairs_next_to_columns_of_other_kinds(make_trainer, column, order):
    """TRL goes by any of these columns, whichever comes first in a set."""
    other = [message("user", prompt) for prompt in PROMPTS]
    data = dict(list({**STANDARD, column: other}.items())[::order])
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuidanceWarning)
        trainer = make_trainer(data)  # what they hold is in the pairs
    expected = make_trainer(STANDARD)
    assert trainer.train_dataset["chosen_ids"] == expected.train_dataset["chosen_ids"]
    assert not trainer.reward_info.chat_template


@pytest.mark.parametrize("column", ["question", "system", "instruction", "messages"])
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_not_read(make_trainer, column, streaming):
    text = [f"Say it like a {who}." for who in ("king", "poet", "child")]
    data = {column: [message("system", x) for x in text] if column == "messages" else text}
    data |= STANDARD if column == "system" else {"chosen": CHOSEN, "rejected": REJECTED}
    dataset = Dataset.from_dict({**data, "source": ["a", "b", "c"], "score": [1.0, 2.0, 3.0]})
    with pytest.warns(GuidanceWarning, match=rf"columns \['{column}'\], which are not read") as record:
        make_trainer(dataset.to_iterable_dataset() if streaming else dataset, max_steps=1)
    assert sum(issubclass(warning.category, GuidanceWarning) for warning in record) == 1


def test_columns_that_say_nothing_new_are_dropped_silently(make_trainer):
    extra = {"question": PROMPTS, "system": ["", None, ""], "prompt_id": ["a1", "b2", "c3"], "note": ["a b"] * 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuidanceWarning)
        make_trainer(STANDARD | extra)
        make_trainer(conversational(False) | {"messages": conversational(False)["chosen"], "note": ["a b"] * 3})


@pytest.mark.parametrize("margin", [math.nan, math.inf, None, "high", [1.0]])
def test_margins(make_trainer, margin):
    data = Dataset.from_dict(STANDARD | {"margin": [margin] * 3})
    for dataset in (data, data.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"In pair 0 .*`margin` is .*must be a finite number"):
            make_trainer(dataset, max_steps=1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "has no ids"), ([5, 10**6], "the ids 5 to 1000000"), ([-1, 5], "the ids -1 to 5"), (None, "is None")],
)
def test_tokens(make_trainer, ids, message):
    data = Dataset.from_dict({"chosen_ids": [[5, 6, 7], ids], "rejected_ids": [[5, 8], [5, 9]]})
    with pytest.raises(ValueError, match=rf"In pair 1 .*`chosen_ids` .*{message}.*token ids from 0 to"):
        make_trainer(data)
    with pytest.raises(ValueError, match=r"In pair 0 .*`genarm_prompt_length` is 3"):
        make_trainer({"chosen_ids": [[5, 6, 7]], "rejected_ids": [[5, 8]], "genarm_prompt_length": [3]})


def test_arguments_of_a_template(make_trainer):
    for column, value in (("tools", "no JSON"), ("tools", '{"name": "f"}'), ("chat_template_kwargs", None)):
        with pytest.raises(ValueError, match=rf"In pair 0 .*`{column}` is"):
            make_trainer(Dataset.from_list([dict(MALFORMED_CHAT, **{column: value})]))


MALFORMED_CHAT = {
    "prompt": message("user", "How?"),
    "chosen": message("assistant", "Fine."),
    "rejected": message("assistant", "Late."),
}


def test_what_is_no_dataset(make_trainer):
    with pytest.raises(TypeError, match=r"The eval dataset is a `list`.*`datasets.Dataset`"):
        make_trainer(eval_dataset=[MALFORMED_CHAT])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)
NAMES = ["prompt", "chosen", "rejected", "margin", "tools", "chat_template_kwargs", "messages", "chosen_ids"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([STANDARD, conversational(True), conversational(False)]), st.sampled_from(NAMES), VALUES)
def test_any_column_is_one_that_trl_can_read_or_refused_by_its_name(data, column, value):
    pair = {name: values[0] for name, values in data.items()} | {column: value}
    stream = IterableDataset.from_generator(lambda: iter([pair]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuidanceWarning)
        try:
            checked, is_chat, _ = columns.check_pairs(stream, "train", 48)
            (checked,) = checked
        except ValueError as error:
            checked, refusal = None, str(error)
    if checked is None:
        assert f"`{column}`" in refusal or "`chosen`" in refusal, refusal
        assert "but" in refusal or "would be read twice" in refusal, refusal
        return
    kinds = {type(checked[name]) for name in ("prompt", "chosen", "rejected") if name in checked}
    assert kinds == {list if is_chat else str}
    assert math.isfinite(checked.get("margin", 0.0))


# --- models ---

BIDIRECTIONAL = {
    "bert": {"is_decoder": False},
    "llama": {"is_causal": False, "attn_implementation": "sdpa"},
    "gemma3_text": {"use_bidirectional_attention": True, "head_dim": 8, "num_key_value_heads": 2},
}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny(model_type, tokenizer, **values):
    torch.manual_seed(0)
    settings = {**SIZES, "vocab_size": len(tokenizer), "initializer_range": 0.4, "pad_token_id": 0, **values}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


@pytest.mark.parametrize("model_type", BIDIRECTIONAL)
def test_a_model_that_is_bidirectional(make_trainer, tokenizer, model_type):
    """Its log-probabilities of a token know the token."""
    model = tiny(model_type, tokenizer, **BIDIRECTIONAL[model_type])
    with pytest.raises(TypeError, match=r"is bidirectional.*a token changes what the model predicts before it"):
        make_trainer(model=model)


def test_a_causal_model_whose_config_is_no_decoder(make_trainer, tokenizer):
    model = tiny("gpt_neox", tokenizer)
    assert not getattr(model.config, "is_decoder", False)
    make_trainer(model=model, max_steps=1).train()


# --- adapters ---


def test_only_an_adapter_that_is_loaded_again_is_trained(make_trainer, tokenizer):
    model = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    model.add_adapter("second", LoraConfig(**LORA, task_type="CAUSAL_LM"))
    make_trainer(model=model)  # 'default' is active
    model.set_adapter("second")
    with pytest.raises(ValueError, match=r"adapters \['default', 'second'\], and \['second'\] are active.*'default'"):
        make_trainer(model=model)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are active"):
        make_trainer(model=model)
    alone = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), LoraConfig(**LORA), adapter_name="arm")
    with pytest.raises(ValueError, match=r"adapters \['arm'\].*Load yours under that name"):
        make_trainer(model=alone)


def test_an_adapter_that_is_loaded_for_inference(make_trainer, tokenizer, tmp_path):
    get_peft_model(tiny_llama(vocab_size=len(tokenizer)), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(vocab_size=len(tokenizer)), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"All weights of the model are frozen.*is_trainable=True"):
        make_trainer(model=model)
