"""Strengths in other words: a KL temperature, weights of objectives, a divergence per token that is held."""

import pytest
import torch
from helpers import FOUR, assert_same, generate, row_of
from oracle import next_token_log_probs
from support import ARM, ASSISTANT, BASE, ONE
from tiny import VOCAB_SIZE, left_padded
from transformers import LogitsProcessor

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo
from hf_genarm.decoding import kl_control
from hf_genarm.decoding.kl_control import KLControl, divergence
from hf_genarm.decoding.texts import TextReader

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")


def arms(**values):
    """Two reward models that say of themselves what is given, the first and the second value of each name."""
    infos = [RewardInfo(**{name: value[index] for name, value in values.items()}) for index in range(2)]
    return [AutoregressiveRewardModel(model, None, info) for model, info in zip((ARM, ASSISTANT), infos, strict=True)]


def test_alpha_from_beta():
    """alpha = beta_r / beta: the samples of the KL-regularised optimum of a reward beta_r log pi_r, token by token."""
    processor = GenARMLogitsProcessor(arms(beta=(0.05, 0.1)))
    processor.set_beta(0.2)
    assert processor.alpha == pytest.approx([0.25, 0.5])
    row = ONE["input_ids"][0]
    optimum = next_token_log_probs(BASE, row)
    for model, beta in ((ARM, 0.05), (ASSISTANT, 0.1)):
        optimum = optimum + beta * next_token_log_probs(model, row) / 0.2
    guided = processor(ONE["input_ids"], next_token_log_probs(BASE, row)[None].float())
    torch.testing.assert_close(guided[0].double(), optimum.log_softmax(-1), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="`beta` is 0"):
        processor.set_beta(0)
    with pytest.raises(ValueError, match=r"Reward model 1 does not record the `beta`.*Set `alpha`"):
        GenARMLogitsProcessor(arms(beta=(0.05, None))).set_beta(0.1)


def test_weights_of_objectives():
    """Each weighted reward has the scale that its weight says."""
    processor = GenARMLogitsProcessor(arms(reward_scale=(10.0, 40.0)))
    processor.set_weights([0.3, 0.7], alpha=2.0)
    first, second = processor.alpha
    assert first * 10 / (second * 40) == pytest.approx(0.3 / 0.7)
    assert processor.alpha == pytest.approx([2 * 0.3 * 20 / 10, 2 * 0.7 * 20 / 40])
    processor.set_weights(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    assert processor.alpha.tolist() == [[2.0, 0.0], [1.0, 0.25]]
    for weights in ([0.5, 0.6], [1.5, -0.5], [1.0], [[0.5, 0.5], [0.5, 0.4]]):
        with pytest.raises(ValueError, match="with the sum 1"):
            processor.set_weights(weights)
    with pytest.raises(ValueError, match=r"Reward model 0 does not record its scale.*`reward_scale`"):
        GenARMLogitsProcessor(arms(reward_scale=(None, 1.0))).set_weights([0.5, 0.5])


# --- a divergence that is held ---


class Measure(LogitsProcessor):
    """The divergence of what comes after guidance from what comes before, of each row and step."""

    def __init__(self):
        self.steps = []

    def around(self, processor):
        measure = self

        class Before(LogitsProcessor):
            def __call__(self, input_ids, scores):
                measure.base = scores.double().log_softmax(-1)
                return scores

        return [Before(), processor, self]

    def __call__(self, input_ids, scores):
        guided = scores.double().log_softmax(-1)
        self.steps.append((guided.exp() * (guided - self.base).nan_to_num()).sum(-1))  # impossible tokens: 0
        return scores


@pytest.mark.parametrize("target", [0.05, 0.3])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampling"])
def test_the_mean_divergence_of_each_text_is_the_target(target, options):
    processor = GenARMLogitsProcessor(ARM, target_kl=target, attention_mask=FOUR["attention_mask"])
    measure = Measure()
    generate(BASE, measure.around(processor), FOUR, min_new_tokens=40, max_new_tokens=40, **options)
    means = torch.stack(measure.steps).mean(dim=0)
    torch.testing.assert_close(means, torch.full_like(means, target), rtol=0.1, atol=0)
    fixed = Measure()
    plain = GenARMLogitsProcessor(ARM, attention_mask=FOUR["attention_mask"])
    generate(BASE, fixed.around(plain), FOUR, min_new_tokens=40, max_new_tokens=40, **options)
    assert (torch.stack(fixed.steps).mean(dim=0) - target).abs().min() > 0.1 * target


def test_each_text_is_controlled_by_itself(base, adapters):
    """A batch equals single runs, and joint passes equal separate ones."""
    options = {"target_kl": 0.2, "alpha": [1.0, -0.5]}
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, **options)
    together = generate(base, [processor], FOUR)
    for index in range(4):
        inputs = row_of(FOUR, index)
        alone = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, **options)
        answer = generate(base, [alone], inputs).sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert together.sequences[index, FOUR["input_ids"].shape[1] :].tolist()[: len(answer)] == answer


