"""
Lists what works with what: the tests and the table in `docs/support.md` are made from this file.

    python tests/support.py        # writes the table into docs/support.md
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tiny import BOS, EOS, PAD, VOCAB_SIZE, left_padded, tiny_llama
from tiny import SIZES as TINY_SIZES
from transformers import DynamicCache, GenerationMixin, LogitsProcessor

from hf_genarm.hub.kv_cache import CACHE

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
START, END = "<!-- support: begin -->", "<!-- support: end -->"

EXACT, REFUSED = "exact", "refused"

BASE, ARM, ASSISTANT = tiny_llama(0), tiny_llama(1), tiny_llama(3)

# A prompt that repeats itself, so that prompt lookup finds something.
ONE = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 5, 6, 7]]), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
BATCH = left_padded([4, 8, 6])
SAMPLING = {"do_sample": True, "top_k": 0}
FILTERS = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}


@dataclass
class Mode:
    """A way to call `generate`, and what to expect of a guided call."""

    name: str
    options: dict | Callable[[], dict] = field(default_factory=dict)
    inputs: dict = field(default_factory=lambda: BATCH)
    expected: str = EXACT
    error: str = ""
    why: str = ""
    elsewhere: str = ""  # the test, if it is not the one that goes through this list

    def kwargs(self) -> dict:
        return self.options() if callable(self.options) else dict(self.options)


class Ban(LogitsProcessor):
    """Constrained decoding: some tokens at minus infinity, wherever it stands in the list."""

    tokens = (4, 5, 6, 7, 8, 9)

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.tokens] = -torch.inf
        return scores


def chat_continues() -> dict:
    cache = DynamicCache(config=BASE.config)
    with torch.no_grad():
        BASE(input_ids=ONE["input_ids"][:, :5], **{CACHE: cache}, use_cache=True)
    return {CACHE: cache}


def embeddings() -> dict:
    return {"inputs_embeds": BASE.get_input_embeddings()(ONE["input_ids"])}


def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A decoding method of the user's own."""
    processors = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
    return GenerationMixin._sample(model, input_ids, generation_config=generation_config, **processors, **kwargs)


