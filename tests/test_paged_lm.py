"""Texts in pages: what is read in parts, each at its position, against forward passes from scratch."""

import random

import pytest
import torch
from tiny import VOCAB_SIZE, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from hf_genarm.vllm.paged_lm import PagedLM
from hf_genarm.vllm.text_pages import HeldText, TextPages, shared_length


def from_scratch(network, text, n=1):
    with torch.no_grad():
        return network(input_ids=torch.tensor([text])).logits[0, -n:]


def a_text(generator, length):
    return [generator.randrange(VOCAB_SIZE) for _ in range(length)]


def sliding(window, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | options
    config = MistralConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=2, sliding_window=window, **sizes)
    config.initializer_range = 0.4
    return MistralForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.4)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    "make",
    [tiny_llama, lambda: tiny_llama(num_attention_heads=4, num_key_value_heads=2), lambda: sliding(5), gpt2],
    ids=["llama", "grouped", "sliding", "gpt2"],
)
@pytest.mark.parametrize(("chunk", "n_tokens"), [(4, 320), (64, 320), (64, 112), (7, 112)])
def test_texts_that_come_go_and_are_cut_are_read_as_from_scratch(make, chunk, n_tokens):
    lm = PagedLM(make(), length=100, n_tokens=n_tokens, chunk=chunk)
    check_random_life(make(), lm)
    assert (lm.pages.n_dropped > 0) == (n_tokens == 112)


def check_random_life(network, lm):
    """A random life of five texts, three at a time: growth by one or many, drafts, cuts, release, return, and drops."""
    generator = random.Random(0)
    texts = {owner: a_text(generator, 1 + generator.randrange(80)) for owner in range(5)}
    held = set()
    for _ in range(40):
        for owner in list(held):
            if generator.random() < 0.2:
                lm.release(owner)
                held.discard(owner)
        while len(held) < 1 + generator.randrange(3):
            held.add(generator.randrange(5))
        called = generator.sample(sorted(held), 1 + generator.randrange(len(held)))
        n_last = [1 + generator.randrange(3) for _ in called]
        for owner, n in zip(called, n_last, strict=True):
            cut = generator.random() < 0.2
            grown = texts[owner][: generator.randrange(len(texts[owner])) if cut else None]
            texts[owner] = (grown + a_text(generator, n))[-90:]
            if generator.random() < 0.1:
                texts[owner] = a_text(generator, 60)
        logits = lm({owner: texts[owner] for owner in called}, n_last)
        expected = torch.cat([from_scratch(network, texts[x], n) for x, n in zip(called, n_last, strict=True)])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_all_texts_take_one_pass_and_only_new_tokens_are_read():
    network = tiny_llama()
    seen = []
    lm = PagedLM(network, length=64, n_tokens=256)
    network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    texts = {owner: a_text(random.Random(owner), 5 + owner) for owner in range(4)}
    lm(texts, [1] * 4)
    assert seen == [(1, 5 + 6 + 7 + 8)]
    lm({owner: [*text, 3] for owner, text in texts.items()}, [1] * 4)
    assert seen[1:] == [(1, 4)]


def test_a_long_text_does_not_hold_up_the_others():
    """Those that grow by a token are in the first pass; the long one takes what room is left."""
    network, generator = tiny_llama(), random.Random(0)
    seen = []
    lm = PagedLM(network, length=64, n_tokens=192, chunk=8)
    long, short = a_text(generator, 30), a_text(generator, 4)
    lm({"short": short}, [1])
    network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    logits = lm({"long": long, "short": [*short, 5]}, [1, 1])
    assert [len(ids[0]) for ids in seen] == [8, 8, 8, 7]
    assert seen[0][0] == [5, *long[:7]]
    fresh = tiny_llama()
    torch.testing.assert_close(
        logits, torch.cat([from_scratch(fresh, long), from_scratch(fresh, [*short, 5])]), atol=1e-4, rtol=0
    )


def test_a_text_that_returns_finds_what_it_has_read():
    network = tiny_llama()
    lm = PagedLM(network, length=64, n_tokens=192)
    one, other = a_text(random.Random(0), 20), a_text(random.Random(1), 20)
    lm({"one": one, "other": other}, [1, 1])
    lm.release("one")
    lm.release("other")
    seen = []
    network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    lm({"again": [*one, 4], "also": [*other[:10], 9, 9]}, [1, 1])
    assert seen == [(1, 1 + 2)]


def test_an_interrupted_pass_leaves_no_trace():
    network, fresh = tiny_llama(), tiny_llama()
    lm = PagedLM(network, length=64, n_tokens=128)
    text = a_text(random.Random(0), 12)
    lm({"a": text[:6]}, [1])

    def fail(*_):
        raise KeyboardInterrupt

    handle = network.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        lm({"a": [*text[:4], 1, 2, 3, 4, 5]}, [1])
    handle.remove()
    torch.testing.assert_close(lm({"a": text}, [1]), from_scratch(fresh, text), atol=1e-4, rtol=0)


