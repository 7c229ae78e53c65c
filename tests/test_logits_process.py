"""The processor in `generate`, against recomputation from scratch, closed forms and enumeration."""

import copy
import itertools

import pytest
import torch
from helpers import assert_same, generate
from oracle import Recompute, guided, next_token_log_probs
from peft import LoraConfig, get_peft_model
from tiny import PAD, VOCAB_SIZE, left_padded, random_prompts, tiny_llama
from transformers import AutoModelForSequenceClassification, DynamicCache, T5Config, T5ForConditionalGeneration

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.hub.kv_cache import CACHE

BASE, ARM, OTHER = tiny_llama(0), tiny_llama(1), tiny_llama(2)

GREEDY = {"do_sample": False}
SAMPLING = {"do_sample": True, "top_k": 0}
MODES = {
    "greedy": GREEDY,
    "sampling": SAMPLING,
    "sampling, several returns": SAMPLING | {"num_return_sequences": 3},
    "sampling, top-p and temperature": SAMPLING | {"top_p": 0.8, "temperature": 0.7},
}


def inputs_of(lengths, seed=0):
    return left_padded(lengths, seed) if isinstance(lengths, list) else {"input_ids": random_prompts(1, lengths, seed)}


@pytest.mark.parametrize("lengths", [7, [7, 7], [9, 3, 5]], ids=["one prompt", "batch", "left-padded batch"])
@pytest.mark.parametrize("mode", MODES)
def test_generate_equals_recomputation(mode, lengths):
    inputs = inputs_of(lengths)
    options = MODES[mode]
    output = generate(BASE, [GenARMLogitsProcessor([ARM, OTHER], [1.0, 0.5], base_model=BASE)], inputs, **options)
    expected = generate(BASE, [Recompute([ARM, OTHER], [1.0, 0.5], inputs.get("attention_mask"))], inputs, **options)
    unguided = generate(BASE, [], inputs, **options)
    assert output.sequences.tolist() != unguided.sequences.tolist()
    assert_same(output, expected)


def test_one_instance_serves_many_calls():
    processor = GenARMLogitsProcessor(ARM, 1.5, base_model=BASE)
    for lengths, seed in [(6, 0), ([4, 8], 1), (6, 0), (11, 2), ([3, 2, 9], 3), (6, 4), ([4, 8], 1)]:
        inputs = inputs_of(lengths, seed)
        output = generate(BASE, [processor], inputs, **SAMPLING)
        assert_same(output, generate(BASE, [Recompute([ARM], [1.5], inputs.get("attention_mask"))], inputs, **SAMPLING))


def test_a_conversation_of_several_turns():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    ids = random_prompts(1, 5)
    for turn in range(3):
        output = generate(BASE, [processor], {"input_ids": ids}, **SAMPLING, max_new_tokens=4)
        assert_same(output, generate(BASE, [Recompute([ARM], [1.0])], {"input_ids": ids}, **SAMPLING, max_new_tokens=4))
        ids = torch.cat([output.sequences, random_prompts(1, 3, seed=turn)], dim=1)


def test_alpha_zero_equals_no_processor_and_runs_no_reward_model(monkeypatch):
    arm = copy.deepcopy(ARM)
    processor = GenARMLogitsProcessor(arm, 0.0, base_model=BASE)
    monkeypatch.setattr(arm, "forward", None)
    inputs = left_padded([4, 6])
    for options in MODES.values():
        output = generate(BASE, [processor], inputs, **options)
        expected = generate(BASE, [], inputs, **options)
        assert torch.equal(output.sequences, expected.sequences)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(output.scores, expected.scores, strict=True))


def test_a_reward_of_zero_strength_is_not_run(monkeypatch):
    inputs = left_padded([4, 6])
    expected = generate(BASE, [GenARMLogitsProcessor(OTHER, 0.7, base_model=BASE)], inputs)
    arm = copy.deepcopy(ARM)
    processor = GenARMLogitsProcessor([arm, OTHER], [0.0, 0.7], base_model=BASE)
    monkeypatch.setattr(arm, "forward", None)
    assert_same(generate(BASE, [processor], inputs), expected)


