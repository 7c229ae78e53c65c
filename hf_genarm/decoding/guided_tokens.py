"""The table of what guidance did to each token, which draws itself."""

import math
from collections.abc import Sequence
from typing import Any

from ..viewing.picture import Drawing, Picture
from ..viewing.tokens import Token, TokenText

# The likeliest next tokens and their probabilities
Likeliest = list[tuple[str, float]]


class GuidedTokens(Drawing, dict):
    r"""
    Holds what guidance did to each token: a plain `dict` of columns, for a `pandas.DataFrame`, that draws itself.

    It is coloured by `change`, $\log\pi - \log\pi_\text{base}$ of the token that was taken: blue was made likelier,
    orange less likely. `by` colours it by a column.

    Args:
        columns (`dict[str, list]`):
            The table, a row for each token.
        texts (list of `str`):
            What each token adds to its text; `None` for a token after the end of a text, which is not drawn.
        likeliest (list of `tuple`):
            For each token, the three likeliest before and after guidance.
        titles (list of `str`, *optional*):
            What each reward model rewards; `None` where that is not known. Defaults to that for all.
    """

    def __init__(
        self,
        columns: dict[str, list[Any]],
        texts: Sequence[str | None],
        likeliest: Sequence[tuple[Likeliest, Likeliest]],
        titles: Sequence[str | None] = (),
    ):
        super().__init__(columns)
        self._texts, self._likeliest = list(texts), list(likeliest)
        n_rewards = sum(name.startswith("alpha_") for name in self)
        self._titles = [x or f"reward {index}" for index, x in enumerate(titles or [None] * n_rewards)]

    def __reduce__(self) -> tuple:
        return type(self), (dict(self), self._texts, self._likeliest, self._titles)

    def token_texts(self) -> list[TokenText]:
        return self.by("change").token_texts()

    def by(self, measure: str) -> Picture:
        """
        Returns the same picture, coloured by a column such as `"kl"` or `"reward_log_prob_0"`.

        Args:
            measure (`str`):
                Name of a column, or `"change"`.

        Raises:
            ValueError: if there is no such column.
        """
        texts: dict[int, list[Token]] = {}
        for (sequence, _), token in self.tokens(measure).items():
            texts.setdefault(sequence, []).append(token)
        titles = {index: f"sequence {index}" if len(texts) > 1 else "" for index in texts}
        name = name_of(measure)
        if measure.startswith("reward_log_prob_"):
            name = f"{self._titles[int(measure.removeprefix('reward_log_prob_'))]}, nats"
        return Picture([TokenText(tokens, name, titles[index]) for index, tokens in texts.items()])

    def tokens(self, measure: str = "change") -> dict[tuple[int, int], Token]:
        """Returns the tokens of the picture that `by` draws, by sequence and position."""
        if measure == "change":
            values = [x - y for x, y in zip(self["guided_log_prob"], self["base_log_prob"], strict=True)]
        elif measure in self:
            values = [float(x) for x in self[measure]]
        else:
            raise ValueError(f"`measure` is {measure!r}, but must be 'change' or one of {', '.join(self)}.")
        places = zip(self["sequence"], self["position"], strict=True)
        return {
            place: Token(text, values[row], self._notes(row))
            for row, (place, text) in enumerate(zip(places, self._texts, strict=True))
            if text is not None
        }

    def _notes(self, row: int) -> tuple[tuple[str, str], ...]:
        base, guided = (math.exp(self[f"{name}_log_prob"][row]) for name in ("base", "guided"))
        notes = [("probability", f"{base:.2g} of the base, {guided:.2g} guided")]
        for index, title in enumerate(self._titles):
            reward, alpha = self[f"reward_log_prob_{index}"][row], self[f"alpha_{index}"][row]
            if not math.isnan(reward):
                notes.append((title, f"{reward:.2f} nats, with strength {alpha:.2f}"))
        before, after = self._likeliest[row]
        notes += [("KL", f"{self['kl'][row]:.3f} nats"), ("likeliest before", _listed(before))]
        return (*notes, ("likeliest after", _listed(after)))


def name_of(measure: str) -> str:
    """Returns the label of the scale of a picture that is not coloured by a reward."""
    names = {"change": "guided minus base log-probability, nats", "kl": "divergence from the base, nats"}
    return names.get(measure, measure)


def _listed(tokens: Likeliest) -> str:
    return ", ".join(f"“{text}” {probability:.2f}".replace("\n", "⏎") for text, probability in tokens)
