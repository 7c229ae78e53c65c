"""The reward of the next string: a reward model with other tokens than the base, for the tokens of the base."""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ...hub.info import GuidanceWarning
from ..own_prompt import OwnPrompt
from .byte_map import ByteMap
from .spellings import PRUNING, PrefixProbabilities, Pruning, Spellings
from .starting_model import StartingModel
from .text_tree import TextTree


@dataclass(frozen=True)
class Candidates:
    """
    Chooses which tokens of the base get rewards: the smallest set with some share of its probability. The others keep
    the probability that the base gives them.

    Parameters:
        mass (`float`):
            The share.
        most (`int`):
            The number of tokens that it has at most.
    """

    mass: float = 0.999
    most: int = 64


CANDIDATES = Candidates()
# What the reward model reads, and whether the base begins an answer to it with a space that is not there
Prompt = tuple[tuple[int, ...], bool]
# What statistics keep in addition, for each token
OF_STRINGS = ("coverage", "pruned")


class StringRewards:
    r"""
    Returns rewards for the tokens of a base from a reward model whose tokens are other strings.

    With the bytes $c$ of the answer so far, and $s_v$ of a token, the reward is that of the string,

    $$\rho(v \mid c) = \log F(c \cdot s_v) - \log F(c)$$

    where $F(x)$ is the probability that the reward model's own answer begins with $x$. Those of a text add up to the
    log-probability of its string. With a reference, that of the same string is subtracted.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The reward model.
        start ([`StartingModel`]):
            The model with the same tokens that it is contrasted with, if there is one.
        byte_map ([`ByteMap`]):
            The bytes of the tokens of both.
        candidates ([`Candidates`], *optional*), pruning ([`Pruning`], *optional*):
            Which tokens get rewards, and which spellings are followed.

    Attributes:
        coverage (`torch.Tensor` of shape `(batch_size,)`):
            For each text of the last call, the share of the base's probability that its candidates have.
        pruned (`torch.Tensor` of shape `(batch_size,)`):
            The share of the reward model's probability of each text that was dropped in the last step.
    """

    has_cache = False  # of the kind that drafts are read into ahead
    KEPT_TEXTS = 512
    LOW_COVERAGE, N_TO_WARN = 0.9, 32

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        start: StartingModel,
        byte_map: ByteMap,
        candidates: Candidates = CANDIDATES,
        pruning: Pruning = PRUNING,
    ):
        self.model, self._byte_map, self._candidates = model, byte_map, candidates
        self.tree = TextTree(model, *start)
        self.probabilities = PrefixProbabilities(byte_map, self.tree, pruning)
        self.coverage = self.pruned = torch.ones(0)
        self._n_covered, self._warned = np.zeros(2), set[str]()
        self.reset()

    def reset(self) -> None:
        """Forgets what has been read."""
        self.tree.reset()
        self._begun: dict[Prompt, Spellings] = {}
        self._texts: OrderedDict[tuple[Prompt, tuple[int, ...]], Spellings] = OrderedDict()

    release = reset

    @property
    def why(self) -> str:
        """The reason why the rewards are those of strings, what they are contrasted with, and what a token costs."""
        contrasted = (
            "without a contrast" if len(self.tree.models) == 1 else "minus those of the model it was trained from"
        )
        cost = (
            "a pass over a few places"
            if self.tree.why_rows is None
            else (f"a pass over the whole text for each of several spellings, as {self.tree.why_rows}")
        )
        return (
            f"its tokens are other strings than those of the base: rewards are those of strings, {contrasted}, for the "
            f"{self._candidates.most} likeliest tokens at most, and each token of the base costs {cost}"
        )

    def log_probs(self, input_ids: Tensor, scores: Tensor, prompt: OwnPrompt) -> Tensor:
        """
        Returns the rewards of the next token.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
                The texts so far, in ids of the base, on the host.
            scores (`torch.FloatTensor` of shape `(batch_size, vocab_size)`):
                The scores of the base, which candidates are chosen by.
            prompt ([`OwnPrompt`]):
                What the reward model reads in place of the base's prompt.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`: NaN for tokens that are no candidates.
        """
        try:
            rewards = self._log_probs(input_ids, scores, prompt)
        except BaseException:  # an interrupted pass leaves a cache whose layers differ in length
            self.reset()
            raise
        self.tree.trim()
        return rewards

    def _log_probs(self, input_ids: Tensor, scores: Tensor, prompt: OwnPrompt) -> Tensor:
        answers = [tuple(row) for row in input_ids[:, prompt.answer_start :].tolist()]
        repeats = len(answers) // len(prompt.input_ids)
        pairs = zip(prompt.input_ids, prompt.attention_mask, strict=True)
        prompts = [tuple(ids[mask == 1].tolist()) for ids, mask in pairs]
        before = input_ids[:, prompt.answer_start - 1].tolist()
        texts = self._read([(prompts[row // repeats], self._writes_space(x)) for row, x in enumerate(before)], answers)
        probabilities = scores.float().softmax(dim=-1)
        top, tokens = (x.tolist() for x in probabilities.topk(min(self._candidates.most, scores.shape[-1])))
        firsts = [not answer and self._writes_space(x) for answer, x in zip(answers, before, strict=True)]
        chosen = [self._chosen(*row) for row in zip(texts, firsts, tokens, top, strict=True)]
        log_probs, ends = self.probabilities.log_probs(texts, [list(of_row.values()) for of_row, _ in chosen])
        rewards = np.full(scores.shape, np.nan)
        for row, (strings, end_tokens) in enumerate(chosen):
            rewards[row, list(strings)] = self._reward(log_probs[row])
            rewards[row, end_tokens] = self._reward(ends[row][:, None])
        self.pruned = torch.tensor([text.dropped for text in texts])
        result = torch.from_numpy(rewards).float().to(scores.device)
        self.coverage = probabilities.masked_fill(result.isnan(), 0.0).sum(dim=-1)
        self._warn_of_low_coverage(texts)
        return result

    def _reward(self, log_probs: np.ndarray) -> np.ndarray:
        """Returns the reward by log-probabilities `(n_models, n)`: minus those of the reference, if there is one."""
        if len(log_probs) == 1:
            return log_probs[0]
        of_model, of_reference = log_probs
        with np.errstate(invalid="ignore"):
            return np.where(np.isneginf(of_reference), 0.0, of_model - of_reference)

    def _chosen(
        self, text: Spellings, drops_space: bool, tokens: Sequence[int], probabilities: Sequence[float]
    ) -> tuple[dict[int, bytes], list[int]]:
        """Returns the candidates after a text with their strings, and those that end it."""
        strings, end_tokens, mass = dict[int, bytes](), list[int](), 0.0
        for token, probability in zip(tokens, probabilities, strict=True):
            if mass >= self._candidates.mass or probability == 0 or not text.list or text.is_over:
                break
            mass += probability
            string = self._string(token, drops_space)
            if token in self._byte_map.ends:
                end_tokens.append(token)
            elif string:
                strings[token] = string
        return strings, end_tokens

    def _writes_space(self, token: int) -> bool:
        """Returns whether the base begins a text after a token, a special one, with a space that is not there."""
        return self._byte_map.base_adds_space and self._bytes(token) is None

    def _bytes(self, token: int) -> bytes | None:
        of_base = self._byte_map.of_base
        return of_base[token] if 0 <= token < len(of_base) else None

    def _string(self, token: int, drops_space: bool = False) -> bytes:
        """Returns what a token of the base adds to an answer."""
        string = self._bytes(token) or b""
        return string[1:] if drops_space and string[:1] == b" " else string

    def _read(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Spellings]:
        """Returns the spellings of some answers, from those of the longest known beginning of each."""
        keys = list(zip(prompts, answers, strict=True))
        known = {key: self._known(*key) for key in keys}
        while ahead := {key: text for key, text in known.items() if text[0] < len(key[1])}:
            strings = [
                b"" if text.is_over else self._string(answer[n], drops_space=n == 0 and writes_space)
                for ((_, writes_space), answer), (n, text) in ahead.items()
            ]
            texts = self.probabilities.advance([text for _, text in ahead.values()], strings)
            for (key, (n, before)), text in zip(ahead.items(), texts, strict=True):
                is_over = before.is_over or key[1][n] in self._byte_map.ends
                text = Spellings(before.list, before.log_prob, is_over=True) if is_over else text
                known[key] = n + 1, text
                self._texts[key[0], key[1][: n + 1]] = text
                if not text.list:
                    self._warn_of_an_end(key[1][: n + 1])
        while len(self._texts) > max(self.KEPT_TEXTS, 4 * len(keys)):
            self._texts.popitem(last=False)
        return [known[key][1] for key in keys]

    def _known(self, prompt: Prompt, answer: tuple[int, ...]) -> tuple[int, Spellings]:
        """Returns the longest beginning of an answer whose spellings are known: its length, and these."""
        for n in range(len(answer), 0, -1):
            text = self._texts.get((prompt, answer[:n]))
            if text is not None:
                return n, text
        if prompt not in self._begun:
            self._begun[prompt] = self._begin(prompt[0])
        return 0, self._begun[prompt]

    def _begin(self, prompt: tuple[int, ...]) -> Spellings:
        """
        Returns the spellings of an answer that has not begun.

        The last token of a plain text may be the beginning of a longer one, which the answer goes on with. After a
        special token, some tokenizers write a space that is not there.
        """
        of_reward, node = self._byte_map.of_reward, self.tree.root.after(prompt)
        last = of_reward[prompt[-1]]
        is_plain = len(prompt) > 1 and all(of_reward[token] is not None for token in prompt[1:])
        if is_plain and last:
            assert node.parent is not None
            return self.probabilities.begin(node.parent, last)
        return self.probabilities.begin(node, b" " if last is None and self._byte_map.reward_adds_space else b"")

    def _warn_of_low_coverage(self, texts: Sequence[Spellings]) -> None:
        going_on = [x for x, text in zip(self.coverage.tolist(), texts, strict=True) if text.list and not text.is_over]
        self._n_covered += (len(going_on), sum(going_on))
        n_tokens, covered = self._n_covered
        if n_tokens >= self.N_TO_WARN and covered < self.LOW_COVERAGE * n_tokens:
            self._warn(
                "coverage",
                f"The {self._candidates.most} likeliest tokens, which guidance across tokenizers acts on, have only "
                f"{covered / n_tokens:.2f} of the base's probability on average; the others keep the probability that "
                "the base gives them. Choose among fewer tokens (`top_p`, a lower temperature), or use a reward model "
                "with the tokenizer of the base.",
            )

    def _warn_of_an_end(self, answer: Sequence[int]) -> None:
        written = b"".join(map(self._string, answer))
        self._warn(
            "end",
            f"The answer goes on with {written[-16:]!r}, which no tokens of the reward model spell, so that from there "
            "on it has no rewards, and is not guided. Exclude such characters (`bad_words_ids`), or use a reward model "
            "whose tokenizer can write all bytes.",
        )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, GuidanceWarning, stacklevel=2)
