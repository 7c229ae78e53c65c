"""Whoever calls the processor, and however: exact, in the base's own passes where that can be, or a clear error."""

import copy
import functools
import gc
import pickle
import threading

import numpy as np
import pytest
import torch
from helpers import assert_same, generate, guided_until, joint_passes, needs_compile, raises, separate
from oracle import Recompute
from peft import LoraConfig, get_peft_model
from support import ARM, ASSISTANT, BASE, BATCH, ONE
from tiny import PAD, VOCAB_SIZE, left_padded, random_prompts, save_adapter, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    TextStreamer,
    pipeline,
)

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.hub.kv_cache import CACHE

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

# A hole in a prompt and pad tokens that are text: nothing that tokens could tell
INPUTS = {"input_ids": random_prompts(3, 8), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
INPUTS["input_ids"][0, :2] = PAD
INPUTS["attention_mask"][1, 3] = INPUTS["attention_mask"][2, :3] = 0


class Inside(LogitsProcessor):
    """A processor in a processor."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, input_ids, scores):
        return self.processor(input_ids, scores)


class Scheduled(LogitsProcessor):
    """Strengths that grow with the number of tokens beyond the prompts, from scratch."""

    def __init__(self, models, inputs):
        self.models, self.start, self.mask = models, inputs["input_ids"].shape[1], inputs.get("attention_mask")

    def __call__(self, input_ids, scores):
        alpha = 0.2 * (input_ids.shape[1] - self.start)
        return Recompute(self.models, [alpha] * len(self.models), self.mask)(input_ids, scores)


class Subclass(GenARMLogitsProcessor):
    def __call__(self, input_ids, scores):
        return super().__call__(input_ids, scores)


def nested(function, depth):
    """A chain of decorators."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return nested(wrapper, depth - 1) if depth else wrapper


CALLERS = {
    "plain": lambda processor: processor,
    "in a processor": Inside,
    "three processors deep": lambda processor: Inside(Inside(Inside(processor))),
    "functools.partial": lambda processor: functools.partial(processor),
    "ten decorators": lambda processor: nested(processor, 10),
}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam search"])
@pytest.mark.parametrize("name", CALLERS)
def test_wrapped_processors(name, options, base, adapters, models):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    output = generate(base, [CALLERS[name](processor)], INPUTS, **options)
    assert_same(output, generate(base, [Recompute(models, [1.0, 1.0], INPUTS["attention_mask"])], INPUTS, **options))
    assert joint_passes(processor) > 5
    hidden = {CACHE: DynamicCache(config=base.config), **ONE}
    with torch.no_grad():
        base(input_ids=ONE["input_ids"][:, :5], **{CACHE: hidden[CACHE]}, use_cache=True)
    hidden["input_ids"] = ONE["input_ids"][:, 5:]
    with pytest.raises(ValueError, match="has read 9 tokens, but `generate` was given 4"):
        generate(base, [CALLERS[name](processor)], hidden)


def test_a_subclass_and_generate_called_through_decorators(base, adapters, models):
    processor = Subclass.from_pretrained(adapters, base_model=base)
    torch.manual_seed(0)
    options = {"max_new_tokens": 10, "return_dict_in_generate": True, "output_scores": True}
    output = nested(base.generate, 10)(**INPUTS, logits_processor=[processor], **options)
    assert_same(output, generate(base, [Recompute(models, [1.0, 1.0], INPUTS["attention_mask"])], INPUTS))
    assert joint_passes(processor) == 9


def test_a_list_in_the_list_is_refused_by_transformers():
    with pytest.raises(ValueError, match=r"LogitsProcessorList.* are passed to the logits processor"):
        generate(BASE, [LogitsProcessorList([GenARMLogitsProcessor(ARM, base_model=BASE)])])


def test_two_processors_on_one_base_both_join(base, adapters, models):
    first, second = (GenARMLogitsProcessor.from_pretrained(adapter, base_model=base) for adapter in adapters)
    output = generate(base, [first, second], INPUTS)
    assert_same(output, generate(base, [Recompute(models, [1.0, 1.0], INPUTS["attention_mask"])], INPUTS))
    assert joint_passes(first) == joint_passes(second) == 9


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # the name that older loops use
@pytest.mark.parametrize("has_base", [True, False])
def test_a_custom_loop_that_prefills_and_steers(has_base, base, adapters, models):
    """With left padding: without a base, the processor requires the mask."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base if has_base else None)
    oracle = Recompute(models, [1.0, 1.0], BATCH["attention_mask"])
    ids, mask = BATCH["input_ids"], BATCH["attention_mask"]
    cache = DynamicCache(config=base.config)
    for step in range(6):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        new = slice(None) if step == 0 else slice(-1, None)
        with torch.no_grad():
            output = base(ids[:, new], attention_mask=mask, position_ids=positions[:, new], past_key_values=cache)
        if step == 0:
            with pytest.raises(ValueError, match="starts with the pad token"):
                processor(ids, output.logits[:, -1])
            processor.attention_mask = mask
        scores = processor(ids, output.logits[:, -1])
        torch.testing.assert_close(scores, oracle(ids, output.logits[:, -1]), atol=1e-4, rtol=0)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)


def test_a_pipeline_and_a_streamer(tokenizer, tmp_path, capsys):
    plain = tiny_llama(0, vocab_size=len(tokenizer))
    plain.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "arm")
    processor = GenARMLogitsProcessor.from_pretrained(adapter, base_model=base)
    oracle = Recompute([separate(tmp_path / "base", adapter)], [1.0])
    generator = pipeline("text-generation", model=base, tokenizer=tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False}
    (guided,), (expected,) = (
        generator("The weather", logits_processor=[x], return_full_text=False, **options) for x in (processor, oracle)
    )
    assert guided == expected
    assert joint_passes(processor) == 5
    ids = tokenizer("How was the train ride?", return_tensors="pt").input_ids
    texts = []
    for x in (processor, oracle):
        base.generate(ids, logits_processor=[x], streamer=TextStreamer(tokenizer), **options)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
    assert joint_passes(processor) == 10


def test_two_threads_with_a_processor_each(base, adapters, models):
    expected = [generate(base, [Recompute([model], [1.0], INPUTS["attention_mask"])], INPUTS) for model in models]
    processors = [GenARMLogitsProcessor.from_pretrained(adapter, base_model=base) for adapter in adapters]
    outputs = [[], []]

    def work(index):
        torch.set_num_threads(1)
        for _ in range(5):
            outputs[index].append(generate(base, [processors[index]], INPUTS))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        for output in outputs[index]:
            assert_same(output, expected[index])
        assert joint_passes(processors[index]) == 5 * 9
    assert "forward" not in vars(base)


def test_prompts_that_begin_like_earlier_texts(base, adapters, models):
    """A prompt of one more token, the first prompt again after its own output, and the output as a prompt."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=lambda step: 0.2 * step)
    ids = ONE["input_ids"]
    output = generate(base, [processor], {"input_ids": ids}).sequences
    for prompt in (output[:, :10], ids, output[:, :12], output[:, :12]):
        inputs = {"input_ids": prompt}
        result = generate(base, [processor], inputs)
        expected = generate(base, [Scheduled(models, inputs)], inputs)
        torch.testing.assert_close(result.scores[0], base(prompt).logits[:, -1].detach())  # step 0
        assert_same(result, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["criterion", "streamer"])
def test_an_interruption_and_then_reuse(error, where, base, adapters, models):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    before = dict(vars(base))

    class Stop(TextStreamer):
        def __init__(self):
            self.n = 0

        def put(self, value):
            self.n += 1
            if self.n == 4:
                raise error

        def end(self):
            pass

    call = {
        "criterion": lambda: guided_until(base, processor, raises(error)),
        "streamer": lambda: generate(base, [processor], ONE, streamer=Stop()),
    }
    with pytest.raises(error):
        call[where]()
    assert vars(base) == before
    unguided = generate(base, [])
    assert torch.equal(torch.stack(unguided.scores), torch.stack(generate(tiny_llama(0), []).scores))
    assert_same(generate(base, [processor]), generate(base, [Recompute(models, [1.0, 1.0], BATCH["attention_mask"])]))


def test_a_generate_call_inside_another(base, adapters, models):
    """In a stopping criterion, guided by the same processor, with a schedule: each counts from its own prompt."""
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=lambda step: 0.2 * step)
    inner_ids, inner = random_prompts(1, 5, seed=7), []

    def use():
        inner.append(generate(base, [processor], {"input_ids": inner_ids}))

    outer = guided_until(base, processor, use)
    assert_same(outer, generate(base, [Scheduled(models, BATCH)]))
    assert_same(inner[0], generate(base, [Scheduled(models, {"input_ids": inner_ids})], {"input_ids": inner_ids}))


