"""Every line of the support table: guided `generate` against recomputation from scratch."""

import copy
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from helpers import assert_same, generate, oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Recompute
from support import ARCHITECTURES, ARM, BASE, BATCH, END, EXACT, MODES, ONE, PAGE, REFUSED, START, Ban, table
from tiny import EOS, VOCAB_SIZE, left_padded, tiny_llama
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from hf_genarm import GenARMLogitsProcessor, GuidanceWarning

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")


TEST = re.compile(r"^def (test_\w+)", re.MULTILINE)


def listed(expected):
    return [mode for mode in MODES if mode.expected == expected and not mode.elsewhere]


@pytest.mark.parametrize("mode", listed(EXACT), ids=lambda mode: mode.name)
def test_guided_text_equals_recomputation(mode):
    output = generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE)], mode.inputs, **mode.kwargs())
    expected = generate(BASE, [oracle(mode.inputs)], mode.inputs, **mode.kwargs())
    unguided = generate(BASE, [], mode.inputs, **mode.kwargs())
    assert output.sequences.tolist() != unguided.sequences.tolist()
    assert_same(output, expected)


@pytest.mark.parametrize("mode", listed(REFUSED), ids=lambda mode: mode.name)
def test_unsupported_modes_are_refused(mode):
    with pytest.raises((ValueError, NotImplementedError), match=mode.error):
        generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE)], mode.inputs, **mode.kwargs())


def test_every_other_mode_names_its_test():
    tests = {name for path in Path(__file__).parent.glob("test_*.py") for name in TEST.findall(path.read_text("utf-8"))}
    assert {mode.elsewhere for mode in MODES if mode.elsewhere} <= tests


def test_the_table_on_the_page_is_this_list():
    assert PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0].strip() == table()


# --- one instance in any order ---

BATCHES = [BATCH, left_padded([3, 7], 1), left_padded([9], 2), left_padded([8, 8, 8], 3)]


@pytest.mark.slow  # the state machine tries other orders by default
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_one_instance_in_random_order(data):
    """Any sequence of modes, prompts, strengths, masks, resets and changes of the weights, on one instance."""
    arm = copy.deepcopy(ARM)
    processor = GenARMLogitsProcessor(arm, base_model=BASE)
    for seed in range(data.draw(st.integers(2, 5))):
        mode = data.draw(st.sampled_from(listed(EXACT)))
        inputs = ONE if mode.inputs is ONE else data.draw(st.sampled_from(BATCHES))
        processor.alpha = data.draw(st.sampled_from([1.0, 0.3, -0.5]))
        processor.attention_mask = data.draw(st.sampled_from([None, inputs["attention_mask"]]))
        event = data.draw(st.sampled_from(["nothing", "reset", "other weights"]))
        if event == "reset":
            processor.reset()
        if event == "other weights":
            torch.nn.init.normal_(arm.model.layers[0].self_attn.q_proj.weight, std=0.4)
        output = generate(BASE, [processor], inputs, seed=seed, max_new_tokens=5, **mode.kwargs())
        expected = generate(
            BASE, [oracle(inputs, [arm], processor.alpha)], inputs, seed=seed, max_new_tokens=5, **mode.kwargs()
        )
        assert_same(output, expected)


@pytest.mark.parametrize("reference", [None, "base"])
def test_many_threads_each_with_its_own_instance(reference):
    alone = oracle(BATCH) if reference is None else GenARMLogitsProcessor(ARM, base_model=BASE, reference=reference)
    expected = [generate(BASE, [alone], BATCH, **{"num_beams": beams}) for beams in (1, 2, 3)]
    outputs = [None] * 3

    def work(index):
        processor = GenARMLogitsProcessor(ARM, base_model=BASE, reference=reference)
        for _ in range(5):
            outputs[index] = generate(BASE, [processor], BATCH, **{"num_beams": index + 1})

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, other in zip(outputs, expected, strict=True):
        assert_same(output, other)


# --- no waste ---


