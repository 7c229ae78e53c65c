"""The commands, on a tiny model and every kind of file; and what they read from the columns of a dataset."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from helpers import ROOT, run, write
from huggingface_hub import ModelCard
from pairs import CHOSEN, PROMPTS, REJECTED, STANDARD, conversational
from trl import TrlParser

from hf_genarm import AutoregressiveRewardModel, RewardInfo
from hf_genarm.scripts import train
from hf_genarm.scripts.pairs import PairArguments, hold_out, load_pairs, messages_of

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*_[lhf]*.yaml"))


# --- reading pairs ---


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "csv", "tsv", "parquet"])
def test_files(tmp_path, suffix):
    pairs = load_pairs(PairArguments(write(tmp_path, suffix, STANDARD)), "train")
    assert pairs.to_dict() == STANDARD


def test_columns_of_other_names(tmp_path):
    path = write(tmp_path, "jsonl", {"question": PROMPTS, "better": CHOSEN, "worse": REJECTED, "rank": [1, 2, 3]})
    args = PairArguments(path, prompt_column="question", chosen_column="better", rejected_column="worse")
    assert load_pairs(args, "train").to_dict() == STANDARD


def test_a_column_that_says_which_is_preferred(tmp_path):
    """As in PKU-SafeRLHF, where two columns prefer by two objectives."""
    columns = {"prompt": PROMPTS, "response_0": CHOSEN, "response_1": REJECTED, "safer_response_id": [0, 1, 0]}
    path = write(tmp_path, "jsonl", columns)
    names = {"response_columns": ["response_0", "response_1"], "preferred_column": "safer_response_id"}
    names["prompt_template"] = "USER: {prompt}"
    pairs = load_pairs(PairArguments(path, **names), "train")
    assert pairs["prompt"] == [f"USER: {prompt}" for prompt in PROMPTS]
    assert pairs["chosen"] == [CHOSEN[0], REJECTED[1], CHOSEN[2]]
    assert pairs["rejected"] == [REJECTED[0], CHOSEN[1], REJECTED[2]]
    with pytest.raises(ValueError, match="go together"):
        PairArguments(path, response_columns=["response_0", "response_1"])


def test_dialogues_of_hh_rlhf(tmp_path):
    before = "\n\nHuman: How was it?\n\nAssistant: Which one?\n\nHuman: The train.\n\nAssistant:"
    path = write(tmp_path, "jsonl", {"chosen": [f"{before} It was late.\nVery."], "rejected": [f"{before} Fine."]})
    (pair,) = load_pairs(PairArguments(path), "train")
    assert [(turn["role"], turn["content"]) for turn in pair["prompt"]] == [
        ("user", "How was it?"),
        ("assistant", "Which one?"),
        ("user", "The train."),
    ]
    assert pair["chosen"] == [{"role": "assistant", "content": "It was late.\nVery."}]
    assert pair["rejected"] == [{"role": "assistant", "content": "Fine."}]
    assert messages_of("\n\nHuman: Hm\n\nAssistant:")[-1] == {"role": "assistant", "content": ""}


def test_messages_without_a_prompt_column(tmp_path):
    explicit, implicit = (
        load_pairs(PairArguments(write(tmp_path, "jsonl", conversational(kind))), "train") for kind in (True, False)
    )
    assert explicit.to_list() == implicit.to_list()


def test_what_else_the_trainer_reads_is_kept(tmp_path):
    others = {"margin": [1, 2, 3], "tools": ["[]"] * 3, "chat_template_kwargs": [{"thinks": True}] * 3}
    path = write(tmp_path, "jsonl", {**STANDARD, **others, "source": ["a", "b", "c"]})
    assert load_pairs(PairArguments(path), "train").to_dict() == {**STANDARD, **others}


def test_missing_columns(tmp_path):
    path = write(tmp_path, "jsonl", {"better": CHOSEN, "worse": REJECTED})
    with pytest.raises(ValueError, match=r"\['better', 'worse'\], but not \['chosen', 'rejected'\].*--chosen_column"):
        load_pairs(PairArguments(path), "train")


def test_pairs_that_are_equal_or_empty_have_a_prompt_too(tmp_path):
    """The trainer leaves them out, and counts them."""
    path = write(tmp_path, "jsonl", {"chosen": ["", "one", "same"], "rejected": ["two", "", "same"]})
    assert load_pairs(PairArguments(path), "train")["prompt"][:2] == ["", ""]


def test_no_prompt_is_in_both_parts():
    prompts = [f"prompt {index // 3}" for index in range(300)]
    pairs = Dataset.from_dict({"prompt": prompts, "index": range(300)})
    kept, held_out = hold_out(pairs, 0.2)
    assert not set(kept["prompt"]) & set(held_out["prompt"])
    assert sorted([*kept["index"], *held_out["index"]]) == list(range(300))
    assert len(held_out) == 60
    assert list(hold_out(pairs, 0.2)[1]["index"]) == list(held_out["index"])
    assert list(hold_out(pairs, 0.2, seed=1)[1]["index"]) != list(held_out["index"])
    assert len(hold_out(pairs, 31)[1]) == 33


# --- the commands ---


@pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")  # plain text for a chat model
def test_train_then_evaluate(base_folder, tmp_path, capsys):
    """The report of the finished folder is what the trainer measured on the same held-out pairs."""
    columns = {name: column * 4 for name, column in STANDARD.items()}
    columns["prompt"] = [f"{index}. {prompt}" for index, prompt in enumerate(columns["prompt"])]
    path = write(tmp_path, "jsonl", columns)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"learning_rate": 0.01, "beta": 0.3, "lora_target_modules": ["q_proj", "k_proj"]}))
    folder = tmp_path / "arm"
    options = ["--report_to", "none", "--max_steps", 3, "--per_device_train_batch_size", 2, "--logging_steps", 1]
    options += ["--test_size", 4, "--objective", "warm weather", "--beta", 0.2, "--config", recipe]
    run("train", "--model", base_folder, "--dataset", path, "--output_dir", folder, *options)

    info = RewardInfo.load(folder / "genarm_config.json")
    assert (info.beta, info.n_pairs, info.metrics["n_pairs"]) == (0.2, 8, 4)
    assert (info.objective, info.dataset) == ("warm weather", "pairs.jsonl")
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"
    assert (folder / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "eval_results.json").read_text())["eval_pair_accuracy"] == info.metrics["pair_accuracy"]
    model = AutoregressiveRewardModel.from_pretrained(str(folder)).model
    assert model.peft_config["default"].target_modules == {"q_proj", "k_proj"}

    run("evaluate", "--model", folder, "--dataset", path, "--test_size", 4, "--output_dir", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert report["metrics"] == pytest.approx(info.metrics, abs=1e-4)
    assert (tmp_path / "report" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{info.metrics['pair_accuracy']:.3f}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")  # plain text for a chat model
def test_full_training_and_a_test_split(base_folder, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        Path(write(tmp_path, "jsonl", STANDARD)).rename(folder / f"{split}.jsonl")
    options = ["--report_to", "none", "--max_steps", 1, "--no_use_peft", "--dataset_test_split", "test"]
    run("train", "--model", base_folder, "--dataset", folder, "--output_dir", tmp_path / "arm", *options)
    assert (tmp_path / "arm" / "model.safetensors").exists()
    assert RewardInfo.load(tmp_path / "arm" / "genarm_config.json").metrics["n_pairs"] == 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_parsed(path, tmp_path):
    """Every key of a recipe is an argument; the whole batch is the paper's."""
    pair_args, training_args, model_args, *_ = TrlParser(train.ARGUMENTS).parse_args_and_config(
        ["--config", str(path), "--output_dir", str(tmp_path)]
    )
    assert pair_args.dataset is not None
    assert model_args.model_name_or_path is not None
    assert training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps == 32
    assert training_args.objective
