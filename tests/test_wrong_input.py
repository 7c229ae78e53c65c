"""Every public entry, given values of wrong types and contents: it works, or the error has name, value and way out."""

import dataclasses
import importlib
import json
import math
import re
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_prompts, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import LlamaForSequenceClassification, LlamaModel, T5Config, T5ForConditionalGeneration

import hf_genarm
from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo, cli, smc_sample
from hf_genarm.hub.card import reward_model_card
from hf_genarm.scripts.arguments import ARGUMENTS

OURS = str(Path(hf_genarm.__file__).parent)
BASE, ARM, TOKENIZER = tiny_llama(0), tiny_llama(1, num_hidden_layers=1), tiny_tokenizer()
KNOWN = AutoregressiveRewardModel(ARM, TOKENIZER, RewardInfo(beta=0.1, reward_scale=2.0))
SCORER = AutoregressiveRewardModel(tiny_llama(1, vocab_size=len(TOKENIZER)), TOKENIZER)
SENTENCE = GenARMLogitsProcessor.from_sentences("Be kind.", SCORER.model, TOKENIZER)
CLASSIFIER = LlamaForSequenceClassification(ARM.config)
ENCODER_DECODER = T5ForConditionalGeneration(
    T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
)
PROMPTS = random_prompts(2, 5)
SCORES = BASE(PROMPTS).logits[:, -1].detach()

ODD = [
    *(None, True, -1, 10**30, 1e400, math.nan, 1j, b"x", "", "a", "auto", "\ud83d", Path("x"), object(), object, print),
    *([], (), {}, set(), [None], [True], [[1.0]], [[1], [1, 2]], ["1"], [""], ["a", "b"], range(1), {"a": 1}),
    *(nn.Linear(2, 2), BASE, CLASSIFIER, ENCODER_DECODER, LlamaModel(ARM.config), LlamaModel, TOKENIZER),
    *(KNOWN, RewardInfo(), [ARM, None], np.ones((2, 1)), np.array([["a"]]), np.array([None])),
    *(torch.ones(()), torch.zeros(0), torch.ones(2, 1), torch.ones(2, 2), torch.ones(1, 1, 1), torch.ones(2, 1).bool()),
    *(torch.full((2, 1), math.nan), torch.full((2, 5), 0.5), torch.ones(2, 5), torch.ones(2, 5, dtype=torch.int8)),
    *(torch.ones(1, dtype=torch.complex64), torch.ones(2, 1, device="meta"), torch.eye(2).to_sparse()),
    [[{"role": "user"}]],
    [[{"role": None, "content": 3}]],
    [{"role": "user", "content": "a"}],
]
MADE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=3,
)


