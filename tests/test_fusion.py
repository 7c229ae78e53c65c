"""One forward pass for base and reward adapters: the results are the same, and the base never notices."""

import copy
import gc
import pickle
import re
import threading

import pytest
import torch
from helpers import (
    At,
    assert_same,
    assert_same_distributions,
    generate,
    guided_until,
    joint_passes,
    needs_compile,
    raises,
    saved_with_adapter,
    separate,
    ways_to_read,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Recompute
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from support import ARCHITECTURES, BATCH, EXACT, MODES, ONE
from tiny import PAD, left_padded, random_prompts, save_adapter, tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor, StoppingCriteriaList
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.decoding.fusion import joint_network, joint_pass
from hf_genarm.hub.kv_cache import CACHE
from hf_genarm.hub.sharing import follow, twin

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

# Modes in which the base has no cache to be joined.
APART = {"`use_cache=False`"}


def is_untouched(base, before):
    """No replaced forward, no hook, the same modules, the same weights."""
    assert "forward" not in vars(base)
    assert not any(vars(module).get("forward") or module._forward_hooks for module in base.modules())
    assert [type(module) for module in base.modules()] == [type(module) for module in before.modules()]
    assert all(torch.equal(x, y) for x, y in zip(base.parameters(), before.parameters(), strict=True))
    ids = random_prompts(3, 7)
    return torch.equal(base(input_ids=ids).logits, before(input_ids=ids).logits)


# --- the same results ---


@pytest.mark.parametrize("mode", [m for m in MODES if m.expected == EXACT and not m.elsewhere], ids=lambda m: m.name)
def test_joint_passes_equal_recomputation(mode, base, adapters, models):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=[1.0, 0.5])
    assert processor.engine == "fused"
    assistant = {"assistant_model": base} if "the base itself" in mode.name else {}
    output = generate(base, [processor], mode.inputs, **mode.kwargs() | assistant)
    if not mode.name.startswith("assisted"):  # where an assistant may have been first
        assert (joint_passes(processor) > 0) == (mode.name not in APART)
    oracle = Recompute(models, [1.0, 0.5], mode.inputs["attention_mask"])
    expected = generate(base, [oracle], mode.inputs, **mode.kwargs() | assistant)
    unguided = generate(base, [], mode.inputs, **mode.kwargs() | assistant)
    assert output.sequences.tolist() != unguided.sequences.tolist()
    assert_same(output, expected)
    assert is_untouched(base, tiny_llama(0))


def test_the_engine_is_what_was_done(base, adapters, caplog):
    """Without a cache of the base it is `shared`, which is logged once; later calls can be joined again."""
    caplog.set_level("INFO", "hf_genarm")
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    for options, engine in (({}, "fused"), ({"use_cache": False}, "shared"), ({}, "fused")):
        caplog.clear()
        generate(base, [processor], min_new_tokens=4, max_new_tokens=4, **options)
        assert processor.engine == engine
        lines = [x.message for x in caplog.records if "run separately, because" in x.message]
        assert [("keeps no cache" in line) for line in lines] == [True] * (engine == "shared")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_every_step_after_the_prompt_is_joint(base, adapters, options):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    generate(base, [processor], min_new_tokens=10, **options)
    assert joint_passes(processor) == 9


@pytest.mark.parametrize("is_slow", [True, False])
def test_joint_passes_equal_recomputation_in_both_orders_of_factors(base, adapters, models, is_slow, monkeypatch):
    for module in (joint_network, joint_pass):
        monkeypatch.setattr(module, "slow_for_few_rows", lambda device: is_slow)
    calls, product = [], joint_network._linear
    monkeypatch.setattr(joint_network, "_linear", lambda *args: calls.append(None) or product(*args))
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=[1.0, 0.5])
    output = generate(base, [processor], BATCH)
    assert joint_passes(processor)
    assert bool(calls) == is_slow
    assert_same(output, generate(base, [Recompute(models, [1.0, 0.5], BATCH["attention_mask"])], BATCH))