def test_scores_are_fp32_and_out_of_place():
    scores = torch.randn(2, VOCAB_SIZE, dtype=torch.bfloat16)
    before = scores.clone()
    result = GenARMLogitsProcessor(ARM, base_model=BASE)(random_prompts(2, 4), scores)
    assert torch.equal(scores, before)
    assert result.dtype == torch.float32
    # `output_logits` keeps the tensor that processors are given.
    inputs = {"input_ids": random_prompts(1, 5)}
    output = generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE)], inputs, output_logits=True)
    with torch.no_grad():
        logits = BASE(input_ids=inputs["input_ids"]).logits[:, -1]
    torch.testing.assert_close(output.logits[0], logits, atol=1e-5, rtol=0)


# --- identities ---


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_the_base_as_its_own_reward_sharpens(alpha):
    ids = random_prompts(3, 6)
    scores = torch.stack([next_token_log_probs(BASE, row) for row in ids]).float()
    result = GenARMLogitsProcessor(BASE, alpha, base_model=BASE)(ids, scores)
    torch.testing.assert_close(result, ((1 + alpha) * scores).log_softmax(-1), atol=1e-4, rtol=0)
    assert not torch.allclose(result, scores, atol=0.1)


def test_a_uniform_reward_changes_nothing():
    uniform = tiny_llama(1)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    ids, scores = random_prompts(2, 6), torch.randn(2, VOCAB_SIZE)
    result = GenARMLogitsProcessor(uniform, 2.0, base_model=BASE)(ids, scores)
    torch.testing.assert_close(result, scores.log_softmax(-1), atol=1e-5, rtol=0)


