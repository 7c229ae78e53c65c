"""What differs between architectures: positions, adapters, tokenizers, and what a base reads besides tokens."""

import copy
import math
import sys

import pytest
import torch
from oracle import Recompute
from peft import (
    CPTConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import EOS, VOCAB_SIZE, left_padded, random_prompts, save_adapter, tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    LogitsProcessor,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)
from zoo import NAMES, tiny

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.decoding.lockstep import LockstepLM
from hf_genarm.hub.limits import n_positions
from hf_genarm.hub.sharing import twin

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

BATCH = left_padded([3, 5])


class Compare(LogitsProcessor):
    """Returns what a processor does, after comparing it with the reward model's own words about each text alone."""

    def __init__(self, processor, reward_model, inputs):
        self.processor = processor
        self.oracle = Recompute([reward_model], [1.0], inputs["attention_mask"])
        self.calls = 0

    def __call__(self, input_ids, scores):
        guided = self.processor(input_ids, scores)
        torch.testing.assert_close(guided, self.oracle(input_ids, scores), atol=1e-4, rtol=0)
        assert (guided.exp() - scores.softmax(-1)).abs().max() > 1e-3
        self.calls += 1
        return guided


def assert_exact(reward_model, base, processor=None, inputs=BATCH, max_new_tokens=3):
    processor = GenARMLogitsProcessor(reward_model, base_model=base) if processor is None else processor
    compare = Compare(processor, reward_model, inputs)
    base.generate(**inputs, logits_processor=[compare], max_new_tokens=max_new_tokens, suppress_tokens=[EOS])
    assert compare.calls == max_new_tokens


# --- positions ---

LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}


def rotating(kind):
    """Whose frequencies depend on the length of a text from 16 tokens on."""
    if kind == "Phi-3":
        return tiny("phi3", rope_parameters=LONG_ROPE, original_max_position_embeddings=16)
    if kind == "longrope":
        return tiny_llama(1, rope_parameters=LONG_ROPE)
    return tiny_llama(1, rope_parameters=DYNAMIC_ROPE, max_position_embeddings=16)


@pytest.mark.parametrize("kind", ["Phi-3", "longrope", "dynamic"])
def test_frequencies_that_depend_on_the_length(kind):
    """Whatever was read before, the logits are those of a new model that reads the text at once."""
    lockstep = LockstepLM(rotating(kind))
    assert lockstep.has_cache
    first, second = random_prompts(1, 24, 0), random_prompts(1, 24, 1)
    short = [(first, length) for length in range(12, 16)]
    for text, length in [*short, (first, 16), (first, 17), (first, 24), (second, 14), (second, 16), (second, 20)]:
        ids = text[:, :length]
        with torch.no_grad():
            expected = rotating(kind)(input_ids=ids, use_cache=False).logits[:, -1]
        torch.testing.assert_close(lockstep(ids, torch.ones_like(ids)), expected, atol=1e-4, rtol=0)
    batch = left_padded([6, 15])
    ids = torch.cat([batch["input_ids"], random_prompts(2, 3)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    for row, logits in enumerate(lockstep(ids, mask)):
        with torch.no_grad():
            alone = rotating(kind)(input_ids=ids[row][mask[row] == 1][None], use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)


class RecomputeNew(Recompute):
    """With a new model for each call."""

    def __init__(self, make, inputs):
        super().__init__([], [1.0], inputs["attention_mask"])
        self.make = make

    def __call__(self, input_ids, scores):
        self.models = [self.make()]
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_an_adapter_is_fused_as_long_as_the_frequencies_are_fixed(kind):
    def adapter_on(base):
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(base, config).eval()

    inputs, base = left_padded([6, 12]), rotating(kind)
    processor = GenARMLogitsProcessor(adapter_on(twin(base)), base_model=base)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "return_dict_in_generate": True, "output_scores": True}
    output = base.generate(**inputs, **options, logits_processor=[processor])
    oracle = RecomputeNew(lambda: adapter_on(rotating(kind)), inputs)
    expected = rotating(kind).generate(**inputs, **options, logits_processor=[oracle])
    assert processor._machine.rewards.models[0].joint_passes == 3  # with 13, 14 and 15 tokens in the longest text
    for ours, theirs in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# One of each kind: from 0, from 2, from behind the pad token, a table that is no embedding, none at all
TABLES = {"gpt2": 64, "opt": 64, "bart": 64, "roberta": 63, "gptj": 64, "openai-gpt": 64, "ctrl": 64, "llama": math.inf}


# Reformer compares lengths itself, before its pass.
OTHERS = [pytest.param(x, marks=pytest.mark.slow) for x in NAMES if x not in TABLES and x != "reformer"]


@pytest.mark.parametrize("name", [*TABLES, *OTHERS])
def test_the_number_of_positions(name):
    """As many tokens can be read, and one more can't."""
    model = tiny(name)
    longest = n_positions(model)
    if name in TABLES:
        assert longest == TABLES[name]
    with torch.no_grad():
        model(input_ids=random_prompts(1, min(longest, 70)), use_cache=False)
        if longest < math.inf:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=random_prompts(1, longest + 1), use_cache=False)