def works_or_is_refused(call, *names):
    """Calls, and checks an error: raised by our code, with the name of the argument, a rule or a way out, and short."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except (TypeError, ValueError, OSError, ImportError) as error:
        message = str(error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        assert frame.filename.startswith(OURS), f"{frame}: {message}"
        assert any(name in message for name in names), message
        assert ", but " in message or re.search(r"\S[.:] [A-Z`]", message), message
        assert len(message) < 700, message


def processor(argument):
    """Makes a processor with one argument, and calls it."""

    def call(value):
        given = {"reward_model": ARM} | {argument: value}
        GenARMLogitsProcessor(given.pop("reward_model"), **given)(PROMPTS, SCORES)

    return call


def watching(argument):
    """Makes a processor that knows the base, with one argument, and calls it."""

    def call(value):
        given = {"reward_model": ARM, "base_model": BASE, "tokenizer": TOKENIZER, "reward_tokenizer": TOKENIZER}
        given |= {argument: value}
        GenARMLogitsProcessor(given.pop("reward_model"), **given)(PROMPTS, SCORES)

    return call


def setting(name):
    """Sets a value on a processor, and calls it."""

    def call(value):
        other = GenARMLogitsProcessor(ARM)
        setattr(other, name, value)
        other(PROMPTS, SCORES)

    return call


def reward_model(argument):
    """Makes a reward model with one argument, and scores a text."""

    def call(value):
        given = {"model": SCORER.model, "tokenizer": TOKENIZER, "info": RewardInfo(loss={"reference": "base"})}
        AutoregressiveRewardModel(**given | {"reference": SCORER.model} | {argument: value}).score(["What"], ["is"])

    return call


def statistics(value):
    kept = GenARMLogitsProcessor(ARM)
    kept.keeps_statistics = True
    kept(PROMPTS, SCORES)
    kept.statistics(value)


def particles(argument):
    """Samples from the optimum over whole texts, with one argument."""

    def call(value):
        given = {"n_particles": 2, "ess_threshold": 0.5} | {argument: value}
        if isinstance(value, int) and value > 10:
            return  # would take long
        options = {"do_sample": True, "max_new_tokens": 1, "custom_generate": smc_sample}
        BASE.generate(PROMPTS, logits_processor=[GenARMLogitsProcessor(ARM, base_model=BASE)], **options, **given)

    return call


def drafts(value):
    GenARMLogitsProcessor(ARM, base_model=BASE).assistant(value)


def info(field):
    """Makes what a reward model records about itself, with one field, and its card."""
    return lambda value: str(reward_model_card(RewardInfo(**{field: value}), "a", "a", True))


ROW = {"alpha": 1.0, "reference": None, "temperature": 1.0} | {x: [1.0] * 3 for x in ("reward", "kl", "perplexity")}
MEASURED = {"scorer": "s", "n_prompts": 3, "max_new_tokens": 3, "max_kl": 2.0, "settings": [ROW]}
MEASURED |= {"examples": [{"prompt": "a", "answer": "b"}]}
SETTING = {"alpha": 1.0, "reference": None, "temperature": 1.0, "measured": MEASURED}


def recommended(*path):
    """Makes a recommendation with one value somewhere in it, and its card."""

    def call(value):
        changed = json.loads(json.dumps(SETTING))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        info("recommended")(changed)

    return call


MODELS = ("`model`", "`reward_model`", "can't be a reward model", "can't be a reference", "bidirectional")
OTHER_TOKENS = ("embeddings", "knows ids", "that training started from")
TEXTS = ("prompt", "response", "chat")
ENTRIES = {
    "reward_model": (processor("reward_model"), MODELS),
    "reward_model, with a base": (watching("reward_model"), MODELS),
    "base_model": (processor("base_model"), ("`base_model`", "base model")),
    "reference": (processor("reference"), ("`reference`", "can't be a reference", "bidirectional")),
    **{x: (processor(x), (f"`{x}`",)) for x in ("alpha", "target_kl", "pad_token_id", "attention_mask")},
    **{f"{x}, with a base": (watching(x), (f"`{x}`",)) for x in ("alpha", "tokenizer", "reward_tokenizer")},
    **{x: (processor(x), ("tokenizer`",)) for x in ("tokenizer", "reward_tokenizer")},
    **{f"{x}, set": (setting(x), (f"`{x}`",)) for x in ("alpha", "target_kl", "attention_mask", "keeps_statistics")},
    "set_beta": (lambda value: GenARMLogitsProcessor(KNOWN).set_beta(value), ("`beta`", "`alpha`")),
    "set_weights": (lambda value: GenARMLogitsProcessor(KNOWN).set_weights(value), ("`weights`",)),
    "set_weights, alpha": (lambda value: GenARMLogitsProcessor(KNOWN).set_weights([1.0], value), ("`alpha`",)),
    "prompts, set": (setting("prompts"), ("`prompts",)),
    "encode": (lambda value: SENTENCE.encode(value), ("prompt", "chat")),
    "sentence": (lambda value: AutoregressiveRewardModel.from_sentence(value, ARM, TOKENIZER), ("`sentence`",)),
    "statistics": (statistics, ("`sequences`",)),
    "assistant": (drafts, ("`num_assistant_tokens`",)),
    **{x: (particles(x), (f"`{x}`",)) for x in ("n_particles", "ess_threshold")},
    **{f"AutoregressiveRewardModel, {x}": (reward_model(x), (f"`{x}`", *MODELS, *OTHER_TOKENS))
       for x in ("model", "tokenizer", "info", "reference")},
    "prompts": (lambda value: SCORER.score(value, ["is"]), TEXTS),
    "responses": (lambda value: SCORER.score(["What"], value), TEXTS),
    "responses to a chat": (lambda value: SCORER.score([[{"role": "user", "content": "a"}]], value), TEXTS),
    **{x: (lambda value, x=x: SCORER.token_rewards(["What"], ["is"], **{x: value}), (f"`{x}`",))
       for x in ("batch_size", "chunk_length")},
    "as_reward_func": (lambda value: SCORER.as_reward_func(value)(["What"], ["is"]), ("`batch_size`",)),
    **{f"RewardInfo, {x}": (info(x), (f"`{x}`",)) for x in RewardInfo.__dataclass_fields__},
    **{f"recommended, {x}": (recommended(x), ("`recommended`",)) for x in SETTING},
    **{f"measured, {x}": (recommended("measured", x), ("`recommended`",)) for x in MEASURED},
    **{f"settings, {x}": (recommended("measured", "settings", 0, x), ("`recommended`",)) for x in ROW},
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_arguments(entry):
    call, names = ENTRIES[entry]
    for value in ODD:
        works_or_is_refused(lambda value=value: call(value), *names)

    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(MADE)
    def any_value(value):
        works_or_is_refused(lambda: call(value), *names)

    any_value()


@pytest.mark.parametrize("value", [None, "a", Path("a"), 3, [None], [ARM, "a"], CLASSIFIER, nn.Linear(2, 2)], ids=repr)
@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "with a base"])
def test_what_is_no_reward_model(value, base):
    with pytest.raises(
        TypeError, match=r"`reward_model` is .*no language model.*`from_pretrained`|Classif.*can't be a"
    ):
        GenARMLogitsProcessor(value, base_model=base)


def test_models_and_tokenizers_are_no_strengths():
    """`from_pretrained` takes the base at that place, and all three can be called."""
    for value in (BASE, TOKENIZER, LlamaModel):
        with pytest.raises(TypeError, match=r"`alpha` is .*but must be a number.*by their names"):
            GenARMLogitsProcessor(ARM, value)


CALLS = {
    "no rows": (PROMPTS[:0], SCORES[:0], ValueError, r"`input_ids` has shape \(0, 5\).*one row at least"),
    "no tokens": (PROMPTS[:, :0], SCORES, ValueError, "no prompt tokens.*Pass `input_ids`"),
    "negative": (PROMPTS - 60, SCORES, ValueError, "ids from -|id -"),
    "beyond": (PROMPTS + 1000, SCORES, ValueError, "ids from 1.*knows ids from 0 to 47|unknown|not in the"),
    "float": (PROMPTS.float(), SCORES, TypeError, "`input_ids` is of torch.float32, but must be a tensor of integers"),
    "bool": (PROMPTS.bool(), SCORES, TypeError, "`input_ids` is of torch.bool"),
    "list": (PROMPTS.tolist(), SCORES, TypeError, r"`input_ids` is \[\["),
    "one text": (PROMPTS[0], SCORES, ValueError, r"`input_ids` has shape \(5,\)"),
    "other rows": (PROMPTS[:1], SCORES, ValueError, "`input_ids` has 1 rows, but `scores` has 2"),
    "other width": (PROMPTS, SCORES[:, :20], ValueError, "48 tokens, but the base model has 20|token is left"),
    "no scores": (PROMPTS, None, TypeError, "`scores` is None, but must be a tensor of real numbers"),
    "array": (PROMPTS, SCORES.numpy(), TypeError, r"`scores` is array"),
    "one row of scores": (PROMPTS, SCORES[0], ValueError, r"`scores` has shape \(48,\)"),
    "impossible": (PROMPTS, torch.full_like(SCORES, -math.inf), ValueError, "token"),
}
GUIDES = {
    "plain": {},
    "watching": {"base_model": BASE},
    "reference": {"base_model": BASE, "reference": "base"},
    "target": {"target_kl": 0.1},
    "aligned": {"tokenizer": TOKENIZER, "reward_tokenizer": TOKENIZER},
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("guide", GUIDES)
def test_calls(guide, case):
    """Ids are refused before a forward pass: on a GPU, that would end in an assertion, after which nothing runs."""
    input_ids, scores, kind, message = CALLS[case]
    guided = GenARMLogitsProcessor(ARM, **GUIDES[guide])
    if (guide, case) == ("aligned", "other width"):  # tokens without a logit are left out
        return
    with pytest.raises(kind, match=message):
        guided(input_ids, scores)
    assert guided(PROMPTS, SCORES).isfinite().any()  # and it can be used as before


# --- commands ---

VALUES = [
    "a",
    "nan",
    "inf",
    "-1",
    "0",
    "1.5",
    "1e30",
    "",
    " ",
    "None",
    "true",
    "no/where",
    "/no/where",
    "folder",
    "9" * 20,
]
VALUES += [
    "meta",
    "cuda:9",
    "file.txt",
    "file.txt/x",
    "list.jsonl",
    "null.jsonl",
    "cut.jsonl",
    "scalar.jsonl",
    "binary.jsonl",
]
MODEL = ["--base", "no/base", "--arm", "no/arm"]
COMMANDS = {
    "show": [*MODEL, "--prompt", "What is"],
    "generate": [*MODEL, "--prompts", "prompts.jsonl", "--output", "new/answers.jsonl"],
    "tune": [*MODEL, "--prompts", "prompts.jsonl", "--scorer", "json:dumps"],
    "evaluate": ["--base", "no/base", "--model", "no/arm", "--dataset", "pairs.jsonl"],
    "train": ["--model", "no/base", "--dataset", "pairs.jsonl", "--output_dir", "new"],
    "demo": ["--base", "no/base", "--arm", "no/arm", "--export", "new"],
    "env": MODEL,
}
# Of `train` only those that are not of transformers, TRL or PEFT
OWN = {
    "train": "dataset dataset_train_split dataset_test_split test_size prompt_column chosen_column prompt_template "
    "response_columns preferred_column model beta reference target_margin sft_coefficient log_samples "
    "samples_max_new_tokens output_dir"
}
SAMPLED = {"show": 60, "generate": 60, "tune": 60, "evaluate": 60, "train": 25, "demo": 40, "env": 20}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [json.dumps({"prompt": f"{n}?", "chosen": "Fine.", "rejected": "Late."}) for n in range(12)]
    for name, lines in {
        "prompts.jsonl": ['{"prompt": "What?"}', '{"prompt": "Why?"}'],
        "pairs.jsonl": pairs,
        "file.txt": ["a"],
        "list.jsonl": ["[1]"],
        "null.jsonl": ['{"prompt": null, "chosen": null, "rejected": null}'],
        "scalar.jsonl": ["3"],
        "cut.jsonl": ['{"prompt"'],
    }.items():
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\x00\x80")
    (tmp_path / "folder").mkdir()


def own_arguments(command):
    """Returns the arguments that are defined here, by the dataclasses of a command."""
    if command in OWN:
        return OWN[command].split()
    groups = ARGUMENTS.get(command) or importlib.import_module(f"hf_genarm.scripts.{command}").ARGUMENTS
    return [field.name for group in groups for field in dataclasses.fields(group)]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(files, command, capsys):
    """No model is reached: a value that is right, too, ends in one line, which names the model."""

    @settings(max_examples=SAMPLED[command], deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(own_arguments(command)), st.sampled_from(VALUES))
    def any_value(argument, value):
        code = cli.main([command, *COMMANDS[command], f"--{argument}", value])
        said = capsys.readouterr().err.splitlines()
        said = said[-1:] if argument == "json" else said  # before it, what is otherwise printed to stdout
        assert code in (1, 2) or (command == "demo" and code == 0), (argument, value)
        if code:
            assert len(said) == 1, said
            assert said[0].startswith(f"hf-genarm {command}: "), said
            assert "--debug" not in said[0], said  # as where an error has no sentence
            assert ", but " in said[0] or re.search(r"\S[.:;!] [A-Z`-]", said[0]), said

    any_value()