class Sometimes(LogitsProcessor):
    """Consulted from a token on, or every second token."""

    def __init__(self, processor, is_asked):
        self.processor, self.is_asked = processor, is_asked

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - BATCH["input_ids"].shape[1]
        return self.processor(input_ids, scores) if self.is_asked(step) else scores.log_softmax(-1)


@pytest.mark.parametrize("is_asked", [lambda step: step >= 4, lambda step: step % 2 == 0], ids=["late", "every other"])
def test_a_processor_that_is_not_always_called(is_asked, base, adapters, models):
    """Also when rows have finished, whose last tokens are pads."""
    base.generation_config.eos_token_id = list(range(3, VOCAB_SIZE, 4))
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    output = generate(base, [Sometimes(processor, is_asked)])
    assert (output.sequences[:, -1] == PAD).any()
    oracle = Recompute(models, [1.0, 1.0], BATCH["attention_mask"])
    assert_same(output, generate(base, [Sometimes(oracle, is_asked)]))


def test_strength_that_begins_in_the_middle(base, adapters, models):
    """With an explicit mask, which is first looked at when there is something to steer."""
    mask = BATCH["attention_mask"]
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, alpha=0.0, attention_mask=mask)
    oracle = Recompute(models, [0.0, 0.0], mask)

    class Begin(LogitsProcessor):
        def __call__(self, input_ids, scores):
            on = float(input_ids.shape[1] >= BATCH["input_ids"].shape[1] + 4)
            processor.alpha, oracle.alphas = on, [on, on]
            return scores.log_softmax(-1)

    assert_same(generate(base, [Begin(), processor]), generate(base, [Begin(), oracle]))