@pytest.mark.parametrize("name", [x for x in TABLES if x != "llama"])
def test_what_can_not_be_read_is_refused_before_the_pass(name):
    """On a GPU, the pass would end in an assertion, after which nothing runs."""
    reward_model, passes = tiny(name), []
    processor = GenARMLogitsProcessor(reward_model, base_model=tiny_llama(0))
    reward_model.register_forward_pre_hook(lambda *_: passes.append(1))
    ids, scores = random_prompts(1, 70), torch.zeros(1, VOCAB_SIZE)
    with pytest.raises(ValueError, match=rf"has 70 tokens, but .*, as a reward model, has {TABLES[name]} positions"):
        processor(ids, scores)
    n_known = reward_model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=rf"ids from 5 to {n_known + 3}, but .* ids from 0 to {n_known - 1}\."):
        processor(torch.tensor([[5, n_known + 3, 6]]), scores)
    assert not passes
    processor(ids[:, : TABLES[name]], scores)


def test_the_positions_of_references_aligned_models_and_adapters():
    ids, scores, mask = left_padded([66, 63]), torch.zeros(2, VOCAB_SIZE), torch.ones(2, 66, dtype=torch.long)
    padded, short = ids["input_ids"], {"attention_mask": ids["attention_mask"][1:]}
    referring = GenARMLogitsProcessor(tiny_llama(0), reference=tiny("gpt2"), attention_mask=mask)
    with pytest.raises(ValueError, match="has 66 tokens, but `GPT2LMHeadModel`, as a reference, has 64 positions"):
        referring(padded, scores)
    # Padding takes none.
    GenARMLogitsProcessor(tiny_llama(0), reference=tiny("gpt2"), **short)(padded[1:], scores[1:])
    tokenizer = tiny_tokenizer()
    size = {"vocab_size": len(tokenizer)}
    aligned = GenARMLogitsProcessor(tiny("gpt2", **size), tokenizer=tokenizer, reward_tokenizer=tokenizer)
    aligned.attention_mask = mask
    with pytest.raises(ValueError, match="has 66 tokens, but `GPT2LMHeadModel`, as a reward model, has 64 positions"):
        aligned(padded, torch.zeros(2, len(tokenizer)))
    # What an adapter puts before the text takes some.
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert n_positions(get_peft_model(tiny("gpt2"), config)) == 61


# --- adapters ---

VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
ADAPTERS = {
    "prompt tuning": PromptTuningConfig(**VIRTUAL),
    "prefix tuning": PrefixTuningConfig(**VIRTUAL),
    "p-tuning": PromptEncoderConfig(encoder_hidden_size=8, **VIRTUAL),
    "CPT": CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
    ),
    "aLoRA": LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7, 8]
    ),
}
WITH_INVOCATION = copy.deepcopy(BATCH)
WITH_INVOCATION["input_ids"][1, 1:3] = torch.tensor([7, 8])


