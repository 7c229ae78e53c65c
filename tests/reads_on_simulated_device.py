"""
What guidance costs the host in each token, counted on the simulated device; run by `test_placement.py`.

A read of the host makes it wait for the device, which then has nothing to do until the next kernels are launched.
"""

import pytest
import torch
from helpers import batch, joint_passes
from peft import LoraConfig, get_peft_model
from simulated import DEVICE, SimulatedDevice, counting, put
from tiny import left_padded, random_prompts, tiny_llama, tiny_tokenizer

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.hub.causality import take_as_causal
from hf_genarm.hub.sharing import frozen_twin
from hf_genarm.training.prefix_sharing import PairBatch, PairLogProbs

TOKENIZER = tiny_tokenizer()
SIZE = {"vocab_size": len(TOKENIZER), "eos_token_id": None}
N_COUNTED = 4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def a_base(dtype=torch.float32, **config):
    return tiny_llama(0, **SIZE | config).to(dtype)


def an_adapter(base, seed=1, targets=("q_proj", "v_proj")):
    """A LoRA in float32 on the weights of a base, as PEFT loads it whatever the base is in."""
    torch.manual_seed(seed)
    network, originals = frozen_twin(base)
    config = LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
    model = get_peft_model(network, config).eval()
    for module in model.modules():
        own = {name: x for name, x in module._parameters.items() if x is not None}
        module._parameters.update({name: originals.get(x, x) for name, x in own.items()})
    return model


def a_separate(seed=5):
    return tiny_llama(seed, num_hidden_layers=1, **SIZE)


