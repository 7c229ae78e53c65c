"""Text that a reward model drafts: the same tokens without sampling, and the same distribution with it."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from helpers import assert_same, generate
from oracle import Recompute
from support import ASSISTANT, BASE, ONE
from tiny import EOS, tiny_llama
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import LogitsProcessor, PreTrainedTokenizerFast, TextStreamer

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.decoding.assistant import DraftingAssistant
from hf_genarm.decoding.draft_length import DraftLength
from hf_genarm.decoding.fusion import joint_network, joint_pass
from hf_genarm.decoding.fusion.joint_network import JointNetwork

ARM = tiny_llama(1, num_hidden_layers=1)
LONG = {"max_new_tokens": 16, "min_new_tokens": 12}


def oracle(*models, alphas=None):
    return Recompute(list(models), list(alphas or [1.0] * len(models)), ONE["attention_mask"])


# --- the same tokens ---

OPTIONS = {
    "greedy": dict,
    "`min_new_tokens`": lambda: {"min_new_tokens": 6},
    "penalties": lambda: {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "an end that is forced": lambda: {"forced_eos_token_id": EOS},
    "`suppress_tokens`": lambda: {"suppress_tokens": [4, 5], "bad_words_ids": [[6], [7, 8]]},
    "`prefix_allowed_tokens_fn`": lambda: {"prefix_allowed_tokens_fn": lambda *_: [3, 4, 5, 6, EOS]},
    "one new token": lambda: {"max_new_tokens": 1},
    "no end": lambda: {"eos_token_id": None},
}


@pytest.mark.parametrize("n_drafts", [1, 4, None])
@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_text_is_the_same(name, n_drafts):
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    drafted = {"assistant_model": processor.assistant(n_drafts)}
    for max_new_tokens in (12, 5) if "new" not in name else (12,):  # one instance; the second ends within drafts
        options = {"max_new_tokens": max_new_tokens} | OPTIONS[name]()
        assert_same(
            generate(BASE, [processor], ONE, **options | drafted),
            generate(BASE, [oracle(ARM)], ONE, **{"max_new_tokens": max_new_tokens} | OPTIONS[name]()),
        )


class Clamp(LogitsProcessor):
    """Comes after guidance, and changes what it prefers."""

    def __call__(self, input_ids, scores):
        return scores.masked_fill(scores == scores.max(), -torch.inf)


@pytest.mark.parametrize("where", ["before", "after", "around"])
def test_other_processors_still_act(where):
    def listed(it):
        if where == "around":

            class Around(LogitsProcessor):
                def __call__(self, input_ids, scores):
                    return Clamp()(input_ids, it(input_ids, scores))

            return [Around()]
        return [Clamp(), it] if where == "before" else [it, Clamp()]

    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    output = generate(BASE, listed(processor), ONE, assistant_model=processor.assistant(3))
    assert_same(output, generate(BASE, listed(oracle(ARM)), ONE))
    assert output.sequences.tolist() != generate(BASE, [oracle(ARM)], ONE).sequences.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0},
        {"alpha": -0.5},
        {"alpha": lambda step: 0.5 + 0.2 * step},
        {"alpha": torch.tensor([[0.7]])},
        {"target_kl": 0.5},
        {"reference": "base"},
        {"reference": ASSISTANT},
    ],
    ids=lambda settings: f"{settings}"[:24],
)
def test_strengths_and_references(settings):
    """Text and statistics are those of the processor without drafts, which other tests compare with an oracle."""
    outputs = []
    for n_drafts in (None, 3):
        processor = GenARMLogitsProcessor(ARM, base_model=BASE, **settings)
        processor.keeps_statistics = True
        drafted = {"assistant_model": processor.assistant(n_drafts)} if n_drafts else {}
        outputs.append((generate(BASE, [processor], ONE, **LONG | drafted), processor))
    (expected, plain), (output, drafting) = outputs
    assert_same(output, expected, atol=1e-3 if "target_kl" in settings else 1e-4)
    if settings.get("alpha") == 0.0:
        return
    ours, theirs = (it.statistics(expected.sequences) for it in (drafting, plain))
    assert len(ours["kl"]) == len(theirs["kl"]) > 10
    for name in ("kl", "alpha_0", "reward_log_prob_0", "guided_log_prob"):
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), atol=1e-3, rtol=0)


def test_several_reward_models():
    large = tiny_llama(4)
    processor = GenARMLogitsProcessor([large, ARM], [0.5, 1.0], base_model=BASE)
    output = generate(BASE, [processor], ONE, assistant_model=processor.assistant(3), **LONG)
    assert_same(output, generate(BASE, [oracle(large, ARM, alphas=[0.5, 1.0])], ONE, **LONG))


def test_a_prompt_that_is_padded():
    inputs = {"input_ids": torch.tensor([[0, 0, 5, 6, 7, 8]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    output = generate(BASE, [processor], inputs, assistant_model=processor.assistant(3))
    assert_same(output, generate(BASE, [Recompute([ARM], [1.0], inputs["attention_mask"])], inputs))


def test_stop_strings_within_drafts(tokenizer):
    base, arm = (tiny_llama(n, vocab_size=len(tokenizer), num_hidden_layers=2 - n) for n in (0, 1))
    inputs = tokenizer("How was the train ride?", return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    processor = GenARMLogitsProcessor(arm, base_model=base, tokenizer=tokenizer)
    free = generate(base, [processor], inputs)
    lengths = set()
    for end in range(2, 9):
        stop = {"stop_strings": [tokenizer.decode(free.sequences[0, length + end - 2 : length + end])]}
        stop |= {"tokenizer": tokenizer}
        expected = generate(base, [processor], inputs, **stop)
        for eos in ({}, {"eos_token_id": None}):
            drafted = {"assistant_model": processor.assistant(4)} | eos
            assert_same(generate(base, [processor], inputs, **stop | drafted), expected)
        lengths.add(expected.sequences.shape[1])
    assert len(lengths) > 2
    without = GenARMLogitsProcessor(arm, base_model=base)
    with pytest.raises(ValueError, match="has no tokenizer"):
        generate(base, [without], inputs, assistant_model=without.assistant(), **stop)


def test_a_new_call_after_a_draft_that_ended():
    """What was of no use for a draft is read in the next call."""
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    drafted = {"assistant_model": processor.assistant(3)}
    first = generate(BASE, [processor], ONE, forced_eos_token_id=EOS, max_new_tokens=4, **drafted).sequences
    inputs = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    for options in (drafted, {}):
        expected = generate(BASE, [Recompute([ARM], [1.0])], inputs)
        assert_same(generate(BASE, [processor], inputs, **options), expected)


def test_after_a_reward_model_was_changed():
    arm = copy.deepcopy(ARM)
    processor = GenARMLogitsProcessor(arm, base_model=BASE)
    assistant = processor.assistant(3)
    generate(BASE, [processor], ONE, assistant_model=assistant)
    torch.nn.init.normal_(arm.model.layers[0].self_attn.q_proj.weight, std=0.4)
    assert_same(generate(BASE, [processor], ONE, assistant_model=assistant), generate(BASE, [oracle(arm)], ONE))


class Broken(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise RuntimeError("broken")


@pytest.mark.parametrize("where", ["drafting", "verifying"])
def test_after_an_exception(where):
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    assistant, broken = processor.assistant(3), Broken()
    if where == "verifying":  # drafts go through without it
        inner, assistant.generate = assistant.generate, lambda **kwargs: inner(**kwargs | {"logits_processor": []})
    with pytest.raises(RuntimeError, match="broken"):
        generate(BASE, [processor, broken], ONE, assistant_model=assistant)
    for options in ({}, {"assistant_model": processor.assistant(3)}):
        assert_same(generate(BASE, [processor], ONE, **options), generate(BASE, [oracle(ARM)], ONE))


def test_an_ensemble_weight_relaxes_what_is_accepted():
    """A weight relaxes what is accepted, so that no score may be left out."""
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    options = {"eos_token_id": None, "assistant_ensemble_weight": 0.3, "assistant_model": processor.assistant(3)}
    output = generate(BASE, [processor], ONE, **options)
    start, is_likeliest = ONE["input_ids"].shape[1], []
    for n_new, scores in enumerate(output.scores):
        text, token = output.sequences[:, : start + n_new], output.sequences[0, start + n_new]
        expected = oracle(ARM)(text, BASE(input_ids=text).logits[:, -1])
        torch.testing.assert_close(scores.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)
        is_likeliest.append(bool(token == scores.argmax()))
    assert len(is_likeliest) == 10
    assert not all(is_likeliest)


def test_a_streamer_gets_all_tokens(tokenizer, capsys):
    base, arm = (tiny_llama(n, vocab_size=len(tokenizer), num_hidden_layers=2 - n) for n in (0, 1))
    processor = GenARMLogitsProcessor(arm, base_model=base)
    output = generate(base, [processor], ONE, assistant_model=processor.assistant(3), streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip() == tokenizer.decode(output.sequences[0]).strip()


def test_a_copy_drafts_for_the_copy():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    assistant = processor.assistant(2)
    expected = generate(BASE, [processor], ONE, assistant_model=assistant)
    base, other = pickle.loads(pickle.dumps((BASE, processor)))
    assert_same(generate(base, [other], ONE, assistant_model=other.assistant(2)), expected)


# --- no waste ---


def passes_of(model):
    lengths = []
    model.register_forward_hook(
        lambda _, args, kwargs, output: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return lengths


def test_each_token_is_read_once():
    arm, other, base = copy.deepcopy(ARM), tiny_llama(4), copy.deepcopy(BASE)
    processor = GenARMLogitsProcessor([arm, other], base_model=base)
    read, by_other, by_base = passes_of(arm), passes_of(other), passes_of(base)
    for _ in range(2):
        for lengths in (read, by_other, by_base):
            lengths.clear()
        generate(base, [processor], ONE, assistant_model=processor.assistant(3), **LONG)
        # The drafts of a cycle, and what it was given to go on from
        assert read[0] == ONE["input_ids"].shape[1]
        assert set(read[1:]) == {1}
        assert sum(read) <= sum(by_base)
        assert len(by_other) <= len(by_base)


def test_the_base_verifies_in_passes_for_a_few_tokens(monkeypatch):
    """Over other modules, unless something acts on its own; and over its weights as they are now."""
    for module in (joint_network, joint_pass):  # as on a processor where torch is slow for a few tokens
        monkeypatch.setattr(module, "slow_for_few_rows", lambda device: True)
    passes, call = [], JointNetwork.__call__
    monkeypatch.setattr(JointNetwork, "__call__", lambda self, *args: passes.append(1) or call(self, *args))
    base = copy.deepcopy(BASE)
    processor = GenARMLogitsProcessor(ARM, base_model=base)
    drafted = {"assistant_model": processor.assistant(3)} | LONG
    assert_same(generate(base, [processor], ONE, **drafted), generate(base, [oracle(ARM)], ONE, **LONG))
    n_passes = len(passes)
    assert n_passes > 2

    before = generate(base, [oracle(ARM)], ONE, **LONG)
    layer = base.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().flip(0))
    changed = generate(base, [oracle(ARM)], ONE, **LONG)
    assert changed.sequences.tolist() != before.sequences.tolist()
    assert_same(generate(base, [processor], ONE, **drafted), changed)
    assert len(passes) > n_passes

    n_passes = len(passes)
    handle = layer.register_forward_hook(lambda module, args, output: -output)
    hooked = generate(base, [oracle(ARM)], ONE, **LONG)
    assert hooked.sequences.tolist() != changed.sequences.tolist()
    assert_same(generate(base, [processor], ONE, **drafted), hooked)
    assert len(passes) == n_passes
    handle.remove()


def test_nothing_is_read_after_a_token_that_is_rejected():
    arm = copy.deepcopy(ARM)
    processor = GenARMLogitsProcessor(arm, -4.0, base_model=BASE)  # so that no draft is accepted
    read = passes_of(arm)
    output = generate(BASE, [processor], ONE, assistant_model=processor.assistant(1), eos_token_id=None)
    assert len(read) == len(output.scores) == 10


# --- what can't be ---


def test_assistants_that_are_refused():
    with pytest.raises(ValueError, match="without `base_model`"):
        GenARMLogitsProcessor(ARM).assistant()
    with pytest.raises(ValueError, match="drafts would gain nothing"):
        GenARMLogitsProcessor(tiny_llama(1), base_model=BASE).assistant()
    with pytest.raises(ValueError, match="`num_assistant_tokens` is 0"):
        GenARMLogitsProcessor(ARM, base_model=BASE).assistant(0)
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    inputs = {name: value.repeat(2, 1) for name, value in ONE.items()}
    with pytest.raises(ValueError, match="batch_size = 1"):
        generate(BASE, [processor], inputs, assistant_model=processor.assistant())


# --- how many ---


@pytest.mark.parametrize(("acceptance", "expected"), [(0.95, range(5, 13)), (0.5, range(1, 3)), (0.05, range(1))])
def test_the_number_of_drafts(acceptance, expected):
    generator, length, numbers = torch.Generator().manual_seed(0), DraftLength(), []
    for _ in range(400):
        numbers.append(n := length.n_drafts())
        length.record(n, int((torch.rand(n, generator=generator) < acceptance).cumprod(dim=0).sum()))
    late = numbers[100:]
    assert sum(n in expected for n in late) > 0.75 * len(late)


def test_text_that_cannot_be_drafted_costs_little_more():
    length, n_drafts = DraftLength(), 0
    for _ in range(400):
        n_drafts += (n := length.n_drafts())
        length.record(n, 0)
    assert n_drafts * DraftLength.COST < 0.1 * 400


@pytest.mark.parametrize("arm", [ARM, [ARM, tiny_llama(2, num_hidden_layers=1)]], ids=["one reward", "two rewards"])
def test_the_same_seed_gives_the_same_text(arm):
    """Also in a second call of the same assistant, after another text, and on a machine that is slow at times."""
    processor = GenARMLogitsProcessor(arm, base_model=BASE)
    assistant = processor.assistant()
    options = {"do_sample": True, "top_k": 0, "assistant_model": assistant} | LONG
    first = generate(BASE, [processor], ONE, **options)
    other = generate(BASE, [processor], ONE, seed=1, **options)
    assert first.sequences.tolist() != other.sequences.tolist()
    assert generate(BASE, [processor], ONE, **options).sequences.tolist() == first.sequences.tolist()
    fresh = GenARMLogitsProcessor(arm, base_model=BASE)
    again = generate(BASE, [fresh], ONE, **options | {"assistant_model": fresh.assistant()})
    assert again.sequences.tolist() == first.sequences.tolist()


# --- the same distribution ---

VOCAB, LENGTH = 6, 3
SIZES = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FEW = [tiny_llama(seed, **SIZES, initializer_range=0.3, num_hidden_layers=n) for seed, n in ((3, 2), (4, 1), (5, 2))]
PROMPT = torch.tensor([[3, 4, 5, 3, 4]])

# transformers splits the strings of tokens with the last one.
LETTERS = Tokenizer(
    WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "x": 3, "y": 4, "z": 5, "abcdef": 6}, unk_token="<pad>")
)
LETTERS.decoder = Fuse()
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=LETTERS, pad_token="<pad>", eos_token="</s>")

LAWS = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "no end": {"eos_token_id": None},
    "`min_new_tokens`": {"min_new_tokens": 2},
    "more drafts than tokens": {"drafts": 8},
    "one draft": {"drafts": 1},
    "measured": {"drafts": None},
    "two reward models": {"models": (1, 2)},
    "a reference": {"reference": "base"},
    "stop strings": {"stop_strings": ["z", "xy"], "tokenizer": TOKENIZER},
}


def has_ended(setting, text):
    stops = "stop_strings" in setting and (5 in text or (3, 4) in pairwise(text))
    return stops or ("eos_token_id" not in setting and 2 in text)


class Contrast(LogitsProcessor):
    """The distribution with the base as reference, written out: base and reward model at strengths 0.3 and 0.7."""

    def __call__(self, input_ids, scores):
        with torch.no_grad():
            of_base, of_arm = (model(input_ids=input_ids).logits[:, -1].double().log_softmax(-1) for model in FEW[:2])
        return scores.log_softmax(-1) + 0.7 * (of_arm - of_base)


class Guidance(LogitsProcessor):
    """Eq. 7 by passes from scratch."""

    def __init__(self, models):
        self.models = models

    def __call__(self, input_ids, scores):
        for index in self.models:
            with torch.no_grad():
                scores = scores + 0.7 * FEW[index](input_ids=input_ids).logits[:, -1].double().log_softmax(-1)
        return scores


def options_of(setting):
    """Those of `generate`."""
    return {key: value for key, value in setting.items() if key not in ("drafts", "models", "reference")}


def law_of(setting):
    """The probability of each text of `LENGTH` new tokens, ended ones padded: a product of `generate`'s own scores."""
    options = options_of(setting)
    it = Contrast() if "reference" in setting else Guidance(setting.get("models", (1,)))
    law = {(): 1.0}
    for n_new in range(LENGTH):
        going_on = [text for text in law if not has_ended(setting, text)]
        inputs = torch.cat([PROMPT.repeat(len(going_on), 1), torch.tensor(going_on).long().view(len(going_on), -1)], 1)
        now = options | {"max_new_tokens": 1, "max_length": None}
        if "min_new_tokens" in now:
            now["min_new_tokens"] = max(now["min_new_tokens"] - n_new, 0)
        output = FEW[0].generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            logits_processor=[it],
            do_sample=True,
            return_dict_in_generate=True,
            output_scores=True,
            **{"top_k": 0} | now,
        )
        rows = dict(zip(going_on, output.scores[0].softmax(-1).tolist(), strict=True))
        longer = {(*text, v): law[text] * p for text, row in rows.items() for v, p in enumerate(row)}
        law = longer | {(*text, 0): p for text, p in law.items() if text not in rows}
    return law