def test_strengths_that_change_while_it_runs(base, adapters, models):
    """A reward that is switched off is not run; switched on again, it has to catch up."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    plan = [[1.0, 0.0], [1.0, 0.0], [0.5, 1.0], [0.0, 0.0], [0.0, -0.5], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]

    class Change(LogitsProcessor):
        def __call__(self, input_ids, scores):
            alpha = plan[input_ids.shape[1] - BATCH["input_ids"].shape[1]]
            processor.alpha = oracle.alphas = alpha
            return scores

    oracle = Recompute(models, [1.0, 1.0], BATCH["attention_mask"])
    options = {"max_new_tokens": len(plan), "min_new_tokens": len(plan)}
    output = generate(base, [Change(), processor], **options)
    assert 0 < joint_passes(processor) < len(plan) - 1
    assert_same(output, generate(base, [Change(), oracle], **options))


@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)
def test_architectures(family, tmp_path):
    base, adapter = saved_with_adapter(family, tmp_path)
    model = separate(tmp_path / "base", adapter)
    fused = 0
    for options, inputs in ways_to_read(base):
        mask = inputs["attention_mask"]
        processor = GenARMLogitsProcessor.from_pretrained(adapter, base_model=base, attention_mask=mask)
        output = generate(base, [processor], inputs, max_new_tokens=12, **options)
        assert_same(output, generate(base, [Recompute([model], [1.0], mask)], inputs, max_new_tokens=12, **options))
        assert processor.engine == ("fused" if family.fused else "shared")
        fused += joint_passes(processor)
    assert (fused > 0) == family.fused


LORA = {
    "rank pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha pattern": {"alpha_pattern": {"q_proj": 32}},
    "rsLoRA": {"use_rslora": True},
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "some layers": {"layers_to_transform": [1]},
    "Gaussian init": {"init_lora_weights": "gaussian"},
}
OTHER_LORA = {
    "DoRA": ({"use_dora": True}, "shared"),
    "biases of the adapter": ({"lora_bias": True}, "shared"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "shared"),
    "tokens": ({"trainable_token_indices": [5, 6]}, "shared"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "shared"),
    "an init that changes the base": ({"init_lora_weights": "pissa"}, "separate"),
}


# PEFT warns of biases that can't be merged, and of embeddings that it saves.
@pytest.mark.filterwarnings(
    "ignore::peft.utils.warning.PeftWarning", "ignore:Setting `save_embedding_layers`:UserWarning"
)
@pytest.mark.parametrize("name", [*LORA, *OTHER_LORA])
def test_kinds_of_lora(name, folder, base, tmp_path):
    config, engine = (LORA[name], "fused") if name in LORA else OTHER_LORA[name]
    adapter = save_adapter(folder / "base", tmp_path / "arm", **config)
    processor = GenARMLogitsProcessor.from_pretrained(adapter, base_model=base)
    assert processor.engine == engine
    oracle = Recompute([separate(folder / "base", adapter)], [1.0], BATCH["attention_mask"])
    output = generate(base, [processor])
    assert output.sequences.tolist() != generate(base, []).sequences.tolist()
    assert_same(output, generate(base, [oracle]))
    assert is_untouched(base, tiny_llama(0))


def test_trained_biases(tmp_path):
    tiny_llama(0, attention_bias=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = copy.deepcopy(base)
    adapter = save_adapter(tmp_path / "base", tmp_path / "arm", bias="all")
    processor = GenARMLogitsProcessor.from_pretrained(adapter, base_model=base)
    assert processor.engine == "separate"
    oracle = Recompute([separate(tmp_path / "base", adapter)], [1.0], BATCH["attention_mask"])
    assert_same(generate(base, [processor]), generate(base, [oracle]))
    assert is_untouched(base, before)


def test_engines_mix(base, folder, adapters, models, tmp_path):
    dora = save_adapter(folder / "base", tmp_path / "dora", use_dora=True)
    shared = [AutoregressiveRewardModel.from_pretrained(name, base) for name in (adapters[0], dora)]
    processor = GenARMLogitsProcessor([*shared, tiny_llama(7)], base_model=base)
    assert processor.engine == "fused, shared, separate"
    oracle = Recompute([models[0], separate(folder / "base", dora), tiny_llama(7)], [1.0] * 3, BATCH["attention_mask"])
    assert_same(generate(base, [processor]), generate(base, [oracle]))
    assert joint_passes(processor) > 0


def test_one_log_line_names_the_engine_and_the_reason(base, folder, adapters, tmp_path, caplog):
    caplog.set_level("INFO", "hf_genarm")
    dora = save_adapter(folder / "base", tmp_path / "dora", use_dora=True)
    for name, words in (
        (adapters[0], "engine `fused`"),
        (dora, "engine `shared`, because `Dora.* is not plain LoRA"),
        (adapters[1], "engine `separate`.*`another`"),
    ):
        if "another" in words:
            base.name_or_path = "another"
        caplog.clear()
        GenARMLogitsProcessor.from_pretrained(name, base_model=base)
        (message,) = [record.message for record in caplog.records if "engine" in record.message]
        assert message.startswith(name)
        assert re.search(words, message)


class Int8Linear(torch.nn.Module):
    """A linear layer whose weights are buffers of whole numbers, as those of GPTQ and AWQ are."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.qweight * self.scale)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_layers_of_peft_for_quantised_weights():
    base, kinds = tiny_llama(0), {"gate_proj": AqlmLoraLinear, "up_proj": AwqLoraLinear, "down_proj": GPTQLoraLinear}
    for layer in base.model.layers:
        for name in kinds:
            setattr(layer.mlp, name, Int8Linear(getattr(layer.mlp, name)).eval())
    arm = twin(base)
    torch.manual_seed(0)
    options = {"config": LoraConfig(r=4, init_lora_weights=False), "r": 4, "init_lora_weights": False}
    for layer in arm.model.layers:
        for name, kind in kinds.items():
            setattr(layer.mlp, name, kind(getattr(layer.mlp, name), "default", **options).eval())
    processor = GenARMLogitsProcessor(arm, base_model=base)
    output = generate(base, [processor], BATCH)
    assert joint_passes(processor) == 9
    assert_same(output, generate(base, [Recompute([arm], [1.0], BATCH["attention_mask"])], BATCH))
    assert output.sequences.tolist() != generate(base, [], BATCH).sequences.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(base, adapters, models, dtype):
    base, model = base.to(dtype), copy.deepcopy(models[1]).to(dtype)
    processor = GenARMLogitsProcessor.from_pretrained(adapters[1], base_model=base)
    inputs = left_padded([8, 8])
    output = generate(base, [processor], inputs, max_new_tokens=5)
    assert joint_passes(processor) == 4
    atol = 1e-4 if dtype == torch.float64 else 0.25  # half the bits make the order of a sum matter
    assert_same_distributions(output, generate(base, [Recompute([model], [1.0])], inputs, max_new_tokens=5), atol)