@needs_compile
def test_a_compiled_base_and_reward_model(base, adapters, models):
    compiled = torch.compile(base, backend="eager")
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=compiled)
    output = generate(compiled, [processor], INPUTS)
    assert_same(output, generate(base, [Recompute(models, [1.0, 1.0], INPUTS["attention_mask"])], INPUTS))
    assert joint_passes(processor) == 9
    compiled = torch.compile(copy.deepcopy(ARM), backend="eager")
    processor = GenARMLogitsProcessor(compiled, base_model=base)
    assert processor._machine.rewards.models[0].has_cache
    assert_same(
        generate(base, [processor], INPUTS), generate(base, [Recompute([ARM], [1.0], INPUTS["attention_mask"])], INPUTS)
    )


def test_a_reward_model_whose_forward_is_wrapped(caplog):
    arm = copy.deepcopy(ARM)
    forward = arm.forward
    arm.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    processor = GenARMLogitsProcessor(arm, base_model=BASE)
    assert not caplog.records
    assert_same(generate(BASE, [processor]), generate(BASE, [Recompute([ARM], [1.0], BATCH["attention_mask"])]))


def test_a_reward_model_that_was_loaded_in_inference_mode():
    with torch.inference_mode():
        arm = tiny_llama(1)
    processor = GenARMLogitsProcessor(arm, base_model=BASE)
    assert_same(generate(BASE, [processor]), generate(BASE, [Recompute([ARM], [1.0], BATCH["attention_mask"])]))


# --- the base is left as it was ---


