"""`hf-genarm show` and `generate`: the text of the oracle, whatever the batch, the process, or what was killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import run_command
from oracle import Recompute, next_token_log_probs
from tiny import save_adapter, save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_genarm import AutoregressiveRewardModel, cli
from hf_genarm.scripts import generate

ALPHAS = [1.5, 0.5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and two adapters."""
    folder = tmp_path_factory.mktemp("models")
    base = save_llama(folder / "base", max_position_embeddings=512)
    arms = [save_adapter(base, str(folder / name), seed) for seed, name in enumerate(("warm", "brief"))]
    return base, arms


@pytest.fixture(scope="module")
def models(folders):
    base, arms = folders
    loaded = AutoModelForCausalLM.from_pretrained(base).eval()
    return loaded, [AutoregressiveRewardModel.from_pretrained(arm).model for arm in arms]


def prompts(n=7):
    """Texts and messages of many lengths."""
    for index in range(n):
        text = "The train was late, " * (index * 3 % 7) + "the view was"
        prompt = text if index % 2 else [{"role": "user", "content": text}]
        yield {"prompt": prompt, "id": f"№\u2028{index}", "nested": {"none": None, "list": [1.0, 2]}}


def written(folder, rows, name="prompts.jsonl"):
    path = Path(folder, name)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def encoded(base, prompt):
    tokenizer = AutoTokenizer.from_pretrained(base)
    if isinstance(prompt, str):
        return tokenizer, torch.tensor([tokenizer(prompt)["input_ids"]])
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return tokenizer, asked["input_ids"]


def alone(folders, models, prompt, alphas, max_new_tokens):
    """The greedy answer to one prompt, by the oracle; its text and all tokens."""
    tokenizer, ids = encoded(folders[0], prompt)
    processors = [Recompute(models[1], alphas)] if any(alphas) else []
    output = models[0].generate(
        ids, logits_processor=processors, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), output[0], ids.shape[1]


def command(folders, *arguments):
    base, arms = folders
    return ["--base", base, "--arm", *arms, "--alpha", *map(str, ALPHAS), *map(str, arguments)]


def run(*arguments):
    assert cli.main([str(x) for x in arguments]) == 0


# --- show ---


@pytest.mark.parametrize("reference", [[], ["--reference", "base"]])
def test_show_prints_both_answers_and_what_they_score(folders, models, capsys, reference):
    question = "How was the train ride?"
    options = ["--temperature", 0, "--max_new_tokens", 6, "--width", 400, *reference]
    run("show", *command(folders, "--prompt", question, *options))
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    chat = [{"role": "user", "content": question}]
    texts = [alone(folders, models, chat, alphas, 6) for alphas in ([0, 0], ALPHAS)]
    assert texts[0][0] != texts[1][0]
    if reference:
        texts = texts[:1]  # the other answer is another one; that it is exact is tested elsewhere
    for text, ids, start in texts:
        assert text.split()[0] in printed
        for index, arm in enumerate(models[1]):
            learned = sum(
                float(next_token_log_probs(arm, ids[:at])[ids[at]] - next_token_log_probs(models[0], ids[:at])[ids[at]])
                for at in range(start, len(ids))
            )
            who = "unguided" if text == texts[0][0] else f"guided, alpha {ALPHAS[index]:g}"
            shown = re.findall(rf"{who}: ([-+.\d]+)", printed)[index if who == "unguided" else 0]
            assert float(shown) == pytest.approx(learned, abs=0.051)


# --- generate ---


@pytest.fixture(scope="module")
def expected(folders, models):
    """The rows of `answers.jsonl`."""
    rows = []
    for row in prompts():
        text = alone(folders, models, row["prompt"], ALPHAS, 8)[0]
        is_text = isinstance(row["prompt"], str)
        rows.append({**row, "completion": text if is_text else [{"role": "assistant", "content": text}]})
    return rows


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_are_answered_as_each_prompt_alone(folders, models, expected, tmp_path, batch_size):
    unguided = [alone(folders, models, row["prompt"], [0, 0], 8)[0] for row in prompts(3)]
    assert all(text not in json.dumps(row["completion"]) for text, row in zip(unguided, expected, strict=False))
    path, output = written(tmp_path, prompts()), tmp_path / "answers.jsonl"
    options = ["--prompts", path, "--output", output, "--max_new_tokens", 8, "--batch_size", batch_size]
    run("generate", *command(folders, *options))
    assert read(output) == expected
    assert sorted(x.name for x in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]