def test_two_rewards_add_up():
    ids, scores = random_prompts(2, 6), torch.randn(2, VOCAB_SIZE)
    first = GenARMLogitsProcessor(ARM, 0.7, base_model=BASE)(ids, scores)
    second = GenARMLogitsProcessor(OTHER, 1.3, base_model=BASE)(ids, scores)
    both = GenARMLogitsProcessor([ARM, OTHER], [0.7, 1.3], base_model=BASE)(ids, scores)
    assert not torch.allclose(first, second, atol=0.1)
    torch.testing.assert_close(both, (first + second - scores).log_softmax(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(both, GenARMLogitsProcessor(OTHER, 1.3, base_model=BASE)(ids, first), atol=1e-4, rtol=0)


def test_sampled_texts_follow_the_enumerated_distribution():
    """All continuations of two tokens over a vocabulary of 5: frequencies of 20,000 samples against Eq. 7."""
    sizes = {"vocab_size": 5, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    base, arm = tiny_llama(0, **sizes), tiny_llama(1, **sizes)
    prompt = torch.tensor([3, 1, 4])

    def step(ids):
        return guided(next_token_log_probs(base, ids), [next_token_log_probs(arm, ids)], [1.0])

    law = torch.zeros(5, 5, dtype=torch.double)
    for first, second in itertools.product(range(5), repeat=2):
        law[first, second] = step(prompt)[first] + step(torch.cat([prompt, torch.tensor([first])]))[second]
    torch.testing.assert_close(law.exp().sum(), torch.tensor(1.0, dtype=torch.double))

    torch.manual_seed(0)
    n = 20_000
    processor = GenARMLogitsProcessor(arm, base_model=BASE)
    output = base.generate(
        prompt.repeat(n, 1),
        attention_mask=torch.ones(n, 3, dtype=torch.long),
        logits_processor=[processor],
        do_sample=True,
        top_k=0,
        max_new_tokens=2,
        pad_token_id=0,
    )
    counts = torch.zeros(25, dtype=torch.double).index_add_(
        0, output[:, 3] * 5 + output[:, 4], torch.ones(n, dtype=torch.double)
    )
    expected = law.exp().flatten() * n
    common = expected > 5
    chi_squared = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert chi_squared < 56.0  # the 99.98th percentile for 24 degrees of freedom
    base_law = torch.stack([next_token_log_probs(base, prompt).exp()])
    assert (base_law - step(prompt).exp()).abs().max() > 0.1


# --- adapters ---


def test_an_adapter_on_the_base_is_a_reward_model():
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    arm = get_peft_model(copy.deepcopy(BASE), adapter).eval()
    inputs = left_padded([4, 6])
    with arm.disable_adapter():
        without = next_token_log_probs(arm, inputs["input_ids"][1])
    assert (without - next_token_log_probs(arm, inputs["input_ids"][1])).abs().max() > 0.1
    expected = generate(BASE, [Recompute([arm], [1.0], inputs["attention_mask"])], inputs)
    assert_same(generate(BASE, [GenARMLogitsProcessor(arm, base_model=BASE)], inputs), expected)


# --- bad input ---


def test_alpha_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"`alpha` is \[1.0, 2.0, 3.0\].*3 values.*2 reward models"):
        GenARMLogitsProcessor([ARM, OTHER], [1.0, 2.0, 3.0], base_model=BASE)
    processor = GenARMLogitsProcessor([ARM, OTHER], 2, base_model=BASE)
    assert processor.alpha == [2.0, 2.0]
    with pytest.raises(ValueError, match="1 values"):
        processor.alpha = [1.0]
    with pytest.raises(ValueError, match=r"nan.*finite"):
        processor.alpha = float("nan")


def test_no_reward_model():
    with pytest.raises(ValueError, match="empty list"):
        GenARMLogitsProcessor([])


def test_models_that_are_no_causal_lm():
    classifier = AutoModelForSequenceClassification.from_config(ARM.config)
    with pytest.raises(TypeError, match="LlamaForSequenceClassification"):
        GenARMLogitsProcessor(classifier)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB_SIZE, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(TypeError, match="T5ForConditionalGeneration"):
        GenARMLogitsProcessor(t5)


def test_another_vocabulary():
    other = tiny_llama(1, vocab_size=VOCAB_SIZE + 1)
    with pytest.raises(ValueError, match=rf"Reward model 1.*{VOCAB_SIZE + 1} tokens.*{VOCAB_SIZE}"):
        generate(BASE, [GenARMLogitsProcessor([ARM, other], base_model=BASE)], inputs_of(4))


def test_nan_rewards_are_named():
    broken = copy.deepcopy(ARM)
    broken.config.name_or_path = "broken-arm"
    broken.lm_head.weight.data[7, 3] = float("nan")
    with pytest.raises(ValueError, match=r"Reward model 1 \(`broken-arm`\) returned NaN"):
        generate(BASE, [GenARMLogitsProcessor([ARM, broken], base_model=BASE)], inputs_of(4))


# --- padding ---


def test_an_explicit_mask_may_have_holes():
    inputs = left_padded([8, 8])
    inputs["attention_mask"][0, 3] = 0
    inputs["attention_mask"][1, :2] = 0
    processor = GenARMLogitsProcessor(ARM, base_model=BASE, attention_mask=inputs["attention_mask"])
    output = generate(BASE, [processor], inputs, **SAMPLING, num_return_sequences=2)
    expected = generate(
        BASE, [Recompute([ARM], [1.0], inputs["attention_mask"])], inputs, **SAMPLING, num_return_sequences=2
    )
    assert_same(output, expected)


def test_a_mask_serves_its_prompts_only():
    first, second = left_padded([5, 3], seed=0), left_padded([5, 3], seed=1)
    processor = GenARMLogitsProcessor(ARM, base_model=BASE, attention_mask=first["attention_mask"])
    for _ in range(2):
        generate(BASE, [processor], first)
    with pytest.raises(ValueError, match="other prompts"):
        generate(BASE, [processor], second)
    with pytest.raises(ValueError, match="other prompts"):
        generate(BASE, [processor], left_padded([5, 3, 4]))
    processor.attention_mask = second["attention_mask"]
    assert_same(
        generate(BASE, [processor], second), generate(BASE, [Recompute([ARM], [1.0], second["attention_mask"])], second)
    )


def test_without_the_base_the_mask_must_be_given():
    prompt = torch.tensor([[PAD, 5, 6]])
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    for case in (inputs, left_padded([3, 5])):
        processor = GenARMLogitsProcessor(ARM)
        with pytest.raises(ValueError, match=r"starts with the pad token.*`base_model`.*processor.attention_mask"):
            generate(BASE, [processor], case)
        processor.attention_mask = case["attention_mask"]
        assert_same(
            generate(BASE, [processor], case), generate(BASE, [Recompute([ARM], [1.0], case["attention_mask"])], case)
        )


HOLE = left_padded([8, 8])["attention_mask"].index_fill(1, torch.tensor([3]), 0)
MASKS = {
    "a hole": {"input_ids": random_prompts(2, 8), "attention_mask": HOLE},
    "padding that is no pad token": left_padded([3, 8]) | {"input_ids": random_prompts(2, 8)},
    "pad tokens that are text": left_padded([3, 8]) | {"attention_mask": torch.ones(2, 8, dtype=torch.long)},
}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 3}])
@pytest.mark.parametrize("name", MASKS)
def test_the_mask_of_generate_is_known_whatever_the_tokens_are(name, options):
    inputs = MASKS[name]
    output = generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE)], inputs, **options)
    assert_same(output, generate(BASE, [Recompute([ARM], [1.0], inputs["attention_mask"])], inputs, **options))
    other = generate(BASE, [Recompute([ARM], [1.0], (inputs["input_ids"] != PAD).long())], inputs, **options)
    assert not torch.allclose(other.scores[0], output.scores[0], atol=1e-2)


