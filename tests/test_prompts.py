"""Models that read prompts of their own: guided `generate` against each model alone on its prompt and the answer."""

import copy
import pickle

import pytest
import torch
from helpers import assert_same, generate, joint_passes, saved_with_adapter, ways_to_read
from oracle import Alone
from support import ARCHITECTURES, ARM, BASE, BATCH, EXACT, MODES, ONE, SAMPLING
from tiny import EOS, left_padded, own_prompts, tiny_llama
from transformers import BatchEncoding, LogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
from two_tokenizers import permuted, renumbered

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, smc_sample
from hf_genarm.functional import kl_divergence
from hf_genarm.hub.kv_cache import CACHE
from hf_genarm.hub.sharing import twin

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

# Modes in which the base has no cache to be joined.
APART = {"`use_cache=False`"}
LISTED = [mode for mode in MODES if mode.expected == EXACT and not mode.elsewhere]


def options_of(mode, base):
    """The options of a mode; an assistant adapts its number of drafts to each call, so that each gets a new one."""
    options = mode.kwargs()
    if options.get("assistant_model") is BASE:
        options["assistant_model"] = base
    elif "assistant_model" in options:
        options["assistant_model"] = copy.deepcopy(options["assistant_model"])
    return options


# --- every mode ---


@pytest.mark.parametrize("mode", LISTED, ids=lambda mode: mode.name)
def test_separate_models_with_prompts_of_their_own(mode):
    """Two reward models, of which one reads the prompt of the base, and a reference."""
    other, small = tiny_llama(4, num_hidden_layers=1), tiny_llama(5)
    processor = GenARMLogitsProcessor([ARM, other], [1.0, 0.7], base_model=BASE, reference=small)
    prompts, negative = own_prompts(mode.inputs, 0), own_prompts(mode.inputs, 1, 4)
    without = generate(BASE, [processor], mode.inputs, **options_of(mode, BASE))
    processor.prompts, processor.reference_prompts = [prompts, None], negative
    output = generate(BASE, [processor], mode.inputs, **options_of(mode, BASE))
    oracle = Alone([ARM, other], [1.0, 0.7], mode.inputs, [prompts, None], small, negative)
    assert output.sequences.tolist() != without.sequences.tolist()
    assert_same(output, generate(BASE, [oracle], mode.inputs, **options_of(mode, BASE)))


@pytest.mark.parametrize("mode", LISTED, ids=lambda mode: mode.name)
def test_prompts_of_their_own_in_joint_passes(mode, base, adapters, models):
    """An adapter and the base itself with longer and shorter prompts, an adapter without, and a negative prompt."""
    arms = [AutoregressiveRewardModel.from_pretrained(x, base).model for x in adapters]
    processor = GenARMLogitsProcessor(
        [arms[0], twin(base), arms[1]], [1.0, 0.6, 0.5], base_model=base, reference="base"
    )
    assert processor.engine == "fused"
    prompts = [own_prompts(mode.inputs, 0), own_prompts(mode.inputs, 1, 5), None]
    negative = own_prompts(mode.inputs, 2, 9)
    without = generate(base, [processor], mode.inputs, **options_of(mode, base))
    joint = joint_passes(processor)
    processor.prompts, processor.reference_prompts = prompts, negative
    output = generate(base, [processor], mode.inputs, **options_of(mode, base))
    if not mode.name.startswith("assisted"):
        assert (joint_passes(processor) > joint) == (mode.name not in APART)
        assert (processor._machine.reference._lockstep.joint_passes > 0) == (mode.name not in APART)
    plain = tiny_llama(0)
    oracle = Alone([models[0], plain, models[1]], [1.0, 0.6, 0.5], mode.inputs, prompts, plain, negative)
    assert output.sequences.tolist() != without.sequences.tolist()
    assert_same(output, generate(base, [oracle], mode.inputs, **options_of(mode, base)))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_every_step_after_the_prompt_is_joint(base, adapters, options):
    arm = AutoregressiveRewardModel.from_pretrained(adapters[0], base)
    processor = GenARMLogitsProcessor([arm, twin(base)], base_model=base, reference="base")
    processor.prompts, processor.reference_prompts = [own_prompts(BATCH, 0), own_prompts(BATCH, 1)], BATCH
    generate(base, [processor], min_new_tokens=10, **options)
    models = [*processor._machine.rewards.models, processor._machine.reference._lockstep]
    assert [model.joint_passes for model in models] == [9, 9, 9]


