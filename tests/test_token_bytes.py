"""The bytes of tokens: what `decode` returns, for tokenizers of every kind."""

import random

import pytest
from tiny import CORPUS, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from two_tokenizers import fast, like_tiktoken, sentencepiece_bpe, sentencepiece_unigram

from hf_genarm.hub.token_bytes import spaces_after_special_tokens, spelled, token_bytes

KINDS = {
    "byte-level": tiny_tokenizer,
    "tiktoken": like_tiktoken,
    "SentencePiece BPE": lambda: sentencepiece_bpe(False),
    "SentencePiece BPE that writes a space": lambda: sentencepiece_bpe(True),
    "SentencePiece unigram": lambda: sentencepiece_unigram(False),
    "SentencePiece unigram that writes a space": lambda: sentencepiece_unigram(True),
}


def random_texts(alphabet, n_texts):
    generator = random.Random(0)
    return ["".join(generator.choices(alphabet, k=generator.randint(0, 12))) for _ in range(n_texts)]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_tokens_have_the_same_bytes(kind):
    tokenizer = KINDS[kind]()
    known = token_bytes(tokenizer)
    assert {index for index, x in enumerate(known) if x is None} == set(tokenizer.all_special_ids)
    writes_space = "writes a space" in kind
    assert spaces_after_special_tokens(tokenizer, known) == writes_space
    all_characters = [chr(x) for x in (*range(256), *range(0x4E00, 0x4E10), *range(0x1F600, 0x1F610), 0xFFFD)]
    alphabet = sorted(set("".join(CORPUS)) - {"\n"}) if "unigram" in kind else all_characters
    texts = random_texts(alphabet, 2700)  # 16,200 in all
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        written = spelled(known, ids)
        if writes_space and text:
            assert written[:1] == b" "
            assert written.lstrip(b" ") == text.lstrip(" ").encode()
        else:
            assert written == text.encode()


def test_a_tokenizer_whose_bytes_are_not_known_is_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "train": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"`decode\(\[1, 1\]\)` is 'the the', and not .*\['the', 'the'\].*byte-level"):
        token_bytes(fast(words, unk_token="<unk>"))