MODES = [
    Mode("greedy"),
    Mode("sampling", SAMPLING),
    Mode("temperature, top-k, top-p, min-p, typical", SAMPLING | FILTERS),
    Mode("`num_return_sequences`", SAMPLING | {"num_return_sequences": 3}),
    Mode("beam search", {"num_beams": 3, "num_return_sequences": 2}),
    Mode("beam search, early stopping", {"num_beams": 4, "early_stopping": True, "length_penalty": 0.5}),
    Mode("beam sampling", SAMPLING | {"num_beams": 3}),
    Mode("assisted decoding, another model", {"assistant_model": ASSISTANT}, ONE),
    Mode("assisted decoding, sampling", SAMPLING | {"assistant_model": ASSISTANT}, ONE),
    Mode("assisted decoding by the base itself", {"assistant_model": BASE}, ONE),
    Mode("assisted decoding, early exit", {"assistant_early_exit": 1}, ONE),
    Mode(
        "assisted decoding, an assistant with another tokenizer, greedy",
        {"assistant_model": ASSISTANT, "tokenizer": 1, "assistant_tokenizer": 2},
        ONE,
        REFUSED,
        elsewhere="test_universal_assisted_decoding",
        why="drafts would be guided on the assistant's tokens; with sampling they are not, and it is exact",
    ),
    Mode(
        "`assistant_model=processor.assistant()`: the reward model drafts",
        elsewhere="test_greedy_text_is_the_same",
        why="the same tokens if greedy, the same distribution if sampled",
    ),
    Mode(
        "the same, with a reward model that is not smaller than the base, or an adapter on it",
        expected=REFUSED,
        elsewhere="test_assistants_that_are_refused",
        why="drafts would gain nothing",
    ),
    Mode("prompt lookup", {"prompt_lookup_num_tokens": 3}, ONE),
    Mode("prompt lookup, sampling", SAMPLING | {"prompt_lookup_num_tokens": 3}, ONE),
    Mode("`custom_generate=<callable>`", {"custom_generate": sample}),
    Mode(
        "sequential Monte Carlo, `custom_generate=smc_sample`",
        elsewhere="test_the_distribution_approaches_the_optimum_over_whole_texts",
        why="one particle is guided sampling, many are the optimum over whole texts",
    ),
    Mode("`use_cache=False`", {"use_cache": False}),
    Mode(
        "static cache of the base",
        {"cache_implementation": "static"},
        why="fused, and compiled as `generate` compiles the base; separate if all layers have windows that it outgrows",
    ),
    Mode("quantised cache of the base (quanto)", elsewhere="test_a_quantised_cache_of_the_base"),
    Mode("`past_key_values` that continues a chat", chat_continues, ONE),
    Mode("`inputs_embeds` together with `input_ids`", embeddings, ONE),
    Mode("classifier-free guidance", {"guidance_scale": 1.5}, ONE),
    Mode("`min_new_tokens`", {"min_new_tokens": 5}),
    Mode("repetition and n-gram penalties", {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    Mode("`forced_eos_token_id`", {"forced_eos_token_id": EOS}),
    Mode("`suppress_tokens`, `bad_words_ids`", {"suppress_tokens": [4, 5], "bad_words_ids": [[6], [7, 8]]}),
    Mode("`sequence_bias`", {"sequence_bias": [[[4], 3.0]]}),
    Mode("`prefix_allowed_tokens_fn`", {"prefix_allowed_tokens_fn": lambda *_: [3, 4, 5, 6, EOS]}),
    Mode("`exponential_decay_length_penalty`", {"exponential_decay_length_penalty": (3, 1.2)}),
    Mode("`renormalize_logits`", {"num_beams": 2, "renormalize_logits": True}),
    Mode(
        "`inputs_embeds` alone",
        lambda: embeddings() | {"input_ids": None},
        ONE,
        REFUSED,
        "was given 0",
        "the reward model can't read embeddings of the base",
    ),
    Mode(
        'continuous batching: `cache_implementation="paged"`, `generate_batch`',
        {"cache_implementation": "paged"},
        ONE,
        REFUSED,
        "Continuous batching",
        "the engine ignores logits processors",
    ),
    Mode(
        "`smc_sample` with beams, greedy, `target_kl`, several guides, or probabilities changed after guidance",
        expected=REFUSED,
        elsewhere="test_combinations_without_a_distribution_are_refused",
        why="no distribution over whole texts is defined",
    ),
    Mode(
        "group and constrained beams, contrastive search, DoLa",
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        BATCH,
        REFUSED,
        "trust_remote_code",
        "transformers moved them to code on the Hub, which it won't load unasked; not tested with it",
    ),
]


@dataclass
class Architecture:
    """A family of reward models. `note` says what is special about it."""

    name: str
    config: str
    sizes: dict
    note: str = ""
    targets: str | list[str] = "all-linear"
    fused: bool = True

    def model(self):
        torch.manual_seed(5)
        config = getattr(transformers, self.config)(**self.sizes)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZES = TINY_SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 1, "max_position_embeddings": 256}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.4}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
ATTENTION = ["q_proj", "v_proj"]
READ_AGAIN = "the whole text is read again for every token: slow"