# One of each kind by default: rotary positions, learned ones, windows, a recurrent state
QUICK = {"Llama", "GPT-2", "Gemma 3", "Mamba"}
FAMILIES = [pytest.param(x, marks=() if x.name in QUICK else pytest.mark.slow, id=x.name) for x in ARCHITECTURES]


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures(family, tmp_path):
    """The base with another prompt, and an adapter with its own, next to padding, under windows, with any positions."""
    base, adapter = saved_with_adapter(family, tmp_path)
    arm = AutoregressiveRewardModel.from_pretrained(adapter, base).model
    alone, fused = copy.deepcopy(base), 0
    for options, inputs in ways_to_read(base):
        for lengths in ([3, 17], [2, 4]):  # longer and shorter than the base's
            prompts = [own_prompts(inputs, 3, length) for length in lengths]
            processor = GenARMLogitsProcessor([arm, twin(base)], [1.0, 0.8], base_model=base)
            processor.prompts = prompts
            output = generate(base, [processor], inputs, max_new_tokens=12, **options)
            oracle = Alone([copy.deepcopy(arm), alone], [1.0, 0.8], inputs, prompts)
            assert_same(output, generate(base, [oracle], inputs, max_new_tokens=12, **options))
            fused += joint_passes(processor)
    assert (fused > 0) == family.fused


def test_keys_and_values_are_not_copied(base):
    """In each layer, the caches of all models are parts of one tensor, and the next joint pass uses it as it is."""
    processor = GenARMLogitsProcessor(twin(base), base_model=base, reference="base")
    processor.prompts, processor.reference_prompts = own_prompts(BATCH, 0), own_prompts(BATCH, 1)
    starts = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            step = processor._machine.watch.step
            others = processor._machine.rewards.models[0], processor._machine.reference._lockstep
            caches = [step.run.cache, *(model._state.cache for model in others)]
            starts.append([cache.layers[1].keys.untyped_storage().data_ptr() for cache in caches])
            return scores

    output = generate(base, [processor, Look()], max_new_tokens=6, min_new_tokens=6)
    assert len(starts) == 6
    assert len(output.scores) == 6
    assert all(len(set(of_step)) == 1 for of_step in starts[2:])


# --- identities ---


def test_the_prompts_of_the_base_make_no_difference(base, adapters):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=[1.0, 0.5], reference="base")
    expected = generate(base, [processor])
    processor.prompts, processor.reference_prompts = BATCH, BATCH
    assert_same(generate(base, [processor]), expected)
    processor.prompts = processor.reference_prompts = None
    again = generate(base, [processor])
    assert all(torch.equal(x, y) for x, y in zip(again.scores, expected.scores, strict=True))


@pytest.mark.parametrize("options", [{}, SAMPLING, {"num_beams": 3}], ids=["greedy", "sampling", "beams"])
def test_at_strength_1_the_base_reads_the_other_prompt(options):
    """log π(y | x) + [log π(y | s, x) - log π(y | x)] is what `generate` writes for the other prompt."""
    processor = GenARMLogitsProcessor(twin(BASE), base_model=BASE, reference="base")
    processor.prompts = own_prompts(BATCH, 0)
    output = generate(BASE, [processor], **options)
    expected = generate(BASE, [], processor.prompts[0], **options)
    lengths = [x["input_ids"].shape[1] for x in (BATCH, processor.prompts[0])]
    texts = [x.sequences[:, length:].tolist() for x, length in zip((output, expected), lengths, strict=True)]
    assert texts[0] == texts[1]


def test_two_equal_rewards_at_half_the_strength():
    prompts = own_prompts(BATCH, 0)
    outputs = []
    for n in (1, 2):
        processor = GenARMLogitsProcessor([twin(BASE)] * n, 2.0 / n, base_model=BASE, reference="base")
        processor.prompts = prompts
        outputs.append(generate(BASE, [processor]))
    assert_same(*outputs)