def count(setting, n_texts):
    options = options_of(setting)
    models = [FEW[index] for index in setting.get("models", (1,))]
    kwargs = {"reference": setting.get("reference"), "tokenizer": setting.get("tokenizer")}
    processor = GenARMLogitsProcessor(models, 0.7, base_model=FEW[0], **kwargs)
    assistant, counts = processor.assistant(setting.get("drafts", 2)), {}
    for _ in range(n_texts):
        output = FEW[0].generate(
            input_ids=PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            logits_processor=[processor],
            assistant_model=assistant,
            do_sample=True,
            max_new_tokens=LENGTH,
            **{"top_k": 0} | options,
        )
        text = output[0, PROMPT.shape[1] :].tolist()
        text = tuple(text + [0] * (LENGTH - len(text)))
        counts[text] = counts.get(text, 0) + 1
    return counts


def p_values(counts, law, n_resamples=2000):
    """Of χ² and of the total variation, each against its own distribution for samples of the law."""
    texts = [text for text, p in law.items() if p > 0]
    assert set(counts) <= set(texts)
    p = torch.tensor([law[text] for text in texts], dtype=torch.float64)
    n, observed = sum(counts.values()), torch.tensor([float(counts.get(text, 0)) for text in texts])
    samples = torch.distributions.Multinomial(n, p).sample((n_resamples,))
    distances = [lambda x: ((x - n * p) ** 2 / (n * p)).sum(-1), lambda x: (x / n - p).abs().sum(-1) / 2]
    return [float((of(samples) >= of(observed)).double().mean()) for of in distances]


