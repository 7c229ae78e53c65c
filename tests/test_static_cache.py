"""A static cache of the base, which `generate` compiles for: adapters are rows of it, and no pass is compiled again."""

import copy
import dataclasses

import pytest
import torch
from helpers import (
    assert_same,
    generate,
    guided_until,
    joint_passes,
    needs_compile,
    raises,
    saved_with_adapter,
    separate,
)
from oracle import Alone, Recompute
from peft import LoraConfig, get_peft_model
from support import ARCHITECTURES, BATCH, ONE, SAMPLING
from tiny import left_padded, own_prompts, save_adapter, tiny_llama
from transformers import CompileConfig, LogitsProcessor, StaticCache
from transformers.cache_utils import StaticLayer

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.hub.kv_cache import CACHE
from hf_genarm.hub.sharing import twin

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

STATIC = {"cache_implementation": "static", "max_new_tokens": 6, "min_new_tokens": 6}
N_JOINT = 5  # passes after the prompt
DRAFTS = {"prompt_lookup_num_tokens": 3, "max_cache_len": 32}
WAYS = {
    "greedy": ({}, BATCH),
    "sampling": (SAMPLING | {"num_return_sequences": 2}, BATCH),
    "one text": ({}, ONE),
    "beams": ({"num_beams": 3, "num_return_sequences": 2}, left_padded([3, 11], 1)),
    "beam sampling": (SAMPLING | {"num_beams": 2}, BATCH),
    "a prompt in parts": ({"prefill_chunk_size": 2}, BATCH),
}
if hasattr(StaticLayer, "crop"):  # else `generate` refuses drafts
    WAYS["drafts"] = (DRAFTS, ONE)


@pytest.fixture
def processor(base, adapters):
    return GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=[1.0, 0.5])


def test_one_processor_in_all_ways(base, processor, models):
    """Exact and joint, in any order; at strength 0 bit for bit unguided, and then exact again."""
    for name, (options, inputs) in [*WAYS.items(), *list(WAYS.items())[::3]]:
        joint, options = joint_passes(processor), options | STATIC
        output = generate(base, [processor], inputs, **options)
        oracle = Recompute(models, processor.alpha, inputs["attention_mask"])
        assert_same(output, generate(base, [oracle], inputs, **options))
        assert joint_passes(processor) - joint == N_JOINT or name == "drafts"
        assert joint_passes(processor) > joint
        assert processor.engine == "fused"
    processor.alpha = 0.0
    for options, inputs in (WAYS["sampling"], WAYS["beams"]):
        output, unguided = (generate(base, x, inputs, **options | STATIC) for x in ([processor], []))
        assert torch.equal(torch.stack(output.scores), torch.stack(unguided.scores))


def test_passes_of_the_base_alone_in_between(tmp_path):
    """It reads on in the same memory, its windows, shorter than the text, have followed, rewards keep their rows."""
    (family,) = (x for x in ARCHITECTURES if x.name == "Gemma 3")
    base, adapter = saved_with_adapter(family, tmp_path)
    other = save_adapter(tmp_path / "base", tmp_path / "other", 1)
    models = [separate(tmp_path / "base", x) for x in (adapter, other)]
    processor = GenARMLogitsProcessor.from_pretrained([adapter, other], base_model=base)
    plan = [[1, 1], [1, 1], [0, 0], [1, 0], [1, 0], [0, 1], [0, 0], [1, 1], [1, 1]]
    start = BATCH["input_ids"].shape[1]

    class Change(LogitsProcessor):
        def __call__(self, input_ids, scores):
            processor.alpha = oracle.alphas = [float(x) for x in plan[input_ids.shape[1] - start]]
            return scores

    oracle = Recompute(models, [1.0, 1.0], BATCH["attention_mask"])
    options = STATIC | {"max_new_tokens": len(plan), "min_new_tokens": len(plan)}
    output = generate(base, [Change(), processor], **options)
    assert 3 <= joint_passes(processor) < len(plan) - 1
    assert_same(output, generate(base, [Change(), oracle], **options))


