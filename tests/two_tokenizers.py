"""Tiny tokenizers that cut the same texts into other tokens, and what models give to strings, by enumeration."""

import itertools
import json

import torch
from peft import LoraConfig, get_peft_model
from tiny import CORPUS, EOS, VOCAB_SIZE, tiny_llama
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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


TEXTS = [*CORPUS, "naïve façade, 東京 😀", "  two  spaces\n\nand lines\t"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def fast(tokenizer, **special):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def like_tiktoken():
    """As that of Llama 3 and Qwen, which are converted from tiktoken: words by a pattern, ready merges first."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return fast(tokenizer, eos_token="<|end|>")


def sentencepiece_bpe(writes_space):
    """As that of Llama 2 (which writes a space before a text), or Gemma."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=list(NAMES.values()), show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    vocab, merges = tokenizer.get_vocab(), []
    for token in sorted(vocab, key=vocab.get):
        halves = [(token[:n], token[n:]) for n in range(1, len(token))]
        merges += [pair for pair in halves if vocab.keys() >= set(pair)][:1]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [pair for pair in merges if "".join(pair) not in NAMES.values()]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.add_special_tokens(list(NAMES.values()))
    first = [normalizers.Prepend("▁")] if writes_space else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if writes_space else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    tokenizer.decoder = decoders.Sequence(parts)
    return fast(tokenizer, **NAMES)


def sentencepiece_unigram(writes_space):
    """As that of T5: without bytes, so that it can't write all texts."""
    scheme = "always" if writes_space else "never"
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    options = {"special_tokens": list(NAMES.values()), "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=120, **options))
    return fast(tokenizer, **NAMES)


class Strings:
    """The log-probability that an answer begins with a string, or is that string: over all sequences of tokens."""

    def __init__(self, model, tokenizer):
        self._model = model
        self._texts = {index: token for token, index in tokenizer.get_vocab().items() if index > EOS}
        self._known = {}

    def _following(self, ids):
        if ids not in self._known:  # with all that differ in the last token, which takes no more time
            rows = [(*ids[:-1], token) for token in {ids[-1], *self._texts}]
            with torch.no_grad():
                logits = self._model(torch.tensor(rows), use_cache=False).logits[:, -1]
            self._known |= zip(rows, logits.double().softmax(-1).tolist(), strict=True)
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


def read_by_reward(inputs):
    """The prompts of a batch in tokens of the reward model: the same texts, without padding."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [REWARD_TOKENIZER(BASE_TOKENIZER.decode(ids[mask == 1]))["input_ids"] for ids, mask in rows]


class Enumerated(LogitsProcessor):
    """
    The processor that ours must equal: the rewards of all strings, by enumeration, for the model and its reference.

    The last token of a plain text may be the beginning of a longer one: it is what the answer begins with.

    Args:
        both (list of [`Strings`]):
            The reward model and its reference.
        alpha (`float`):
            The strength.
        prompts (list of list of `int`):
            What they read, for each request.
        answer_start (`int`):
            Where answers begin in the texts of the base.
    """

    def __init__(self, both, alpha, prompts, answer_start):
        self._both, self._alpha, self._prompts, self._start = both, alpha, prompts, answer_start

    def rewards(self, prompt, answer):
        """The reward of each token of the base, by its id."""
        written = BASE_TOKENIZER.decode(answer, skip_special_tokens=True)
        if prompt[-1] > EOS:
            *prompt, last = prompt
            written = REWARD_TOKENIZER.decode([last]) + written
        of_both = []
        for model in self._both:
            before = model.begins(tuple(prompt), written)
            strings = {x: written + BASE_TOKENIZER.decode([x]) for x in range(EOS + 1, VOCAB_SIZE)}
            values = {x: model.begins(tuple(prompt), string) for x, string in strings.items()}
            values[EOS] = model.ends(tuple(prompt), written)
            of_both.append({x: value / before for x, value in values.items()})
        return {x: torch.tensor(value / of_both[1][x]).log().item() for x, value in of_both[0].items()}

    def __call__(self, input_ids, scores):
        log_probs, repeats = scores.double().log_softmax(-1), len(input_ids) // len(self._prompts)
        for row, answer in enumerate(input_ids[:, self._start :].tolist()):
            if EOS in answer:
                continue
            rewards = self.rewards(self._prompts[row // repeats], answer)
            scored = [x for x in rewards if log_probs[row, x] > -torch.inf]
            before = log_probs[row, scored]
            after = before + self._alpha * torch.tensor([rewards[x] for x in scored], dtype=torch.float64)
            log_probs[row, scored] = after - after.logsumexp(-1) + before.logsumexp(-1)
        return log_probs.to(scores.dtype)


def permuted(tokenizer, seed=0):
    """The same tokens and merges, numbered otherwise, and the permutation from old to new ids."""
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(seed))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] = {token: int(order[index]) for token, index in vocab.items()}
    for token in state["added_tokens"]:
        token["id"] = int(order[token["id"]])
    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **tokens)
    return other, order


def renumbered(model, order, vocab_size):
    """The same distribution over strings, with the ids of the permuted tokenizer and some rows of padding."""
    twin = tiny_llama(9, vocab_size=vocab_size)
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = twin.state_dict()[name].clone()
        rows[order] = state[name][: len(order)]
        state[name] = rows
    twin.load_state_dict(state)
    return twin