def test_the_pages_are_there_from_the_beginning_and_never_grow():
    lm = PagedLM(tiny_llama(), length=64, n_tokens=256)
    size = lm.n_bytes
    # Keys and values, layers, pages and an empty one, tokens, one head of 8, float32
    assert size == 2 * 2 * 17 * 16 * 8 * 4
    assert lm.bytes_per_token == 2 * 2 * 8 * 4
    lm({owner: a_text(random.Random(owner), 60) for owner in range(4)}, [1] * 4)
    assert lm.n_bytes == size


def test_what_can_not_be_served_is_refused_at_the_start():
    with pytest.raises(ValueError, match="up to 256 tokens, but the server takes up to 300"):
        PagedLM(tiny_llama(), length=300, n_tokens=300)
    dynamic = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match="up to 255 tokens"):
        PagedLM(dynamic, length=256, n_tokens=256)

    class Deaf(type(tiny_llama())):
        def forward(self, genarm_packed=None, **kwargs):
            self.set_attn_implementation("eager")
            return super().forward(**kwargs)

    with pytest.raises(ValueError, match="can't be served, because"):
        PagedLM(Deaf(tiny_llama().config).eval(), length=32, n_tokens=64)


# --- more texts than fit ---


def test_a_text_that_is_dropped_is_read_again_and_only_that_one(caplog):
    lm, fresh = PagedLM(tiny_llama(), length=64, n_tokens=96), tiny_llama()
    texts = {owner: a_text(random.Random(owner), 33) for owner in range(3)}  # three pages of 16 tokens each, of six
    torch.testing.assert_close(
        lm(texts, [1] * 3), torch.cat([from_scratch(fresh, x) for x in texts.values()]), atol=1e-4, rtol=0
    )
    assert (lm.n_read, lm.pages.n_dropped) == (99, 1)
    assert [x.message for x in caplog.records if "don't fit into the memory" in x.message]
    grown = {owner: [*text, 7] for owner, text in texts.items()}
    torch.testing.assert_close(
        lm(grown, [1] * 3), torch.cat([from_scratch(fresh, x) for x in grown.values()]), atol=1e-4, rtol=0
    )
    assert lm.n_read == 99 + 1 + 1 + 34  # two of them are still there
    assert len([x.message for x in caplog.records if "don't fit into the memory" in x.message]) == 1


def test_nan_does_not_reach_the_text_that_gets_the_pages():
    broken, fresh = tiny_llama(), tiny_llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[40] = torch.nan
    lm = PagedLM(broken, length=64, n_tokens=64)
    one, other = [5, 40] * 20, [5] * 35  # three pages each, of four, and the last of the other is not full
    logits = lm({"other": other, "one": one}, [1, 1])
    assert logits[1].isnan().all()
    logits = lm({"one": [*one, 7], "other": [*other, 7, 8, 9]}, [1, 1])
    assert logits[0].isnan().all()
    torch.testing.assert_close(logits[1:], from_scratch(fresh, [*other, 7, 8, 9]), atol=1e-4, rtol=0)


def test_the_least_recently_used_of_those_without_an_owner_go_first():
    pages = TextPages(6, 4)

    def read(owner, tokens):
        text = pages.hold(owner, tokens)
        assert pages.reserve(text, len(tokens), {})
        text.tokens += tokens[len(text.tokens) :]
        return text

    old, new, held = read("old", [1] * 8), read("new", [2] * 8), read("held", [3] * 8)
    pages.release("old")
    pages.release("new")
    read("more", [4] * 8)
    assert (old.tokens, len(new.tokens), len(held.tokens), pages.n_dropped) == ([], 8, 8, 0)
    read("again", [2] * 7)
    assert pages.n_found == 7
    assert pages.n_in_use == 6
    assert not pages.reserve(pages.hold("none", [9]), 1, [held, *(pages.get(x) for x in ("more", "again"))])
    assert held.tokens
    read("none", [9])
    assert (held.tokens, pages.n_dropped) == ([], 1)


def test_few_words_in_common_are_not_worth_the_rest_of_a_text():
    pages = TextPages(8, 4)
    first = pages.hold("first", [1] * 12)
    assert pages.reserve(first, 12, {})
    first.tokens += [1] * 12
    pages.release("first")
    assert pages.hold("other", [1, 1, 5, 5, 5, 5]) is not first
    assert pages.hold("next turn", [1] * 6 + [5]) is first
    assert first.tokens == [1] * 6
    assert isinstance(pages.get("other"), HeldText)


def test_fewer_tokens_than_one_text_has_are_refused():
    with pytest.raises(ValueError, match="48 tokens in pages of 16 hold no text of 64"):
        PagedLM(tiny_llama(), length=64, n_tokens=48)


def test_shared_length():
    generator = random.Random(0)
    for _ in range(300):
        one = [int(generator.random() < 0.05) for _ in range(generator.randrange(100))]
        other = [int(generator.random() < 0.05) for _ in range(generator.randrange(100))]
        same = [x == y for x, y in zip(one, other, strict=False)]
        assert shared_length(one, other) == (same.index(False) if False in same else len(same))
