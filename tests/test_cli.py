"""`hf-genarm` around its commands: help, version, JSON, and what is left when a command ends early."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run, write
from huggingface_hub import ModelCard
from pairs import PROMPTS, STANDARD, conversational
from tiny import save_adapter, save_llama

from hf_genarm import AutoregressiveRewardModel, RewardInfo, __version__, cli
from hf_genarm.demo import DEMO_MODEL_ID
from hf_genarm.files import write_whole
from hf_genarm.scripts import generate
from hf_genarm.training.trainer import AutoregressiveRewardTrainer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and an adapter on it, whose recommended temperature is 0.5."""
    folder = tmp_path_factory.mktemp("models")
    arm = save_adapter(save_llama(folder / "base"), str(folder / "arm"))
    setting = {"alpha": 2.0, "reference": "base", "temperature": 0.5, "measured": {}}
    RewardInfo(beta=0.1, recommended=setting).save(arm)
    return str(folder / "base"), arm


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    return path


# --- what needs no model ---


def test_a_typo_and_help_do_not_import_torch():
    """In a process of its own, which has imported nothing yet."""
    script = """
import sys
from hf_genarm import cli

calls = [["tran"], ["--version"], ["--help"], ["generate", "--promts", "x"], ["show", "--arm", "x", "--promt", "x"],
    ["tune", "--arm", "x", "--prompts", "x", "--alfa", "1"], ["env", "--armm", "x"], ["publish", "--dry"],
    ["demo", "--prot", "1"], ["evaluate", "--modl", "x"], ["generate", "--help"], ["publish", "--help_all"]]
codes = [cli.main(call) for call in calls]
assert codes == [2, 0, 0, 2, 2, 2, 2, 2, 2, 2, 0, 0], codes
assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "`tran` is not a command. Is it `train`?" in done.stderr
    assert "`--alfa`, from the command line, is not an argument. Is it `--alpha`?" in done.stderr
    assert f"hf_genarm {__version__}\n" in done.stdout


def listed(command, *more, capsys):
    assert cli.main([command, "--help", *more]) == 0
    return capsys.readouterr().out


def test_help_lists_our_arguments_first_and_the_others_on_demand(capsys):
    short, whole = listed("train", capsys=capsys), listed("train", "--help_all", capsys=capsys)
    names = [re.findall(r"^  --(\w+)", text, re.MULTILINE) for text in (short, whole)]
    for name in ("dataset", "beta", "reference", "model_name_or_path", "log_samples", "overwrite_output_dir"):
        assert name in names[0]
    assert {"output_dir", "learning_rate", "lora_r"} < set(names[0])
    assert "adam_beta1" not in names[0]
    assert "adam_beta1" in names[1]
    assert names[0].index("dataset") < names[0].index("beta") < names[0].index("learning_rate")
    assert set(names[0]) < set(names[1])
    hidden = int(re.search(r"`--help_all` lists (\d+) more", short)[1])
    assert hidden == len(set(names[1])) - len(set(names[0])) > 100
    assert "(required)" in short
    assert "    hf-genarm train --model" in short  # the lines of the description are as they are written


@pytest.mark.parametrize("command", sorted(cli._COMMANDS.keys() - {"lm-eval"}))
def test_help_of_each_command(command, capsys):
    printed = listed(command, capsys=capsys)
    assert printed.startswith(f"usage: hf-genarm {command}")
    assert f"hf-genarm {command} " in printed.split("\n", 1)[1]  # its command line
    assert "(default: None)" not in printed


# --- JSON ---


def test_env_as_json(models, capsys):
    run("env", "--arm", models[1], "--json")
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["hf_genarm"] == __version__
    assert any("engine `fused`" in line for line in facts["models"])
    assert f"- hf_genarm: {__version__}" in printed.err


def test_evaluate_as_json_by_the_name_that_other_commands_have(models, tmp_path, capsys):
    path = write(tmp_path, "jsonl", STANDARD)
    run("evaluate", "--arm", models[1], "--dataset", path, "--output_dir", tmp_path / "report", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert report["metrics"]["n_pairs"] == 3


# --- the recommended temperature ---


def test_sampling_takes_the_recommended_temperature(models, prompts, tmp_path, capsys):
    def answers(*options):
        output = tmp_path / f"answers-{len(list(tmp_path.iterdir()))}.jsonl"
        run("generate", "--arm", models[1], "--prompts", prompts, "--output", output, "--max_new_tokens", 8, *options)
        return output.read_text(encoding="utf-8"), capsys.readouterr().out

    recommended, said = answers("--do_sample")
    assert "Sampling: temperature 0.5, as recommended\n" in said
    given, said = answers("--do_sample", "--temperature", 0.5)
    other, said_otherwise = answers("--do_sample", "--temperature", 1.5)
    assert recommended == given != other
    assert "Sampling: temperature 1.5\n" in said_otherwise
    _, said = answers()
    assert "answers are greedy. The recommended temperature, 0.5, is for `--do_sample`." in said


def shown(models, *options, capsys):
    """What `show` prints: its lines about the models, and the columns of both answers as text."""
    run("show", "--arm", models[1], "--prompt", PROMPTS[0], "--max_new_tokens", 12, "--width", 203, *options)
    printed = capsys.readouterr().out
    rows = re.sub(r"\033\[[\d;]*m", "", printed).split("unguided: ")[1].splitlines()[1:]
    return printed, *("".join(row.ljust(203)[side] for row in rows).strip() for side in (slice(100), slice(103, 203)))


def test_show_draws_both_answers_by_the_same_random_numbers(models, capsys):
    printed, unguided, guided = shown(models, "--alpha", 1e-5, capsys=capsys)
    assert "Temperature: 0.5, as recommended\n" in printed
    assert unguided == guided
    _, same, guided = shown(models, "--alpha", 9, capsys=capsys)
    assert same == unguided != guided
    printed, other, _ = shown(models, "--alpha", 9, "--temperature", 1.5, capsys=capsys)
    assert "Temperature: 1.5\n" in printed
    assert other != unguided
    assert shown(models, "--alpha", 9, "--seed", 1, capsys=capsys)[1] != unguided


def test_show_has_colours_in_terminals_only(models, capsys, monkeypatch):
    assert "\033" not in shown(models, "--alpha", 9, capsys=capsys)[0]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\033[38;2;" in shown(models, "--alpha", 9, capsys=capsys)[0]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in shown(models, "--alpha", 9, capsys=capsys)[0]


# --- bases by their names ---


def test_the_hub_id_of_the_examples_works_without_the_hub(tmp_path, monkeypatch, capsys):
    """From training to publishing, whose card names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_GENARM_SMOKE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--report_to", "none", "--max_steps", 1, "--test_size", 0, "--lora_target_modules", "q_proj", "v_proj"]
    path = write(tmp_path, "jsonl", conversational(True))
    run("train", "--model", DEMO_MODEL_ID, "--dataset", path, "--output_dir", "my-arm", *options)
    assert ModelCard.load(tmp_path / "my-arm" / "README.md").data.base_model == DEMO_MODEL_ID
    capsys.readouterr()
    run("publish", "my-arm", "me/my-arm", "--dry_run")
    assert f"Licence: apache-2.0. Base: {DEMO_MODEL_ID}." in capsys.readouterr().out

    config = tmp_path / "my-arm" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": DEMO_MODEL_ID}))
    assert AutoregressiveRewardModel.from_pretrained("my-arm").score(["How?"], ["Well."]).isfinite()
    run("show", "--arm", "my-arm", "--prompt", "How?", "--max_new_tokens", 2)