@pytest.mark.slow  # the state machine tries other orders by default
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_one_instance_in_random_order(data, folder, adapters, models):
    """Any sequence of modes, prompts, strengths and resets, on one instance, is that of the same without fusion."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    modes = [mode for mode in MODES if mode.expected == EXACT and not mode.elsewhere]
    for seed in range(data.draw(st.integers(2, 5))):
        mode = data.draw(st.sampled_from(modes))
        inputs = ONE if mode.inputs is ONE else data.draw(st.sampled_from([BATCH, left_padded([3, 7], 1)]))
        processor.alpha = data.draw(st.sampled_from([[1.0, 0.5], [0.3, 0.0], [0.0, 1.0], [-0.5, 0.5]]))
        if data.draw(st.booleans()):
            processor.reset()
        oracle = Recompute(models, processor.alpha, inputs["attention_mask"])
        output = generate(base, [processor], inputs, seed, max_new_tokens=5, **mode.kwargs())
        assert_same(output, generate(base, [oracle], inputs, seed, max_new_tokens=5, **mode.kwargs()))


# --- the base never notices ---


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["between two passes", "inside a joint pass"])
def test_the_base_after_an_error(base, adapters, models, error, where, monkeypatch):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    action = raises(error)
    if where == "inside a joint pass":
        fail, action = action, lambda: monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
    cache = DynamicCache(config=base.config)
    with pytest.raises(error) as held:  # a traceback keeps the frames of `generate` alive, as it does in a notebook
        guided_until(base, processor, action, **{CACHE: cache})
    monkeypatch.undo()
    joint = joint_passes(processor)
    assert {layer.keys.shape for layer in cache.layers} == {(3, 1, cache.get_seq_length(), 8)}
    with torch.no_grad():  # nothing is in effect, even when the same cache goes on
        new = torch.full((3, 1), 5)
        ours = base(input_ids=new, **{CACHE: copy.deepcopy(cache)}, use_cache=True).logits
        theirs = tiny_llama(0)(input_ids=new, **{CACHE: cache}, use_cache=True).logits
    assert torch.equal(ours, theirs)
    unguided = generate(base, [])
    assert joint_passes(processor) == joint
    assert_same(generate(base, [processor]), generate(base, [Recompute(models, [1.0, 1.0], BATCH["attention_mask"])]))
    assert torch.equal(torch.stack(unguided.scores), torch.stack(generate(tiny_llama(0), []).scores))
    del held
    gc.collect()
    assert is_untouched(base, tiny_llama(0))


def test_the_base_unguided_in_another_thread(base, adapters, models):
    expected = {
        True: generate(base, [Recompute(models, [1.0, 1.0], BATCH["attention_mask"])]),
        False: generate(base, []),
    }
    outputs = {True: [], False: []}

    def work(guided):
        torch.set_num_threads(1)  # is a setting of each thread, and shows in the last bits
        processors = [GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)] if guided else []
        for _ in range(6):
            outputs[guided].append(generate(base, processors))

    threads = [threading.Thread(target=work, args=(guided,)) for guided in (True, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output in outputs[True]:
        assert_same(output, expected[True])
    for output in outputs[False]:
        assert torch.equal(torch.stack(output.scores), torch.stack(expected[False].scores))
    assert is_untouched(base, tiny_llama(0))


def test_the_base_is_used_in_the_middle(base, adapters, models, tmp_path):
    """Copied, saved, and used for something else in the same thread, between two steps of a guided generation."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    ids, copies = random_prompts(2, 6), []
    expected = base(input_ids=ids).logits

    def use():
        assert "forward" not in vars(base)
        assert torch.equal(base(input_ids=ids).logits, expected)
        copies.extend([copy.deepcopy(base), pickle.loads(pickle.dumps(base))])
        base.save_pretrained(tmp_path)
        torch.save(base, tmp_path / "whole.pt")

    output = guided_until(base, processor, use)
    assert joint_passes(processor) == 9
    assert_same(output, generate(base, [Recompute(models, [1.0, 1.0], BATCH["attention_mask"])]))
    copies.append(AutoModelForCausalLM.from_pretrained(tmp_path))
    copies.append(torch.load(tmp_path / "whole.pt", weights_only=False))
    for other in copies:
        torch.nn.init.zeros_(other.lm_head.weight)
        assert not other(input_ids=ids).logits.any()
    assert is_untouched(base, tiny_llama(0))