def spent(base, processor, n_tokens, batch_size=1, is_padded=False, is_on_device=True, **options):
    """The counts of one call, and what it returned."""
    batch = {"input_ids": random_prompts(batch_size, 12)}
    if is_padded:
        batch = left_padded([12 - 3 * row for row in range(batch_size)])
    inputs = {name: x.to(DEVICE if is_on_device else "cpu") for name, x in batch.items()}
    options = {"do_sample": False, "max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "pad_token_id": 0} | options
    processors = [] if processor is None else [processor]
    with torch.no_grad(), counting() as counts:
        output = base.generate(**inputs, logits_processor=processors, **options)
    return counts, output


def per_token(base, make, **options):
    """Reads and launches of the last tokens, once the first four are written."""
    (few, _), (many, _) = (spent(base, make(), 4 + n, **options) for n in (0, N_COUNTED))
    return many - few


STATIC = {"cache_implementation": "static"}

CASES = {
    "fused": ({}, {}),
    "fused, batch": ({}, {"batch_size": 4}),
    "fused, left-padded": ({}, {"batch_size": 4, "is_padded": True}),
    "fused, two rewards": ({"n_arms": 2}, {}),
    "fused, strengths per request": ({"alpha": torch.rand(4, 1) + 0.1}, {"batch_size": 4}),
    "fused, target_kl": ({"target_kl": 0.1}, {}),
    "fused, target_kl, batch": ({"target_kl": 0.1}, {"batch_size": 4}),
    "fused, reference": ({"reference": "base"}, {}),
    "fused, beams": ({}, {"num_beams": 3}),
    "fused, statistics": ({"keeps_statistics": True}, {"batch_size": 4}),
    "fused, sampled": ({}, {"do_sample": True}),
    "separate": ({"engine": "separate"}, {}),
    "separate, batch": ({"engine": "separate"}, {"batch_size": 4}),
    "separate, left-padded": ({"engine": "separate"}, {"batch_size": 4, "is_padded": True}),
    "separate, beams": ({"engine": "separate"}, {"num_beams": 3}),
    "separate, without base_model": ({"engine": "separate", "base_model": None}, {}),
    "separate, without base_model, batch": ({"engine": "separate", "base_model": None}, {"batch_size": 4}),
    "separate, aligned vocabularies": ({"engine": "separate", "reward_tokenizer": TOKENIZER}, {}),
    "separate, mask on the host": (
        {"engine": "separate", "attention_mask": torch.ones(4, 12, dtype=torch.long)},
        {"batch_size": 4},
    ),
    "separate, two rewards": ({"engine": "separate", "n_arms": 2}, {}),
    "shared": ({"engine": "shared"}, {}),
    "own prompts": ({"engine": "separate", "prompts": 7}, {"batch_size": 2}),
    "fused, own prompts": ({"prompts": 7}, {"batch_size": 2}),
    "fused, static cache": ({}, {"batch_size": 2} | STATIC),
    "fused, static cache, two rewards": ({"n_arms": 2}, STATIC),
    "fused, static cache, left-padded": ({}, {"batch_size": 4, "is_padded": True} | STATIC),
    "a sentence": ({"engine": "sentence", "prompts": 7, "reference": "base"}, {"batch_size": 2}),
}


# What is not 0: a beam that moves is found by its text; a text of a custom loop too, whose errors are raised at once;
# transformers reads a mask with padding.
READS = {
    name: 1 for name in CASES if "beams" in name or "padded" in name or "own prompts" in name or "sentence" in name
}
READS |= {name: 2 for name in CASES if "without base_model" in name}


def prepared(
    engine="fused",
    n_arms=1,
    alpha=1.0,
    base_model="base",
    keeps_statistics=False,
    prompts=None,
    is_on_device=True,
    **options,
):
    """A base and what makes a processor for it."""
    base = a_base()
    if engine == "separate":
        arms = [a_separate(5 + index) for index in range(n_arms)]
    elif engine == "sentence":
        arms = []
    else:
        arms = [an_adapter(base, 1 + index) for index in range(n_arms)]
    if is_on_device:
        put(base, *arms)
    if engine == "shared":
        base.register_forward_hook(lambda *_: None)
    if "reward_tokenizer" in options:
        options["tokenizer"] = TOKENIZER

    def make():
        models = (
            [AutoregressiveRewardModel.from_sentence("Be kind.", base, TOKENIZER)] if engine == "sentence" else arms
        )
        own = {"base_model": base} if base_model else {}
        own |= {"tokenizer": TOKENIZER} if engine == "sentence" else {}
        processor = GenARMLogitsProcessor(models, alpha, **own, **options)
        processor.keeps_statistics = keeps_statistics
        if prompts is not None:
            ids = random_prompts(2, prompts, seed=3)
            processor.prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return processor

    return base, make


def described(counts, n_tokens=N_COUNTED):
    return "\n".join(f"{n / n_tokens:g} per token: {place}" for place, n in counts.ours().items() if n)


@pytest.fixture(autouse=True)
def device():
    with SimulatedDevice():
        yield


@pytest.mark.parametrize("name", CASES)
def test_reads_for_each_token(name):
    settings, options = CASES[name]
    base, make = prepared(**settings)
    counts = per_token(base, make, **options)
    assert sum(counts.ours().values()) <= N_COUNTED * READS.get(name, 0), described(counts)
    unguided = per_token(base, lambda: None, **options)
    n_of_generate = sum(counts.reads.values()) - sum(counts.ours().values())
    assert n_of_generate <= sum(unguided.reads.values())


@pytest.mark.parametrize(
    "name",
    ["fused", "separate", "fused, strengths per request", "fused, static cache", "separate, aligned vocabularies"],
)
def test_the_text_is_that_of_the_cpu(name):
    settings, options = CASES[name]
    base, make = prepared(**settings)
    processor = make()
    _, output = spent(base, processor, 12, do_sample=False, **options)
    assert joint_passes(processor) == ("fused" in name) * 11
    _, unguided = spent(base, None, 12, do_sample=False, **options)
    assert output.tolist() != unguided.tolist()
    base, make = prepared(**settings, is_on_device=False)
    _, expected = spent(base, make(), 12, is_on_device=False, do_sample=False, **options)
    assert output.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["fused", "fused, reference", "fused, own prompts", "fused, static cache", "separate"])
def test_ids_on_the_cpu(name):
    """`generate` moves them to the base at each pass; processors are then called with scores on the CPU."""
    settings, _ = CASES[name]
    base, make = prepared(**settings)
    prompts = random_prompts(2, 12)
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    options |= STATIC if "static" in name else {}
    processor = make()
    texts = [base.generate(ids, logits_processor=[processor], **options) for ids in (prompts, prompts.to(DEVICE))]
    assert str(texts[0].device) == "cpu"
    assert texts[0].tolist() == texts[1].tolist() != base.generate(prompts, **options).tolist()


@pytest.mark.parametrize("n_drafts", [2, 6])
def test_reads_for_each_cycle_of_drafts(n_drafts):
    """Their number doesn't depend on that of the drafts."""
    base, make = prepared(engine="separate")
    processor = make()
    assistant, cycles = processor.assistant(n_drafts), []
    generate = assistant.generate
    assistant.generate = lambda *args, **kwargs: cycles.append(None) or generate(*args, **kwargs)
    options = {"do_sample": False, "max_new_tokens": 18, "pad_token_id": 0, "eos_token_id": 2}
    with counting() as counts:
        prompt = random_prompts(1, 12).to(DEVICE)
        base.generate(prompt, logits_processor=[processor], assistant_model=assistant, **options)
    assert len(cycles) >= 2
    assert sum(counts.ours().values()) <= 3 * len(cycles) + 4, described(counts, len(cycles))


