"""Strengths of each request, schedules, and strengths that change: in every mode, with and without joint passes."""

import copy
import threading

import pytest
import torch
from helpers import FOUR, assert_same, generate, joint_passes, row_of
from oracle import Recompute
from support import ARM, ASSISTANT, BASE, EXACT, MODES, ONE
from tiny import VOCAB_SIZE, left_padded, tiny_llama
from transformers import LogitsProcessor

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.decoding.strength import check_alpha, refuse_other_requests

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

# Both rewards, one of them, none, and away from one
WEIGHTS = torch.tensor([[1.0, 0.5], [0.0, 1.5], [0.0, 0.0], [-0.7, 0.3]])


def listed(inputs=None):
    return [
        mode
        for mode in MODES
        if mode.expected == EXACT and not mode.elsewhere and (mode.inputs is not ONE) == (inputs is FOUR)
    ]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("mode", listed(FOUR), ids=lambda mode: mode.name)
def test_each_request_has_its_own_strengths(mode, fused, base, adapters, models):
    if fused:
        processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=WEIGHTS)
    else:
        processor = GenARMLogitsProcessor(models, WEIGHTS, base_model=base)
    output = generate(base, [processor], FOUR, **mode.kwargs())
    expected = generate(base, [Recompute(models, WEIGHTS, FOUR["attention_mask"])], FOUR, **mode.kwargs())
    assert_same(output, expected)
    same = generate(base, [Recompute(models, [1.0, 0.5], FOUR["attention_mask"])], FOUR, **mode.kwargs())
    assert same.sequences.tolist() != expected.sequences.tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beam search"])
