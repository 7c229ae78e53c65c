"""Rewards of finished text, against the log-probabilities of each text by itself, in float64."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import CORPUS, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer

from hf_genarm import AutoregressiveRewardModel

PROMPTS = ["How was the train?", "Tell me about the food.", ""]
RESPONSES = ["It was late, and the seat was hard.", "Fine.", "The view was warm and kind, but the people were cold."]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(0, vocab_size=len(tokenizer))


@pytest.fixture
def arm(model, tokenizer):
    return AutoregressiveRewardModel(model, tokenizer)


def log_probs(model, ids: list[int]) -> torch.Tensor:
    """Of the tokens after the first."""
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([ids])).logits[0, :-1]
    model.float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def expected(model, tokenizer, prompt: str, response: str) -> torch.Tensor:
    """Counted in characters: the tokens that end after the prompt, and the end of the text."""
    encoded = tokenizer(prompt + response + "<eos>", return_offsets_mapping=True)
    n_prompt = sum(end <= len(prompt) for _, end in encoded["offset_mapping"])
    return log_probs(model, encoded["input_ids"])[max(n_prompt - 1, 0) :]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("chunk_length", [3, 7, 1024])
def test_scores(arm, model, tokenizer, batch_size, chunk_length):
    oracle = torch.stack([expected(model, tokenizer, *pair).sum() for pair in zip(PROMPTS, RESPONSES, strict=True)])
    rewards = arm.score(PROMPTS, RESPONSES, batch_size=batch_size, chunk_length=chunk_length)
    assert rewards.shape == (3,)
    assert rewards.std() > 1
    torch.testing.assert_close(rewards.double(), oracle, atol=1e-4, rtol=0)


def test_token_rewards(arm, model, tokenizer):
    for row, prompt, response in zip(arm.token_rewards(PROMPTS, RESPONSES), PROMPTS, RESPONSES, strict=True):
        torch.testing.assert_close(
            row.rewards.double(), expected(model, tokenizer, prompt, response), atol=1e-4, rtol=0
        )
        assert row.text == response
        assert len(row.input_ids) == len(row.offsets) == len(row.rewards)
        assert row.input_ids[-1] == tokenizer.eos_token_id
        pieces = [row.text[start:end] for start, end in row.offsets]
        assert "".join(pieces) == (response if prompt else response[row.offsets[0][0] :])
        assert tokenizer.decode(row.input_ids[:-1]).strip() == "".join(pieces).strip()


def test_a_token_across_the_boundary_belongs_to_the_response(arm, tokenizer):
    """Here the last letter of the prompt and the first of the response are one token."""
    offsets = tokenizer(CORPUS[0], return_offsets_mapping=True)["offset_mapping"]
    start, end = next((start, end) for start, end in offsets if end - start > 2)
    row = arm.token_rewards([CORPUS[0][: start + 1]], [CORPUS[0][start + 1 :]])[0]
    assert row.offsets[0] == (0, end - start - 1)
    assert len(row.rewards) == sum(last > start for _, last in offsets) + 1


def test_chats_go_through_the_template(arm, model, tokenizer):
    rows = arm.token_rewards(CHATS, RESPONSES)
    for row, chat, response in zip(rows, CHATS, RESPONSES, strict=True):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert row.text == response + "<eos>"
        oracle = expected(model, tokenizer, prompt, response)
        torch.testing.assert_close(row.rewards.double(), oracle, atol=1e-4, rtol=0)
    messages = [[{"role": "assistant", "content": response}] for response in RESPONSES]
    assert torch.equal(arm.score(CHATS, messages), arm.score(CHATS, RESPONSES))


def test_best_of_n_in_one_line(arm):
    answers = RESPONSES
    best = answers[arm.score([PROMPTS[0]] * len(answers), answers).argmax()]
    assert best == max(answers, key=lambda answer: arm.score([PROMPTS[0]], [answer]).item())


def test_empty_lists_and_responses(arm, model, tokenizer):
    assert arm.score([], []).shape == (0,)
    row = arm.token_rewards(["How?"], [""])[0]
    assert row.input_ids.tolist() == [tokenizer.eos_token_id]
    torch.testing.assert_close(row.rewards.double(), expected(model, tokenizer, "How?", ""), atol=1e-4, rtol=0)


def test_bad_input(arm, model):
    with pytest.raises(ValueError, match="2 prompts, but 3 responses"):
        arm.score(PROMPTS[:2], RESPONSES)
    with pytest.raises(ValueError, match="same form"):
        arm.score(PROMPTS[:1], [[{"role": "assistant", "content": "Fine."}]])
    with pytest.raises(ValueError, match=r"response '' to the prompt '' has no token that follows another"):
        arm.score([""], [""])
    with pytest.raises(ValueError, match="no tokenizer"):
        AutoregressiveRewardModel(model).score(PROMPTS, RESPONSES)


@pytest.mark.parametrize("name", ["prompts", "responses"])
@pytest.mark.parametrize("given", ["How?", b"How?", None, 5, {"role": "user", "content": "How?"}], ids=repr)
def test_what_is_no_list_is_refused(arm, name, given):
    """A string is a sequence of strings, too: its letters."""
    with pytest.raises(TypeError, match=rf"`{name}` is .*must be a list of texts or of chats"):
        arm.score(**({"prompts": ["a"] * 4, "responses": ["b"] * 4} | {name: given}))


@pytest.mark.parametrize("name", ["prompts", "responses"])
@pytest.mark.parametrize("given", [None, 5, float("nan"), b"How?", {"role": "user"}, [], ["How?"]], ids=repr)
def test_what_is_no_text_is_refused(arm, name, given):
    with pytest.raises(TypeError, match=rf"`{name}\[1\]` is .*must be a `str` or a list of messages"):
        arm.score(**({"prompts": PROMPTS, "responses": RESPONSES} | {name: ["a", given, "c"]}))


def test_lists_of_other_types(arm):
    assert torch.equal(arm.score(iter(PROMPTS), tuple(RESPONSES)), arm.score(PROMPTS, RESPONSES))


def test_chats_need_a_template(model, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template\. Set `tokenizer\.chat_template`"):
        AutoregressiveRewardModel(model, plain).score(CHATS, RESPONSES)


@pytest.mark.parametrize("options", [{"batch_size": -1}, {"batch_size": 0}, {"chunk_length": -3}, {"batch_size": 1.5}])
def test_sizes_are_positive(arm, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"`{name}` is {value}, .*give 1 or more"):
        arm.score(PROMPTS, RESPONSES, **options)


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
        "rope_theta": 100.0,
    },
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize(("batch_size", "chunk_length"), [(1, 1024), (3, 5), (2, 17)])
def test_frequencies_that_depend_on_the_length(tokenizer, kind, batch_size, chunk_length):
    """A text is read as if nothing else were there: no other row, and no earlier text."""
    sizes = {"vocab_size": len(tokenizer), "rope_parameters": ROPES[kind], "max_position_embeddings": 16}

    def score(prompt, response):
        return expected(tiny_llama(0, **sizes), tokenizer, prompt, response).sum()

    oracle = torch.stack([score(*pair) for pair in zip(PROMPTS, RESPONSES, strict=True)])
    arm = AutoregressiveRewardModel(tiny_llama(0, **sizes), tokenizer)
    lengths = [len(tokenizer(prompt + response).input_ids) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert min(lengths) < 16 < max(lengths)
    for _ in range(2):
        rewards = arm.score(PROMPTS, RESPONSES, batch_size=batch_size, chunk_length=chunk_length)
        torch.testing.assert_close(rewards.double(), oracle, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["prompt tuning", "aLoRA"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_adapters_that_look_at_the_whole_text(tokenizer, kind, batch_size):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if kind == "aLoRA":
        invocation = tokenizer(PROMPTS[1]).input_ids[-2:]
        config = LoraConfig(r=2, task_type="CAUSAL_LM", alora_invocation_tokens=invocation, init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(0, vocab_size=len(tokenizer)), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    rows = AutoregressiveRewardModel(model, tokenizer).token_rewards(PROMPTS, RESPONSES, batch_size=batch_size)
    for row, prompt, response in zip(rows, PROMPTS, RESPONSES, strict=True):
        ids = tokenizer(prompt + response + "<eos>", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -ids.shape[1] : -1]
        oracle = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, -len(row.rewards) :, 0]
        torch.testing.assert_close(row.rewards, oracle, atol=1e-4, rtol=0)


def test_a_text_that_is_too_long_is_named(tokenizer):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    with pytest.raises(ValueError, match=r"has \d+ tokens, but .*, as a reward model, has 12 positions"):
        AutoregressiveRewardModel(model, tokenizer).score(PROMPTS, RESPONSES)


def test_progress(arm, capsys):
    arm.score(PROMPTS, RESPONSES)
    assert "Scoring" not in capsys.readouterr().err
    arm.score(PROMPTS, RESPONSES, show_progress=True)
    assert "Scoring" in capsys.readouterr().err


@pytest.mark.parametrize("chat", [True, False])
def test_a_step_of_grpo(arm, tokenizer, tmp_path, chat):
    seen = []

    def reward(prompts, completions, **kwargs):
        rewards = arm.as_reward_func()(prompts=prompts, completions=completions, **kwargs)
        seen.append((prompts, completions, rewards))
        return rewards

    config = GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        max_steps=1,
        bf16=False,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    dataset = Dataset.from_dict({"prompt": (CHATS if chat else PROMPTS)[:2]})
    policy = tiny_llama(1, vocab_size=len(tokenizer))
    GRPOTrainer(policy, reward, args=config, train_dataset=dataset, processing_class=tokenizer).train()
    ((prompts, completions, rewards),) = seen
    assert len(rewards) == 4
    torch.testing.assert_close(torch.tensor(rewards), arm.score(prompts, completions))
