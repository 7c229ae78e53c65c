"""Rewards of strings: reward models whose tokens are other strings than those of the base, against enumeration."""

import asyncio
import copy
import itertools
import json
import logging
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import assert_same, generate, run, write
from oracle import next_token_log_probs
from support import ARCHITECTURES, BASE, BATCH, EXACT, MODES, ONE
from tiny import EOS, left_padded, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_tokenizers import (
    BASE_TOKENIZER,
    REWARD_TOKENIZER,
    Enumerated,
    Strings,
    adapter_of,
    of_letters,
    read_by_reward,
    sentencepiece_bpe,
    sentencepiece_unigram,
)

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, GuidanceWarning
from hf_genarm.decoding.strings.byte_map import ByteMap
from hf_genarm.decoding.strings.prompt_reader import PromptReader
from hf_genarm.decoding.strings.spellings import NO_PRUNING, PRUNING, PrefixProbabilities
from hf_genarm.decoding.strings.starting_model import StartingModel
from hf_genarm.decoding.strings.string_rewards import Candidates, StringRewards
from hf_genarm.decoding.strings.text_tree import Node, TextTree
from hf_genarm.decoding.vocab import VocabMap
from hf_genarm.demo import demo_model
from hf_genarm.hub.sharing import without_adapter
from hf_genarm.hub.token_bytes import spelled, token_bytes

ARM = adapter_of(REWARD_TOKENIZER, 1)
# Plain models, which take less time
BOTH = [Strings(copy.deepcopy(ARM).merge_and_unload(), REWARD_TOKENIZER)]
BOTH += [Strings(copy.deepcopy(ARM).unload(), REWARD_TOKENIZER)]
TOKENIZERS = {"tokenizer": BASE_TOKENIZER, "reward_tokenizer": REWARD_TOKENIZER}


def guide(model=ARM, reference="base", **options):
    return GenARMLogitsProcessor(model, reference=reference, **{"base_model": BASE} | TOKENIZERS | options)


def exact(processor):
    """The same processor with all tokens as candidates, and with nothing pruned."""
    (strings,) = processor._machine.rewards.models
    strings._candidates, strings.probabilities._pruning = Candidates(1.0, 10**6), NO_PRUNING
    return processor


def enumerated(inputs, alpha, both=BOTH, prompts=None):
    return Enumerated(both, alpha, prompts or read_by_reward(inputs), inputs["input_ids"].shape[1])


# --- the probability of a string ---


@pytest.mark.parametrize("tokens", [[], ["ab", "ba"], ["aa", "bb", "ab", "aab", "bba"]], ids=str)
def test_prefix_probabilities_are_sums_over_all_sequences_of_tokens(tokens):
    tokenizer = of_letters("ab", tokens)
    models = [tiny_llama(seed, vocab_size=len(tokenizer)).double() for seed in (1, 2)]
    byte_map = ByteMap(of_letters("ab", ["ba", "bb", "abb"]), tokenizer, {EOS}, {EOS}, len(tokenizer))
    tree = TextTree(*models)
    assert tree.why_rows is None
    probabilities, prompt, written = PrefixProbabilities(byte_map, tree, NO_PRUNING), (1, 4, 3), ""
    begun = probabilities.begin(tree.root.after(prompt))
    text, strings, rewards = begun, ["a", "b", "ba", "abb"], np.zeros(2)
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
    (at_once,) = probabilities.advance([begun], [written.encode()])
    np.testing.assert_allclose(at_once.log_prob, rewards, atol=1e-9)


@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)
def test_a_tree_of_texts_is_read_as_each_text_alone(family):
    model = family.model()
    tree = TextTree(model)
    is_tree = family.name in ("Llama", "Qwen2", "Qwen3", "GPT-2", "Mixtral")
    assert (tree.why_rows is None) == is_tree, tree.why_rows
    begun = tree.root.after([5, 9, 7, 8, 4, 6])
    nodes = [begun, begun.after([6, 4]), begun.child(4), tree.root.after([7, 7])]
    tree.read(nodes[2:])
    tree._sorted_out_at = 0  # so that what nothing refers to any more is dropped
    tree.read([*nodes, begun.after([6, 5])])
    for node in nodes:
        alone = next_token_log_probs(model, torch.tensor(node.tokens()))
        torch.testing.assert_close(torch.tensor(node.following[0]).double(), alone, atol=1e-4, rtol=0)


