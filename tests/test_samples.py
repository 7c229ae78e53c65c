"""Answers that are logged while an adapter is trained: those of the model that is saved, and training never notices."""

import sys

import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers import from_trackio, run, write
from pairs import CHOSEN, PROMPTS, REJECTED, message
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.scripts import samples
from hf_genarm.scripts.samples import SamplesCallback, sample_prompts

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

N_TOKENS = 6


@pytest.fixture
def kept(monkeypatch):
    callbacks = []

    class Kept(SamplesCallback):
        def __init__(self, *args):
            super().__init__(*args)
            callbacks.append(self)

    monkeypatch.setattr("hf_genarm.scripts.train.SamplesCallback", Kept)
    return callbacks


NUMBERED = [f"{number}. {prompt}" for number in range(4) for prompt in PROMPTS]


def options(base_folder, tmp_path, is_chat=False, report_to="none"):
    columns = {"prompt": NUMBERED, "chosen": CHOSEN * 4, "rejected": REJECTED * 4}
    if is_chat:
        columns["prompt"] = [message("user", prompt) for prompt in NUMBERED]
        columns |= {side: [message("assistant", text) for text in columns[side]] for side in ("chosen", "rejected")}
    path = write(tmp_path, "jsonl", columns)
    given = ["--model", base_folder, "--dataset", path, "--dataset_test_split", "train", "--report_to", report_to]
    given += ["--max_steps", 4, "--eval_strategy", "steps", "--eval_steps", 2, "--learning_rate", 0.05, "--seed", 1]
    return [*given, "--per_device_train_batch_size", 2, "--samples_max_new_tokens", N_TOKENS, "--lora_r", 4]


@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "messages"])
def test_samples_are_answers_of_what_is_saved(base_folder, tmp_path, kept, capsys, is_chat):
    folder = tmp_path / "arm"
    run("train", "--output_dir", folder, "--log_samples", 2, *options(base_folder, tmp_path, is_chat))
    (callback,) = kept
    assert [row[0] for row in callback.rows] == [2, 2, 4, 4]
    prompts = [x.strip() for x in NUMBERED[:2]] if is_chat else NUMBERED[:2]
    assert [row[1] for row in callback.rows] == prompts * 2
    assert "Samples of step 4 took" in capsys.readouterr().out
    unguided = [row[2] for row in callback.rows]
    assert unguided[:2] == unguided[2:]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base_folder), AutoTokenizer.from_pretrained(base_folder)
    arm = AutoregressiveRewardModel.from_pretrained(str(folder))
    for prompt, (*_, before, after) in zip(prompts, callback.rows[2:], strict=True):
        text = prompt
        if is_chat:
            text = tokenizer.apply_chat_template(message("user", prompt), add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=not is_chat, return_tensors="pt").input_ids
        for processors, expected in (
            ([], before),
            ([GenARMLogitsProcessor(arm.model, base_model=model, reference="base")], after),
        ):
            output = model.generate(
                ids, logits_processor=processors, attention_mask=torch.ones_like(ids), max_new_tokens=N_TOKENS
            )
            assert tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == expected


def test_training_never_notices(base_folder, tmp_path, kept):
    weights = []
    for name, extra in (("without", []), ("again", []), ("with", ["--log_samples", 1])):
        torch.manual_seed(0)  # with which the adapter begins
        run("train", "--output_dir", tmp_path / name, *extra, *options(base_folder, tmp_path))
        weights.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[1] == weights[2]
    assert len(kept) == 1


def test_prompts_and_what_is_refused(base_folder, tmp_path, make_trainer):
    pairs = Dataset.from_dict(
        {"prompt": [*PROMPTS, PROMPTS[0]], "chosen": [*CHOSEN, "x"], "rejected": [*REJECTED, "y"]}
    )
    assert sample_prompts(pairs, 2) == PROMPTS[:2]
    assert sample_prompts(pairs, 99) == PROMPTS
    for nothing in (None, pairs.remove_columns("prompt")):
        with pytest.raises(ValueError, match="no held-out pairs with a column `prompt`"):
            sample_prompts(nothing, 2)
    with pytest.raises(ValueError, match="samples need an adapter"):
        SamplesCallback(make_trainer(), PROMPTS)


def test_texts_can_not_break_out_of_the_table():
    table = pd.DataFrame([(1, "a | b\n| c |", "<b>", "d")], columns=["step", "prompt", "unguided", "guided"])
    lines = samples._markdown(table).splitlines()
    assert len(lines) == 3
    assert lines[2] == "| 1 | a \\| b \\| c \\| | &lt;b> | d |"


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["tensorboard", "trackio", "wandb"])
def test_the_table_reaches_the_logger(base_folder, tmp_path, kept, monkeypatch, logger):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = options(base_folder, tmp_path, report_to=logger)
    run("train", "--output_dir", tmp_path / "arm", "--log_samples", 2, *given)
    if logger == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.out.tfevents.*")).parent))
        events.Reload()
        logged = events.Tensors("samples/text_summary")
        assert [event.step for event in logged] == [2, 4]
        assert NUMBERED[0] in logged[0].tensor_proto.string_val[0].decode()
    elif logger == "trackio":
        assert from_trackio(None)["samples"]["_type"] == "trackio.table"
    else:
        wandb = sys.modules["wandb"]
        assert wandb.run.summary["samples"]["nrows"] == 4
        wandb.finish()
