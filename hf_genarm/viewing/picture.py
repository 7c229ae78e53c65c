"""Objects that draw themselves: in a notebook, in a terminal, in a paper, and side by side."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .figure import draw
from .html import to_html
from .terminal import to_ansi
from .tokens import TokenText


class Drawing:
    """Adds pictures to a class that defines [`Drawing.token_texts`]."""

    def token_texts(self) -> list[TokenText]:
        """Returns the texts, with what their tokens are coloured by."""
        raise NotImplementedError

    def to_html(self) -> str:
        """Returns the picture that notebooks show; pointing at a token shows what is known about it."""
        return to_html(self.token_texts())

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_ansi(self, width: int | None = None, limit: float | None = None, has_colors: bool = True) -> str:
        """
        Returns the picture for a terminal: `print(x.to_ansi())`.

        Args:
            width (`int`, *optional*):
                Columns of the terminal. Defaults to those that it reports.
            limit (`float`, *optional*):
                The value at which colours are full, for pictures that are to be compared. Defaults to what suits these
                texts.
            has_colors (`bool`, *optional*, defaults to `True`):
                Whether to write the escape codes of colours, which a file or a pipe should not get.
        """
        return to_ansi(self.token_texts(), width, limit, has_colors)

    def plot(self, ax: Any = None) -> Any:
        """
        Draws the picture for a paper, with matplotlib.

        Args:
            ax ([`~matplotlib.axes.Axes`], *optional*):
                Where to draw. Defaults to a new figure.

        Returns:
            [`~matplotlib.axes.Axes`]; `ax.figure.savefig("tokens.pdf")` writes it.
        """
        return draw(self.token_texts(), ax)

    def beside(self, *others: "Drawing", titles: Sequence[str] | None = None) -> "Picture":
        """
        Returns a picture of this and others side by side, on one scale.

        Args:
            *others ([`Drawing`]):
                What to put to the right of it.
            titles (list of `str`, *optional*):
                One for each text.

        Raises:
            ValueError: if there are not as many titles as texts.
        """
        texts = [text for drawing in (self, *others) for text in drawing.token_texts()]
        if titles is not None and len(titles) != len(texts):
            raise ValueError(f"`titles` has {len(titles)} entries, but there are {len(texts)} texts. Give as many.")
        if titles is not None:
            texts = [replace(text, title=title) for text, title in zip(texts, titles, strict=True)]
        return Picture(texts)


class Picture(Drawing):
    """
    Holds some texts, and draws them.

    Args:
        texts (list of [`TokenText`]):
            The texts.
    """

    def __init__(self, texts: list[TokenText]):
        self._texts = texts

    def token_texts(self) -> list[TokenText]:
        return self._texts
