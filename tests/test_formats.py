"""Tokens and prompt lengths of every dataset format, against `apply_chat_template` by itself."""

import copy
import itertools
import json
import warnings

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from pairs import STANDARD, TEMPLATES, TOOLS, conversational, implicit, message
from tiny import EOS
from trl import RewardTrainer

from hf_genarm.training import preference_data


def shared_length(*texts):
    length = 0
    while all(len(ids) > length for ids in texts) and len({ids[length] for ids in texts}) == 1:
        length += 1
    return length


def chat_oracle(tokenizer, tail, row, mode="drop", max_length=None):
    """Chosen, rejected and length of the prompt of one pair, or `None` if it is left out."""
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs", {})
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, "tokenize": False}

    def write(messages, **more):
        text = tokenizer.apply_chat_template(messages, **options, **{**kwargs, **more})
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt, texts = row.get("prompt"), [row["chosen"], row["rejected"]]
    if prompt is None:
        n_shared = 0
        while n_shared < min(map(len, texts)) - 1 and texts[0][n_shared] == texts[1][n_shared]:
            n_shared += 1
        prompt = texts[0][:n_shared]
    else:
        texts = [prompt + text for text in texts]
    ids = [write(text) for text in texts]
    try:
        start = shared_length(*ids, write(prompt, add_generation_prompt=True)) if prompt else shared_length(*ids)
    except TemplateError:
        start = shared_length(*ids)
    n_tail = len(tokenizer(tail)["input_ids"])
    return cut_to(max_length, mode, [text[: len(text) - n_tail] for text in ids], start)


def cut_to(max_length, mode, ids, start):
    excess = 0 if max_length is None else max(max(map(len, ids)) - max_length, 0)
    if excess and mode == "drop":
        return None
    if excess:
        cut = min(excess, start) if mode == "keep_end" else 0
        ids, start = [text[cut : cut + max_length] for text in ids], min(start - cut, max_length)
    return None if ids[0] == ids[1] else (*ids, start)