def test_the_base_is_trained_and_moved(base, adapters):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    plain = tiny_llama(0)
    ids = random_prompts(2, 6)
    for move in (lambda model: model.double(), lambda model: model.float()):
        generate(base, [processor])
        for model in (base, plain):
            model.train()(input_ids=ids, labels=ids).loss.backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
            move(model.eval()).zero_grad()
        joint = joint_passes(processor)
        adapted = [PeftModel.from_pretrained(copy.deepcopy(plain), adapter) for adapter in adapters]
        output = generate(base, [processor])
        assert joint_passes(processor) == joint + 9
        assert_same(output, generate(base, [Recompute(adapted, [1.0, 1.0], BATCH["attention_mask"])]))
        assert is_untouched(base, plain)


def test_a_base_that_moves_takes_its_reward_models_along(base, adapters):
    """To the meta device, the only other one that every machine has: it computes shapes, and no values."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    generate(base, [processor])
    base.to("meta")
    for reward_model in processor._machine.rewards.models:
        follow(reward_model.model, base)
        tensors = [*reward_model.model.parameters(), *reward_model.model.buffers()]
        assert {x.device.type for x in tensors} == {"meta"}


class MixingMLP(LlamaMLP):
    """Runs its layers on the tokens of all rows as if they were one text."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)[None]).view(x.shape)


def test_a_network_that_can_not_be_joined(base, adapters, models, caplog):
    """Found out in the first joint pass, which then counts for nothing; nor is it tried at every step."""
    caplog.set_level("INFO", "hf_genarm")
    base.model.layers[0].mlp.__class__ = MixingMLP
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    output = generate(base, [processor])
    assert joint_passes(processor) == 0
    assert sum("mixes the rows" in record.message for record in caplog.records) == 1
    assert processor.engine == "shared"
    assert_same(output, generate(base, [Recompute(models, [1.0, 1.0], BATCH["attention_mask"])]))


class FlatMLP(LlamaMLP):
    """Runs its layers on tokens without rows, and the first of them twice."""

    def forward(self, x):
        self.gate_proj(x)
        return super().forward(x.flatten(0, 1)).view(x.shape)


