"""Rewards as a contrast with a reference: identities with other methods, in every mode, fused and not."""

import pytest
import torch
from helpers import FOUR, assert_same, assert_same_distributions, generate, joint_passes, model_for
from oracle import log_probs_after, unpadded
from support import ARM, ASSISTANT, BASE, EXACT, MODES, ONE
from tiny import VOCAB_SIZE, left_padded, tiny_llama, tiny_tokenizer
from transformers import LlamaForSequenceClassification, LogitsProcessor

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo
from hf_genarm.functional import contrast, ratio_equivalent

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")


class RecomputeContrast(LogitsProcessor):
    """log π_base + Σ α (log π_r - log π_ref), from scratch, on the unpadded tokens of each row."""

    def __init__(self, models, alphas, reference, inputs):
        self.models, self.alphas, self.reference = models, alphas, reference
        self.mask = inputs["attention_mask"]

    def __call__(self, input_ids, scores):
        texts, guided = unpadded(input_ids, self.mask), scores.double().log_softmax(-1)
        reference = log_probs_after(self.reference, texts)
        for model, alpha in zip(self.models, self.alphas, strict=True):
            guided = guided + alpha * (log_probs_after(model, texts) - reference)
        return guided.log_softmax(-1).to(scores.dtype)


def listed():
    return [mode for mode in MODES if mode.expected == EXACT and not mode.elsewhere]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("mode", listed(), ids=lambda mode: mode.name)