@pytest.mark.parametrize(
    ("name", "n_texts"),
    [("no end", 200), *(pytest.param(x, 2000, marks=pytest.mark.slow) for x in LAWS)],
)
def test_sampled_text_has_the_guided_distribution(name, n_texts):
    torch.manual_seed(0)
    law = law_of(LAWS[name])
    assert abs(sum(law.values()) - 1) < 1e-5
    assert min(p_values(count(LAWS[name], n_texts), law)) > 1e-3


def test_the_distribution_of_drafts_depends_on_the_text_only(monkeypatch):
    """If it followed from what is drawn, as when what would end the text is dropped, texts would have another law."""
    right, n_possible = DraftingAssistant.generate, {}

    def noted(self, **kwargs):
        output = right(self, **kwargs)
        text = tuple(kwargs["input_ids"][0, PROMPT.shape[1] :].tolist())
        n_possible.setdefault(text, set()).add(int(output.scores[0].isfinite().sum()))
        return output

    monkeypatch.setattr(DraftingAssistant, "generate", noted)
    torch.manual_seed(0)
    count(LAWS["stop strings"], 30)
    assert n_possible[()] == {VOCAB - 1}
    assert all(len(numbers) == 1 for numbers in n_possible.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no end", "stop strings"])
def test_a_wrong_acceptance_rule_is_noticed(name, monkeypatch):
    """The control: what replaces a rejected draft is drawn from the whole distribution, not from what is left of it."""
    from transformers.generation import utils

    right = utils._speculative_sampling

    def wrong(candidate_input_ids, candidate_logits, candidate_length, new_logits, *args, **kwargs):
        valid, n_matches = right(candidate_input_ids, candidate_logits, candidate_length, new_logits, *args, **kwargs)
        last = new_logits[0, valid.shape[1] - 1].softmax(-1).multinomial(1)[None]
        return torch.cat([valid[:, :-1], last], dim=1), n_matches

    monkeypatch.setattr(utils, "_speculative_sampling", wrong)
    torch.manual_seed(0)
    assert min(p_values(count(LAWS[name], 600), law_of(LAWS[name]))) < 1e-3


@pytest.mark.slow
def test_a_wrong_distribution_of_drafts_is_noticed(monkeypatch):
    """The control for what an assistant says of its drafts."""
    right = DraftingAssistant.generate

    def wrong(self, *args, **kwargs):
        output = right(self, *args, **kwargs)
        output.scores = tuple(scores / 8 for scores in output.scores)
        return output

    monkeypatch.setattr(DraftingAssistant, "generate", wrong)
    torch.manual_seed(0)
    assert min(p_values(count(LAWS["no end"], 600), law_of(LAWS["no end"]))) < 1e-3
