"""Rewards of strings: reward models whose tokens are other strings than those of the base, against enumeration."""

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import assert_same, generate
from support import BASE, EXACT, MODES
from tiny import EOS, left_padded, tiny_llama
from two_tokenizers import BASE_TOKENIZER, REWARD_TOKENIZER, Enumerated, Strings, adapter_of, of_letters

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.decoding.strings.byte_map import ByteMap
from hf_genarm.decoding.strings.spellings import NO_PRUNING, PrefixProbabilities
from hf_genarm.decoding.strings.string_rewards import Candidates
from hf_genarm.decoding.strings.text_tree import TextTree
from hf_genarm.hub.sharing import without_adapter

ARM = adapter_of(REWARD_TOKENIZER, 1)
REFERENCE = without_adapter(ARM)
PROMPT = REWARD_TOKENIZER("cafe")["input_ids"]


def exact(processor):
    """The same processor with all tokens as candidates, and with nothing pruned."""
    (strings,) = processor._machine.rewards.models
    strings._candidates, strings.probabilities._pruning = Candidates(1.0, 10**6), NO_PRUNING
    return processor


def guide(model=ARM, reference="base", **options):
    tokenizers = {"tokenizer": BASE_TOKENIZER, "reward_tokenizer": REWARD_TOKENIZER}
    return GenARMLogitsProcessor(model, base_model=BASE, reference=reference, **tokenizers, **options)


def unpadded(inputs):
    return [ids[mask == 1].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


# --- the probability of a string ---


@pytest.mark.parametrize("tokens", [[], ["ab", "ba"], ["aa", "bb", "ab", "aab", "bba"]], ids=str)
def test_prefix_probabilities_are_sums_over_all_sequences_of_tokens(tokens):
    tokenizer = of_letters("ab", tokens)
    models = [tiny_llama(seed, vocab_size=len(tokenizer)).double() for seed in (1, 2)]
    byte_map = ByteMap(of_letters("ab", ["ba", "bb", "abb"]), tokenizer, {EOS}, {EOS}, len(tokenizer))
    tree = TextTree(*models)
    assert tree.why_rows is None
    probabilities, prompt, written = PrefixProbabilities(byte_map, tree, NO_PRUNING), (1, 4, 3), ""
    text, strings, rewards = probabilities.begin(tree.root.after(prompt)), ["a", "b", "ba", "abb"], np.zeros(2)
    for chosen in (2, 3, 0):
        (log_probs,), (ends,) = probabilities.log_probs([text], [[x.encode() for x in strings]])
        for model, ours, end in zip(models, log_probs, ends, strict=True):
            of_model = Strings(model, tokenizer)
            before = of_model.begins(prompt, written)
            expected = [np.log(of_model.begins(prompt, written + x) / before) for x in strings]
            np.testing.assert_allclose(ours, expected, atol=1e-9)
            np.testing.assert_allclose(end, np.log(of_model.ends(prompt, written) / before), atol=1e-9)
        rewards += log_probs[:, chosen]
        written += strings[chosen]
        (text,) = probabilities.advance([text], [strings[chosen].encode()])
        # The rewards of a text add up to the log-probability of its string, whatever tokens it was cut into.
        total = [np.log(Strings(model, tokenizer).begins(prompt, written)) for model in models]
        np.testing.assert_allclose(rewards, total, atol=1e-9)
        np.testing.assert_allclose(text.log_prob, total, atol=1e-9)
    (at_once,) = probabilities.advance([probabilities.begin(tree.root.after(prompt))], [written.encode()])
    np.testing.assert_allclose(at_once.log_prob, rewards, atol=1e-9)


# --- in `generate` ---

DEFAULT = ("sampling", "beam search", "assisted decoding, another model", "prompt lookup, sampling")


def modes():
    for mode in MODES:
        if mode.expected == EXACT and not mode.elsewhere:
            yield pytest.param(mode, id=mode.name, marks=() if mode.name in DEFAULT else pytest.mark.slow)


@pytest.mark.parametrize("mode", list(modes()))
def test_guided_text_equals_enumeration(mode):
    options = mode.kwargs() | {"max_new_tokens": 4}
    processor = exact(guide(alpha=1.5))
    assert processor.engine == "strings"
    output = generate(BASE, [processor], mode.inputs, **options)
    oracle = Enumerated(ARM, REFERENCE, 1.5, unpadded(mode.inputs))
    expected = generate(BASE, [oracle], mode.inputs, **mode.kwargs() | {"max_new_tokens": 4})
    unguided = generate(BASE, [], mode.inputs, **mode.kwargs() | {"max_new_tokens": 4})
    assert output.sequences.tolist() != unguided.sequences.tolist()
    assert_same(output, expected)


def test_alpha_0_is_no_guidance():
    output, expected = generate(BASE, [guide(alpha=0.0)]), generate(BASE, [])
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert all(map(torch.equal, output.scores, expected.scores))


def test_one_instance_for_many_calls():
    """Prompts of any number and length, strengths for each request, copies: each text is what it would be alone."""
    processor = exact(guide())
    for base, instance in (
        (BASE, processor),
        copy.deepcopy((BASE, processor)),
        pickle.loads(pickle.dumps((BASE, guide()))),
    ):
        exact(instance)
        for inputs in (left_padded([5, 9]), left_padded([7], 4)):
            instance.alpha = torch.linspace(0.5, 2.0, len(inputs["input_ids"]))[:, None]
            output = generate(base, [instance], inputs, max_new_tokens=3)
            for row, prompt in enumerate(unpadded(inputs)):
                oracle = Enumerated(ARM, REFERENCE, float(instance.alpha[row, 0]), [prompt])
                alone = generate(BASE, [oracle], {"input_ids": torch.tensor([prompt])}, max_new_tokens=3)
                assert output.sequences[row, -3:].tolist() == alone.sequences[0, -3:].tolist()
                torch.testing.assert_close(output.scores[2][row], alone.scores[2][0], atol=1e-4, rtol=0)
