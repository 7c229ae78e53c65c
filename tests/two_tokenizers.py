"""Tiny tokenizers that cut the same texts into other tokens, and what their models give to strings, by enumeration."""

import torch
from tiny import BOS, EOS, PAD, tiny_llama
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>"]


def of_letters(*tokens):
    """A tokenizer of the letters a and b, and of longer tokens that are made of two shorter ones each."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, "a", "b", *tokens])}
    merges = [next((x[:n], x[n:]) for n in range(1, len(x)) if x[:n] in vocab and x[n:] in vocab) for x in tokens]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def model_of(tokenizer, seed, **config):
    """A tiny model in float64 that gives its tokens and the end of a text probabilities far from equal."""
    return tiny_llama(seed, vocab_size=len(tokenizer), **config).double()


def log_prob_of_prefix(model, tokenizer, prompt, string, ends=False):
    """The log-probability that an answer begins with a string, or is that string, by all sequences of tokens."""
    texts = {index: token.encode() for token, index in tokenizer.get_vocab().items() if index > EOS}

    def total(ids, rest):
        with torch.no_grad():
            following = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        if not rest:
            return following[EOS] if ends else following.new_ones(())
        result = following.new_zeros(())
        for token, text in texts.items():
            if text.startswith(rest) and (text != rest or not ends):
                result = result + following[token] * (1 if not ends else 0)
            elif rest.startswith(text):
                result = result + following[token] * total([*ids, token], rest[len(text) :])
        return result

    return total(list(prompt), string).log()


__all__ = ["BOS", "EOS", "PAD", "log_prob_of_prefix", "model_of", "of_letters"]