def test_the_base_as_reference(mode, fused, base, adapters, models):
    inputs = ONE if mode.inputs is ONE else FOUR
    if fused:
        options = {"base_model": base, "alpha": [1.2, -0.4], "reference": "base"}
        processor = GenARMLogitsProcessor.from_pretrained(adapters, **options)
    else:
        processor = GenARMLogitsProcessor(models, [1.2, -0.4], base_model=base, reference=tiny_llama(0))
    assistant = {"assistant_model": base} if "the base itself" in mode.name else {}
    for _ in range(2):
        output = generate(base, [processor], inputs, **mode.kwargs() | assistant)
    oracle = RecomputeContrast(models, [1.2, -0.4], tiny_llama(0), inputs)
    expected = generate(base, [oracle], inputs, **mode.kwargs() | assistant)
    unguided = generate(base, [], inputs, **mode.kwargs() | assistant)
    assert output.sequences.tolist() != unguided.sequences.tolist()
    assert_same(output, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_the_base_as_reference_takes_no_pass(base, adapters, options):
    """Its distribution is that of the base's own rows."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, reference="base")
    generate(base, [processor], FOUR, max_new_tokens=8, min_new_tokens=8, **options)
    assert joint_passes(processor) == 7
    assert processor._machine.reference._lockstep is None


def test_other_weights_between_calls(base, adapters, models):
    """What the base has read under other weights is not used."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters[:1], base_model=base, reference="base")
    text = generate(base, [processor], ONE, max_new_tokens=4).sequences
    torch.nn.init.normal_(base.lm_head.weight, std=0.4, generator=torch.Generator().manual_seed(7))
    inputs = {"input_ids": text[:, :-1], "attention_mask": torch.ones_like(text[:, :-1])}
    output = generate(base, [processor], inputs)
    expected = generate(
        base, [RecomputeContrast([processor._machine.rewards.models[0].model], [1.0], base, inputs)], inputs
    )
    assert_same(output, expected)


def test_at_strength_one_it_is_the_adapter_itself(base, adapters, models):
    """DeRa's identity: π_base (π_r / π_base) = π_r."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters[0], base_model=base, reference="base")
    output = generate(base, [processor], FOUR, do_sample=True, top_k=0)
    expected = generate(models[0], [], FOUR, do_sample=True, top_k=0)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert_same_distributions(output, expected)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 1.0), (1.0, 1.0), (3.0, 0.7), (-0.4, 1.0)])
def test_eq_7_is_the_ratio_sampled_at_a_lower_temperature(base, adapters, alpha, temperature):
    """π_base π_r^α = (π_base (π_r / π_base)^(α/(1+α)))^(1+α), whole texts of a batch and their distributions."""
    eq_7 = GenARMLogitsProcessor.from_pretrained(adapters[0], base_model=base, alpha=alpha, reference=None)
    options = {"do_sample": True, "top_k": 0, "output_scores": True, "return_dict_in_generate": True}
    expected = generate(base, [eq_7], FOUR, temperature=temperature, **options)
    strength, lower = ratio_equivalent(alpha, temperature)
    ratio = GenARMLogitsProcessor.from_pretrained(adapters[0], base_model=base, alpha=strength, reference="base")
    output = generate(base, [ratio], FOUR, temperature=lower, **options)
    assert output.sequences.tolist() == expected.sequences.tolist()
    for one, other in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(one.log_softmax(-1), other.log_softmax(-1), atol=2e-4, rtol=0)
    hotter = generate(base, [ratio], FOUR, temperature=temperature, **options)
    assert not torch.allclose(hotter.scores[0].log_softmax(-1), expected.scores[0].log_softmax(-1), atol=1e-2)


def test_strengths_without_an_equivalent_ratio():
    with pytest.raises(ValueError, match="`alpha` is -1, but only above -1"):
        ratio_equivalent(-1)


def test_between_base_and_adapter_it_is_their_geometric_mean(models):
    """DeRa: realignment at any strength between base and adapter."""
    ids = ONE["input_ids"]
    with torch.no_grad():
        base_log_probs, tuned = (model(ids).logits[:, -1].log_softmax(-1) for model in (tiny_llama(0), models[0]))
    processor = GenARMLogitsProcessor(models[0], 0.3, reference=tiny_llama(0))
    expected = (0.7 * base_log_probs + 0.3 * tuned).log_softmax(-1)
    torch.testing.assert_close(processor(ids, base_log_probs), expected, atol=1e-5, rtol=0)


def test_proxy_tuning():
    """A small tuned model and its untuned twin steer another base: softmax(s_base + s_tuned - s_untuned)."""
    ids = ONE["input_ids"]
    with torch.no_grad():
        logits = [model(ids).logits[:, -1] for model in (BASE, ARM, ASSISTANT)]
    processor = GenARMLogitsProcessor(ARM, reference=ASSISTANT)
    expected = (logits[0] + logits[1] - logits[2]).log_softmax(-1)
    torch.testing.assert_close(processor(ids, logits[0]), expected, atol=1e-5, rtol=0)


def test_a_reference_equals_a_reward_model_of_opposite_strength():
    ids, scores = left_padded([7, 7])["input_ids"], torch.randn(2, VOCAB_SIZE)
    one = GenARMLogitsProcessor(ARM, 0.6, reference=ASSISTANT)(ids, scores)
    two = GenARMLogitsProcessor([ARM, ASSISTANT], [0.6, -0.6])(ids, scores)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_impossible_tokens():
    reward, reference = (
        torch.tensor([-1.0, -torch.inf, -torch.inf, -2.0]),
        torch.tensor([-2.0, -1.0, -torch.inf, -torch.inf]),
    )
    assert contrast(reward, reference).tolist() == [1.0, -torch.inf, 0.0, 0.0]


def test_a_classifier_is_no_reference():
    classifier = LlamaForSequenceClassification(tiny_llama(1).config)
    with pytest.raises(TypeError, match=r"ForSequenceClassification` can't be a reference.*`AutoModelForCausalLM`"):
        GenARMLogitsProcessor(tiny_llama(1), reference=classifier)
    tokenizer = tiny_tokenizer()
    trained = AutoregressiveRewardModel(
        model_for(tokenizer), tokenizer, RewardInfo(loss={"reference": "base"}), classifier
    )
    with pytest.raises(TypeError, match="can't be a reference"):
        trained.score(["What"], [" is"])


def test_another_vocabulary_is_refused():
    processor = GenARMLogitsProcessor(ARM, reference=tiny_llama(0, vocab_size=VOCAB_SIZE + 1))
    with pytest.raises(ValueError, match=rf"reference scores {VOCAB_SIZE + 1} tokens.*has {VOCAB_SIZE}"):
        processor(ONE["input_ids"], torch.zeros(1, VOCAB_SIZE))


def test_the_base_must_be_given(adapters):
    with pytest.raises(ValueError, match=r'`reference` is "base".*Pass `base_model`'):
        GenARMLogitsProcessor.from_pretrained(adapters[0], reference="base")