@pytest.mark.parametrize("scale", [0.5, 1.5, 3.0])
def test_classifier_free_guidance(scale):
    """That of transformers, in the mode in which it is right: one row, greedy or sampled, with a negative prompt."""
    negative = left_padded([6], seed=31)
    processor = GenARMLogitsProcessor(twin(BASE), scale - 1, base_model=BASE, reference="base")
    processor.reference_prompts = negative
    for options in ({}, SAMPLING):
        theirs = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, copy.deepcopy(BASE), negative["input_ids"])
        output = generate(BASE, [processor], ONE, **options)
        expected = generate(BASE, [theirs], ONE, **options)
        assert output.sequences.tolist() != generate(BASE, [], ONE, **options).sequences.tolist()
        assert output.sequences.tolist() == expected.sequences.tolist()
        for ours, other in zip(output.scores, expected.scores, strict=True):
            torch.testing.assert_close(ours, other.log_softmax(-1), atol=1e-4, rtol=0)
        option = generate(BASE, [], ONE, guidance_scale=scale, negative_prompt_ids=negative["input_ids"], **options)
        assert output.sequences.tolist() == option.sequences.tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2} | SAMPLING])
def test_classifier_free_guidance_where_that_of_transformers_is_wrong(options):
    """Batches with padding, beams, several returns."""
    negative = own_prompts(BATCH, 1)
    processor = GenARMLogitsProcessor(twin(BASE), 0.5, base_model=BASE, reference="base")
    processor.reference_prompts = negative
    for _ in range(2):  # and reuse
        output = generate(BASE, [processor], **options)
        expected = generate(BASE, [Alone([BASE], [0.5], BATCH, [None], BASE, negative)], **options)
        assert_same(output, expected)


# --- settings and what is kept ---


def test_at_strength_0_nothing_is_read():
    arm = copy.deepcopy(ARM)
    read = []
    processor = GenARMLogitsProcessor(arm, 0.0, base_model=BASE, reference="base")
    arm.register_forward_pre_hook(lambda *args: read.append(args))
    processor.prompts = processor.reference_prompts = own_prompts(BATCH, 0)
    output, unguided = generate(BASE, [processor]), generate(BASE, [])
    assert not read
    assert all(torch.equal(x, y) for x, y in zip(output.scores, unguided.scores, strict=True))


def test_strengths_of_requests_and_schedules():
    prompts = own_prompts(BATCH, 0)
    processor = GenARMLogitsProcessor(ARM, torch.tensor([[1.0], [0.0], [-0.5]]), base_model=BASE)
    processor.prompts = prompts
    oracle = Alone([ARM], processor.alpha, BATCH, [prompts])
    assert_same(generate(BASE, [processor], num_beams=2), generate(BASE, [oracle], num_beams=2))

    processor.alpha = lambda step: 0.0 if step % 2 else 1.0
    start = BATCH["input_ids"].shape[1]

    class Scheduled(Alone):
        def __call__(self, input_ids, scores):
            is_on = (input_ids.shape[1] - start) % 2 == 0
            return super().__call__(input_ids, scores) if is_on else scores

    assert_same(generate(BASE, [processor]), generate(BASE, [Scheduled([ARM], [1.0], BATCH, [prompts])]))


def test_requests_with_one_prompt_of_the_base_and_several_of_a_reward(base, adapters):
    """What is kept about a text is kept for its request: here only the prompts of the rewards differ."""
    inputs = {name: value.repeat(3, 1) for name, value in ONE.items()}
    arm = AutoregressiveRewardModel.from_pretrained(adapters[0], base)
    processor = GenARMLogitsProcessor(arm, base_model=base, reference="base", target_kl=0.3)
    processor.keeps_statistics = True
    prompts = processor.prompts = own_prompts(inputs, 0)
    output = generate(base, [processor], inputs, min_new_tokens=10)
    table = processor.statistics(output.sequences)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3
    for index in range(3):
        kept = prompts["attention_mask"][index].bool()
        alone = GenARMLogitsProcessor(arm, base_model=base, reference="base", target_kl=0.3)
        alone.keeps_statistics = True
        alone.prompts = {name: value[index, kept][None] for name, value in prompts.items()}
        expected = generate(base, [alone], ONE, min_new_tokens=10)
        assert output.sequences[index].tolist() == expected.sequences[0].tolist()
        of_row = alone.statistics(expected.sequences)
        rows = [row for row, sequence in enumerate(table["sequence"]) if sequence == index]
        for name in ("kl", "reward_log_prob_0", "alpha_0", "log_z"):
            assert [table[name][row] for row in rows] == pytest.approx(of_row[name], abs=1e-3)