def test_the_last_processor_leaves_the_base_as_it_was(base, adapters):
    """In whatever order they go, and with something put on top."""
    before = dict(vars(base))
    first, second, third = (
        GenARMLogitsProcessor.from_pretrained(adapters, base_model=base, reference="base") for _ in range(3)
    )
    generate(base, [first])
    assert vars(base) != before
    for index in (1, 0, 2):
        if index == 1:
            del second
        elif index == 0:
            del first
        else:
            generate(base, [third])
            del third
    gc.collect()
    assert vars(base) == before
    assert not base._forward_hooks

    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    ours = base.prepare_inputs_for_generation
    base.prepare_inputs_for_generation = functools.wraps(ours)(lambda *args, **kwargs: ours(*args, **kwargs))
    del processor
    gc.collect()
    assert torch.equal(generate(base, []).sequences, generate(tiny_llama(0), []).sequences)
    again = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    generate(base, [again])
    assert joint_passes(again) == 9


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_an_adapter_is_not_merged_into_the_base_that_it_shares(merge, base, adapters):
    before = copy.deepcopy(base.state_dict())
    arm = AutoregressiveRewardModel.from_pretrained(adapters[0], base)
    with pytest.raises(ValueError, match=f"`{merge}` would change the weights of the base model"):
        getattr(arm.model, merge)()
    getattr(copy.deepcopy(arm).model, merge)()  # has weights of its own
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())
    own = AutoregressiveRewardModel.from_pretrained(adapters[0])
    getattr(own.model, merge)()  # is free to


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_of_processors_with_their_base(copied, base, adapters, models):
    processor = GenARMLogitsProcessor.from_pretrained(
        adapters, base_model=base, alpha=[1.0, 0.5], target_kl=0.3, reference="base"
    )
    processor.keeps_statistics = True
    expected = generate(base, [processor])
    other_base, other = copied((base, processor))
    assert other_base is not base
    torch.nn.init.zeros_(base.lm_head.weight)  # nothing is shared
    output = generate(other_base, [other])
    assert_same(output, expected)
    assert joint_passes(other) == 9
    assert other.keeps_statistics
    assert other.statistics(output.sequences)["kl"]
    alone = copied(GenARMLogitsProcessor([ARM], 0.5))
    ids, scores = ONE["input_ids"], torch.randn(1, VOCAB_SIZE)
    assert torch.equal(alone(ids, scores), GenARMLogitsProcessor([ARM], 0.5)(ids, scores))


def test_a_base_with_a_processor_is_copied_saved_and_moved(base, adapters, tmp_path):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    generate(base, [processor])
    ids = random_prompts(2, 6)
    for other in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert other.prepare_inputs_for_generation.__self__ is other
        assert torch.equal(other(ids).logits, base(ids).logits)
    base.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, base(ids).logits)
    assert base.to(torch.float64).dtype == torch.float64
    generate(base, [processor])
    assert joint_passes(processor) == 18


# --- what a run is ---


def test_passes_stay_joint_after_hidden_states_were_returned(base, adapters, models):
    """transformers leaves its capture hooks on the modules."""
    with torch.no_grad():
        base(ONE["input_ids"], output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in base.modules())
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    assert processor.engine == "fused"
    output = generate(base, [processor])
    assert joint_passes(processor) == 9
    assert_same(output, generate(base, [Recompute(models, [1.0, 1.0], BATCH["attention_mask"])]))
    handle = base.model.layers[0].register_forward_hook(lambda *args: None)
    assert processor.engine == "shared"
    handle.remove()
    assert processor.engine == "fused"


def other_parameter(arm):
    layer = arm.base_model.model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight * 2)


def other_state(arm):
    arm.load_state_dict({name: 1.5 * x for name, x in arm.state_dict().items()}, assign=True)


def other_layer(arm):
    layers = arm.base_model.model.model.layers
    layers[0] = copy.deepcopy(layers[1])
    layers[0].self_attn.layer_idx = 0


