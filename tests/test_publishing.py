"""Whatever is saved or pushed is a whole reward model, and what is loaded to be trained is a whole causal LM."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import LORA
from hub_server import connect
from pairs import STANDARD, conversational
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_llama, tiny_llama, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl import clone_chat_template

from hf_genarm import (
    AutoregressiveRewardConfig,
    AutoregressiveRewardModel,
    AutoregressiveRewardTrainer,
    GenARMLogitsProcessor,
    GuidanceWarning,
    RewardInfo,
)


class Wait(TrainerCallback):
    """Files are pushed in the background, and Trainer does not wait with writing the next ones."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, *args, **kwargs):
        self.trainer._finish_current_push()


def train_and_push():
    for strategy in ("every_save", "all_checkpoints", "end"):
        tokenizer = tiny_tokenizer()
        trainer = AutoregressiveRewardTrainer(
            model=tiny_llama(vocab_size=len(tokenizer)),
            args=AutoregressiveRewardConfig(
                strategy,
                hub_model_id=f"me/{strategy}",
                push_to_hub=True,
                hub_strategy=strategy,
                length_normalized=True,
                beta=2.0,
                custom_generate=True,
                max_steps=2,
                save_steps=1,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(STANDARD),
            eval_dataset=Dataset.from_dict(STANDARD),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
        )
        trainer.add_callback(Wait(trainer))
        trainer.evaluate()
        trainer.train()
        if strategy == "end":
            trainer.push_to_hub(dataset_name="me/pairs")


def test_what_is_pushed_in_training(server, monkeypatch, tmp_path):
    """Trainer copies into the folder that it pushes only the files that it knows."""
    connect(monkeypatch, server, tmp_path / "cache")
    monkeypatch.setenv("CI", "1")  # keeps TRL from calling home
    monkeypatch.chdir(tmp_path)
    train_and_push()
    assert len(server.repos) == 3
    for strategy, repo in ((name.split("/")[1], repo) for name, repo in server.repos.items()):
        commits = [files for files in repo.commits.values() if "adapter_model.safetensors" in files]
        assert len(commits) >= (1 if strategy == "end" else 2)
        for files in commits:
            assert {"genarm_config.json", "README.md", "custom_generate/generate.py", "tokenizer.json"} <= files.keys()
            info = json.loads(files["genarm_config.json"])
            assert (info["beta"], info["loss"]) == (2.0, {"length_normalized": True})
            assert info["metrics"] == {}  # measured before training, with other weights
            assert b"genarm" in files["README.md"]
            assert f"me/{strategy}".encode() in files["custom_generate/generate.py"]
        if strategy == "all_checkpoints":
            names = {f"checkpoint-1/{name}" for name in ("genarm_config.json", "adapter_model.safetensors")}
            assert names <= repo.commits[repo.head].keys()


def test_every_checkpoint_is_a_reward_model(make_trainer):
    trainer = make_trainer(peft_config=LoraConfig(**LORA), save_steps=1, max_steps=2, beta=0.3)
    trainer.train()
    for name in ("checkpoint-1", "checkpoint-2"):
        assert RewardInfo.load(Path(trainer.args.output_dir, name, "genarm_config.json")).beta == 0.3


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_peft_model_is_saved_as_that_of_a_causal_lm(make_trainer, tokenizer, task_type):
    """Without it, PEFT can't load what is saved by itself."""
    config = LoraConfig(**LORA, task_type=task_type)
    trainer = make_trainer(model=get_peft_model(tiny_llama(vocab_size=len(tokenizer)), config))
    trainer.save_model()
    saved = json.loads(Path(trainer.args.output_dir, "adapter_config.json").read_text())
    assert saved["task_type"] == "CAUSAL_LM"
    assert config.task_type == task_type
    model = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), LoraConfig(**LORA))
    model.peft_config["default"].task_type = "SEQ_CLS"
    with pytest.raises(ValueError, match=r"SEQ_CLS.*CAUSAL_LM"):
        make_trainer(model=model)


