"""`--sentence` of the commands: what a prompt with the sentence does, stronger, and with reward models."""

import json
import re

import pytest
from helpers import run
from pairs import PROMPTS, message
from tiny import save_adapter, save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo, cli

SENTENCE = "The train was late."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = save_llama(folder / "base", max_position_embeddings=512)
    return base, save_adapter(base, str(folder / "arm"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": message("user", prompt)} for prompt in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(models, prompts, tmp_path, *options):
    output = tmp_path / f"answers-{len(list(tmp_path.iterdir()))}.jsonl"
    options = ["--prompts", prompts, "--output", output, "--max_new_tokens", 8, *options]
    run("generate", "--base", models[0], *options)
    return [json.loads(line)["completion"][0]["content"] for line in output.read_text(encoding="utf-8").splitlines()]


def greedy(base, messages, processor=None):
    """The answer to one chat, without a command."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    if processor is None:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        processors = []
    else:
        made = processor(model, tokenizer)
        inputs, processors = made.encode(messages), [made]
    output = model.generate(**inputs, logits_processor=processors, do_sample=False, max_new_tokens=8, pad_token_id=0)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_sentence_at_strength_1_is_a_system_message(models, prompts, tmp_path):
    asked = [greedy(models[0], [*message("system", SENTENCE), *message("user", prompt)]) for prompt in PROMPTS]
    assert asked != [greedy(models[0], message("user", prompt)) for prompt in PROMPTS]
    assert answers(models, prompts, tmp_path, "--sentence", SENTENCE, "--alpha", 1) == asked
    assert answers(models, prompts, tmp_path, "--sentence", SENTENCE, "--alpha", 3, "--batch_size", 2) != asked


def test_a_sentence_and_a_reward_model(models, prompts, tmp_path):
    def mixed(model, tokenizer):
        arms = [
            AutoregressiveRewardModel.from_pretrained(models[1], model),
            AutoregressiveRewardModel.from_sentence(SENTENCE, model, tokenizer),
        ]
        return GenARMLogitsProcessor(arms, [0.7, 1.5], base_model=model, reference="base", tokenizer=tokenizer)

    expected = [greedy(models[0], message("user", prompt), mixed) for prompt in PROMPTS]
    options = ["--arm", models[1], "--sentence", SENTENCE, "--alpha", 0.7, 1.5, "--reference", "base"]
    assert answers(models, prompts, tmp_path, *options) == expected
    assert answers(models, prompts, tmp_path, *options[:2], "--alpha", 0.7, "--reference", "base") != expected


def test_show_names_the_sentence(models, capsys):
    run("show", "--base", models[0], "--sentence", SENTENCE, "--prompt", "How was it?", "--max_new_tokens", 6)
    printed = capsys.readouterr().out
    assert f"{SENTENCE} minus base, nats" in printed
    assert "guided, alpha 1.5: " in printed


def test_tune_makes_the_folder_of_a_sentence(models, prompts, tmp_path, monkeypatch):
    (tmp_path / "sentence_scorer.py").write_text(
        "def later(prompts, completions, **_):\n"
        "    later.n = getattr(later, 'n', 0) + 1\n"
        "    return [later.n] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--scorer", "sentence_scorer:later", "--max_kl", 1e6, "--max_perplexity", 1e6, "--max_new_tokens", 4]
    run("tune", "--base", models[0], "--sentence", SENTENCE, "--prompts", prompts, "--temperature", 0.5, *options)
    info = RewardInfo.load("tuning/genarm_config.json")
    assert info.sentence == SENTENCE
    tried = [row["alpha"] for row in info.recommended["measured"]["settings"]]
    assert tried == [0, 0, 1, 1.5, 2, 3]
    assert (info.recommended["alpha"], info.recommended["temperature"]) == (3, 0.5)
    base = AutoModelForCausalLM.from_pretrained(models[0])
    processor = GenARMLogitsProcessor.from_pretrained("tuning", base_model=base)
    assert (processor.alpha, processor.reference) == ([3.0], "base")
    assert SENTENCE in (tmp_path / "tuning" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (["show", "--prompt", "How?"], "nothing to steer by.*`--arm`.*`--sentence`"),
        (["show", "--prompt", "How?", "--sentence", " "], "`sentence` is"),
        (["tune", "--prompts", "x", "--scorer", "a:b"], "`arm` is None and `sentence` is None"),
        (["tune", "--prompts", "x", "--scorer", "a:b", "--arm", "a", "--sentence", "b"], "`arm` is 'a' and `sentence`"),
    ],
)
def test_wrong_calls(call, line, capsys):
    assert cli.main(call) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(line, said), said