def test_a_batch_equals_single_runs(base, adapters, options):
    """Each request by itself, with its strengths as plain numbers."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=WEIGHTS)
    together = generate(base, [processor], FOUR, **options).sequences
    assert joint_passes(processor) > 0
    for index, weights in enumerate(WEIGHTS.tolist()):
        alone = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=weights)
        inputs = row_of(FOUR, index)
        expected = generate(base, [alone], inputs, **options).sequences
        n_returns = options.get("num_return_sequences", 1)
        for number in range(n_returns):
            answer = expected[number, inputs["input_ids"].shape[1] :].tolist()
            row = together[index * n_returns + number, FOUR["input_ids"].shape[1] :].tolist()
            assert row[: len(answer)] == answer
            assert set(row[len(answer) :]) <= {0}


def test_a_request_without_guidance_is_untouched():
    """Bit for bit, in a batch with others that are guided."""
    ids = FOUR["input_ids"]
    scores = torch.randn(4, VOCAB_SIZE)
    scores[:, 5] = -torch.inf
    processor = GenARMLogitsProcessor([ARM, ASSISTANT], WEIGHTS, attention_mask=FOUR["attention_mask"])
    guided = processor(ids, scores)
    assert torch.equal(guided[2], scores[2])
    assert not any(torch.equal(guided[index], scores[index]) for index in (0, 1, 3))


def test_a_reward_that_is_zero_in_every_row_is_not_run():
    never = copy.deepcopy(ASSISTANT)
    processor = GenARMLogitsProcessor([ARM, never], torch.tensor([[1.0, 0.0], [0.5, 0.0]]))
    never.forward = None  # calling it is a TypeError
    ids = left_padded([5, 5])["input_ids"]
    assert processor(ids, torch.zeros(2, VOCAB_SIZE)).shape == (2, VOCAB_SIZE)
    processor.alpha = torch.tensor([[1.0, 0.0], [0.5, 0.1]])
    with pytest.raises(TypeError):
        processor(ids, torch.zeros(2, VOCAB_SIZE))


def test_impossible_tokens_of_a_reward_that_is_off_for_a_row():
    """0 times minus infinity is not a number, and must not get into the row."""
    impossible = tiny_llama(1)
    bias = torch.zeros(VOCAB_SIZE)
    bias[7] = -torch.inf
    impossible.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    processor = GenARMLogitsProcessor([impossible, ARM], torch.tensor([[1.0, 0.5], [0.0, 0.5]]))
    guided = processor(left_padded([5, 5])["input_ids"], torch.zeros(2, VOCAB_SIZE))
    assert guided[0, 7] == -torch.inf
    assert guided[1].isfinite().all()


# --- schedules ---


class RecomputeSchedule(LogitsProcessor):
    """The strengths of a step, counted from the prompt that the test knows."""

    def __init__(self, models, schedule, inputs):
        self.models, self.schedule, self.inputs = models, schedule, inputs

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.inputs["input_ids"].shape[1]
        return Recompute(self.models, self.schedule(step), self.inputs.get("attention_mask"))(input_ids, scores)


def schedule(step):
    """Nothing at first, then one reward, then both."""
    return [0.0, 0.0] if step < 2 else [0.3 * step, 0.0 if step < 5 else 0.8]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("mode", listed(FOUR) + listed(ONE), ids=lambda mode: mode.name)
def test_a_schedule(mode, fused, base, adapters, models):
    inputs = ONE if mode.inputs is ONE else FOUR
    if fused:
        processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=schedule)
    else:
        processor = GenARMLogitsProcessor(models, schedule, base_model=base)
    assistant = {"assistant_model": base} if "the base itself" in mode.name else {}
    for _ in range(2):  # the second call begins again at step 0
        output = generate(base, [processor], inputs, **mode.kwargs() | assistant)
        oracle = RecomputeSchedule(models, schedule, inputs)
        expected = generate(base, [oracle], inputs, **mode.kwargs() | assistant)
        assert_same(output, expected)
    unguided = generate(base, [], inputs, **mode.kwargs() | assistant)
    assert output.sequences.tolist() != unguided.sequences.tolist()


def test_a_schedule_in_a_custom_loop():
    steps = []
    processor = GenARMLogitsProcessor(ARM, lambda step: steps.append(step) or 1.0)
    for _ in range(2):
        ids = left_padded([5, 5])["input_ids"]
        for _ in range(3):
            scores = processor(ids, BASE(ids).logits[:, -1])
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert steps == [0, 1, 2, 0, 1, 2]


def test_a_schedule_of_each_request():
    processor = GenARMLogitsProcessor([ARM, ASSISTANT], lambda step: WEIGHTS * step, base_model=BASE)
    output = generate(BASE, [processor], FOUR, max_new_tokens=2)
    expected = generate(
        BASE, [GenARMLogitsProcessor([ARM, ASSISTANT], WEIGHTS, base_model=BASE)], FOUR, max_new_tokens=2
    )
    unguided = generate(BASE, [], FOUR, max_new_tokens=2)
    torch.testing.assert_close(output.scores[0], unguided.scores[0])
    assert output.sequences[:, -2].tolist() == unguided.sequences[:, -2].tolist()
    assert not torch.allclose(output.scores[0], expected.scores[0])


# --- setting it ---


def test_each_token_has_one_setting_when_another_thread_sets_it():
    """Every row of scores is that of one of the two settings, never of a mixture."""
    settings = [[0.5, 0.5], [1.5, -0.5]]
    processor = GenARMLogitsProcessor([ARM, ASSISTANT], settings[0])
    ids = ONE["input_ids"]
    scores = BASE(ids).logits[:, -1].detach()
    expected = [GenARMLogitsProcessor([ARM, ASSISTANT], x)(ids, scores) for x in settings]
    done = threading.Event()

    def change():
        while not done.is_set():
            for x in settings:
                processor.alpha = x

    thread = threading.Thread(target=change)
    thread.start()
    try:
        seen = [
            min(range(2), key=lambda k: float((processor(ids, scores) - expected[k]).abs().max())) for _ in range(100)
        ]
        for _ in range(100):
            result = processor(ids, scores)
            assert min(float((result - x).abs().max()) for x in expected) < 1e-5
    finally:
        done.set()
        thread.join()
    assert set(seen) == {0, 1}


def test_invalid_strengths():
    for alpha, message in (
        (torch.zeros(4, 3), r"shape \(4, 3\), but there are 2 reward models"),
        (torch.zeros(0, 2), r"shape \(0, 2\)"),
        (torch.zeros(1, 4, 2), r"shape \(1, 4, 2\)"),
        (torch.tensor([[1.0, torch.nan]]), "must be finite"),
        ([1.0], "has 1 values, but there are 2"),
        ([1.0, float("inf")], "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            check_alpha(alpha, 2)
    with pytest.raises(ValueError, match=r"`alpha` has 3 rows.*4 rows to generate"):
        refuse_other_requests(torch.ones(3, 2), torch.zeros(4, 5, dtype=torch.long))
    processor = GenARMLogitsProcessor(ARM, lambda step: schedule)
    with pytest.raises(ValueError, match="returned a function for step 0"):
        processor(ONE["input_ids"], torch.zeros(1, VOCAB_SIZE))
    processor = GenARMLogitsProcessor(ARM, lambda step: [1.0, 2.0])
    with pytest.raises(ValueError, match="has 2 values, but there are 1"):
        processor(ONE["input_ids"], torch.zeros(1, VOCAB_SIZE))


def test_a_tensor_is_copied():
    alpha = torch.tensor([[1.0], [2.0]])
    processor = GenARMLogitsProcessor(ARM, alpha)
    alpha += 1
    assert processor.alpha.tolist() == [[1.0], [2.0]]
    processor.alpha = torch.tensor([0.5])
    assert processor.alpha == [0.5]
    processor.alpha = torch.tensor(0.25)
    assert processor.alpha == [0.25]


def test_a_number_is_returned_as_it_was_given():
    processor = GenARMLogitsProcessor(ARM, 0.3)
    assert processor.alpha == [0.3]
    processor.alpha = [-0.7]
    assert processor.alpha == [-0.7]
