"""A reward model is asked in the form that it was trained on, chats or plain text; otherwise there is one warning."""

import warnings

import pytest
import torch
from datasets import Dataset
from helpers import run
from pairs import STANDARD, conversational
from tiny import save_adapter
from transformers import AutoModelForCausalLM

from hf_genarm import GenARMLogitsProcessor, GuidanceWarning, RewardInfo
from hf_genarm.hub.compatibility import as_trained
from hf_genarm.hub.info import chat_template_fingerprint, package_versions

QUESTION = "How was the food?"


@pytest.fixture
def arms(base_folder, tokenizer, tmp_path):
    """Three adapters on a chat model: trained on chats, on plain text, and by another program."""
    versions = package_versions()
    infos = {
        "chats": RewardInfo(chat_template=chat_template_fingerprint(tokenizer), versions=versions),
        "plain": RewardInfo(versions=versions),
        "unknown": RewardInfo(),
    }
    for name, info in infos.items():
        save_adapter(base_folder, str(tmp_path / name))
        tokenizer.save_pretrained(tmp_path / name)
        info.save(tmp_path / name)
    return {name: str(tmp_path / name) for name in infos}


@pytest.mark.parametrize(
    ("name", "wrong", "match"),
    [
        ("chats", "plain", "not in the chat template"),
        ("plain", "chats", "trained on plain text"),
        ("unknown", None, None),
    ],
)
def test_the_other_form_is_warned_about_once(base_folder, tokenizer, arms, name, wrong, match):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    chat = [{"role": "user", "content": QUESTION}]
    prompts = {
        "plain": tokenizer(QUESTION, return_tensors="pt")["input_ids"],
        "chats": tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")[
            "input_ids"
        ],
    }
    assert prompts["plain"].shape != prompts["chats"].shape
    processor = GenARMLogitsProcessor.from_pretrained(arms[name], base_model=base, tokenizer=tokenizer)
    given = {}
    for form, ids in prompts.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                base.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[processor], max_new_tokens=2)
        given[form] = [str(x.message) for x in caught if issubclass(x.category, GuidanceWarning)]
    for form, messages in given.items():
        assert len(messages) == (form == wrong)
        assert all(match in message for message in messages)


def test_a_question_has_the_form_of_the_training(tokenizer, base_folder):
    chats, plain, unknown = (
        RewardInfo(chat_template="sha256:" + "0" * 32, versions=package_versions()),
        RewardInfo(versions=package_versions()),
        RewardInfo(),
    )
    chat = [{"role": "user", "content": QUESTION}]
    for infos, expected in (
        ([chats], chat),
        ([unknown], chat),
        ([plain], QUESTION),
        ([plain, plain], QUESTION),
        ([plain, chats], chat),
    ):
        assert as_trained(QUESTION, tokenizer, infos) == expected
    tokenizer = type(tokenizer).from_pretrained(base_folder)
    tokenizer.chat_template = None
    assert as_trained(QUESTION, tokenizer, [chats]) == QUESTION


@pytest.mark.parametrize("name", ["chats", "plain", "unknown"])
def test_show_asks_as_the_reward_model_was_trained(base_folder, arms, name, capsys):
    """A warning of the other form is an error in tests."""
    options = ["--base", base_folder, "--max_new_tokens", 4, "--device", "cpu", "--width", 60]
    run("show", "--arm", arms[name], "--prompt", QUESTION, *options)
    assert "guided" in capsys.readouterr().out


def test_the_trainer_records_the_form(make_trainer, tokenizer):
    chats = conversational(True)
    texts = {
        name: [
            tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True)
            if name == "prompt"
            else x[0]["content"]
            for x in column
        ]
        for name, column in chats.items()
    }
    tokens = {
        f"{side}_ids": [
            tokenizer(prompt + answer)["input_ids"] for prompt, answer in zip(texts["prompt"], texts[side], strict=True)
        ]
        for side in ("chosen", "rejected")
    }
    plain_tokens = {
        f"{side}_ids": [tokenizer(x)["input_ids"] for x in STANDARD[side]] for side in ("chosen", "rejected")
    }
    for pairs, is_for_chats in (
        (chats, True),
        (STANDARD, False),
        (texts, True),
        (tokens, True),
        (plain_tokens, False),
    ):
        assert make_trainer(Dataset.from_dict(pairs)).reward_info.is_for_chats is is_for_chats
