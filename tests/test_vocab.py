"""Reward models whose tokenizer is another one: permuted, padded to another size, with tokens of its own."""

import copy

import pytest
import torch
from helpers import generate
from oracle import Recompute, guided, next_token_log_probs
from tiny import CORPUS, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from two_tokenizers import permuted, renumbered

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, GuidanceWarning, RewardInfo
from hf_genarm.decoding.vocab import VocabMap
from hf_genarm.functional import fill_unscored, guided_log_probs
from hf_genarm.hub.info import chat_template_fingerprint


@pytest.fixture(scope="module")
def setup():
    tokenizer = tiny_tokenizer()
    return tokenizer, tiny_llama(0, vocab_size=len(tokenizer)), tiny_llama(1, vocab_size=len(tokenizer))


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 3}], ids=str)
def test_permuted_ids_are_aligned_by_string(setup, options):
    tokenizer, base, arm = setup
    other, order = permuted(tokenizer)
    twin = renumbered(arm, order, len(tokenizer))
    inputs = tokenizer([*CORPUS[:2], "It is"], return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = generate(base, [Recompute([arm], [1.0], inputs["attention_mask"])], inputs, **options)
    processor = GenARMLogitsProcessor(twin, base_model=base, tokenizer=tokenizer, reward_tokenizer=other)
    output = generate(base, [processor], inputs, **options)
    unaligned = generate(base, [GenARMLogitsProcessor(twin, base_model=base)], inputs, **options)
    assert unaligned.sequences.tolist() != expected.sequences.tolist()
    assert output.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_tokenizer_of_a_reward_model_is_the_default(setup):
    """Where it is the same as that of the base, nothing is aligned, nor if it says nothing about the base's."""
    tokenizer, base, arm = setup
    other, order = permuted(tokenizer)
    own = AutoregressiveRewardModel(renumbered(arm, order, len(tokenizer)), other)
    for options in ({"base_model": base}, {}):
        (aligned,) = GenARMLogitsProcessor(own, tokenizer=tokenizer, **options)._vocab_maps
        ids, mask = torch.arange(len(tokenizer))[None], torch.ones(1, len(tokenizer), dtype=torch.long)
        assert aligned.reward_ids(ids, mask)[0].tolist() == order.tolist()
        same = AutoregressiveRewardModel(arm, tokenizer)
        assert GenARMLogitsProcessor([same, arm], tokenizer=tokenizer, **options)._vocab_maps == [None, None]


@pytest.mark.parametrize("larger", ["base", "reward model"])
def test_embeddings_padded_to_other_sizes(setup, larger):
    """As Qwen2.5 0.5B (151,936 rows) and 7B (152,064), which share a tokenizer."""
    tokenizer, base, arm = setup
    size = len(tokenizer)
    if larger == "base":
        base = renumbered(base, torch.arange(size), size + 8)
    else:
        arm = renumbered(arm, torch.arange(size), size + 8)
    ids = tokenizer(CORPUS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        scores = base(ids).logits[:, -1]
    with pytest.raises(ValueError, match=r"pass both \(`tokenizer`, `reward_tokenizer`\)"):
        GenARMLogitsProcessor(arm)(ids, scores)
    result = GenARMLogitsProcessor(arm, 1.5, tokenizer=tokenizer, reward_tokenizer=tokenizer)(ids, scores)
    assert result.shape == scores.shape
    base_log_probs = scores.log_softmax(-1)
    reward = next_token_log_probs(arm, ids[0])[:size]
    scored = guided(base_log_probs[0, :size].double(), [reward], [1.5])
    torch.testing.assert_close(result[0, :size].log_softmax(-1).double(), scored, atol=1e-4, rtol=0)
    # What the reward model can't score keeps its probability.
    torch.testing.assert_close(result[0, size:], base_log_probs[0, size:], atol=1e-4, rtol=0)


def test_an_added_token(setup):
    """As Llama with 32,000 tokens and with a pad token added to it: 32,001."""
    tokenizer, _, arm = setup
    with_pad = copy.deepcopy(tokenizer)
    with_pad.add_special_tokens({"pad_token": "[PAD]"})
    base = tiny_llama(0, vocab_size=len(with_pad))
    batch = with_pad(["The sun", CORPUS[0]], return_tensors="pt", padding=True)
    assert batch.input_ids[0, 0] == len(tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    processor = GenARMLogitsProcessor(arm, base_model=base, tokenizer=with_pad, reward_tokenizer=tokenizer)
    output = generate(base, [processor], inputs, suppress_tokens=[len(tokenizer)])
    alone = inputs["input_ids"][0][inputs["attention_mask"][0] == 1][None]
    expected = generate(base, [processor], {"input_ids": alone}, suppress_tokens=[len(tokenizer)])
    torch.testing.assert_close(output.scores[0][0], expected.scores[0][0], atol=1e-4, rtol=0)
    # The other way round, the reward model knows one token more.
    result = GenARMLogitsProcessor(base, tokenizer=tokenizer, reward_tokenizer=with_pad)(
        alone, torch.zeros(1, len(tokenizer))
    )
    reward = next_token_log_probs(base, alone[0])[: len(tokenizer)]
    torch.testing.assert_close(result[0].double(), reward.log_softmax(-1), atol=1e-4, rtol=0)

    real = torch.cat([alone, torch.tensor([[len(tokenizer)]])], dim=1)
    with pytest.raises(ValueError, match=rf"'\[PAD\]' \(id {len(tokenizer)}\).*suppress_tokens"):
        processor(torch.cat([real, alone[:, :1]], dim=1), torch.zeros(1, len(with_pad)))


@pytest.mark.parametrize("side", ["base", "reward model", "both"])
def test_added_tokens_without_logits(setup, side):
    """A pad token that was added to a tokenizer, while the model was not resized."""
    tokenizer, base, arm = setup
    with_pad = copy.deepcopy(tokenizer)
    with_pad.add_special_tokens({"pad_token": "[PAD]"})
    inputs = tokenizer(["The sun", CORPUS[0]], return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    tokenizers = {
        "tokenizer": tokenizer if side == "reward model" else with_pad,
        "reward_tokenizer": tokenizer if side == "base" else with_pad,
    }
    processor = GenARMLogitsProcessor(arm, base_model=base, **tokenizers)
    output = generate(base, [processor], inputs)
    expected = generate(base, [Recompute([arm], [1.0], inputs["attention_mask"])], inputs)
    assert output.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    wider = torch.zeros(1, len(tokenizer) + 3)  # one map serves several numbers of logits
    assert processor(inputs["input_ids"][1:], wider).isfinite().all()


def test_other_tokens_are_refused(setup):
    tokenizer, _, arm = setup
    words = Tokenizer(models.WordLevel({"<pad>": 0, "the": 1, "train": 2}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    with pytest.raises(ValueError, match=r"bytes of the tokens of .* are not known: `decode\(.*byte-level"):
        GenARMLogitsProcessor(arm, tokenizer=tokenizer, reward_tokenizer=other)
    with pytest.raises(ValueError, match=r"`tokenizer` is not, .*Pass both"):
        GenARMLogitsProcessor(arm, reward_tokenizer=other)
    with pytest.raises(ValueError, match="2 tokenizers, but there are 1 reward models"):
        GenARMLogitsProcessor(arm, tokenizer=tokenizer, reward_tokenizer=[tokenizer, tokenizer])


def test_from_pretrained_compares_the_tokenizers_that_it_finds(setup, tmp_path):
    tokenizer, base, arm = setup
    other, order = permuted(tokenizer)
    for name, model, its_tokenizer in (
        ("base", base, tokenizer),
        ("arm", renumbered(arm, order, len(tokenizer)), other),
    ):
        model.save_pretrained(tmp_path / name)
        its_tokenizer.save_pretrained(tmp_path / name)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "the": 1}, unk_token="<pad>"))
    arm.save_pretrained(tmp_path / "foreign")
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(tmp_path / "foreign")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = tokenizer(CORPUS[1], return_tensors="pt").input_ids
    scores = torch.randn(1, len(tokenizer))
    processor = GenARMLogitsProcessor.from_pretrained(str(tmp_path / "arm"), base_model=base)
    torch.testing.assert_close(processor(ids, scores), Recompute([arm], [1.0])(ids, scores), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"bytes of the tokens of `.*foreign` are not known"):
        GenARMLogitsProcessor.from_pretrained(str(tmp_path / "foreign"), base_model=base)


@pytest.mark.filterwarnings("error::hf_genarm.GuidanceWarning")
def test_a_prompt_without_the_chat_template_is_warned_about(setup, tmp_path):
    tokenizer, base, arm = setup
    for name, model in (("base", base), ("arm", arm)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    chats = [[{"role": "user", "content": text}] for text in ("How was the food?", "Is the sun warm today?")]
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    chat = tokenizer.apply_chat_template(chats, **options)
    chat = {name: chat[name] for name in ("input_ids", "attention_mask")}
    text = {"input_ids": tokenizer("How was the food?", return_tensors="pt").input_ids}

    RewardInfo().save(tmp_path / "arm")
    generate(base, [GenARMLogitsProcessor.from_pretrained(str(tmp_path / "arm"), base_model=base)], text)
    RewardInfo(chat_template=chat_template_fingerprint(tokenizer)).save(tmp_path / "arm")
    processor = GenARMLogitsProcessor.from_pretrained(str(tmp_path / "arm"), base_model=base)
    generate(base, [processor], chat)
    generate(base, [processor], chat, num_beams=2)
    with pytest.warns(GuidanceWarning, match="not in the chat template"):
        generate(base, [processor], text)
    generate(base, [processor], text)


@pytest.mark.parametrize("do_sample", [True, False])
def test_universal_assisted_decoding(setup, do_sample):
    """Greedy drafts are made with our processor on the assistant's tokens: refused. Sampled ones are not: exact."""
    tokenizer, base, arm = setup
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["hello", "world"])
    ids = tokenizer(CORPUS[1], return_tensors="pt").input_ids
    options = {"tokenizer": tokenizer, "assistant_tokenizer": other, "do_sample": do_sample, "top_k": 0}
    options["assistant_model"] = tiny_llama(3, vocab_size=len(other))
    if not do_sample:
        with pytest.raises(ValueError, match="An assistant model must have the tokenizer of the base model"):
            generate(base, [GenARMLogitsProcessor(arm)], {"input_ids": ids}, **options)
        return
    # The number of drafts depends on earlier calls, and with it the random numbers: compare along the text.
    compared = 0
    for _ in range(5):
        output = generate(base, [GenARMLogitsProcessor(arm)], {"input_ids": ids}, **options)
        for step, scores in enumerate(output.scores):
            text = output.sequences[0, : ids.shape[1] + step]
            expected = guided(next_token_log_probs(base, text), [next_token_log_probs(arm, text)], [1.0])
            torch.testing.assert_close(scores[0].double(), expected, atol=1e-4, rtol=0)
            compared += 1
    assert compared >= 5


def test_a_token_that_cant_be_scored_keeps_its_probability():
    scores = torch.randn(4, 6).log_softmax(-1)
    rewards = torch.randn(4, 6).log_softmax(-1)
    rewards[:, [1, 4]] = torch.nan
    result = guided_log_probs(scores, [fill_unscored(rewards, -2.0, scores)], [-2.0])
    torch.testing.assert_close(result[:, [1, 4]], scores[:, [1, 4]], atol=1e-5, rtol=0)
    assert (result - scores).abs().max() > 0.1
    only_unscored = scores.clone()
    only_unscored[:, [0, 2, 3, 5]] = -torch.inf
    result = guided_log_probs(only_unscored, [fill_unscored(rewards, 2.0, only_unscored)], [2.0])
    torch.testing.assert_close(result, only_unscored.log_softmax(-1))


def test_identical_tokenizers_map_to_themselves(setup):
    tokenizer = setup[0]
    ids = tokenizer(CORPUS[0], return_tensors="pt").input_ids
    assert torch.equal(VocabMap(tokenizer, tokenizer).reward_ids(ids, torch.ones_like(ids)), ids)


def test_log_z_where_tokens_can_not_be_scored(setup):
    """They weigh what leaves their probability as it is: that of the scored ones, and their sum is that of all."""
    tokenizer, _, arm = setup
    other, order = permuted(tokenizer, 1)
    base, twin = tiny_llama(0, vocab_size=len(tokenizer) + 4), renumbered(arm, order, len(tokenizer))
    processor = GenARMLogitsProcessor(twin, base_model=base, tokenizer=tokenizer, reward_tokenizer=other)
    processor.keeps_statistics = True
    inputs = tokenizer(CORPUS[0], return_tensors="pt", return_token_type_ids=False)
    output = generate(base, [processor], inputs, max_new_tokens=1)
    with torch.no_grad():
        scores = base(**inputs).logits[0, -1, :-4].log_softmax(-1)
        reward = arm(**inputs).logits[0, -1].log_softmax(-1)
    expected = (scores + reward).logsumexp(-1).item()
    assert processor.statistics(output.sequences)["log_z"] == [pytest.approx(expected, abs=1e-4)]
    assert processor.log_z.tolist() == [pytest.approx(expected, abs=1e-4)]