def other_scale(arm):
    for module in arm.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def other_adapter(arm):
    torch.manual_seed(8)
    arm.add_adapter("more", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    arm.base_model.set_adapter(["default", "more"])


def other_rope(arm):
    arm.base_model.model.model.rotary_emb.inv_freq *= 0.5


def hooked(arm):
    arm.base_model.model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize(
    "change", [other_parameter, other_state, other_layer, other_scale, other_adapter, other_rope, hooked]
)
def test_a_reward_model_that_was_changed_between_two_calls(change, is_fused, base, adapters, folder):
    """The second prompt begins like the first text."""
    arm = separate(folder / "base", adapters[0])
    processor = GenARMLogitsProcessor(arm, base_model=base)
    if is_fused:
        processor = GenARMLogitsProcessor.from_pretrained(adapters[0], base_model=base)
        arm = processor._machine.rewards.models[0].model
    text = generate(base, [processor], ONE).sequences
    before = Recompute([arm], [1.0])(text, torch.zeros(1, VOCAB_SIZE))
    change(arm)
    assert (Recompute([arm], [1.0])(text, torch.zeros(1, VOCAB_SIZE)) - before).abs().max() > 0.01
    inputs = {"input_ids": text}
    assert_same(generate(base, [processor], inputs), generate(base, [Recompute([arm], [1.0])], inputs))


def test_autocast_and_then_not(base, adapters, models):
    processor = GenARMLogitsProcessor.from_pretrained(adapters, base_model=base)
    with torch.autocast("cpu", torch.bfloat16):
        generate(base, [processor])
    assert_same(generate(base, [processor]), generate(base, [Recompute(models, [1.0, 1.0], BATCH["attention_mask"])]))


def test_the_reference_follows_the_base(base, adapters, models):
    """Adapters that are added to the base after the processor was made, and disabled."""
    processor = GenARMLogitsProcessor(models, 0.7, base_model=base, reference="base")
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    tuner = None
    for change in ("none", "added", "disabled", "enabled"):
        if change == "added":
            tuner = get_peft_model(base, config).eval().base_model  # puts layers into the base
        elif change == "disabled":
            tuner.disable_adapter_layers()
        elif change == "enabled":
            tuner.enable_adapter_layers()
        scores = []
        for options in ({}, {"assistant_model": ASSISTANT}):
            output = generate(base, [processor], ONE, max_new_tokens=4, **options)
            scores.append(output.scores[0])
        with torch.no_grad():
            own = base(ONE["input_ids"]).logits[:, -1].log_softmax(-1)
            rewards = [model(ONE["input_ids"]).logits[:, -1].log_softmax(-1) - own for model in models]
        expected = (own + 0.7 * sum(rewards)).log_softmax(-1)
        for score in scores:
            torch.testing.assert_close(score, expected, atol=1e-4, rtol=0)


def test_custom_loops_with_a_schedule():
    """Two of them in turns, rows that are dropped, and a prompt as long as the old text."""
    steps = []
    processor = GenARMLogitsProcessor(ARM, lambda step: steps.append(step) or 1.0)

    def step(ids):
        scores = processor(ids, torch.zeros(len(ids), VOCAB_SIZE))
        expected = Recompute([ARM], [1.0])(ids, torch.zeros(len(ids), VOCAB_SIZE))
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
        return torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)

    first, second = random_prompts(2, 5), random_prompts(3, 7, seed=1)
    for _ in range(3):
        first, second = step(first), step(second)
    assert steps == [0, 0, 1, 1, 2, 2]
    steps.clear()
    step(second[1:])
    step(random_prompts(3, second.shape[1], seed=2))
    assert steps == [3, 0]
    steps.clear()
    step(torch.cat([first, random_prompts(1, first.shape[1], seed=3)]))  # each row by its own step
    assert sorted(steps) == [0, 3]


@pytest.mark.parametrize("has_base", [True, False])
def test_the_same_prompt_with_other_strengths(has_base):
    """Neither the divergence that is held nor the statistics of one row reach another."""
    twice = {"input_ids": ONE["input_ids"].repeat(2, 1), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    options = {"target_kl": 0.2, "base_model": BASE if has_base else None}

    def made(alpha):
        processor = GenARMLogitsProcessor([ARM, ASSISTANT], alpha, **options)
        processor.keeps_statistics = True
        return processor

    weights = [[1.0, -0.5], [0.2, 3.0]]
    processor = made(torch.tensor(weights))
    output = generate(BASE, [processor], twice, max_new_tokens=6)
    together = processor.statistics(output.sequences)
    for index, alpha in enumerate(weights):
        alone = made(alpha)
        text = generate(BASE, [alone], ONE, max_new_tokens=6).sequences
        assert text.tolist() == output.sequences[index : index + 1].tolist()
        expected = alone.statistics(text)
        rows = [at for at, sequence in enumerate(together["sequence"]) if sequence == index]
        for name in ("kl", "alpha_0", "alpha_1", "guided_log_prob"):
            assert [together[name][at] for at in rows] == pytest.approx(expected[name], abs=1e-4), name


def test_a_prompt_that_continues_an_earlier_text_starts_from_scratch():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE, target_kl=0.2)
    text = generate(BASE, [processor], ONE).sequences
    inputs = {"input_ids": text[:, :-1]}
    fresh = GenARMLogitsProcessor(ARM, base_model=BASE, target_kl=0.2)
    assert_same(generate(BASE, [processor], inputs), generate(BASE, [fresh], inputs))