# --- what training starts from ---


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "tied to the embeddings"])
def test_a_classifier_is_refused_by_its_name_too(make_trainer, tokenizer, tmp_path, tied):
    """Loaded as a causal LM, it has a random LM head, or one that it was not trained with."""
    config = tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=tied).config
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"classifier` is the checkpoint of a LlamaForSequenceClassification"):
        make_trainer(model=str(tmp_path / "classifier"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_a_head(make_trainer, tokenizer, tmp_path, tied):
    config = tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=tied).config
    config.architectures = None
    AutoModel.from_config(config).save_pretrained(tmp_path / "body")
    if tied:  # there is nothing that is missing
        assert make_trainer(model=str(tmp_path / "body")).model.can_generate()
    else:
        with pytest.raises(ValueError, match=r"checkpoint of a LlamaModel; it lacks \['lm_head.weight'\]"):
            make_trainer(model=str(tmp_path / "body"))


# --- tokens that are added ---


@pytest.fixture
def folders(tokenizer, tmp_path):
    """A base, and a tokenizer whose chat template has a token that it lacks."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<turn>"], special_tokens=True)
    other.chat_template = tokenizer.chat_template.replace("<bos>", "<turn>")
    other.save_pretrained(tmp_path / "other")

    def save(tied):
        return save_llama(tmp_path / "base", tie_word_embeddings=tied), str(tmp_path / "other")

    return save


def assert_loads_as_trained(trainer, base_folder):
    """With the base at hand, and without; and whether PEFT has saved the embeddings of the base or only what is new."""
    trainer.train()
    trainer.save_model()
    folder = trainer.args.output_dir
    ids = torch.tensor([trainer.train_dataset[0]["chosen_ids"]])
    assert int(ids.max()) >= AutoModelForCausalLM.from_pretrained(base_folder).config.vocab_size
    expected = trainer.model.eval()(ids).logits
    whole = load_file(f"{folder}/adapter_model.safetensors")
    part = {name: tensor for name, tensor in whole.items() if "base_layer" not in name}
    assert len(part) < len(whole)
    for tensors in (whole, part):
        save_file(tensors, f"{folder}/adapter_model.safetensors")
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        before = copy.deepcopy(base.state_dict())
        for arm in (
            AutoregressiveRewardModel.from_pretrained(folder),
            AutoregressiveRewardModel.from_pretrained(folder, base),
        ):
            assert torch.equal(arm.model(ids).logits, expected)
        for name, tensor in base.state_dict().items():
            assert torch.equal(tensor, before[name])
    prompt = {"input_ids": ids[:, 1:5], "max_new_tokens": 4, "do_sample": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuidanceWarning)  # about the chat template
        processor = GenARMLogitsProcessor.from_pretrained(folder, base, 20.0)
        guided = base.generate(**prompt, logits_processor=[processor])
    assert not torch.equal(guided, base.generate(**prompt))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_tokens_of_a_chat_template(make_trainer, folders):
    base, other = folders(tied=False)
    config = LoraConfig(**LORA, modules_to_save=["lm_head"])
    options = {"processing_class": None, "peft_config": config, "chat_template_path": other}
    assert_loads_as_trained(make_trainer(conversational(True), model=base, **options), base)
    assert config.trainable_token_indices is None  # the user's object is left as it is


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft.tuners.tuners_utils")  # about merging tied layers
def test_tokens_of_a_chat_template_and_tied_embeddings(make_trainer, folders, tokenizer):
    """PEFT can't do what TRL requires; the way out that the error names works."""
    base, other = folders(tied=True)
    data = conversational(True)
    with pytest.raises(ValueError, match=r"tied to its embeddings.*clone_chat_template.*trainable_token_indices"):
        make_trainer(data, model=base, peft_config=LoraConfig(**LORA), chat_template_path=other)
    model, tokenizer, added = clone_chat_template(
        AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(tokenizer), other
    )
    config = LoraConfig(**LORA, trainable_token_indices={"embed_tokens": added})
    assert_loads_as_trained(make_trainer(data, model=model, processing_class=tokenizer, peft_config=config), base)


def test_a_tokenizer_with_tokens_that_the_model_lacks_changes_nothing(make_trainer, folders, tokenizer):
    """Rows that were not trained would take their share of every softmax."""
    base, _ = folders(tied=False)
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<unused>"])
    trainer = make_trainer(model=base, processing_class=longer, peft_config=LoraConfig(**LORA))
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([trainer.train_dataset[0]["chosen_ids"]])
    arm = AutoregressiveRewardModel.from_pretrained(trainer.args.output_dir)
    assert torch.equal(arm.model(ids).logits, trainer.model.eval()(ids).logits)
