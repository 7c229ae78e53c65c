"""Which texts are in which pages of keys and values, and which of them are dropped where pages are short."""

from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

# Stands in for the pages that a text does not have. Nothing is ever written into it.
EMPTY_PAGE = 0


@dataclass(eq=False)
class HeldText:
    """
    Holds the tokens of a text whose keys and values are in its pages, in order.

    Parameters:
        tokens (list of `int`):
            The tokens.
        pages (list of `int`):
            The pages, which may have room for more.
    """

    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class TextPages:
    """
    Hands out pages to texts. Where they are short, the least recently used texts are dropped, first those that no
    owner holds.

    Args:
        n_pages (`int`):
            Number of pages, numbered from 1.
        page_size (`int`):
            Number of tokens in a page.

    Attributes:
        n_found (`int`):
            Number of tokens that a new owner has found in a text which was there.
        n_dropped (`int`):
            Number of texts that were dropped although an owner held them, and so are read again.
    """

    def __init__(self, n_pages: int, page_size: int):
        self.n_pages, self.page_size = n_pages, page_size
        self.n_found = self.n_dropped = 0
        self._free = list(range(n_pages, 0, -1))  # the lowest is handed out first
        self._held: dict[Hashable, HeldText] = {}
        self._idle: OrderedDict[HeldText, None] = OrderedDict()  # the least recently used first
        self._used: OrderedDict[HeldText, None] = OrderedDict()  # of those that are held, likewise

    @property
    def n_in_use(self) -> int:
        """Number of pages of texts that an owner holds."""
        return sum(len(text.pages) for text in self._used)

    def get(self, owner: Hashable) -> HeldText | None:
        """Returns the text of an owner; `None` if it holds none."""
        return self._held.get(owner)

    def hold(self, owner: Hashable, tokens: Sequence[int]) -> HeldText:
        """
        Returns the text of an owner, cut to what it shares with some tokens.

        A new owner continues the text of an earlier one that shares the longest start, if it shares half of that text:
        so an interrupted request, or a conversation, goes on, and no other is lost for a few words at its beginning.
        """
        text = self._held.get(owner)
        if text is None:
            shared = {x: shared_length(x.tokens, tokens) for x in self._idle}
            text = max(shared, key=lambda x: shared[x], default=None)
            if text is None or 2 * shared[text] < len(text.tokens):
                text = HeldText()
            else:
                self._idle.pop(text)
                self.n_found += shared[text]
            self._held[owner] = text
        del text.tokens[shared_length(text.tokens, tokens) :]
        self._used[text] = None
        self._used.move_to_end(text)
        return text

    def release(self, owner: Hashable) -> None:
        """Leaves the text of an owner to others that begin alike, until its pages are needed."""
        text = self._held.pop(owner, None)
        if text is not None:
            self._used.pop(text)
            self._idle[text] = None

    def reserve(self, text: HeldText, n_tokens: int, needed: Collection[HeldText]) -> bool:
        """
        Gives a text the pages for a number of tokens.

        Args:
            text ([`HeldText`]):
                A text that is held.
            n_tokens (`int`):
                The number of tokens.
            needed (collection of [`HeldText`]):
                Texts that may not be dropped for it.

        Returns:
            `bool`: whether there was room.
        """
        n_pages = -(-n_tokens // self.page_size)
        self._give_back(text, n_pages)
        n_more = n_pages - len(text.pages)
        others = [x for x in self._used if x is not text and x not in needed]
        if n_more > len(self._free) + sum(len(x.pages) for x in (*self._idle, *others)):
            return False
        while n_more > len(self._free) and self._idle:
            self._give_back(self._idle.popitem(last=False)[0], 0)
        for other in others:
            if n_more <= len(self._free):
                break
            if other.pages:
                self._give_back(other, 0)
                self.n_dropped += 1
        text.pages += [self._free.pop() for _ in range(n_more)]
        return True

    def _give_back(self, text: HeldText, n_kept: int) -> None:
        """Takes all pages but the first few from a text."""
        self._free += reversed(text.pages[n_kept:])
        del text.pages[n_kept:], text.tokens[n_kept * self.page_size :]


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the number of leading tokens that two texts have in common."""
    end, length = 0, 16
    most = min(len(one), len(other))
    while end < most and one[end : end + length] == other[end : end + length]:
        end, length = end + length, 2 * length
    end = min(end, most)
    low, high = end, min(most, end + length)
    while low < high:  # the first `low` are the same, and not all of the first `high + 1`
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