def test_adapter_and_starting_model_are_two_rows_of_a_pass():
    tree = TextTree(ARM, without_adapter(ARM), is_off=True)
    nodes = [tree.root.after([3, 4, 5]), tree.root.after([3, 4, 6, 7]), tree.root.after([9])]
    tree.read(nodes)
    assert len(tree._passes) == tree.n_passes == 1
    for node in nodes:
        for row, model in enumerate((ARM, without_adapter(ARM))):
            alone = next_token_log_probs(model, torch.tensor(node.tokens()))
            torch.testing.assert_close(torch.tensor(node.following[row]).double(), alone, atol=1e-4, rtol=0)
    assert np.abs(nodes[0].following[0] - nodes[0].following[1]).max() > 0.1


def test_what_nothing_refers_to_is_forgotten():
    root = Node()
    kept = root.after([1, 2])
    root.after([1, 3, 4])
    assert kept.parent.child(2) is kept
    assert list(kept.parent._children) == [2]


# --- in `generate` ---

DEFAULT = ("sampling", "beam search", "assisted decoding, another model", "prompt lookup, sampling")


def modes():
    listed = [mode for mode in MODES if mode.expected == EXACT and not mode.elsewhere]
    marks = [() if mode.name in DEFAULT else pytest.mark.slow for mode in listed]
    return [pytest.param(mode, id=mode.name, marks=mark) for mode, mark in zip(listed, marks, strict=True)]


@pytest.mark.parametrize("mode", modes())
def test_guided_text_equals_enumeration(mode):
    processor = exact(guide(alpha=1.5))
    assert processor.engine == "strings"
    processors = ([processor], [enumerated(mode.inputs, 1.5)], [])
    output, expected, unguided = (
        generate(BASE, x, mode.inputs, **mode.kwargs() | {"max_new_tokens": 3}) for x in processors
    )
    assert (output.scores[0].log_softmax(-1) - unguided.scores[0].log_softmax(-1)).nan_to_num().abs().max() > 0.1
    assert_same(output, expected)


def test_alpha_0_is_no_guidance():
    output, expected = generate(BASE, [guide(alpha=0.0)]), generate(BASE, [])
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert all(map(torch.equal, output.scores, expected.scores))


def test_one_instance_for_many_calls():
    """Prompts of any number and length, strengths for each request, copies: each text is what it would be alone."""
    processor = guide()
    copies = [(BASE, processor), copy.deepcopy((BASE, processor)), pickle.loads(pickle.dumps((BASE, processor)))]
    for base, instance in copies:
        for inputs in (left_padded([5, 9]), left_padded([7], 4)):
            exact(instance).alpha = torch.linspace(0.5, 2.0, len(inputs["input_ids"]))[:, None]
            output = generate(base, [instance], inputs, max_new_tokens=2)
            for row, prompt in enumerate(inputs["input_ids"]):
                alone = {"input_ids": prompt[inputs["attention_mask"][row] == 1][None]}
                alone["attention_mask"] = torch.ones_like(alone["input_ids"])
                oracle = enumerated(alone, float(instance.alpha[row, 0]))
                expected = generate(BASE, [oracle], alone, max_new_tokens=2)
                assert output.sequences[row, -2:].tolist() == expected.sequences[0, -2:].tolist()
                torch.testing.assert_close(output.scores[1][row], expected.scores[1][0], atol=1e-4, rtol=0)


def test_from_the_middle_of_a_text():
    """A strength that begins later, and a custom loop that is continued: what was missed is read."""
    output = generate(BASE, [exact(guide(alpha=lambda step: 1.5 * (step > 1)))], ONE, max_new_tokens=4)
    torch.testing.assert_close(
        output.scores[3], enumerated(ONE, 1.5)(output.sequences[:, :-1], generate_scores(output.sequences[:, :-1]))
    )


def generate_scores(ids):
    with torch.no_grad():
        return BASE(ids).logits[:, -1]


def test_chats_are_read_in_the_template_of_the_reward_model():
    model, reference = (tiny_llama(seed, vocab_size=len(REWARD_TOKENIZER)) for seed in (5, 6))
    own = [copy.deepcopy(x) for x in (BASE_TOKENIZER, REWARD_TOKENIZER)]
    for tokenizer, start in zip(own, ("<bos>", "<eos>abc"), strict=True):
        tokenizer.chat_template = start + "{{ messages[0]['content'] }}{% if add_generation_prompt %}<bos>{% endif %}"
    processor = exact(guide(model, reference, alpha=0.7, tokenizer=own[0], reward_tokenizer=own[1]))
    inputs = processor.encode([[{"role": "user", "content": text}] for text in ("fade", "a")])
    prompts = [own[1](f"<eos>abc{text}<bos>")["input_ids"] for text in ("fade", "a")]
    assert prompts[0][-1] == 1  # no token goes beyond the end of a template
    oracle = enumerated(inputs, 0.7, [Strings(x, REWARD_TOKENIZER) for x in (model, reference)], prompts)
    output, expected = (generate(BASE, [x], inputs, max_new_tokens=2) for x in (processor, oracle))
    assert_same(output, expected)
    with pytest.raises(ValueError, match=r"not those that `processor\.encode` was last"):
        generate(BASE, [processor], left_padded([5, 9]))
    own[1].chat_template = None
    with pytest.raises(ValueError, match="no chat template, in which it would read them"):
        processor.encode([[{"role": "user", "content": "fade"}]])


