"""How many tokens to draft, from how many of the last drafts were accepted."""


class DraftLength:
    r"""
    Chooses the number of drafts that writes the most tokens for what a cycle costs.

    Drafts are accepted with a rate $a$. With $n$ drafts a cycle writes $1 + a + \dots + a^n$ tokens, and costs one pass
    of the base plus `COST` of such a pass for each draft. The rate is counted in tokens, not in seconds, so that the
    same seed gives the same text. A cycle without drafts moves the rate towards 1/2, so that drafts are tried again.
    """

    LARGEST = 12
    # The share of a base pass that drafting and verifying one token takes: `speculation.json` measures 0.2 to 0.4.
    COST = 1 / 3
    # The weight of a cycle in the rate falls by this factor with each later one.
    FADING = 0.95

    def __init__(self) -> None:
        self._accepted = self._rejected = 0.0

    @property
    def acceptance(self) -> float:
        """The rate at which drafts are accepted."""
        return (self._accepted + 1) / (self._accepted + self._rejected + 2)

    def record(self, n_drafts: int, n_accepted: int) -> None:
        """Counts the drafts of a cycle; those after the first rejected one carry no information about the rate."""
        self._accepted = self.FADING * self._accepted + n_accepted
        self._rejected = self.FADING * self._rejected + (n_accepted < n_drafts)

    def n_drafts(self) -> int:
        """Returns the number of drafts for the next cycle, from 0 to `LARGEST`."""
        return max(range(self.LARGEST + 1), key=self._tokens_per_pass)

    def _tokens_per_pass(self, n_drafts: int) -> float:
        return sum(self.acceptance**n for n in range(n_drafts + 1)) / (1 + self.COST * n_drafts)