class Experts(torch.nn.Module):
    """Gives its one expert all tokens, in an order of their own."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = torch.nn.ModuleList([mlp])

    def forward(self, x):
        return self.experts[0](x.flatten(0, 1).flip(0)).flip(0).view(x.shape)


@pytest.mark.parametrize("kind", ["tokens without rows", "experts"])
def test_layers_that_get_tokens_without_rows(base, kind):
    """They are in the order of the rows if each row has one, but not where they are sorted by experts."""
    if kind == "experts":
        base.model.layers[0].mlp = Experts(base.model.layers[0].mlp)
    else:
        base.model.layers[0].mlp.__class__ = FlatMLP
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapter = get_peft_model(twin(base), config).eval()
    processor = GenARMLogitsProcessor(adapter, base_model=base)
    oracle = Recompute([adapter], [1.0], BATCH["attention_mask"])
    assert_same(generate(base, [processor]), generate(base, [oracle]))
    assert (joint_passes(processor) > 0) == (kind != "experts")
    assert processor.engine == ("shared" if kind == "experts" else "fused")
    one = Recompute([adapter], [1.0])
    lookup = {"prompt_lookup_num_tokens": 3, "min_new_tokens": 10}  # drafts: several tokens in each row
    assert_same(generate(base, [processor], ONE, **lookup), generate(base, [one], ONE, **lookup))


def test_one_row_of_positions_for_all_texts(base, adapters, models):
    """As transformers allows them; a joint pass has more rows than they could be repeated for."""
    inputs = {"input_ids": random_prompts(3, 7), "position_ids": torch.arange(7)[None]}
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    assert_same(generate(base, [processor], inputs), generate(base, [Recompute(models, [1.0, 1.0])], inputs))


def test_hooks_on_the_base_still_run(base, adapters, models):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    seen = []
    handle = base.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    output = generate(base, [processor])
    assert joint_passes(processor) == 0
    assert seen == [3] * 10
    handle.remove()
    assert_same(output, generate(base, [Recompute(models, [1.0, 1.0], BATCH["attention_mask"])]))
    generate(base, [processor])
    assert joint_passes(processor) == 9


@needs_compile
def test_a_base_with_a_compiled_forward_gets_separate_passes(base, adapters, models):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    base.compile(backend="eager")
    output = generate(base, [processor])
    assert joint_passes(processor) == 0
    assert_same(output, generate(base, [Recompute(models, [1.0, 1.0], BATCH["attention_mask"])]))


def test_a_changed_base_gets_separate_passes(base, adapters, models):
    """The reward model is the adapter on the base as it was; the base is what it is now."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    torch.manual_seed(9)
    config = LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config).eval()
    output = generate(adapted, [processor])
    assert joint_passes(processor) == 0
    assert_same(output, generate(adapted, [Recompute(models, [1.0, 1.0], BATCH["attention_mask"])]))


def test_adapters_that_change(base, adapters, models):
    """Scaled, switched off, or trained on, between calls and in the middle of one."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters[1], base_model=base)
    (arm,), model = [x.model for x in processor._machine.rewards.models], copy.deepcopy(models[1])
    oracle = Recompute([model], [1.0], BATCH["attention_mask"])
    for change in (
        lambda peft: [torch.nn.init.normal_(x, std=0.3) for name, x in peft.named_parameters() if "lora_B" in name],
        lambda peft: peft.base_model.disable_adapter_layers(),
        lambda peft: peft.base_model.enable_adapter_layers(),
    ):
        before = generate(base, [processor])
        for peft in (arm, model):
            torch.manual_seed(3)
            change(peft)
        output = generate(base, [processor])
        assert output.sequences.tolist() != before.sequences.tolist()
        assert_same(output, generate(base, [oracle]))

    def train(peft):
        def change():
            torch.nn.init.ones_(peft.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
            processor.reset()

        return change

    state = copy.deepcopy(model.state_dict())
    ours = guided_until(base, processor, train(arm))
    theirs = generate(base, [oracle], stopping_criteria=StoppingCriteriaList([At(train(model))]))
    assert_same(ours, theirs)
    assert any(not torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_no_weight_is_copied(base, adapters):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    generate(base, [processor])
    own = {x.data_ptr() for x in base.parameters()}
    (network,) = processor._machine.rewards.models[0]._fusion._local.networks.values()
    assert {x.data_ptr() for x in network._network.parameters()} == own
    for reward_model in processor._machine.rewards.models:
        names = {name for name, x in reward_model.model.named_parameters() if x.data_ptr() not in own}
        assert names
        assert all("lora_" in name for name in names)


def test_memory_of_the_caches(base, adapters):
    """The rows of the reward models are kept once: in the tensor that the base's rows are a part of."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    shared = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            keys = processor._machine.watch.step.run.cache.layers[0].keys
            owns = [x._state.cache.layers[0].keys for x in processor._machine.rewards.models]
            is_one = all(x.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr() for x in owns)
            shared.append(is_one and keys.untyped_storage().nbytes() == 3 * keys.numel() * keys.element_size())
            return scores

    generate(base, [processor, Look()])
    assert shared == [False] + 9 * [True]


def test_padding_columns_that_no_row_uses(base, adapters, models):
    inputs = left_padded([4, 5])
    wide = {"input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 0), value=PAD)}
    wide["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (3, 0))
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, attention_mask=wide["attention_mask"])
    output = generate(base, [processor], wide)
    assert_same(output, generate(base, [Recompute(models, [1.0, 1.0], wide["attention_mask"])], wide))