def test_special_tokens_of_the_base_that_the_reward_model_lacks():
    tokenizer = copy.deepcopy(BASE_TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]}, replace_extra_special_tokens=False)
    base = tiny_llama(0, vocab_size=len(tokenizer))
    inputs = tokenizer("<|user|>fade", return_tensors="pt", return_token_type_ids=False)
    with pytest.raises(ValueError, match=r"'<\|user\|>', which .* doesn't have.*processor\.encode\(chats\)"):
        generate(base, [guide(base_model=base, tokenizer=tokenizer)], inputs)


def test_plain_texts_are_read_without_the_beginning_of_the_base():
    reader = PromptReader(ByteMap(BASE_TOKENIZER, REWARD_TOKENIZER, {EOS}, {EOS}, len(REWARD_TOKENIZER)))
    for text, expected in (("<bos>fade", "fade"), ("fade", "fade"), ("<bos>fa<eos>de", "<bos>fa<eos>de")):
        assert reader(BASE_TOKENIZER(text)["input_ids"]) == REWARD_TOKENIZER(expected)["input_ids"]


def test_statistics_have_the_coverage():
    processor = guide(alpha=1.0)
    (strings,) = processor._machine.rewards.models
    strings._candidates = Candidates(mass=1.0, most=5)
    processor.keeps_statistics = True
    output = generate(BASE, [processor], max_new_tokens=3)
    table = processor.statistics(output.sequences)
    for row in range(3):
        prompt = BATCH["input_ids"][row][BATCH["attention_mask"][row] == 1]
        likeliest = next_token_log_probs(BASE, prompt).exp().topk(5)
        scored = [x > EOS - 1 for x in likeliest.indices.tolist()]  # all but pad and bos
        first = table["sequence"].index(row)
        assert table["coverage_0"][first] == pytest.approx(float(likeliest.values[scored].sum()), abs=1e-4)
    assert all(0 <= x < 0.02 for x in table["pruned_0"])
    assert processor._machine.reference is None  # the base is none


# --- tokenizers that write spaces, or that can't write all ---


@pytest.mark.parametrize("kind", [sentencepiece_bpe, sentencepiece_unigram])
def test_a_space_that_is_not_there(kind):
    """After a special token, some tokenizers write a space before a text. It is no part of an answer."""
    tokenizer, plain = kind(True), tiny_tokenizer()
    ends, known = {tokenizer.eos_token_id}, ByteMap(plain, tokenizer, {EOS}, {2}, len(tokenizer))
    model = tiny_llama(1, vocab_size=len(tokenizer)).double()
    base = tiny_llama(0, vocab_size=len(plain))
    processor = GenARMLogitsProcessor(
        model,
        base_model=base,
        reference=tiny_llama(2, vocab_size=len(tokenizer)).double(),
        tokenizer=plain,
        reward_tokenizer=tokenizer,
    )
    assert known.reward_adds_space
    (strings,) = exact(processor)._machine.rewards.models
    begun = strings._begin((*tokenizer("The sun", add_special_tokens=False)["input_ids"], *ends))
    assert {x.pending for x in begun.list} == {b" ", b""}
    (text,) = strings.probabilities.advance([begun], [b"The"])
    of_model = Strings(model, tokenizer)
    of_model._texts = {index: x.decode("latin-1") for index, x in enumerate(known.of_reward) if x}
    prompt = (*tokenizer("The sun", add_special_tokens=False)["input_ids"], *ends)
    expected = np.log(of_model.begins(prompt, " The") / of_model.begins(prompt, " "))
    np.testing.assert_allclose(text.log_prob[0], expected, atol=1e-9)
    # The other way round
    other = GenARMLogitsProcessor(
        base, base_model=model, reference=base, tokenizer=tokenizer, reward_tokenizer=plain, alpha=0.5
    )
    (strings,) = other._machine.rewards.models
    token = known.of_reward.index(b" t") if b" t" in known.of_reward else known.of_reward.index(b" ")
    assert strings._string(token, drops_space=True) == strings._string(token)[1:]
    assert [strings._writes_space(x) for x in (tokenizer.eos_token_id, token)] == [True, False]