def test_a_mask_that_the_base_does_not_share_is_refused():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE, attention_mask=torch.ones(2, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="other tokens as padding than the base model does"):
        generate(BASE, [processor], MASKS["a hole"])


def test_a_text_that_is_only_in_the_cache_of_the_base_is_refused():
    ids = random_prompts(1, 9)
    cache = DynamicCache(config=BASE.config)
    with torch.no_grad():
        BASE(input_ids=ids[:, :5], **{CACHE: cache}, use_cache=True)
    inputs = {"input_ids": ids[:, 5:], "attention_mask": torch.ones(1, 9, dtype=torch.long), CACHE: cache}
    with pytest.raises(ValueError, match="has read 9 tokens, but `generate` was given 4"):
        generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE)], inputs)


def test_right_padding_is_refused():
    prompts = torch.tensor([[5, 6, 7], [5, 6, PAD]])
    inputs = {"input_ids": prompts, "attention_mask": (prompts != PAD).long()}
    with pytest.raises(ValueError, match="The mask of `generate` ends in 0"):
        generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE)], inputs)
    with pytest.raises(ValueError, match="ends with the pad token"):
        generate(BASE, [GenARMLogitsProcessor(ARM)], inputs)
    with pytest.raises(ValueError, match="`attention_mask` ends in 0"):
        GenARMLogitsProcessor(ARM, attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (3,)])
def test_invalid_masks(shape):
    with pytest.raises(ValueError, match=r"`attention_mask` has shape .*two dimensions"):
        GenARMLogitsProcessor(ARM, attention_mask=torch.ones(shape))


def test_prompts_that_are_embeddings_alone_are_refused():
    embeddings = BASE.get_input_embeddings()(random_prompts(1, 4))
    with pytest.raises(ValueError, match="inputs_embeds"):
        generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE)], {"inputs_embeds": embeddings})


def test_the_pad_token_can_be_another():
    ids = torch.tensor([[PAD, 6, 7]])
    scores = torch.randn(1, VOCAB_SIZE)
    with pytest.raises(ValueError, match="starts with the pad token"):
        GenARMLogitsProcessor(ARM)(ids, scores)
    expected = Recompute([ARM], [1.0])(ids, scores)
    torch.testing.assert_close(GenARMLogitsProcessor(ARM, pad_token_id=5)(ids, scores), expected, atol=1e-4, rtol=0)
