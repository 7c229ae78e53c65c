"""`hf-genarm` when it is called wrongly: one line with the value, the rule and the way out, and no model loaded."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_genarm import cli

PAIR = {"prompt": "How was it?", "chosen": "Fine.", "rejected": "Late."}
LABELLED = {"prompt": "How was it?", "first": "Fine.", "second": "Late."}
FILES = {
    "pairs.jsonl": "".join(json.dumps({**PAIR, "prompt": f"{n}?"}) + "\n" for n in range(4)),
    "one.jsonl": json.dumps(PAIR),
    "other.jsonl": json.dumps({"better": "Fine.", "worse": "Late."}),
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "empty.csv": "",
    "broken.jsonl": '{"chosen": "Fine."',
    "list.jsonl": "[1, 2]\n[3, 4]\n",
    "null.jsonl": json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "rejected": None}),
    "number.jsonl": json.dumps({**PAIR, "chosen": 3}),
    "mixed.jsonl": json.dumps({**PAIR, "chosen": [{"role": "assistant", "content": "Fine."}]}),
    "tools.jsonl": json.dumps({**PAIR, "tools": [{"name": "search"}]}),
    "no_prompt.jsonl": json.dumps({**PAIR, "prompt": None}),
    "labels.jsonl": "".join(json.dumps({**LABELLED, "better": label}) + "\n" for label in (1, 2)),
    "letters.jsonl": json.dumps({**LABELLED, "better": "b"}),
    "text.jsonl": json.dumps({**LABELLED, "better": "1"}),
    "unlabelled.jsonl": json.dumps({**LABELLED, "better": None}),
    "share.jsonl": json.dumps({**LABELLED, "better": 0.7}),
    "pairs.txt": "How was it?",
    "prompts.jsonl": json.dumps({"prompt": "How was it?"}) + "\n\n" + json.dumps({"prompt": "Why?"}),
    "chats.jsonl": json.dumps({"prompt": [{"role": "user", "text": "How was it?"}]}),
    "answered.jsonl": json.dumps({"prompt": "How was it?", "completion": "Fine."}),
    "half.jsonl": json.dumps({"prompt": "How was it? \ud83d"}),
    "nothing.jsonl": json.dumps({"prompt": ""}),
    "there.jsonl": "",
    "unknown.yaml": "learning_rat: 0.1",
    "text.yaml": "beta: much",
    "null.yaml": "beta: null",
    "part.yaml": "max_steps: 1.5",
    "mapping.yaml": "beta: {a: 1}",
    "list.yaml": "- beta",
    "broken.yaml": "beta: [1",
}
BINARY = {"binary.jsonl": b"\x80\xff\x00" * 99, "binary.parquet": b"\x80\xff\x00" * 99, "bad.jsonl.gz": b"no gzip"}
LABELS = ["--response_columns", "first", "second", "--preferred_column", "better"]

# Arguments after good ones, the exit code, and what the line says
TRAIN = [
    (["--lerning_rate", "0.1"], 2, "`--lerning_rate`.*Is it `--learning_rate`"),
    (["my-arm"], 2, "`my-arm`.*not an argument"),
    (["--beta", "much"], 2, "--beta.*'much'"),
    (["--beta", "-1"], 2, "`beta` is -1.0.*positive"),
    (["--reference", "me"], 2, "--reference.*'me'.*'base'"),
    (["--loss_type", "hing"], 2, "--loss_type.*'hing'.*'hinge'"),
    (["--dataset"], 2, "--dataset.*expected one argument"),
    (["--config"], 2, "`--config` is ``.*Name a YAML file"),
    (["--config", "no.yaml"], 2, "`no.yaml`, which is not a file"),
    (["--config=unknown.yaml"], 2, "`--learning_rat`, from the file.*Is it `--learning_rate`"),
    (["--config", "text.yaml"], 2, "--beta.*'much'"),
    (["--config", "null.yaml"], 2, "`beta` is null.*default"),
    (["--config", "part.yaml"], 2, "--max_steps.*'1.5'"),
    (["--config", "mapping.yaml"], 2, "--beta.*'{\"a\": 1}'"),
    (["--config", "list.yaml"], 2, "list.yaml.*mapping"),
    (["--config", "broken.yaml"], 2, "not valid YAML.*line 1"),
    (["--config", "binary.jsonl"], 2, "not valid YAML"),
    (["--test_size", "nan"], 2, "`test_size` is nan.*share"),
    (["--test_size", "-1"], 2, "`test_size` is -1.0.*share"),
    (["--test_size", "1.5"], 2, "`test_size` is 1.5.*number"),
    (["--prompt_template", "Q:"], 2, "`prompt_template` is 'Q:'.*`{prompt}`"),
    (["--preferred_column", "better"], 2, "`preferred_column` is 'better'.*go together"),
    (["--output_dir", "pairs.jsonl"], 1, "`pairs.jsonl` can't be the folder.*Name another"),
    (["--output_dir", "pairs.jsonl/arm"], 1, "`pairs.jsonl/arm` can't be the folder.*Name another"),
    (["--resume_from_checkpoint", "no"], 1, "`resume_from_checkpoint` is 'no'.*no such folder"),
    (["--dataset", "no.jsonl"], 1, "`no.jsonl` can't be read: there is no such file or folder here.*Give a Hub id"),
    (
        ["--dataset", "no/where"],
        1,
        "`no/where` can't be read: there is no such file.*on the Hub.*Give a Hub id",
    ),
    (["--dataset", "/no/where"], 1, "`/no/where` can't be read.*Give a Hub id"),
    (["--dataset", "pairs.txt"], 1, "`pairs.txt` can't be read: the ending.*parquet"),
    (["--dataset", "empty.jsonl"], 1, "`empty.jsonl` is empty"),
    (["--dataset", "empty.csv"], 1, "`empty.csv` can't be read"),
    (["--dataset", "blank.jsonl"], 1, "`blank.jsonl` can't be read.*one pair in each row"),
    (["--dataset", "broken.jsonl"], 1, "`broken.jsonl` can't be read: .*one pair in each row"),
    (["--dataset", "binary.jsonl"], 1, "`binary.jsonl` can't be read: .*one pair in each row"),
    (["--dataset", "binary.parquet"], 1, "`binary.parquet` can't be read: .*one pair in each row"),
    (["--dataset", "bad.jsonl.gz"], 1, "`bad.jsonl.gz` can't be read: .*one pair in each row"),
    (["--dataset", "list.jsonl"], 1, "`list.jsonl` can't be read.*one pair in each row"),
    (["--dataset", "other.jsonl"], 1, r"`other.jsonl` has the columns \['better', 'worse'\].*--chosen_column"),
    (["--dataset", "null.jsonl"], 1, "`rejected` is None in row 2 of `null.jsonl`.*Leave such rows out"),
    (["--dataset", "no_prompt.jsonl"], 1, "`prompt` is None in row 1"),
    (["--dataset", "mixed.jsonl"], 1, "`chosen` and `rejected` are a text and a list .* row 1.*both as messages"),
    (["--dataset", "number.jsonl"], 1, "`chosen` is 3 in row 1.*text or a list of messages"),
    (["--dataset", "one.jsonl"], 1, "1 pairs with 1 prompts.*leaves 0 to train on.*or 0 to hold none out"),
    (["--test_size", "4"], 1, "`test_size` 4 leaves 0 to train on"),
    (["--dataset_test_split", "test"], 1, "split `test` of `pairs.jsonl`.*one split, `train`.*--test_size"),
    (["--dataset_train_split", "valid"], 1, "split `valid` of `pairs.jsonl`.*one split"),
    *(
        (["--dataset", f"{name}.jsonl", *LABELS], 1, f"`better` is {value} in row {row} .*0 where the first")
        for name, value, row in (
            ("labels", 2, 2),
            ("letters", "'b'", 1),
            ("text", "'1'", 1),
            ("unlabelled", None, 1),
            ("share", 0.7, 1),
        )
    ),
    ([], 1, "`no/model` can't be loaded.*causal LM: `--model`"),
]
EVALUATE = [
    (["--batch_size", "-1"], 2, "`batch_size` is -1.*at least 1"),
    (["--max_pairs", "0"], 2, "`max_pairs` is 0.*at least 1"),
    (["--learning_rate", "1"], 2, "`--learning_rate`.*not an argument"),
    (["--output_dir", "pairs.jsonl"], 1, "`pairs.jsonl` can't be the folder"),
    (["--dataset_test_split", "test"], 1, "split `test` of `pairs.jsonl`.*one split"),
    (["--dataset", "null.jsonl"], 1, "`rejected` is None in row 2"),
    (["--dataset", "tools.jsonl"], 1, r"`tools.jsonl` has the columns \['tools'\].*ignore"),
    ([], 1, "`no/model` can't be loaded.*reward model: `--arm`"),
    (["--model", "pairs.jsonl"], 1, "`pairs.jsonl` can't be loaded.*`--arm`"),
]
GUIDED = [
    (["--alpha", "much"], 2, "--alpha.*'much'"),
    (["--alpha", "nan"], 2, "`alpha` is.*nan.*finite"),
    (["--alpha", "1", "2"], 2, "`alpha` is.*2 values.*1 reward models"),
    (["--target_kl", "-1"], 2, "`target_kl` is -1.0.*positive"),
    (["--dtype", "float8"], 2, "--dtype.*'float8'"),
    (["--max_new_tokens", "0"], 2, "`max_new_tokens` is 0.*at least 1"),
    ([], 1, "`no/model` can't be loaded.*causal LM: `--base`"),
]
GENERATE = [
    *GUIDED,
    (["--batch_size", "0"], 2, "`batch_size` is 0.*at least 1"),
    (["--temperature", "0"], 2, "`temperature` is 0.0.*Leave out `--do_sample`"),
    (["--top_p", "1.5"], 2, "`top_p` is 1.5.*at most 1"),
    (["--top_k", "-1"], 2, "`top_k` is -1.*at least 0"),
    (["--output", "there.jsonl"], 1, "`there.jsonl` is there already.*`--output`"),
    (["--output", "."], 1, "`.` is a folder"),
    (["--output", "there.jsonl/answers.jsonl"], 1, "`there.jsonl/answers.jsonl.partial` can't be made.*`--output`"),
    (["--prompts", "no.jsonl"], 1, "`no.jsonl` can't be read: No such file.*`--prompts`"),
    (["--prompts", "binary.jsonl"], 1, "`binary.jsonl` can't be read: it is not text"),
    (["--prompts", "blank.jsonl"], 1, "`blank.jsonl` is empty"),
    (["--prompts", "broken.jsonl"], 1, "Line 1 of `broken.jsonl` is not JSON.*one object in each line"),
    (["--prompts", "list.jsonl"], 1, r"Line 1 of `list.jsonl` is \[1, 2\].*object"),
    (["--prompt_column", "question"], 1, r"Line 1 of `prompts.jsonl` has \['prompt'\].*`--prompt_column`"),
    (["--prompts", "chats.jsonl"], 1, "`prompt` in line 1 of `chats.jsonl`.*messages with `role` and `content`"),
    (["--prompts", "nothing.jsonl"], 1, '`prompt` in line 1 of `nothing.jsonl` is "".*not empty'),
    (["--prompts", "half.jsonl"], 1, "Line 1 of `half.jsonl` has half a character"),
    (["--prompts", "answered.jsonl"], 1, "Line 1 of `answered.jsonl` has a `completion`.*Rename"),
]
SHOW = [
    *GUIDED,
    (["--alpha", "0"], 1, r"`alpha` is \[0.0\].*nothing is guided"),
    (["--prompt", " "], 2, "`prompt` is empty"),
    (["--temperature", "-1"], 2, "`temperature` is -1.0"),
    (["--width", "0"], 2, "`width` is 0, but must be a number of columns, from 1 to 10,000"),
    (["--width", "9" * 20], 2, "`width` is 9999.*from 1 to 10,000"),
]
OTHERS = [
    (["tran"], 2, "hf-genarm tran: `tran` is not a command. Is it `train`.*train, evaluate"),
    (["--help-me"], 2, "`--help-me` is not a command"),
    (["train"], 2, "hf-genarm train: .*required: --dataset.*--model.*--help"),
    (["evaluate", "--dataset", "pairs.jsonl"], 2, "required: --model"),
]
CALLS = [
    *OTHERS,
    *(
        ([command, "--model", "no/model", "--dataset", "pairs.jsonl", *rest], code, line)
        for command, calls in (("train", TRAIN), ("evaluate", EVALUATE))
        for rest, code, line in calls
    ),
    *(
        ([command, "--base", "no/model", "--arm", "no/arm", *given, *rest], code, line)
        for command, given, calls in (
            ("generate", ["--prompts", "prompts.jsonl", "--output", "answers.jsonl"], GENERATE),
            ("show", ["--prompt", "How was it?"], SHOW),
        )
        for rest, code, line in calls
    ),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, content in BINARY.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("call", "code", "line"), CALLS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_wrong_calls(folder, monkeypatch, capfd, call, code, line):
    def too_late(*args, **kwargs):
        raise AssertionError("A model is loaded, though the call is wrong.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_late)
    assert cli.main(call) == code
    printed = capfd.readouterr()
    assert printed.out == ""
    (said,) = printed.err.splitlines()
    assert re.search(line, said), said
    assert re.match(rf"hf-genarm {call[0]}: ", said)


def run(*arguments, cwd):
    command = [sys.executable, "-m", "hf_genarm", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_one_line_and_the_exit_code_of_the_process(folder):
    wrong = ["train", "--model", "no/model", "--dataset", "pairs.jsonl", "--dataset_test_split", "test"]
    failed = run(*wrong, cwd=folder)
    assert failed.returncode == 1
    # Libraries may print while they are imported, such as torchao about what it can't load.
    line = failed.stderr.splitlines()[-1]
    assert line.startswith("hf-genarm train: The split `test`")
    assert "Traceback" not in failed.stderr


def test_a_reader_that_has_read_enough():
    """As `hf-genarm generate --help | head -1`."""
    command = [sys.executable, "-m", "hf_genarm", "generate", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_the_module_is_the_command(folder):
    unknown, helped = run("tran", cwd=folder), run("--help", cwd=folder)
    assert (unknown.returncode, helped.returncode) == (2, 0)
    assert "usage: hf-genarm [--debug] COMMAND" in helped.stdout
    script = Path(sys.executable).parent / "hf-genarm"
    installed = subprocess.run([script, "generate", "--help"], capture_output=True, text=True, check=True)
    assert "--prompt_column" in installed.stdout


@pytest.mark.parametrize("call", [["train", "--debug", "--model"], ["--debug", "train", "--model"]])
def test_debug_raises(call):
    with pytest.raises(cli.UsageError, match="expected one argument"):
        cli.main(call)


def test_the_debug_argument_of_transformers_is_left_alone():
    arguments = ["train", "--debug", "underflow_overflow"]
    assert not cli._take_debug(arguments)
    assert arguments == ["train", "--debug", "underflow_overflow"]


def test_a_bug_says_its_type(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", lambda *_: {}["column"])
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == "hf-genarm train: KeyError: 'column' (`hf-genarm --debug train …` shows where.)\n"
