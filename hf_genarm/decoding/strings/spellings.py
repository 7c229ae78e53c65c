"""The ways in which a reward model spells a text, and the probability that its answer begins with a string."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .byte_map import ByteMap
from .text_tree import Node, TextTree


@dataclass(frozen=True)
class Pruning:
    """
    Chooses which spellings are followed.

    Parameters:
        most (`int`):
            The number of spellings of a text that are kept.
        least_share (`float`):
            The share of the probability of a text that a spelling must have, or else it is dropped.
        as_written (`bool`):
            Whether a new string is only cut where the tokenizer of the reward model would cut it. Models are trained on
            such texts, and give hardly any probability to others. If so, one pass reads all that is needed.
    """

    most: int = 8
    least_share: float = 1e-3
    as_written: bool = True


PRUNING = Pruning()
NO_PRUNING = Pruning(most=2**62, least_share=0.0, as_written=False)


class Spelling(NamedTuple):
    """
    Is one way to write a text in tokens of the reward model, up to its last token, which may run past the text.

    Parameters:
        node ([`Node`]):
            The tokens that end within the text.
        weight (`np.ndarray` of shape `(n_models,)`):
            Their log-probability by each model, minus that of all spellings together.
        pending (`bytes`):
            The end of the text, which they leave to the next token; none if they end where it does.
    """

    node: Node
    weight: np.ndarray
    pending: bytes


@dataclass
class Spellings:
    r"""
    Holds the ways to write a text. Together they have its probability $F$, with which its reward is made: that the
    answer of a model begins with these bytes.

    Parameters:
        list (list of [`Spelling`]):
            The spellings.
        log_prob (`np.ndarray` of shape `(n_models,)`):
            $\log F$ by each model.
        dropped (`float`):
            The share of it that was dropped in the last step.
        is_over (`bool`):
            Whether the text has ended, so that nothing can follow it.
    """

    list: list[Spelling]
    log_prob: np.ndarray
    dropped: float = 0.0
    is_over: bool = False


@dataclass
class _Found:
    """Holds what was found on the way through one string after a text."""

    read: list[Spelling] = field(default_factory=list)
    ends: list[tuple[Spelling, int]] = field(default_factory=list)  # spellings, and the token with which they end


class PrefixProbabilities:
    r"""
    Computes $F$, the probability that the answer of a reward model begins with a string.

    It is the sum over all sequences of tokens whose last one is the first to reach the end of the string:

    $$F(x) = \sum_{t_1 \dots t_n \text{ covers } x} \pi(t_1 \dots t_n)$$

    Sequences that agree up to their last token are one [`Spelling`]. The probabilities of all last tokens that begin
    with the pending bytes are added up, which are neighbours in the order of bytes.

    Args:
        byte_map ([`ByteMap`]):
            The bytes of the tokens.
        tree ([`TextTree`]):
            The reward model, and its reference if there is one.
        pruning ([`Pruning`]):
            Which spellings are followed.
    """

    def __init__(self, byte_map: ByteMap, tree: TextTree, pruning: Pruning):
        self._byte_map, self._tree, self._pruning = byte_map, tree, pruning

    @property
    def _zero(self) -> np.ndarray:
        return np.zeros(len(self._tree.models))

    def begin(self, prompt: Node, pending: bytes = b"") -> Spellings:
        """
        Returns the spellings of an answer that has not begun.

        Args:
            prompt ([`Node`]):
                The prompt.
            pending (`bytes`, *optional*):
                What the answer surely begins with: the end of a prompt whose last token may be longer.
        """
        spellings = Spellings([Spelling(prompt, self._zero, b"")], self._zero)
        if not pending:
            return spellings
        (spellings,) = self.advance([spellings], [pending])
        return Spellings(spellings.list, self._zero)

    def advance(self, texts: Sequence[Spellings], strings: Sequence[bytes]) -> list[Spellings]:
        """Returns the spellings of texts that go on with one string each; an empty list if nothing spells one."""
        jobs = [(text, string) for text, string in zip(texts, strings, strict=True) if string]
        found = iter(self._explore(jobs, [text for text, _ in jobs]))
        return [self._next(text, next(found)) if string else text for text, string in zip(texts, strings, strict=True)]

    def log_probs(
        self, texts: Sequence[Spellings], strings: Sequence[Sequence[bytes]]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        r"""
        Returns $\log F(c \cdot s) - \log F(c)$ of several strings $s$ after each text $c$.

        Args:
            texts (sequence of [`Spellings`]):
                The texts.
            strings (sequence of sequence of `bytes`):
                The strings that may follow each of them.

        Returns:
            For each text: the log-probabilities `(n_models, n_strings)`, and those of its end `(n_models,)`.
        """
        jobs = [(text, string) for text, of_text in zip(texts, strings, strict=True) for string in of_text]
        explored = iter(self._explore(jobs, [text for text in texts if not text.is_over]))
        log_probs, ends = [], []
        for text, of_text in zip(texts, strings, strict=True):
            found = [next(explored) for _ in of_text]
            sums = [self._sum(x.read) for x in found]
            log_probs.append(_log(np.stack(sums, axis=1)) if sums else np.zeros((len(self._zero), 0)))
            complete = [x for x in text.list if not x.pending and not text.is_over]
            ends.append(_log(sum((np.exp(x.weight) * self._end(x.node) for x in complete), start=self._zero)))
        return log_probs, ends

    def _explore(self, jobs: Sequence[tuple[Spellings, bytes]], texts: Sequence[Spellings]) -> list[_Found]:
        """
        Follows the spellings of texts through one string each, and reads what follows the tokens inside of it.

        Args:
            jobs (sequence of (`Spellings`, `bytes`)):
                Texts and strings.
            texts (sequence of [`Spellings`]):
                All texts whose ends are read, too.
        """
        found, written = [_Found() for _ in jobs], [self._written(*job) for job in jobs]
        listed = {id(text): {spelling.node for spelling in text.list} for text in texts}
        self._tree.read(node for nodes in (*listed.values(), *written) for node in nodes)
        cuts = [{(node.parent, node.token) for node in of_job} for of_job in written]
        front = [
            (index, Spelling(x.node, x.weight, x.pending + string), len(x.pending))
            for index, (text, string) in enumerate(jobs)
            for x in text.list
        ]
        while front:
            inside: list[tuple[int, Spelling, int]] = []
            for index, spelling, n_known in front:
                found[index].read.append(spelling)
                node = spelling.node
                assert node.following is not None
                for token, rest in self._byte_map.beginnings(spelling.pending):
                    is_cut = (node, token) in cuts[index]
                    # What ends within the text is listed, unless it was dropped. Some of it turns out to be needed.
                    is_new = len(rest) < len(spelling.pending) - n_known
                    if not (is_new or is_cut) or (is_cut and node.child(token) in listed[id(jobs[index][0])]):
                        continue
                    if not rest:
                        found[index].ends.append((spelling, token))
                    elif is_cut or not self._pruning.as_written:
                        weight = spelling.weight + node.following[:, token]
                        if weight.max() > -np.inf:
                            inside.append((index, Spelling(node.child(token), weight, rest), 0))
            self._tree.read(spelling.node for _, spelling, _ in inside)
            front = inside
        return found

    def _written(self, text: Spellings, string: bytes) -> list[Node]:
        """
        Returns the places inside of a string, after a text, at which the tokenizer of the reward model cuts it.

        If it would not have cut the text as any of the spellings does, each is continued as if a text began there:
        there must be some way to write the string.
        """
        for joins in (True, False):
            nodes = [node for x in text.list for node in self._cuts(x, string, joins)]
            if nodes or any(self._covers(x.pending + string) for x in text.list):
                return nodes
        return []

    def _cuts(self, spelling: Spelling, string: bytes, joins: bool) -> list[Node]:
        """Returns the places inside of a string after one spelling; `joins`: where the last token is cut off, too."""
        of_reward, node = self._byte_map.of_reward, spelling.node
        last = of_reward[node.token] if joins and node.parent is not None else None
        pieces = self._byte_map.pieces((last or b"") + spelling.pending + string)
        if last is not None:
            if pieces[:1] != (node.token,):
                return []
            pieces = pieces[1:]
        return [node := node.child(token) for token in pieces[:-1]]

    def _covers(self, string: bytes) -> bool:
        first, last = self._byte_map.interval(string)
        return first < last

    def _sum(self, spellings: Iterable[Spelling]) -> np.ndarray:
        r"""Returns the sum of the probabilities of spellings, whose last tokens may run past the text."""
        total = self._zero
        for spelling in spellings:
            total = total + np.exp(spelling.weight) * self._mass(
                spelling.node, *self._byte_map.interval(spelling.pending)
            )
        return total

    def _mass(self, node: Node, first: int, last: int) -> np.ndarray:
        """Returns the probability of the tokens at some places in the order of bytes, `(n_models,)`."""
        assert node.following is not None
        # Not as a difference of cumulative sums, which would round small ones away
        return np.exp(node.following[:, self._byte_map.order[first:last]].astype(np.float64)).sum(axis=1)

    def _end(self, node: Node) -> np.ndarray:
        """Returns the probability of the tokens that end a text, `(n_models,)`."""
        assert node.following is not None
        return np.exp(node.following[:, list(self._byte_map.reward_ends)].astype(np.float64)).sum(axis=1)

    def _next(self, text: Spellings, found: _Found) -> Spellings:
        """Returns the spellings of a text that has gone on, from what was found on the way."""
        spellings, shares = [], []
        for spelling in found.read:
            first, last = self._byte_map.interval(spelling.pending)
            first += len(self._byte_map.tokens_of(spelling.pending))  # which end here, and are spellings themselves
            if first < last:
                spellings.append(spelling)
                shares.append(np.exp(spelling.weight) * self._mass(spelling.node, first, last))
        for spelling, token in found.ends:
            assert spelling.node.following is not None
            weight = spelling.weight + spelling.node.following[:, token]
            spellings.append(Spelling(spelling.node.child(token), weight, b""))
            shares.append(np.exp(weight))
        if not spellings:
            return Spellings([], np.full_like(self._zero, -np.inf))
        of_all = np.stack(shares)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.nan_to_num(of_all / of_all.sum(axis=0)).max(axis=1)
        order = [x for x in np.argsort(-share, kind="stable") if share[x] > 0 and share[x] >= self._pruning.least_share]
        kept = order[: self._pruning.most]
        # One that is complete stays in any case: only after such a one can everything follow, and the text end.
        kept += [x for x in np.argsort(-share, kind="stable") if not spellings[x].pending and share[x] > 0][:1]
        kept = list(dict.fromkeys(kept))
        total = of_all[kept].sum(axis=0)
        dropped = float(max(0.0, 1.0 - total[0] / of_all[:, 0].sum())) if of_all[:, 0].sum() > 0 else 0.0
        log_total = _log(total)
        scale = np.where(np.isfinite(log_total), log_total, 0.0)
        kept_spellings = [spellings[x]._replace(weight=spellings[x].weight - scale) for x in kept]
        return Spellings(kept_spellings, text.log_prob + log_total, dropped)


def _log(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(x)