def test_text_that_no_token_of_the_reward_model_spells():
    """A tokenizer without bytes: what it can't write is excluded, and after it nothing is guided."""
    plain, letters = tiny_tokenizer(), of_letters("abc", [])
    base = tiny_llama(0, vocab_size=len(plain))
    tokenizers = {"tokenizer": plain, "reward_tokenizer": letters}
    model = tiny_llama(1, vocab_size=len(letters))
    with pytest.warns(GuidanceWarning, match="favour short tokens"):
        processor = exact(GenARMLogitsProcessor(model, base_model=base, **tokenizers))
    inputs = plain("abcab", return_tensors="pt", return_token_type_ids=False)
    output = generate(base, [processor], inputs, max_new_tokens=3)
    assert set(plain.decode(output.sequences[0], skip_special_tokens=True)) <= set("abc")
    forced = torch.cat([inputs["input_ids"], plain("x", return_tensors="pt")["input_ids"]], dim=1)
    scores = torch.randn(1, len(plain))
    processor(inputs["input_ids"], scores)
    with pytest.warns(GuidanceWarning, match=r"goes on with b'x', which no tokens .* spell.*bad_words"):
        result = processor(forced, scores)
    torch.testing.assert_close(result, scores.log_softmax(-1))


# --- what is refused, warned about and logged ---


def test_models_that_can_not_give_rewards_of_strings():
    full = tiny_llama(1, vocab_size=len(REWARD_TOKENIZER))
    with pytest.raises(ValueError, match=r"not known, since all weights.*AutoModelForCausalLM.*=None` for none"):
        guide(full)
    with pytest.raises(ValueError, match=r"The reference has 48 tokens, but .* has 23.*reference=\"base\""):
        guide(ARM, BASE)
    endless = copy.deepcopy(REWARD_TOKENIZER)
    endless.eos_token = None
    no_end = tiny_llama(1, vocab_size=len(REWARD_TOKENIZER), eos_token_id=None)
    with pytest.raises(ValueError, match=r"has no token that ends a text.*`eos_token_id`"):
        guide(no_end, no_end, reward_tokenizer=endless)
    processor = guide()
    processor.reference_prompts = BATCH
    with pytest.raises(ValueError, match=r"`processor\.reference_prompts` is set, but .* reads the same prompt"):
        generate(BASE, [processor])
    with pytest.raises(ValueError, match=r"tokens of the reward model are other strings.*must read its drafts"):
        guide().assistant()