@pytest.mark.parametrize("window", [4, 64])
def test_windows_in_all_layers(tmp_path, caplog, window):
    """A cache of windows that texts outgrow doesn't show how long these may become: they are read separately."""
    caplog.set_level("INFO", "hf_genarm")
    (family,) = (x for x in ARCHITECTURES if x.name == "Mistral")
    family = dataclasses.replace(family, sizes=family.sizes | {"sliding_window": window})
    base, adapter = saved_with_adapter(family, tmp_path)
    processor = GenARMLogitsProcessor.from_pretrained(adapter, base_model=base)
    output = generate(base, [processor], **STATIC)
    is_outgrown = window == 4
    assert joint_passes(processor) == (0 if is_outgrown else N_JOINT)
    assert processor.engine == ("shared" if is_outgrown else "fused")
    assert sum("run separately, because no layer of" in x.message for x in caplog.records) == is_outgrown
    oracle = Recompute([separate(tmp_path / "base", adapter)], [1.0], BATCH["attention_mask"])
    assert_same(output, generate(base, [oracle], **STATIC))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_prompts_much_longer_than_those_of_the_base(base, adapters, models, options):
    """The joint cache then has more columns."""
    arm = AutoregressiveRewardModel.from_pretrained(adapters[0], base).model
    processor = GenARMLogitsProcessor([arm, twin(base)], [1.0, 0.6], base_model=base)
    processor.prompts = [own_prompts(BATCH, 0, 90), own_prompts(BATCH, 1, 5)]
    output = generate(base, [processor], **STATIC, **options)
    assert joint_passes(processor) == N_JOINT
    oracle = Alone([models[0], tiny_llama(0)], [1.0, 0.6], BATCH, processor.prompts)
    assert_same(output, generate(base, [oracle], **STATIC, **options))


# --- the base never notices ---


def test_a_cache_that_is_given_and_returned(base, processor):
    """It has joint rows meanwhile, and its own afterwards; nothing else is kept."""
    cache, sizes = StaticCache(config=base.config, max_cache_len=24), []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            keys = cache.layers[0].keys
            owns = [x._state.cache.layers[0].keys for x in processor._machine.rewards.models]
            storages = {x.untyped_storage().data_ptr() for x in (keys, *owns)}
            sizes.append((len(storages), keys.untyped_storage().nbytes() // (keys.numel() * keys.element_size())))
            return scores

    output = generate(base, [processor, Look()], **{CACHE: cache})
    assert sizes[1:] == [(1, 3)] * 9
    assert all(x.keys.is_contiguous() and not x.keys._is_view() for x in cache.layers)
    assert all(x.keys.untyped_storage().nbytes() == x.keys.numel() * 4 for x in cache.layers)
    assert not processor._machine.watch.fusion._local.static_caches
    plain, text = StaticCache(config=base.config, max_cache_len=24), output.sequences[:, :-1]
    mask = torch.cat([BATCH["attention_mask"], torch.ones(3, 9, dtype=torch.long)], dim=1)
    with torch.no_grad():
        base(input_ids=text, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0), **{CACHE: plain})
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert int(ours.cumulative_length) == int(theirs.cumulative_length) == text.shape[1]
        is_text = mask.bool()[:, None, :, None]
        length = text.shape[1]
        difference = (ours.keys - theirs.keys)[:, :, :length] * is_text
        assert difference.abs().max() < 1e-4
        assert not ours.keys[:, :, length:].any()


def test_an_error_inside_a_joint_pass(base, processor, models, monkeypatch):
    cache, fail = StaticCache(config=base.config, max_cache_len=24), raises(RuntimeError)

    def action():
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)

    with pytest.raises(RuntimeError):
        guided_until(base, processor, action, **{CACHE: cache})
    monkeypatch.undo()
    with torch.no_grad():  # the cache goes on as it was before that pass
        assert int(cache.get_seq_length()) == BATCH["input_ids"].shape[1] + 4
        new, other = torch.full((3, 1), 5), copy.deepcopy(cache)
        ours = base(input_ids=new, **{CACHE: cache}).logits
        assert torch.equal(ours, tiny_llama(0)(input_ids=new, **{CACHE: other}).logits)
    oracle = Recompute(models, processor.alpha, BATCH["attention_mask"])
    assert_same(generate(base, [processor], **STATIC), generate(base, [oracle], **STATIC))


# --- compiled ---