def test_statistics_are_those_of_the_oracle():
    prompts = own_prompts(ONE, 0)
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    processor.keeps_statistics, processor.prompts = True, prompts
    output = generate(BASE, [processor], ONE, output_logits=True)
    table = processor.statistics(output.sequences)
    oracle = Alone([ARM], [1.0], ONE, [prompts])
    for step, position in enumerate(table["position"]):
        (reward,) = oracle.rewards(output.sequences[0, :position], 0, 1)
        assert table["reward_log_prob_0"][step] == pytest.approx(float(reward[table["token"][step]]), abs=1e-4)
        base, guided = (x[step][0].double().log_softmax(-1) for x in (output.logits, output.scores))
        assert table["kl"][step] == pytest.approx(float(kl_divergence(guided[None], base[None])), abs=1e-4)


def test_particles(base, adapters, models):
    """One is guided sampling; of many, which change places at each step, each has the prompts of its request."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=[1.0, 0.5])
    prompts = processor.prompts = [own_prompts(BATCH, 0), own_prompts(BATCH, 1)]
    options = SAMPLING | {"max_new_tokens": 8, "custom_generate": smc_sample, "output_scores": False}
    one = generate(base, [processor], n_particles=1, **options)
    assert one.sequences.tolist() == generate(base, [processor], **SAMPLING, max_new_tokens=8).sequences.tolist()
    oracle = Alone(models, [1.0, 0.5], BATCH, prompts)

    class Compared(GenARMLogitsProcessor):
        def __call__(self, input_ids, scores):
            guided = super().__call__(input_ids, scores)
            torch.testing.assert_close(guided, oracle(input_ids, scores), atol=1e-4, rtol=0)
            return guided

    arms = [model.model for model in processor._machine.rewards.models]
    compared = Compared(arms, [1.0, 0.5], base_model=base)
    compared.prompts = prompts
    generate(base, [compared], n_particles=4, ess_threshold=1.0, **options)
    assert joint_passes(compared) == 7


def test_chats_that_are_continued_and_reuse_in_any_order(base, adapters, models):
    processor = GenARMLogitsProcessor.from_pretrained(adapters[:1], base_model=base, reference="base")
    first = own_prompts(ONE, 0)
    processor.prompts = first
    output = generate(base, [processor], ONE, max_new_tokens=5)
    # The next turn: the text so far and more tokens, with the cache of the base.
    turn = torch.cat([output.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    inputs = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
    answer = output.sequences[:, ONE["input_ids"].shape[1] :]
    longer = torch.cat([first["input_ids"], answer, torch.tensor([[7, 8, 9]])], dim=1)
    processor.prompts = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    cache = output.get(CACHE, output.get("past_key_values"))
    continued = generate(base, [processor], inputs, **{CACHE: cache})
    oracle = Alone([models[0]], [1.0], inputs, processor.prompts, tiny_llama(0))
    assert_same(continued, generate(base, [oracle], inputs))
    for inputs, seed in ((BATCH, 1), (ONE, 2), (BATCH, 3)):
        processor.prompts = own_prompts(inputs, seed)
        oracle = Alone([models[0]], [1.0], inputs, processor.prompts, tiny_llama(0))
        assert_same(generate(base, [processor], inputs), generate(base, [oracle], inputs))


def test_drafts_of_a_reward_model_with_a_prompt_of_its_own():
    """It writes them after its own prompt, and the other models read them after theirs."""
    small, prompts = tiny_llama(4, num_hidden_layers=1), own_prompts(ONE, 0)
    processor = GenARMLogitsProcessor([small, twin(BASE)], [0.6, 0.5], base_model=BASE, reference="base")
    processor.prompts, processor.reference_prompts = [prompts, own_prompts(ONE, 1)], own_prompts(ONE, 2, 5)
    expected = generate(BASE, [processor], ONE, max_new_tokens=16)
    for _ in range(2):
        output = generate(BASE, [processor], ONE, max_new_tokens=16, assistant_model=processor.assistant())
        assert_same(output, expected)
    with pytest.raises(ValueError, match=r"on the weights of the base.*drafts would gain nothing"):
        GenARMLogitsProcessor(twin(BASE), base_model=BASE).assistant()


def test_copies_and_pickles_carry_the_prompts():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE, reference="base")
    processor.prompts, processor.reference_prompts = own_prompts(BATCH, 0), own_prompts(BATCH, 1)
    expected = generate(BASE, [processor])
    other = copy.copy(processor)
    base, pickled = pickle.loads(pickle.dumps((BASE, processor)))
    assert_same(generate(base, [pickled]), expected)
    processor.prompts = processor.reference_prompts = None
    assert_same(generate(BASE, [other]), expected)
    assert processor.prompts is None
    assert other.prompts[0]["input_ids"].shape == (3, 13)


def test_a_custom_loop_without_the_base():
    prompts = own_prompts(BATCH, 0)
    processor = GenARMLogitsProcessor(ARM, attention_mask=BATCH["attention_mask"])
    processor.prompts = prompts
    oracle = Alone([ARM], [1.0], BATCH, [prompts])
    ids, generator = BATCH["input_ids"], torch.Generator().manual_seed(0)
    for _ in range(6):
        scores = torch.randn(3, BASE.config.vocab_size, generator=generator)
        guided = processor(ids, scores)
        torch.testing.assert_close(guided, oracle(ids, scores), atol=1e-4, rtol=0)
        ids = torch.cat([ids, guided.argmax(-1, keepdim=True)], dim=1)


def test_vocabularies_that_are_aligned(tokenizer):
    """The own prompt is in ids of the reward model, and the answer is translated."""
    other, order = permuted(tokenizer)
    base, arm = tiny_llama(0, vocab_size=len(tokenizer)), tiny_llama(1, vocab_size=len(tokenizer))
    processor = GenARMLogitsProcessor(
        renumbered(arm, order, len(tokenizer)), base_model=base, tokenizer=tokenizer, reward_tokenizer=other
    )
    texts = ["The train was late", "It is"]
    processor.prompts = other(texts, return_tensors="pt", padding=True, padding_side="left")
    oracle = Alone([arm], [1.0], BATCH, [tokenizer(texts, return_tensors="pt", padding=True)])
    inputs = oracle.inputs = left_padded([4, 8])
    assert_same(generate(base, [processor], inputs), generate(base, [oracle], inputs))


# --- wrong input ---

IDS = torch.tensor([[5, 6, 7]])
WRONG = {
    "a string": ("be kind", TypeError, "`prompts` is 'be kind', but must be a dict with `input_ids`"),
    "no mask": ({"input_ids": IDS}, TypeError, "but must be a dict with `input_ids` and `attention_mask`"),
    "floats": ({"input_ids": IDS.float(), "attention_mask": IDS}, TypeError, "is of torch.float32"),
    "shapes": ({"input_ids": IDS, "attention_mask": IDS[:, 1:]}, ValueError, r"\(1, 3\).*\(1, 2\)"),
    "one dimension": ({"input_ids": IDS[0], "attention_mask": IDS[0]}, ValueError, r"shape \(3,\)"),
    "lists of several lengths": ({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]}, TypeError, "input_ids"),
    "no 0 and 1": ({"input_ids": IDS, "attention_mask": IDS}, ValueError, "other values than 0 and 1"),
    "padding alone": ({"input_ids": IDS, "attention_mask": IDS * 0}, ValueError, "Row 0 of `prompts` is padding alone"),
    "right": ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0]])}, ValueError, "padded on the right"),
    "number": ([None, None, None], ValueError, "3 entries, but there are 2 reward models"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_prompts_are_refused(name):
    value, error, message = WRONG[name]
    processor = GenARMLogitsProcessor([ARM, ARM])
    with pytest.raises(error, match=message):
        processor.prompts = value
    assert processor.prompts is None
    with pytest.raises(ValueError, match="has no reference"):
        processor.reference_prompts = BATCH


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}])
def test_other_numbers_of_rows_are_refused(options):
    processor = GenARMLogitsProcessor(ARM, base_model=BASE, reference="base")
    for lengths in ([3, 4], [3] * 6, [3]):
        processor.prompts, processor.reference_prompts = left_padded(lengths), None
        with pytest.raises(ValueError, match=rf"prompts\[0\]` has {len(lengths)} rows.*was given 3 prompts"):
            generate(BASE, [processor], **options)
        processor.prompts, processor.reference_prompts = None, left_padded(lengths)
        with pytest.raises(ValueError, match=f"reference_prompts` has {len(lengths)} rows.*was given 3 prompts"):
            generate(BASE, [processor], **options)


def test_what_a_tokenizer_returns_can_be_set():
    processor = GenARMLogitsProcessor(ARM)
    lists = {"input_ids": [[0, 0, 5], [0, 6, 7]], "attention_mask": [[0, 0, 1], [0, 1, 1]]}
    for prompts in (BatchEncoding(lists), BatchEncoding(lists, tensor_type="pt"), [lists]):
        processor.prompts = prompts
        assert processor.prompts[0]["input_ids"].tolist() == [[0, 5], [6, 7]]  # without a column of padding alone
    assert EOS not in processor.prompts[0]["input_ids"]