ARCHITECTURES = [
    Architecture("Llama", "LlamaConfig", SIZES),
    Architecture("Qwen2", "Qwen2Config", SIZES),
    Architecture("Qwen3", "Qwen3Config", SIZES | {"head_dim": 8}),
    Architecture("Mistral", "MistralConfig", SIZES | {"sliding_window": 4}, "sliding window shorter than the text"),
    Architecture(
        "Gemma 2", "Gemma2Config", SIZES | {"head_dim": 8, "sliding_window": 4}, "alternating windows, soft-caps"
    ),
    Architecture(
        "Gemma 3",
        "Gemma3TextConfig",
        SIZES | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "alternating windows",
    ),
    Architecture(
        "GPT-2",
        "GPT2Config",
        GPT2 | {"vocab_size": VOCAB_SIZE, "bos_token_id": PAD, "eos_token_id": PAD, "pad_token_id": PAD},
        "absolute positions; pad = bos",
    ),
    Architecture(
        "Mixtral",
        "MixtralConfig",
        SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "mixture of experts",
        ATTENTION,
    ),
    Architecture(
        "Bloom", "BloomConfig", TOKENS | {"hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    ),
    Architecture(
        "Mamba",
        "MambaConfig",
        TOKENS | {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
        READ_AGAIN,
        ["in_proj", "x_proj"],
        fused=False,
    ),
    Architecture(
        "LFM2",
        "Lfm2Config",
        SIZES | {"layer_types": ["conv", "full_attention"] * 2},
        "hybrid; " + READ_AGAIN,
        ATTENTION,
        fused=False,
    ),
    Architecture(
        "Qwen3-Next",
        "Qwen3NextConfig",
        SIZES
        | {
            "head_dim": 8,
            "shared_expert_intermediate_size": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        }
        | LINEAR
        | EXPERTS,
        "hybrid; " + READ_AGAIN,
        ATTENTION,
        fused=False,
    ),
    Architecture(
        "RecurrentGemma",
        "RecurrentGemmaConfig",
        TOKENS
        | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        | {"lru_width": 16, "attention_window_size": 4},
        "states in its modules; " + READ_AGAIN,
        ATTENTION,
        fused=False,
    ),
]


def table() -> str:
    lines = ["| `generate` with | guided text |", "|---|---|"]
    lines += [f"| {mode.name} | {mode.expected}{f': {mode.why}' if mode.why else ''} |" for mode in MODES]
    lines += ["", "| the processor, called | guided text |", "|---|---|"]
    lines += [f"| {name} | {outcome} |" for name, outcome in CALLERS]
    lines += ["", "| reward model | guided text |", "|---|---|"]
    lines += [f"| {family.name}{f' ({family.note})' if family.note else ''} | exact |" for family in ARCHITECTURES]
    lines += [f"| {name} | {outcome} |" for name, outcome in OTHER_REWARD_MODELS]
    lines += ["", "| where a model reads a prompt of its own | guided text |", "|---|---|"]
    lines += [f"| {name} | {outcome} |" for name, outcome in OWN_PROMPTS]
    lines += ["", "| prompts and vocabularies | guided text |", "|---|---|"]
    lines += [f"| {name} | {outcome} |" for name, outcome in PROMPTS_AND_VOCABULARIES]
    return "\n".join(lines)


# Each of these is a test of its own.
CALLERS = [
    ("by another processor, three deep; by `functools.partial`; by a subclass", "exact, fused"),
    ("by a `LogitsProcessorList` inside the list", "refused by `generate`: a list is no processor"),
    ("by `generate` behind ten decorators", "exact, fused"),
    ('by `pipeline("text-generation")`, with a streamer', "exact, fused"),
    ("together with a second processor on the same base", "exact, both fused"),
    ("by two threads that share a base, with one processor each", "exact, fused"),
    ("by `generate` inside another's stopping criterion", "exact"),
    ("by your own decoding loop that prefills and steps", "exact; with padding, refused until the mask is given"),
    ("from the middle of a text, or for every second token", "exact"),
    ("after an exception or an interruption in the middle of a text", "exact, fused"),
    ("for a prompt that continues an earlier text, or begins like it", "exact, fused"),
    ("after a reward model or the base was changed", "exact for the models at the beginning of the text"),
    ("with a base that `torch.compile(model)` wraps (torch after 2.6)", "exact, fused"),
    ("with a base whose `forward` is compiled or has hooks", "exact, in separate passes"),
    ("with a base whose layers are on several devices (`device_map`)", "exact, fused"),
    (
        "with a base that is sharded over processes (`tp_plan`, FSDP2)",
        "exact with a separate reward model, with `tp_plan` also with a sentence; an adapter on its weights is refused",
    ),
    ("as a copy or a pickle, alone or with the base", "exact, fused"),
]
OTHER_REWARD_MODELS = [
    ("LoRA adapter on the base, in the base's own forward passes", "exact, in every mode above"),
    ("DoRA, trained biases, `modules_to_save`, embeddings", "exact, in separate passes"),
    ("weights that are offloaded (`device_map`)", "exact"),
    ("one strength per request, schedules, a reference", "exact, in every mode above"),
    ("a target divergence (`target_kl`)", "exact: each text as it would be alone, also with beams and drafts"),
    (
        "weights of base and reward model in 8 bits (torchao; bitsandbytes with `llm_int8_threshold=0.0`) or 4 (nf4)",
        "exact for those weights; adapters on them are fused",
    ),
    (
        "layers that round each row in view of the others (bitsandbytes in 8 bits with outliers, one scale per tensor)",
        "adapters in separate passes, so that the base's rows are rounded as without guidance",
    ),
    ("bfloat16 or float16 weights", "exact for those weights; the product is in float32"),
    ("prompt-, prefix-, p-tuned, CPT and aLoRA adapters", "exact; the whole text is read again for every token"),
    ("adapters with `layer_replication`", "exact; fused if the order of layers is that of the base"),
    (
        "dynamic-NTK and longrope rotary embeddings",
        "exact; cached and fused up to the original length, the whole text is read again beyond it",
    ),
    (
        "decoders without `position_ids` (BART, Marian, MPT, Whisper, …), RoBERTa and similar models as decoders",
        "exact; the whole text is read again for every token, row by row",
    ),
    (
        "every other type of causal LM of which transformers can build a tiny one: more than 150",
        "exact, or refused as bidirectional: listed below",
    ),
    (
        "an adapter whose base was changed under the same name",
        "exact, with its own weights, if the adapter has a fingerprint",
    ),
    ("encoder-decoder, classifier, or bidirectional model", "refused: not a causal LM"),
    ("pickled, damaged, incomplete or infinite weights", "refused"),
]
OWN_PROMPTS = [
    ("reward models and references with weights of their own, in every mode above", "exact, in separate passes"),
    ("adapters and sentences on the base, in every mode above", "exact, fused, with longer and shorter prompts"),
    ('a negative prompt, for `reference="base"`', "exact, fused; `guidance_scale` for one prompt, greedy or sampled"),
    ("with the families of reward models above", "exact, fused where they are above"),
    ("sequential Monte Carlo, statistics, `target_kl`, schedules, one strength per request", "exact, by request"),
    ("chats that are continued, reuse in any order, your own decoding loop, copies and pickles", "exact"),
    ("`assistant_model=processor.assistant()` of a separate reward model", "exact: it drafts after its own prompt"),
    ("`processor.assistant()` of a sentence on the base", "refused: drafts would gain nothing"),
    ("vocabularies that are aligned", "exact: the prompt in ids of the model, the answer is translated"),
    ("at strength 0", "bit for bit that of the base; nothing is read"),
    ("another number of rows than `generate` has prompts, or texts that did not begin together", "refused"),
    ("a sentence without encoded prompts, or with others than those of the call", "refused: use `processor.encode`"),
    ("padding on the right, rows of padding alone, no mask", "refused"),
]
PROMPTS_AND_VOCABULARIES = [
    ("left padding, inferred or given; masks with holes", "exact"),
    ("a text that starts with the pad token, or pad = bos", "refused until the mask is given, then exact"),
    ("right padding", "refused"),
    ("base and reward model would see different padding", "refused"),
    ("a text that is only in the `past_key_values` of the base", "refused: pass the whole text as `input_ids`"),
    (
        "encoder-decoder base; images, audio or `encoder_hidden_states` in the prompt",
        "refused: the reward model can't see the prompt",
    ),
    ("a base with prompt tuning", "refused with `base_model`; exact without, given the mask"),
    ("longer than the positions of a reward model, or ids beyond its embeddings", "refused, the limit is named"),
    ("vision-language base, text prompt", "exact"),
    (
        "ids in another order, other padded sizes, added tokens with or without logits",
        "exact, aligned by the strings of the tokens",
    ),
    (
        "tokens that are other strings, in every mode above, with padding, beams, drafts, reuse and copies",
        "exact for the candidates, if no spelling is pruned; others keep their probability "
        "([how](other_tokenizers.md))",
    ),
    ("tokens whose bytes are not known; a reward model without an end token", "refused"),
    ("tokens that are other strings, in vLLM, lm-eval and `processor.assistant()`", "refused"),
]


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