def test_what_is_remembered_is_bounded():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE, target_kl=0.2)
    processor.keeps_statistics = True
    processor._machine.statistics.KEPT_TOKENS = 40
    outputs = [generate(BASE, [processor], left_padded([6, 4], seed), min_new_tokens=10) for seed in range(12)]
    gc.collect()
    runs = processor._machine.statistics._runs.values()
    assert sum(run.n_texts for run in runs) <= 60
    assert len(processor._machine.kl_control._missing) <= len(runs) + BASE.prepare_inputs_for_generation.watch.KEPT_RUNS
    assert processor.statistics(outputs[-1].sequences)["kl"]
    with pytest.raises(ValueError, match="Nothing is kept about sequence 0"):
        processor.statistics(outputs[0].sequences)


def test_many_rows_are_matched_in_linear_memory():
    """Beams that permute: 256 rows of 1,024 tokens took 907 MB."""
    from hf_genarm.decoding.line import Line
    from hf_genarm.decoding.lockstep import State, _longest_shared_prefix

    ids = torch.randint(3, 1000, (256, 1024))
    state = State(DynamicCache(), Line(ids), length=1024)
    order = torch.randperm(256)
    wanted = torch.cat([ids[order], torch.full((256, 1), 7)], dim=1)
    rows, shared = _longest_shared_prefix(state, Line(wanted), 1025)
    assert shared == 1024
    assert torch.equal(rows, order)
    wanted[3, 500] = 0
    rows, shared = _longest_shared_prefix(state, Line(wanted), 1025)
    assert shared == 500
    assert torch.equal(ids[rows, :500], wanted[:, :500])


# --- what is refused ---


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (None, TypeError, "`alpha` is None, but must be a number"),
        ("1.0", TypeError, "`alpha` is '1.0'"),
        ([[1.0, 0.5], [1.0]], TypeError, r"`alpha` is \[\[1.0, 0.5\], \[1.0\]\]"),
        (3e38, ValueError, "at most 1e\\+06"),
        (lambda step: None, TypeError, "`alpha` is None"),
        (torch.ones(2, 2), ValueError, "2 rows, one for each request, but there are 4 rows"),
    ],
)
def test_invalid_strengths(alpha, error, message):
    def call():
        processor = GenARMLogitsProcessor([ARM, ASSISTANT], alpha, base_model=BASE)
        generate(BASE, [processor], left_padded([4, 4, 6, 5]))

    with pytest.raises(error, match=message):
        call()


def test_valid_strengths():
    ids, scores = ONE["input_ids"], torch.randn(1, VOCAB_SIZE)
    expected = GenARMLogitsProcessor([ARM, ASSISTANT], [0.5, -1.0])(ids, scores)
    for alpha in (np.array([0.5, -1.0]), np.array([[0.5, -1.0]]), [[0.5, -1.0]], (0.5, -1.0), torch.tensor([0.5, -1])):
        torch.testing.assert_close(GenARMLogitsProcessor([ARM, ASSISTANT], alpha)(ids, scores), expected)
    processor = GenARMLogitsProcessor(ARM)
    processor.alpha[0] = float("nan")
    with pytest.raises(ValueError, match=r"`alpha` is \[nan\]"):
        processor(ids, scores)


def test_rewards_that_leave_no_token():
    impossible = tiny_llama(1)
    bias = torch.zeros(VOCAB_SIZE)
    bias[7] = -torch.inf
    impossible.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    ids, scores = ONE["input_ids"], torch.zeros(1, VOCAB_SIZE)
    with pytest.raises(ValueError, match="negative one"):
        GenARMLogitsProcessor(impossible, -1.0)(ids, scores)
    only = torch.full((1, VOCAB_SIZE), -torch.inf)
    only[:, 7] = 0.0
    with pytest.raises(ValueError, match="In row 0, guidance leaves no token"):
        GenARMLogitsProcessor(impossible)(ids, only)


@pytest.mark.parametrize("model", [None, "my-arm", 3])
def test_invalid_reward_models(model):
    with pytest.raises(TypeError, match=r"`reward_model` is (None|'my-arm'|3), which is no language model"):
        GenARMLogitsProcessor(model)


def test_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="`input_ids` has 1 rows, but `scores` has 3"):
        GenARMLogitsProcessor(ARM)(ONE["input_ids"], torch.zeros(3, VOCAB_SIZE))