class Recording(GenARMLogitsProcessor):
    """Remembers every text that it was called with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.texts = set()

    def __call__(self, input_ids, scores):
        self.texts |= {tuple(row) for row in input_ids.tolist()}
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 0},
        {"num_beams": 3},
        {"assistant_model": tiny_llama(3)},
        {"assistant_model": BASE},
    ],
    ids=["greedy", "sampling", "beam search", "assisted", "assisted by the base"],
)
def test_each_token_is_forwarded_once(options):
    arm = copy.deepcopy(ARM)
    forwarded = []
    arm.register_forward_pre_hook(
        lambda _, args, kwargs: forwarded.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    inputs = ONE if "assistant_model" in options else left_padded([8, 8])
    base = copy.deepcopy(BASE)
    if options.get("assistant_model") is BASE:
        options = {"assistant_model": base}
    processor = Recording(arm, base_model=base)
    output = generate(base, [processor], inputs, **options)
    rows = len(inputs["input_ids"]) * options.get("num_beams", 1)
    prompt = rows * inputs["input_ids"].shape[1]
    if "assistant_model" in options:
        # One forward pass for each text that it was called with, drafted or accepted; the prompt is one of them.
        assert sum(forwarded) <= prompt + len(processor.texts) - 1
    else:
        assert sum(forwarded) == prompt + rows * (len(output.scores) - 1)


# --- together with other processors, criteria and streamers ---


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_forbidden_tokens_stay_forbidden(first):
    guided = [GenARMLogitsProcessor(ARM, base_model=BASE)], [oracle(BATCH)]
    output, expected = (generate(BASE, [Ban(), *it] if first else [*it, Ban()], BATCH) for it in guided)
    assert_same(output, expected)
    assert all((scores[:, Ban.tokens] == -torch.inf).all() for scores in output.scores)
    free = generate(BASE, guided[0], BATCH)
    assert output.sequences.tolist() != free.sequences.tolist()


def test_raw_logits_are_those_of_the_base():
    output = generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE)], BATCH, output_logits=True)
    again = generate(BASE, [oracle(BATCH)], BATCH, output_logits=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(output.logits, again.logits, strict=True))


class LongEnough(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 13)


def test_stopping_criteria_and_stop_strings(tokenizer):
    stop = {"stopping_criteria": StoppingCriteriaList([LongEnough()])}
    output = generate(BASE, [GenARMLogitsProcessor(ARM, base_model=BASE)], BATCH, **stop)
    assert output.sequences.shape[1] == 13
    assert_same(output, generate(BASE, [oracle(BATCH)], BATCH, **stop))

    base, arm = tiny_llama(0, vocab_size=len(tokenizer)), tiny_llama(1, vocab_size=len(tokenizer))
    inputs = tokenizer("How was the train ride?", return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    free = generate(base, [GenARMLogitsProcessor(arm, base_model=base)], inputs)
    text = tokenizer.decode(free.sequences[0, inputs["input_ids"].shape[1] :][2:4])
    stop = {"stop_strings": [text], "tokenizer": tokenizer}
    output = generate(base, [GenARMLogitsProcessor(arm, base_model=base)], inputs, **stop)
    assert output.sequences.shape[1] < free.sequences.shape[1]
    assert_same(output, generate(base, [oracle(inputs, [arm])], inputs, **stop))


def test_streaming(tokenizer, capsys):
    base, arm = tiny_llama(0, vocab_size=len(tokenizer)), tiny_llama(1, vocab_size=len(tokenizer))
    inputs = {"input_ids": tokenizer("How was the train ride?", return_tensors="pt").input_ids}
    expected = generate(base, [oracle(inputs, [arm])], inputs)
    text = tokenizer.decode(expected.sequences[0])
    generate(base, [GenARMLogitsProcessor(arm, base_model=base)], inputs, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip() == text.strip()

    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    call = threading.Thread(
        target=generate,
        args=(base, [GenARMLogitsProcessor(arm, base_model=base)], inputs),
        kwargs={"streamer": streamer},
    )
    call.start()
    assert "".join(streamer) == text
    call.join()


def test_pipelines_with_batches_and_chats(tokenizer):
    base, arm = tiny_llama(0, vocab_size=len(tokenizer)), tiny_llama(1, vocab_size=len(tokenizer))
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False, "batch_size": 2}
    generator = pipeline("text-generation", model=base, tokenizer=tokenizer)
    chats = [
        [{"role": "user", "content": text}] for text in ("How was the food?", "Tell me about the sun and the day.")
    ]
    for prompts in (["The weather", "How was the train ride today?"], chats):
        guided = generator(prompts, logits_processor=[GenARMLogitsProcessor(arm, base_model=base)], **options)
        texts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            if isinstance(prompt, list)
            else prompt
            for prompt in prompts
        ]
        for prompt, output in zip(texts, guided, strict=True):
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=isinstance(prompts[0], str)).input_ids
            expected = base.generate(ids, logits_processor=[Recompute([arm], [1.0])], max_new_tokens=6, do_sample=False)
            text = output[0]["generated_text"]
            assert text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


# --- reward models ---


@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)
def test_reward_models(family):
    arm = family.model()
    for options, inputs in (
        ({}, left_padded([4, 12, 7])),
        ({"num_beams": 3}, left_padded([9, 12])),
        ({"assistant_model": tiny_llama(3)}, ONE),
    ):
        processor = GenARMLogitsProcessor(arm, base_model=BASE, attention_mask=inputs["attention_mask"])
        output = generate(BASE, [processor], inputs, max_new_tokens=12, **options)
        assert_same(output, generate(BASE, [oracle(inputs, [arm])], inputs, max_new_tokens=12, **options))


def test_a_reward_model_whose_weights_are_offloaded():
    """Its weights are on no device between forward passes, as with `device_map` on a machine with little memory."""
    arm = cpu_offload(copy.deepcopy(ARM), execution_device="cpu")
    assert arm.device.type == "meta"
    for options in ({}, {"num_beams": 2}):
        assert_same(
            generate(BASE, [GenARMLogitsProcessor(arm, base_model=BASE)], BATCH, **options),
            generate(BASE, [oracle(BATCH)], BATCH, **options),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """
    Half the bits make the order of a sum matter, so cached and uncached forward passes of a model differ in their last
    bits. Ours differs from the latter by no more than a few times what transformers' own cached generation does.
    """
    arm = copy.deepcopy(ARM).to(dtype)
    inputs = left_padded([8, 8])
    output = generate(BASE, [GenARMLogitsProcessor(arm, base_model=BASE)], inputs)
    assert output.scores[0].dtype == torch.float32
    expected = generate(BASE, [oracle(inputs, [arm])], inputs)
    own = [generate(arm, [], inputs, use_cache=cache, output_logits=True).logits for cache in (True, False)]
    noise = max((one.float() - other.float()).abs().max() for one, other in zip(*own, strict=True))
    assert_same(output, expected, atol=max(4 * noise.item(), 0.1))


# --- warnings ---


@pytest.mark.filterwarnings("error::hf_genarm.GuidanceWarning")
def test_correct_use_is_silent():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    generate(BASE, [processor], BATCH, do_sample=True, top_k=0)
    generate(BASE, [processor], BATCH, num_beams=2)


@pytest.mark.filterwarnings("always::hf_genarm.GuidanceWarning")
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda base, arm: base.train(), "base model is in training mode"),
        (lambda base, arm: arm.train(), "Reward model 0 is in training mode"),
        (lambda base, arm: setattr(base.generation_config, "repetition_penalty", 1.2), "repetition_penalty=1.2"),
    ],
    ids=["training mode of the base", "training mode of the reward model", "repetition penalty"],
)
def test_likely_mistakes_are_warned_about_once(mistake, message):
    base, arm = copy.deepcopy(BASE), copy.deepcopy(ARM)
    mistake(base, arm)
    processor = GenARMLogitsProcessor(arm, base_model=base)
    with pytest.warns(GuidanceWarning, match=message):
        generate(base, [processor], BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuidanceWarning)
        generate(base, [processor], BATCH)


def test_continuous_batching_is_refused_where_it_is_called():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    with pytest.raises(NotImplementedError, match="unguided"):
        BASE.generate_batch(inputs=[[5, 6, 7]], logits_processor=[processor])


def test_base_models_that_hide_the_prompt_are_refused():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 3}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB_SIZE, eos_token_id=EOS, pad_token_id=0, **sizes))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        GenARMLogitsProcessor(ARM, base_model=t5)


def test_a_vision_language_base_is_guided_on_text():
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config=BASE.config.to_dict(),
        vision_config=CLIPVisionConfig(**vision, image_size=4, patch_size=2).to_dict(),
        image_token_id=VOCAB_SIZE - 1,
    )
    torch.manual_seed(4)
    base = LlavaForConditionalGeneration(config).eval()
    output = generate(base, [GenARMLogitsProcessor(ARM, base_model=base)], BATCH)
    assert_same(output, generate(base, [oracle(BATCH)], BATCH))
    inputs = {"input_ids": torch.tensor([[5, *[VOCAB_SIZE - 1] * 4, 7]]), "pixel_values": torch.randn(1, 3, 4, 4)}
    with pytest.raises(ValueError, match=r"reads .*(pixel_values|mm_encoder_outputs).* in addition to tokens"):
        generate(base, [GenARMLogitsProcessor(ARM, base_model=base)], inputs)