class Graphs:
    """A backend that runs what it is given, and counts graphs and their calls."""

    def __init__(self):
        self.n_graphs = self.n_calls = 0
        self.config = CompileConfig(backend=self.compile)
        self.config._compile_all_devices = True  # `generate` compiles on GPUs, unless it is asked to
        self.config.mode = None
        self.options = STATIC | {"compile_config": self.config}

    def __deepcopy__(self, memo):
        return self  # a config is copied with its backend

    def compile(self, graph, example_inputs):
        self.n_graphs += 1

        def run(*args):
            self.n_calls += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def small():
    """A base of one layer, and two processors with adapters of the same form."""
    base = tiny_llama(0, num_hidden_layers=1)
    processors = []
    for seeds in ((1, 2), (3, 4)):
        arms = [
            adapter_on(base, seed, targets) for seed, targets in zip(seeds, ("all-linear", ["q_proj"]), strict=True)
        ]
        processors.append(GenARMLogitsProcessor(arms, [1.0, 0.5], base_model=base))
    return base, processors


def adapter_on(base, seed, targets):
    """An adapter on the very weights of a base."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return get_peft_model(twin(base), config).eval()


def assert_exact(base, processor, inputs, *others, **options):
    """Guided and compiled, it is the oracle, which isn't compiled; `others` are models with strengths."""
    models = [x.model for x in processor._machine.rewards.models] + [model for model, _ in others]
    oracle = Recompute(models, [*processor.alpha, *(x for _, x in others)], inputs["attention_mask"])
    output = generate(base, [processor], inputs, **options)
    assert_same(output, generate(base, [oracle], inputs, **options | {"disable_compile": True}))


@needs_compile
def test_one_graph_for_all_prompts(small):
    """Other prompts, strengths, runs, processors and adapters of the same form are the same joint step."""
    torch.compiler.reset()
    (base, processors), graphs = small, Graphs()
    texts = [generate(base, [x], **graphs.options, max_cache_len=32).sequences.tolist() for x in processors]
    assert texts[0] != texts[1]
    for processor in processors:
        for inputs, alpha, options in (
            (BATCH, [1.0, 0.5], {}),
            (left_padded([3, 11, 5], 3), [0.3, -0.5], {}),
            (left_padded([7, 7, 7], 4), [1.0, 1.0], SAMPLING),
        ):
            processor.alpha, joint, calls = alpha, joint_passes(processor), graphs.n_calls
            assert_exact(base, processor, inputs, **graphs.options | {"max_cache_len": 32} | options)
            assert joint_passes(processor) - joint == graphs.n_calls - calls == N_JOINT
    assert graphs.n_graphs == 1
    assert processor.engine == "fused"


@needs_compile
@pytest.mark.slow
def test_other_numbers_of_rows_and_columns(small):
    """They are sizes of one graph, apart from those that compilers take for constants: the first, and 1."""
    torch.compiler.reset()
    (base, (processor, _)), graphs, counts = small, Graphs(), []
    for lengths, n_columns in (([4, 5], 32), ([4, 5, 6], 32), ([4] * 5, 32), ([4, 7], 40), ([9, 3, 7], 48)):
        assert_exact(base, processor, left_padded(lengths, 2), **graphs.options, max_cache_len=n_columns)
        counts.append(graphs.n_graphs)
    assert counts[1] == counts[2] <= 2
    assert counts[3] == counts[4] <= 3


@needs_compile
@pytest.mark.slow
def test_compiled_next_to_a_reference_and_unguided(small):
    """The reference is what the joint pass returns; at strength 0, the compiled base is that of unguided calls."""
    torch.compiler.reset()
    (base, (processor, _)), graphs = small, Graphs()
    arms = [x.model for x in processor._machine.rewards.models]
    processor = GenARMLogitsProcessor(arms, [1.0, 0.5], base_model=base, reference="base")
    assert_exact(base, processor, BATCH, (tiny_llama(0, num_hidden_layers=1), -1.5), **graphs.options)
    assert joint_passes(processor) == graphs.n_calls == N_JOINT
    processor.alpha = 0.0
    output, unguided = (generate(base, x, **graphs.options) for x in ([processor], []))
    assert torch.equal(torch.stack(output.scores), torch.stack(unguided.scores))
    assert graphs.n_graphs == 2
    assert graphs.n_calls == 3 * N_JOINT