def adapted(kind, **sizes):
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(0, **sizes), ADAPTERS[kind]).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # the name that PEFT uses
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_that_look_at_the_whole_text(kind):
    assert_exact(adapted(kind), tiny_llama(0), inputs=WITH_INVOCATION)


@pytest.mark.parametrize(
    "options",
    [
        {"layer_replication": [[1, 2], [0, 1]]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [7, 8]},
    ],
    ids=["layers in another order", "more layers", "aLoRA"],
)
def test_adapters_that_do_not_replace_layers_of_the_base(options, tmp_path):
    tiny_llama(0).save_pretrained(tmp_path / "base")
    folder = save_adapter(tmp_path / "base", tmp_path / "arm", **options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    processor = GenARMLogitsProcessor.from_pretrained(folder, base_model=base)
    assert processor.engine == "shared"
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    assert_exact(alone.eval(), base, processor, WITH_INVOCATION, max_new_tokens=5)


# --- tokenizers ---


@pytest.mark.parametrize("name", ["biogpt", "xlm", "ctrl"])
def test_a_tokenizer_that_can_not_be_loaded_does_not_stop_the_model(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "sacremoses", None)  # not installed
    tiny(name).save_pretrained(tmp_path)
    if name in ("biogpt", "xlm"):
        (tmp_path / "vocab.json").write_text('{"a": 0, "b</w>": 1, "<unk>": 2, "<s>": 3, "</s>": 4, "<pad>": 5}')
        (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    arm = AutoregressiveRewardModel.from_pretrained(str(tmp_path))
    assert arm.tokenizer is None
    assert ("need to install sacremoses" in caplog.text) == (name in ("biogpt", "xlm"))
    assert_exact(arm.model, tiny_llama(0, vocab_size=arm.model.config.vocab_size))


# --- bases ---


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning:peft.peft_model")
def test_a_base_with_virtual_tokens_is_guided_from_outside():
    base, reward_model = adapted("prompt tuning"), tiny_llama(1)
    with pytest.raises(ValueError, match=r"adapter of the kind PROMPT_TUNING.*without `base_model`"):
        GenARMLogitsProcessor(reward_model, base_model=base)
    processor = GenARMLogitsProcessor(reward_model, attention_mask=BATCH["attention_mask"])
    assert_exact(reward_model, base, processor)


def audio_base():
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = Qwen2AudioConfig(
        audio_config={**audio, "num_mel_bins": 8, "max_source_positions": 50},
        text_config=tiny_llama(0).config.to_dict(),
        audio_token_id=VOCAB_SIZE - 1,
    )
    return Qwen2AudioForConditionalGeneration(config).eval()


@pytest.mark.parametrize("given", ["sound", "states of an encoder"])
def test_what_the_base_reads_besides_tokens_is_refused(given):
    one = {"input_ids": torch.tensor([[5, 6, 7]])}
    sizes = {"d_model": 16, "decoder_ffn_dim": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    if given == "sound":
        base, name = audio_base(), "input_features"
        one = {"input_ids": torch.tensor([[5, *[VOCAB_SIZE - 1] * 25, 7]]), name: torch.randn(1, 8, 100)}
        one["feature_attention_mask"] = torch.ones(1, 100, dtype=torch.long)
    else:
        base, name = BartForCausalLM(BartConfig(vocab_size=VOCAB_SIZE, **sizes)).eval(), "encoder_hidden_states"
        one[name] = torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match=f"The base model reads .*`{name}`.* in addition to tokens"):
        base.generate(**one, max_new_tokens=4, logits_processor=[GenARMLogitsProcessor(tiny_llama(1), base_model=base)])