def test_low_coverage_is_warned_about_once():
    processor = guide()
    processor._machine.rewards.models[0]._candidates = Candidates(mass=1.0, most=3)
    with pytest.warns(GuidanceWarning, match=r"The 3 likeliest .*have only 0\.\d\d of the base's .*`top_p`") as given:
        generate(BASE, [processor], num_beams=4, num_return_sequences=4)
    assert len(given) == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of a base, and of an adapter whose tokens are other strings."""
    folder, start, adapter = tmp_path_factory.mktemp("saved"), copy.deepcopy(ARM).unload(), copy.deepcopy(ARM)
    for name, model, tokenizer in (("base", BASE, BASE_TOKENIZER), ("start", start, REWARD_TOKENIZER)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "start")
    adapter.save_pretrained(folder / "arm")
    return str(folder / "base"), str(folder / "arm")


def test_two_lines(saved, caplog):
    """The reference is the starting model, and one line says how the reward model is run."""
    base = type(BASE).from_pretrained(saved[0])
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "hf_genarm"):
        warnings.simplefilter("error", GuidanceWarning)
        processor = GenARMLogitsProcessor.from_pretrained(saved[1], base_model=base)
    (line,) = [x.getMessage() for x in caplog.records if "`strings`" in x.getMessage()]
    assert "minus those of the model it was trained from, for the 64 likeliest tokens" in line
    assert (processor.engine, processor.reference) == ("strings", "base")
    arm = AutoregressiveRewardModel.from_pretrained(saved[1])
    constructed = GenARMLogitsProcessor(arm, base_model=base, tokenizer=BASE_TOKENIZER, reference="base")
    expected = generate(BASE, [enumerated(BATCH, 1.0)], BATCH, max_new_tokens=2)
    for each in (processor, constructed):
        assert_same(generate(base, [exact(each)], BATCH, max_new_tokens=2), expected)


def test_commands(saved, tmp_path, capsys):
    base, arm = saved
    prompts = write(tmp_path, "jsonl", {"prompt": ["fade", "a"]})
    run(
        "generate",
        "--base",
        base,
        "--arm",
        arm,
        "--prompts",
        prompts,
        "--output",
        tmp_path / "out.jsonl",
        "--max_new_tokens",
        3,
    )
    assert all("completion" in json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines())
    run("show", "--base", base, "--arm", arm, "--prompt", "fade", "--max_new_tokens", 3)
    assert "Engine: strings" in capsys.readouterr().out
    run("env", "--base", base, "--arm", arm)
    assert "arm: engine `strings`, because its tokens are other strings" in capsys.readouterr().out


def test_other_engines_refuse_other_tokens(saved):
    tokenizers = BASE_TOKENIZER, REWARD_TOKENIZER
    with pytest.raises(ValueError, match=r"unknown to the reward model.*`generate` of transformers"):
        VocabMap(*tokenizers)  # with which vLLM begins
    pytest.importorskip("lm_eval")
    from hf_genarm.lm_eval import GuidedHFLM

    with pytest.raises(ValueError, match=r"whole texts are scored here.*`hf-genarm generate`"):
        GuidedHFLM(pretrained=saved[0], arm=saved[1], device="cpu")


@pytest.mark.slow
def test_the_shipped_adapter_gives_strings_the_rewards_of_their_tokens():
    """Up to other spellings, which a trained model gives hardly any probability to; after tokens of another one."""
    arm = AutoregressiveRewardModel.from_pretrained("model_cards/arm-smollm2-135m-sentiment")
    known = token_bytes(arm.tokenizer)
    for text in (
        "naïve 東京 😀 x",
        "I loved the extraordinarily courteous receptionists; breakfast (Frühstück) was fine!",
    ):
        assert spelled(known, arm.tokenizer(text)["input_ids"]) == text.encode()
    other, chat = tiny_tokenizer(), [{"role": "user", "content": "How was the hotel?"}]
    ends = {arm.tokenizer.eos_token_id}
    byte_map = ByteMap(other, arm.tokenizer, {EOS}, ends, len(arm.tokenizer))
    strings = StringRewards(arm.model, StartingModel(without_adapter(arm.model), is_off=True), byte_map)
    prompt = arm.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    begun = strings._begin(tuple(prompt))
    (after,) = strings._read([(tuple(prompt), False)], [tuple(other(text)["input_ids"])])
    (ends,) = strings.probabilities.log_probs([after], [[]])[1]
    of_string = after.log_prob + ends
    of_tokens = [
        float(AutoregressiveRewardModel(model, arm.tokenizer).score([chat], [text]))
        for model in (arm.model, arm.reference)
    ]
    assert begun.log_prob.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(of_string, of_tokens, atol=0.1)
    assert (of_string >= np.array(of_tokens) - 1e-2).all()
    assert of_string[0] - of_string[1] == pytest.approx(of_tokens[0] - of_tokens[1], abs=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*sparse:UserWarning")
def test_genlm_bytes_gives_strings_the_same_probabilities():
    """Another implementation of the same sum, which goes byte by byte."""
    genlm = pytest.importorskip("genlm.bytes", reason="needs genlm-bytes, of the extra `slow`")
    from genlm.backend.llm import AsyncTransformer

    model, tokenizer = (x.from_pretrained(demo_model()) for x in (AutoModelForCausalLM, AutoTokenizer))
    chat = [{"role": "user", "content": "How was the hotel?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    text = "The hôtel was lovely".encode()

    async def log_probs():
        network = AsyncTransformer(model, tokenizer)
        trie = genlm.AsyncTokenByteTrie.from_vocab(network.byte_vocab)
        begun = genlm.StatefulTokenizedLM.initial(network, prompt)
        state = await genlm.LazyTrieState(begun, trie, trie.trie.root, 0.0).materialize()
        beam = genlm.ByteBeamState([state], genlm.BeamParams(K=8, prune_threshold=1e-3, heal=False))
        result = []
        for byte in text:
            beam = await (beam.prune() << byte)
            result.append(beam.logZ)
        await beam.cleanup()
        return result

    theirs = asyncio.run(log_probs())
    ends = {tokenizer.eos_token_id}
    byte_map = ByteMap(tokenizer, tokenizer, ends, ends, len(tokenizer))
    tree = TextTree(model)
    probabilities = PrefixProbabilities(byte_map, tree, PRUNING)
    spellings = probabilities.begin(tree.root.after(prompt))
    for start, end in itertools.pairwise([0, 3, 6, 9, 14, len(text)]):  # also within a character, and within tokens
        (spellings,) = probabilities.advance([spellings], [text[start:end]])
        assert spellings.log_prob[0] == pytest.approx(theirs[end - 1], abs=5e-3)