@pytest.mark.parametrize("at", [12, 14, 17])
@pytest.mark.parametrize("do_sample", [False, True])
def test_nan_is_named_before_a_wrong_text_is_returned(at, do_sample):
    """Also if it comes with the last token."""
    base, make = prepared(engine="separate")
    processor = make()
    (reward,) = processor._machine.rewards.models
    call, lengths = reward.model.forward, []

    def forward(*args, **kwargs):
        output = call(*args, **kwargs)
        lengths.append(int(kwargs["position_ids"].max()) + 1)
        if lengths[-1] >= at:
            output.logits = output.logits * float("nan")
        return output

    reward.model.forward = forward
    with pytest.raises(ValueError, match=r"Reward model 0 .* returned NaN"):
        spent(base, processor, 6, do_sample=do_sample)
    assert lengths[-1] <= at + 1
    reward.model.forward = call
    spent(base, processor, 6, do_sample=do_sample)


def test_a_row_without_tokens_is_named():
    base, make = prepared(engine="separate")
    reward = make()._machine.rewards.models[0].model
    reward.lm_head.weight.copy_(reward.lm_head.weight)
    processor = make()
    processor.alpha = -1.0
    call = reward.forward

    def forward(*args, **kwargs):
        output = call(*args, **kwargs)
        output.logits[..., 5] = -torch.inf
        return output

    reward.forward = forward
    with pytest.raises(ValueError, match="In row 0, guidance leaves no token"):
        spent(base, processor, 1)


def launches(n_layers, make_arms):
    """Those of a token, in bfloat16, unguided or with adapters as PEFT loads them."""
    base = a_base(torch.bfloat16, num_hidden_layers=n_layers)
    arms = make_arms(base)
    put(base, *arms)
    for arm in arms:
        take_as_causal(arm.get_base_model())  # the simulated device has no autocast, which the test of that uses
    counts = per_token(base, lambda: GenARMLogitsProcessor(arms, base_model=base) if arms else None)
    return counts.launches / N_COUNTED


def in_layer_and_around(make_arms):
    """The launches of each layer in a token, and those around the layers."""
    of_two, of_three = (launches(n_layers, make_arms) for n_layers in (2, 3))
    return of_three - of_two, 3 * of_two - 2 * of_three


def test_launches():
    unguided, around = in_layer_and_around(lambda base: [])
    few, more_around = in_layer_and_around(lambda base: [an_adapter(base)])
    assert {x.dtype for x in an_adapter(a_base(torch.bfloat16)).parameters()} == {torch.bfloat16, torch.float32}
    many, _ = in_layer_and_around(lambda base: [an_adapter(base, targets=ALL)])
    several, _ = in_layer_and_around(lambda base: [an_adapter(base, seed, ALL) for seed in (1, 2, 3)])
    assert unguided < few <= 1.15 * unguided
    assert many <= 1.4 * unguided
    assert several == many
    assert more_around - around <= 20


def test_launches_of_a_set_divergence():
    totals = [per_token(*prepared(**settings)).launches / N_COUNTED for settings in ({}, {"target_kl": 0.1})]
    assert 0 < totals[1] - totals[0] <= 110, totals


def test_reads_of_a_training_step():
    """One, of the batch: sizes and places are computed on the host. The gradient is that of the CPU."""
    gradients = []
    for is_on_device in (False, True):
        base = a_base(attn_implementation="eager")  # the simulated `sdpa` has no gradient
        model = an_adapter(base).train()
        trained = [name for name, x in model.named_parameters() if "lora_" in name]
        pairs = batch([(20, 9, 4), (13, 3, 6)])
        if is_on_device:
            put(base, model)
            pairs = PairBatch(pairs.input_ids.to(DEVICE), pairs.attention_mask.to(DEVICE))
        parameters = [model.get_parameter(name).requires_grad_() for name in trained]
        method = PairLogProbs(model)
        method(model, pairs, pairs.is_own)
        assert method._may_share
        with counting() as counts:
            loss = method(model, pairs, pairs.is_own).sum()
            found = torch.autograd.grad(loss, parameters)
        gradients.append([x.cpu() for x in found])
    assert sum(counts.reads.values()) == 1, counts.reads
    for own, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