@pytest.mark.parametrize("sampling", [[], ["--do_sample", "--seed", 3]])
def test_a_run_continues_without_losing_or_repeating_a_line(folders, tmp_path, monkeypatch, capsys, sampling):
    path, whole, output = written(tmp_path, prompts()), tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    call = ["generate", *command(folders, "--prompts", path, "--max_new_tokens", 8, "--batch_size", 2, *sampling)]
    run(*call, "--output", whole)

    answered, answer = [], generate.answer

    def stopping(*args):
        if len(answered) == 2:
            raise RuntimeError("killed")
        answered.append(args[2])
        return answer(*args)

    monkeypatch.setattr(generate, "answer", stopping)
    assert cli.main([*map(str, call), "--output", str(output)]) == 1
    assert not output.exists()
    (shard,) = (tmp_path / "answers.jsonl.partial").glob("rank-*")
    lines = shard.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 4
    # There were two processes, and one was killed while it wrote an answer; the other one of its batch is kept.
    shard.with_name("rank-1.jsonl").write_text(lines[0], encoding="utf-8")
    shard.write_text("".join(lines[1:3]) + lines[3][:20], encoding="utf-8")

    assert cli.main([*map(str, call), "--output", str(output), "--alpha", "1"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"answers of a run with alpha \[1.5, 0.5\], but now it is \[1.0, 1.0\]", said)

    answered.clear()
    monkeypatch.setattr(generate, "answer", lambda *args: answered.append(args[2]) or answer(*args))
    run(*call, "--output", output)
    assert read(output) == read(whole)
    assert len(answered) == 3  # the batch of the line that was cut, and the two that had not begun
    assert "answered before: 3," in capsys.readouterr().out


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_killed_run_continues(folders, tmp_path):
    path, output = written(tmp_path, prompts(48)), tmp_path / "answers.jsonl"
    options = ["--prompts", path, "--max_new_tokens", 64, "--batch_size", 2]
    call = [sys.executable, "-m", "hf_genarm", "generate", *command(folders, *options)]
    run_command(*call, "--output", tmp_path / "whole.jsonl")
    process = subprocess.Popen([*call, "--output", str(output)], env=environment())
    shard = tmp_path / "answers.jsonl.partial" / "rank-0.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (shard.exists() and shard.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert 0 < len(shard.read_text(encoding="utf-8").splitlines()) < 48
    printed = run_command(*call, "--output", output)
    assert 0 < int(re.search(r"answered before: (\d+)", printed)[1]) < 48
    assert read(output) == read(tmp_path / "whole.jsonl")


@pytest.mark.slow
def test_two_processes_answer_as_one(folders, expected, tmp_path):
    path, output = written(tmp_path, prompts()), tmp_path / "answers.jsonl"
    options = ["--prompts", path, "--output", output, "--max_new_tokens", 8, "--batch_size", 2]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    printed = run_command(*launcher, "-m", "hf_genarm", "generate", *command(folders, *options))
    assert "processes: 2" in printed
    assert read(output) == expected


# --- env ---


def test_env_prints_versions_and_engines_but_no_paths(folders, capfd):
    base, arms = folders
    assert cli.main(["env", "--base", base, "--arm", arms[0]]) == 0
    printed = capfd.readouterr().out
    assert f"- torch: {torch.__version__}" in printed
    assert "- device: cpu" in printed
    assert "- warm: engine `fused`, because" in printed
    assert str(Path(base).parent) not in printed
    assert cli.main(["env"]) == 0
    assert "engine" not in capfd.readouterr().out


def test_env_prints_why_a_reward_model_runs_separately(folders, capfd, tmp_path):
    base, _ = folders
    assert cli.main(["env", "--base", base, "--arm", save_llama(tmp_path / "whole", 1)]) == 0
    assert "- whole: engine `separate`, because it is not an adapter." in capfd.readouterr().out


def test_env_refuses_a_base_without_a_reward_model(capfd):
    assert cli.main(["env", "--base", "x"]) != 0
    assert "`base` is x, but there is no reward model" in capfd.readouterr().err
