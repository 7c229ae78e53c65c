"""Tiny tokenizers that cut the same texts into other tokens, and what models give to strings, by enumeration."""

import itertools

import torch
from peft import LoraConfig, get_peft_model
from tiny import EOS, VOCAB_SIZE, tiny_llama
from tokenizers import Tokenizer, decoders, models
from transformers import LogitsProcessor, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>"]
LETTERS = "abcdef"


def of_letters(letters, longer):
    """A tokenizer of single letters and of longer tokens, which are made of two shorter ones each."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *letters, *longer])}
    merges = [next((x[:n], x[n:]) for n in range(1, len(x)) if x[:n] in vocab and x[n:] in vocab) for x in longer]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


PAIRS = ["".join(pair) for pair in itertools.product(LETTERS, LETTERS)]
# As many tokens as the tiny base has
BASE_TOKENIZER = of_letters(LETTERS, [*PAIRS, "abc", "dab", "fed"])
REWARD_TOKENIZER = of_letters(
    LETTERS, ["ab", "bc", "cd", "ef", "fa", "ce", "de", "ea", "bb", "dd", "abc", "cde", "bcd", "fab"]
)
assert len(BASE_TOKENIZER) == VOCAB_SIZE


def adapter_of(tokenizer, seed=0):
    """A model of a tokenizer's own, with an adapter that is far from nothing."""
    network = tiny_llama(seed, vocab_size=len(tokenizer))
    torch.manual_seed(seed)
    model = get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


class Strings:
    """The log-probability that an answer begins with a string, or is that string: over all sequences of tokens."""

    def __init__(self, model, tokenizer):
        self._model = model
        self._texts = {index: token for token, index in tokenizer.get_vocab().items() if index > EOS}
        self._known = {}

    def _following(self, ids):
        if ids not in self._known:
            with torch.no_grad():
                logits = self._model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            self._known[ids] = logits.double().softmax(-1).tolist()
        return self._known[ids]

    def begins(self, ids, string):
        if not string:
            return 1.0
        following = self._following(ids)
        return sum(
            following[token] * (1.0 if text.startswith(string) else self.begins((*ids, token), string[len(text) :]))
            for token, text in self._texts.items()
            if text.startswith(string) or string.startswith(text)
        )

    def ends(self, ids, string):
        following = self._following(ids)
        if not string:
            return following[EOS]
        return sum(
            following[token] * self.ends((*ids, token), string[len(text) :])
            for token, text in self._texts.items()
            if string.startswith(text)
        )


class Enumerated(LogitsProcessor):
    """
    The processor that ours must equal: the rewards of all strings, by enumeration, for the model and its reference.

    The last token of a prompt may be the beginning of a longer one: it is what the answer begins with.
    """

    def __init__(self, model, reference, alpha, prompts):
        """`prompts` are the ids of the base, without padding, of each request."""
        self._both = [Strings(model, REWARD_TOKENIZER), Strings(reference, REWARD_TOKENIZER)]
        self._alpha, self._prompts, self._length = alpha, prompts, None

    def rewards(self, prompt, answer):
        """The reward of each token of the base after an answer, in ids of the base; a dict."""
        *read, last = REWARD_TOKENIZER(BASE_TOKENIZER.decode(prompt))["input_ids"]
        written = REWARD_TOKENIZER.decode([last]) + BASE_TOKENIZER.decode(answer, skip_special_tokens=True)
        strings = {x: BASE_TOKENIZER.decode([x]) for x in range(EOS + 1, VOCAB_SIZE)}
        of_both = []
        for model in self._both:
            before = model.begins(tuple(read), written)
            values = {x: model.begins(tuple(read), written + string) / before for x, string in strings.items()}
            of_both.append(values | {EOS: model.ends(tuple(read), written) / before})
        return {x: torch.tensor(value / of_both[1][x]).log().item() for x, value in of_both[0].items()}

    def __call__(self, input_ids, scores):
        log_probs, repeats = scores.double().log_softmax(-1), len(input_ids) // len(self._prompts)
        for row, ids in enumerate(input_ids.tolist()):
            prompt = self._prompts[row // repeats]
            answer = ids[max(map(len, self._prompts)) :]
            if EOS in answer:
                continue
            rewards = self.rewards(prompt, answer)
            scored = [x for x in rewards if log_probs[row, x] > -torch.inf]
            before = log_probs[row, scored]
            after = before + self._alpha * torch.tensor([rewards[x] for x in scored], dtype=torch.float64)
            log_probs[row, scored] = after - after.logsumexp(-1) + before.logsumexp(-1)
        return log_probs.to(scores.dtype)
