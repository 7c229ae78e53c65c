"""What guidance did at each token, against recomputation from scratch, for whatever sequences come out."""

import math

import pytest
import torch
from helpers import FOUR, generate
from oracle import guided, next_token_log_probs
from support import ARM, ASSISTANT, BASE, ONE
from tiny import EOS, VOCAB_SIZE

from hf_genarm import GenARMLogitsProcessor

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")


def row_at(text, mask, models, alphas, base_model=BASE):
    """The row of the last token of a text."""
    before = text[:-1]
    before = torch.cat([before[: len(mask)][mask.bool()], before[len(mask) :]])
    base_log_probs = next_token_log_probs(base_model, before)
    rewards = [next_token_log_probs(model, before) for model in models]
    result = guided(base_log_probs, rewards, alphas)
    token = int(text[-1])
    product = base_log_probs + sum(alpha * reward for alpha, reward in zip(alphas, rewards, strict=True))
    return {
        "token": token,
        "base_log_prob": float(base_log_probs[token]),
        "guided_log_prob": float(result[token]),
        **{f"reward_log_prob_{k}": float(reward[token]) for k, reward in enumerate(rewards) if alphas[k]},
        **{f"alpha_{k}": alpha for k, alpha in enumerate(alphas)},
        "kl": float((result.exp() * (result - base_log_probs)).sum()),
        "log_z": float(product.logsumexp(-1)),
        "entropy": float(-(result.exp() * result).sum()),
        "base_entropy": float(-(base_log_probs.exp() * base_log_probs).sum()),
        "top_token_changed": bool(result.argmax() != base_log_probs.argmax()),
    }


def test_the_end_of_a_beam_that_is_never_continued():
    processor = GenARMLogitsProcessor(ARM, 2.0, base_model=BASE)
    processor.keeps_statistics = True
    options = {"num_beams": 6, "num_return_sequences": 6, "max_new_tokens": 14}
    output = generate(BASE, [processor], FOUR, **options)
    length, n_ended = FOUR["input_ids"].shape[1], 0
    table = processor.statistics(output.sequences)
    for index, position, token, found in zip(
        *(table[name] for name in ("sequence", "position", "token", "guided_log_prob")), strict=True
    ):
        if token == EOS and position >= length and position < output.sequences.shape[1] - 1:
            text, mask = output.sequences[index, : position + 1], FOUR["attention_mask"][index // 6]
            if EOS not in text[length:-1]:
                n_ended += 1
                assert found == pytest.approx(row_at(text, mask, [ARM], [2.0])["guided_log_prob"], abs=1e-4)
    assert n_ended > 1


OPTIONS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "beam search": {"num_beams": 3, "num_return_sequences": 2},
    "assistant": {"assistant_model": ASSISTANT},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_statistics_of_every_token(name):
    inputs = ONE if name in ("assistant", "prompt lookup") else FOUR
    processor = GenARMLogitsProcessor([ARM, ASSISTANT], [0.8, -0.3], base_model=BASE)
    processor.keeps_statistics = True
    output = generate(BASE, [processor], inputs, **OPTIONS[name])
    columns = processor.statistics(output.sequences)
    start = inputs["input_ids"].shape[1]
    n_tokens = len(output.sequences) * (output.sequences.shape[1] - start)
    assert {len(column) for column in columns.values()} == {len(columns["kl"])}
    n_rows = 0
    for index, (sequence, position) in enumerate(zip(columns["sequence"], columns["position"], strict=True)):
        text = output.sequences[sequence, : position + 1]
        if 0 in text[start:] or 2 in text[start:-1]:  # after the end
            continue
        mask = inputs["attention_mask"][sequence // (len(output.sequences) // len(inputs["input_ids"]))]
        for what, value in row_at(text, mask, [ARM, ASSISTANT], [0.8, -0.3]).items():
            assert columns[what][index] == pytest.approx(value, abs=2e-4), what
        n_rows += 1
    assert 0.3 * n_tokens < n_rows <= n_tokens


def test_statistics_report_the_strengths_in_force(base, adapters, models):
    """Those that hold a divergence, too; a reward that is off has the strength 0 and no log-probability."""
    alpha = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0], [2.0, 0.0]])
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=alpha)
    processor.keeps_statistics = True
    output = generate(base, [processor], FOUR)
    columns = processor.statistics(output.sequences)
    strengths = dict(zip(columns["sequence"], columns["alpha_0"], strict=True))
    assert strengths == {0: 1.0, 1: 0.5, 2: 0.0, 3: 2.0}
    assert set(columns["alpha_1"]) == {0.0}
    assert all(math.isnan(x) for x in columns["reward_log_prob_1"])
    kl = [value for value, sequence in zip(columns["kl"], columns["sequence"], strict=True) if sequence == 2]
    assert max(kl) < 1e-5
    processor.alpha, processor.target_kl = [1.0, 0.0], 0.2
    processor.keeps_statistics = True  # from the beginning
    columns = processor.statistics(generate(base, [processor], ONE, min_new_tokens=20, max_new_tokens=20).sequences)
    assert sum(columns["kl"]) / len(columns["kl"]) == pytest.approx(0.2, rel=0.1)
    assert len({round(value, 4) for value in columns["alpha_0"]}) > 5


def test_no_statistics_by_default():
    processor = GenARMLogitsProcessor(ARM)
    with pytest.raises(ValueError, match="keeps_statistics = True"):
        processor.statistics(ONE["input_ids"])
    scores = torch.randn(1, VOCAB_SIZE)
    without = processor(ONE["input_ids"], scores)
    processor.keeps_statistics = True
    assert torch.equal(processor(ONE["input_ids"], scores), without)
    assert processor.statistics(torch.tensor([[3, 4, 5]]))["kl"] == []


def test_a_second_answer_that_is_shorter_than_the_first():
    """The table is that of the call that wrote the end of the text, though another one wrote more of it."""
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    processor.keeps_statistics = True
    first = generate(BASE, [processor], ONE, min_new_tokens=8, max_new_tokens=8).sequences
    longer = torch.cat([first, ONE["input_ids"][:, :3]], dim=1)
    inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    second = generate(BASE, [processor], inputs, min_new_tokens=3, max_new_tokens=3).sequences
    end = ONE["input_ids"].shape[1]
    for sequences, start, n_new in ((second, longer.shape[1], 3), (first, end, 8)):
        assert processor.statistics(sequences)["position"] == [*range(start, start + n_new)]
