"""Rewards of finished text, against the log-probabilities of each text by itself, in float64."""

import pytest
import torch
from datasets import Dataset
from tiny import CORPUS, tiny_llama
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
    assert arm.score([""], [""]).tolist() == [0.0]  # an end alone has nothing to be predicted from
    row = arm.token_rewards(["How?"], [""])[0]
    assert row.input_ids.tolist() == [tokenizer.eos_token_id]
    torch.testing.assert_close(row.rewards.double(), expected(model, tokenizer, "How?", ""), atol=1e-4, rtol=0)


def test_bad_input(arm, model):
    with pytest.raises(ValueError, match="2 prompts, but 3 responses"):
        arm.score(PROMPTS[:2], RESPONSES)
    with pytest.raises(ValueError, match="same form"):
        arm.score(PROMPTS[:1], [[{"role": "assistant", "content": "Fine."}]])
    with pytest.raises(ValueError, match="no tokenizer"):
        AutoregressiveRewardModel(model).score(PROMPTS, RESPONSES)


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
