"""How many drafts pay, by what they and their verification were measured to take."""

import statistics
from collections import deque
from typing import Any


class Pace:
    r"""
    Chooses the number of drafts, so that the most tokens are written per second.

    With n drafts that take d seconds each and are accepted with the rate a, and a verification of v(n) seconds, a cycle
    writes $1 + a + \dots + a^n$ tokens in $n d + v(n)$ seconds. All of it is measured while text is written, and the
    latest counts most. A number that has not been tried of late is taken to be verified as fast as the next smaller
    one, so that it is tried again. Without drafts the rate returns to 1/2, so that they are tried again, too.
    """

    LARGEST = 12
    # What was measured so many cycles ago is forgotten; the weight of a cycle in the rate falls by this factor.
    KEPT_CYCLES, FADING = 64, 0.95

    def __init__(self) -> None:
        self._cycle = 0
        self._accepted = self._rejected = 0.0
        self._drafting: deque[float] = deque(maxlen=16)
        self._verifying: dict[int, deque[tuple[int, float]]] = {}

    @property
    def acceptance(self) -> float:
        """The rate at which drafts are accepted."""
        return (self._accepted + 1) / (self._accepted + self._rejected + 2)

    def note_drafts(self, n_drafts: int, n_accepted: int) -> None:
        """Of the drafts of a cycle, of which those after the first that is rejected tell nothing."""
        self._accepted = self.FADING * self._accepted + n_accepted
        self._rejected = self.FADING * self._rejected + (n_accepted < n_drafts)

    def note_seconds(self, n_drafts: int, drafting: float, verifying: float) -> None:
        """Of all drafts of a cycle, and of their verification."""
        self._cycle += 1
        if n_drafts:
            self._drafting.append(drafting / n_drafts)
        self._verifying.setdefault(n_drafts, deque(maxlen=16)).append((self._cycle, verifying))

    def measured(self) -> dict[str, Any]:
        """Median seconds for a draft, and for the verification of each number of drafts."""
        drafting = statistics.median(self._drafting) if self._drafting else None
        return {"draft": drafting, "verification": {n: self._seconds(n) for n in sorted(self._verifying)}}

    def n_drafts(self) -> int:
        """The number that writes most tokens per second; a few before anything is known."""
        if not self._drafting or not self._verifying:
            return 2
        for n, measured in list(self._verifying.items()):
            if measured[-1][0] < self._cycle - self.KEPT_CYCLES:
                del self._verifying[n]
        return max(range(self.LARGEST + 1), key=self._tokens_per_second)

    def _tokens_per_second(self, n_drafts: int) -> float:
        n_tokens = sum(self.acceptance**n for n in range(n_drafts + 1))
        known = max((n for n in self._verifying if n <= n_drafts), default=min(self._verifying))
        return n_tokens / (n_drafts * statistics.median(self._drafting) + self._seconds(known))

    def _seconds(self, n_drafts: int) -> float:
        """The median, which other programs on the machine change least."""
        return statistics.median(seconds for _, seconds in self._verifying[n_drafts])