def test_a_base_that_cannot_be_loaded_is_what_the_error_names(tmp_path, capsys):
    base = Path(save_llama(tmp_path / "base"))
    arm = save_adapter(str(base), str(tmp_path / "arm"))
    for path in base.glob("*.safetensors"):
        path.unlink()
    named = f"`{base}`, on which `{arm}` was trained, can't be loaded"
    with pytest.raises(ValueError, match=re.escape(named)):
        AutoregressiveRewardModel.from_pretrained(arm)
    assert cli.main(["show", "--arm", arm, "--prompt", "How?"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"hf-genarm show: `{base}`, the base that `{arm}` names, can't be loaded.")


# --- commands that end early ---


def interrupts_at(n, function):
    """The function, which is interrupted as by Ctrl-C when it is called for the n-th time."""
    calls = []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == n:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


def interrupted(call, capsys):
    assert cli.main([str(x) for x in call]) == 130
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    line = printed.splitlines()[-1]
    assert line.startswith(f"hf-genarm {call[0]}: Interrupted. ")
    return line


def test_generate_is_interrupted(models, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "answer", interrupts_at(2, generate.answer))
    output = tmp_path / "answers.jsonl"
    call = ["generate", "--arm", models[1], "--prompts", prompts, "--output", output, "--batch_size", 1]
    call += ["--max_new_tokens", 8]
    assert f"kept in `{output}.partial`: the same command continues" in interrupted(call, capsys)
    assert len((tmp_path / "answers.jsonl.partial" / "rank-0.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("save_steps", [1, 50])
def test_training_is_interrupted_and_goes_on(models, tmp_path, monkeypatch, capsys, save_steps):
    step = AutoregressiveRewardTrainer.training_step
    monkeypatch.setattr(AutoregressiveRewardTrainer, "training_step", interrupts_at(3, step))
    call = [
        "train",
        "--model",
        models[0],
        "--dataset",
        write(tmp_path, "jsonl", conversational(True)),
        "--test_size",
        0,
    ]
    call += ["--output_dir", tmp_path / "arm", "--report_to", "none", "--max_steps", 4, "--save_steps", save_steps]
    line = interrupted(call, capsys)
    if save_steps == 50:
        assert "Nothing is kept, because no checkpoint was saved yet" in line
        return
    monkeypatch.undo()
    (more,) = re.findall(r"add `(--resume_from_checkpoint .*checkpoint-2)` to go on", line)
    run(*call, *more.split())
    assert (tmp_path / "arm" / "adapter_model.safetensors").exists()

    # What is finished is not overwritten by the next training.
    assert cli.main([str(x) for x in call]) == 1
    assert re.search(
        "`.*arm` has a `genarm_config.json` already.*`--overwrite_output_dir`", capsys.readouterr().err.splitlines()[-1]
    )
    run(*call, "--overwrite_output_dir")


def test_a_full_disk_names_the_file(models, prompts, tmp_path, capsys):
    """A limit on the size of files acts as a full disk does, and what is kept is continued."""
    prompts.write_text(prompts.read_text() * 12, encoding="utf-8")
    output = tmp_path / "answers.jsonl"
    call = ["generate", "--arm", models[1], "--prompts", prompts, "--output", output, "--do_sample"]
    call += ["--temperature", 2, "--max_new_tokens", 12]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "large"))):
            write_whole(tmp_path / "large", "x" * 2000)
        assert cli.main([str(x) for x in call]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"hf-genarm generate: `.*rank-0.jsonl` can't be written: .* the same command continues\.$", line)
    run(*call)
    assert len(output.read_text(encoding="utf-8").splitlines()) == 12 * len(PROMPTS)