def prepared(trainer, tokenizer, dataset, **changes):
    args = copy.copy(trainer.args)
    for name, value in changes.items():
        setattr(args, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = list(trainer._prepare_dataset(dataset, tokenizer, args, "eval"))
    return [(row["chosen_ids"], row["rejected_ids"], row["genarm_prompt_length"]) for row in dataset]


@pytest.fixture
def trainer(make_trainer):
    return make_trainer()


@pytest.fixture
def with_template(tokenizer):
    def with_template(name):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = TEMPLATES[name][0]
        return changed

    return with_template


def assert_equal(trainer, tokenizer, dataset, expected, **arguments):
    kept = [pair for pair in expected if pair is not None]
    if kept:
        assert prepared(trainer, tokenizer, dataset, **arguments) == kept
    else:
        with pytest.raises(ValueError, match=r"No pair|identical in all"):
            prepared(trainer, tokenizer, dataset, **arguments)


# --- any text ---

contents = st.text(max_size=12) | st.sampled_from(["", " ", "<eos>", "a<eos>b", "<bos>", "\n\n", "the train was", "é️"])


@st.composite
def chats(draw):
    """A dataset of one form, with tools, template arguments and system prompts or without."""
    explicit, system = draw(st.booleans()), draw(st.booleans())
    kwargs = draw(st.sampled_from([None, {"shout": True}, {"shout": False, "add_generation_prompt": False}]))
    tools = draw(st.sampled_from([None, TOOLS, json.dumps(TOOLS), "[]"]))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = [{"role": "system", "content": draw(contents)}] if system else []
        for _ in range(draw(st.integers(0, 1))):
            prompt += [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": draw(contents)}]
        prompt.append({"role": "user", "content": draw(contents)})
        answers = [[{"role": "assistant", "content": draw(contents)}] for _ in range(2)]
        if draw(st.booleans()):
            answers[0] += [
                {"role": "user", "content": draw(contents)},
                {"role": "assistant", "content": draw(contents)},
            ]
        if explicit:
            row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        else:
            own = draw(st.integers(0, len(prompt)))  # from where on the prompts differ too
            other = [{**turn, "content": turn["content"] + "?"} for turn in prompt[own:]]
            row = {"chosen": prompt + answers[0], "rejected": prompt[:own] + other + answers[1]}
        row |= {} if kwargs is None else {"chat_template_kwargs": kwargs}
        rows.append(row | ({} if tools is None else {"tools": tools}))
    return rows


any_data = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
limits = {
    "mode": st.sampled_from(["drop", "keep_start", "keep_end"]),
    "max_length": st.sampled_from([None, 1, 20, 60]),
}


@any_data
@given(rows=chats(), template=st.sampled_from(list(TEMPLATES)), **limits)
def test_any_chat(trainer, with_template, rows, template, mode, max_length):
    """Arbitrary characters and special tokens, empty turns, several turns, system prompts, tools, odd templates."""
    # A content that is an end token ends the response, where the template writes none itself.
    assume(template != "no end tokens" or "<eos>" not in json.dumps(rows))
    tokenizer = with_template(template)
    expected = [chat_oracle(tokenizer, TEMPLATES[template][1], row, mode, max_length) for row in rows]
    arguments = {"truncation_mode": mode, "max_length": max_length}
    assert_equal(trainer, tokenizer, Dataset.from_list(rows), expected, **arguments)


@any_data
@given(rows=st.lists(st.tuples(contents, contents, contents), min_size=1, max_size=4), explicit=st.booleans(), **limits)
def test_any_text(trainer, tokenizer, rows, explicit, mode, max_length):
    if explicit:
        rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    else:
        rows = [{"chosen": prompt + chosen, "rejected": prompt + rejected} for prompt, chosen, rejected in rows]
    expected = []
    for row in rows:
        texts = [row[side] + ("" if row[side].endswith("<eos>") else "<eos>") for side in ("chosen", "rejected")]
        ids = [tokenizer(row.get("prompt", "") + text)["input_ids"] for text in texts]
        prompt = [tokenizer(row["prompt"])["input_ids"]] if explicit else []
        expected.append(cut_to(max_length, mode, ids, shared_length(*ids, *prompt)))
    arguments = {"truncation_mode": mode, "max_length": max_length}
    assert_equal(trainer, tokenizer, Dataset.from_list(rows), expected, **arguments)


# --- every form ---


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mode", ["drop", "keep_start", "keep_end"])
@pytest.mark.parametrize("tools", [None, TOOLS, json.dumps(TOOLS)], ids=["no tools", "tools", "tools in JSON"])
@pytest.mark.parametrize("explicit", [True, False])
def test_every_form(trainer, with_template, explicit, tools, mode, streaming):
    """Implicit prompts keep their tools and template arguments, and no response is cut away for them."""
    data = conversational(explicit) | {"chat_template_kwargs": [{"shout": True}, {"shout": False}, {"shout": True}]}
    data |= {} if tools is None else {"tools": [tools] * 3}
    rows = [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
    name = "a default system prompt and tools"
    tokenizer = with_template(name)
    whole = [chat_oracle(tokenizer, "", row) for row in rows]
    limit = sorted(max(map(len, pair[:2])) for pair in whole)[1]
    expected = [chat_oracle(tokenizer, "", row, mode, limit) for row in rows]
    assert expected != whole
    if mode == "keep_end":
        assert all(min(map(len, pair[:2])) > pair[2] for pair in expected)
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if streaming else Dataset.from_list(rows)
    assert_equal(trainer, tokenizer, dataset, expected, truncation_mode=mode, max_length=limit)


def test_the_tokens_are_those_of_reward_trainer(trainer, with_template, tmp_path):
    """But for what a template writes after the end of a text."""
    for template, explicit in itertools.product(TEMPLATES, (True, False)):
        tokenizer, dataset = with_template(template), Dataset.from_dict(conversational(explicit))
        theirs = RewardTrainer._prepare_dataset(trainer, dataset, tokenizer, trainer.args, "eval")
        n_tail = len(tokenizer(TEMPLATES[template][1])["input_ids"])
        for row, ours in zip(theirs, prepared(trainer, tokenizer, dataset), strict=True):
            assert [row[side][: len(row[side]) - n_tail] for side in ("chosen_ids", "rejected_ids")] == list(ours[:2])
    for data in (STANDARD, implicit()):
        theirs = RewardTrainer._prepare_dataset(trainer, Dataset.from_dict(data), tokenizer, trainer.args, "eval")
        ours = prepared(trainer, tokenizer, Dataset.from_dict(data))
        assert [(row["chosen_ids"], row["rejected_ids"]) for row in theirs] == [pair[:2] for pair in ours]


def test_pairs_without_a_common_message(trainer, tokenizer):
    """They are taken, as by the parent; what the texts share is the prompt."""
    rows = [
        {"chosen": message("user", "How?") + message("assistant", "Fine."), "rejected": message("user", "What?")},
        {"chosen": message("assistant", "It is fine."), "rejected": message("assistant", "It is late.")},
    ]
    expected = [chat_oracle(tokenizer, "", row) for row in rows]
    assert all(pair[2] == shared_length(*pair[:2]) > 0 for pair in expected)
    assert_equal(trainer, tokenizer, Dataset.from_list(rows), expected)


@pytest.mark.parametrize(
    "turns",
    [
        (["Be kind.", "How?", "Fine."], ["Be kind.", "What?", "Fine day."]),
        (["Be kind.", "How?", "Fine."], ["Be kind.", "How?", "Fine.", "Why?", "Fine."]),
    ],
    ids=["a prompt that the template refuses", "one text begins the other"],
)
def test_implicit_prompts(trainer, with_template, turns):
    tokenizer = with_template("a question is required")
    roles = ["system", *["user", "assistant"] * 2]
    texts = [[{"role": role, "content": text} for role, text in zip(roles, side, strict=False)] for side in turns]
    rows = [dict(zip(("chosen", "rejected"), texts, strict=True))]
    expected = [chat_oracle(tokenizer, "", row) for row in rows]
    own = tokenizer.decode(expected[0][0][expected[0][2] :])
    assert own.strip() == ("How?<eos><bos>assistant: Fine.<eos>" if "What?" in turns[1] else "Fine.<eos>")
    assert_equal(trainer, tokenizer, Dataset.from_list(rows), expected)


def test_fields_that_only_one_column_has(trainer, tokenizer):
    """Arrow gives every message of a column the fields of all others, so that common messages look different."""
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    question, answer = message("user", "How is it?"), message("assistant", "It is late.")
    rows = [
        {"chosen": [*question, {**answer[0], "content": "It is.", "tool_calls": [call]}], "rejected": question + answer}
    ]
    dataset = Dataset.from_list(rows)
    assert dataset[0]["chosen"][0] != dataset[0]["rejected"][0]
    expected = [chat_oracle(tokenizer, "", row) for row in rows]
    assert tokenizer.decode(expected[0][0][: expected[0][2]]) == "<bos>user: How is it?<eos><bos>assistant:"
    assert_equal(trainer, tokenizer, dataset, expected)


@pytest.mark.parametrize("kwargs", [{"add_generation_prompt": True}, {"continue_final_message": True}])
def test_template_arguments_about_the_end(trainer, tokenizer, kwargs):
    """They are about the texts, not about the prompt; a last message that is left open is not cut."""
    row = {key: value[0] for key, value in conversational(False).items()}
    row["chosen"] = [*row["chosen"], *message("user", "Why?"), *message("assistant", "The sun.")]
    whole = chat_oracle(tokenizer, "", row)
    if "continue_final_message" in kwargs:
        whole = (whole[0][:-1], whole[1][:-1], whole[2])
    assert_equal(trainer, tokenizer, Dataset.from_list([row | {"chat_template_kwargs": kwargs}]), [whole])


# --- tokens that are given ---


@pytest.mark.parametrize("names", ["chosen_ids rejected_ids", "chosen_input_ids rejected_input_ids"])
@pytest.mark.parametrize("kind", ["list", "torch", "numpy", "stream"])
@pytest.mark.filterwarnings("ignore:Detected legacy:FutureWarning")
def test_given_tokens_stay_as_they_are(trainer, tokenizer, names, kind):
    """Also after their last end token, next to texts, and next to columns with names that ours might have."""
    chosen, rejected = [5, 6, EOS, 7, EOS, 8, 9], [5, 6, EOS, 7, 9]
    columns = dict(zip(names.split(), ([chosen, rejected], [rejected, chosen]), strict=True))
    texts = {"prompt": ["How?", "What?"], "prompt_length": [1, 1], "content": ["a", "b"], "is_empty": [True, False]}
    dataset = Dataset.from_dict(columns | texts | {"length": ["short", "long"]})
    if kind == "stream":
        dataset = dataset.to_iterable_dataset()
    elif kind != "list":
        dataset = dataset.with_format(kind)
    assert_equal(trainer, tokenizer, dataset, [(chosen, rejected, 4), (rejected, chosen, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = list(trainer._prepare_dataset(dataset, tokenizer, trainer.args, "eval"))
    for name, values in (texts | {"length": ["short", "long"]}).items():
        assert [row[name] for row in result] == values


@pytest.mark.parametrize("value", [1, "short"])
def test_a_column_of_the_user_is_not_a_length(make_trainer, value):
    expected = [row["genarm_prompt_length"] for row in make_trainer().train_dataset]
    trainer = make_trainer(STANDARD | {"prompt_length": [value] * 3})
    assert [row["genarm_prompt_length"] for row in trainer.train_dataset] == expected
    assert trainer.data_collator(list(trainer.train_dataset))["genarm_prompt_length"].tolist() == expected
    trainer.train()


def test_what_was_prepared_is_not_prepared_again(make_trainer):
    """A shorter `max_length` cuts it on; the prompt that was left is known."""
    with pytest.warns(UserWarning, match="and cut"):
        first = make_trainer(max_length=20, truncation_mode="keep_end").train_dataset
    again = make_trainer(first, max_length=20, truncation_mode="keep_end").train_dataset
    assert list(again) == list(first)
    with pytest.warns(UserWarning, match="and cut"):
        shorter = make_trainer(first, max_length=18, truncation_mode="keep_end").train_dataset
    assert max(len(row["chosen_ids"]) for row in first) == 20
    for row, before in zip(shorter, first, strict=True):
        excess = max(max(len(before["chosen_ids"]), len(before["rejected_ids"])) - 18, 0)
        excess = min(excess, before["genarm_prompt_length"])
        assert row["genarm_prompt_length"] == before["genarm_prompt_length"] - excess
        assert row["chosen_ids"] == before["chosen_ids"][excess : excess + 18]


def test_another_version_does_not_use_what_is_cached(trainer, tokenizer, tmp_path, monkeypatch):
    """`datasets` names what it keeps on disk after the name of a function, not after what is in it."""
    Dataset.from_dict(conversational(True)).save_to_disk(tmp_path / "pairs")
    before = prepared(trainer, tokenizer, Dataset.load_from_disk(tmp_path / "pairs"))
    monkeypatch.setattr(preference_data, "_shared_length", lambda *texts: 1)
    # The same version may take it from the cache: this is what shows that there is one.
    assert prepared(trainer, tokenizer, Dataset.load_from_disk(tmp_path / "pairs")) == before
    monkeypatch.setattr(preference_data, "version", lambda name: "another")
    after = prepared(trainer, tokenizer, Dataset.load_from_disk(tmp_path / "pairs"))
    assert [pair[2] for pair in after] == [1, 1, 1] != [pair[2] for pair in before]