@pytest.mark.parametrize("options", [{"assistant_model": ASSISTANT}, {"prompt_lookup_num_tokens": 3}])
def test_drafts_do_not_change_the_strengths(options):
    """Each token has the strength that it has without drafts, whatever was tried and rejected."""
    processor = GenARMLogitsProcessor(ARM, base_model=BASE, target_kl=0.2)
    expected = generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE, target_kl=0.2)], ONE, max_new_tokens=20)
    for _ in range(2):
        assert_same(generate(BASE, [processor], ONE, max_new_tokens=20, **options), expected)
    fixed = generate(BASE, [GenARMLogitsProcessor(ARM)], ONE, max_new_tokens=20)
    assert fixed.sequences.tolist() != expected.sequences.tolist()


def test_each_beam_keeps_its_own_divergence():
    """A beam has the strengths of the text that it is: its scores are those of the text run greedily by force."""
    processor = GenARMLogitsProcessor(ARM, target_kl=0.2)
    output = generate(BASE, [processor], ONE, num_beams=3, num_return_sequences=3)
    start = ONE["input_ids"].shape[1]
    for text, score in zip(output.sequences, output.sequences_scores, strict=True):
        forced = GenARMLogitsProcessor(ARM, target_kl=0.2)
        total, length = 0.0, 0
        for at in range(start, len(text)):
            if text[at] == 0:
                break
            logits = BASE(text[None, :at]).logits[:, -1].detach().log_softmax(-1)
            total, length = total + float(forced(text[None, :at], logits)[0, text[at]]), length + 1
        assert float(score) == pytest.approx(total / length, abs=1e-4)


def test_target_kl_is_set_and_unset():
    scores = torch.randn(1, VOCAB_SIZE)
    processor = GenARMLogitsProcessor(ARM, 0.7)
    plain = processor(ONE["input_ids"], scores)
    processor.target_kl = 0.5
    assert processor.target_kl == 0.5
    held = processor(ONE["input_ids"], scores)
    assert not torch.allclose(plain, held, atol=1e-3)
    processor.target_kl = None
    assert torch.equal(processor(ONE["input_ids"], scores), plain)
    with pytest.raises(ValueError, match="`target_kl` is 0"):
        processor.target_kl = 0


def test_divergence_where_there_is_no_choice():
    """The base leaves one token, or the reward has no opinion: nothing to be held, and no NaN."""
    scores = torch.full((2, VOCAB_SIZE), -torch.inf)
    scores[:, 7] = 0.0
    ids = left_padded([5, 5])["input_ids"]
    guided = GenARMLogitsProcessor(ARM, target_kl=0.5)(ids, scores)
    assert torch.equal(guided, scores)
    control, uniform = KLControl(), torch.zeros(1, VOCAB_SIZE)
    text = TextReader(None)(ONE["input_ids"], torch.zeros(1, VOCAB_SIZE))
    scale = control(text, 1, 0.5, torch.randn(1, VOCAB_SIZE), [uniform], [1.0])
    assert scale.isfinite().all()


def test_divergence_closed_form():
    """Two tokens at 1/2; a direction of log 3 for one of them makes 3/4 and 1/4."""
    base, direction = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[3.0, 1.0]]).log()
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(divergence(base, direction, torch.ones(1))[0], expected)
    assert divergence(base, direction, torch.zeros(1)).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("n_at_once", [2, 4])
def test_factors_that_are_tried_at_once(n_at_once, monkeypatch):
    """As on a GPU; by halving one at a time as on the CPU, the same are found."""
    torch.manual_seed(0)
    base, direction = (3 * torch.randn(2, 6, VOCAB_SIZE)).log_softmax(-1)
    direction[:, 5] = -1e9
    wanted = torch.tensor([0.0, 0.001, 0.1, 0.5, 2.0, 90.0])
    one_by_one = kl_control._solve(base, direction, wanted, 16.0)
    assert one_by_one[0][-1] > 15.9
    assert one_by_one[1][2:5] == pytest.approx(wanted[2:5], abs=1e-3)
    monkeypatch.setattr(kl_control, "_n_halvings_at_once", lambda base: n_at_once)
    for at_once, expected in zip(kl_control._solve(base, direction, wanted, 16.0), one_by_one, strict=True):
        torch.testing.assert_close(at_once, expected, atol=1e-4, rtol=0)
