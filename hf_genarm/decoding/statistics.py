"""What guidance did at each token, kept by the tokens of a text and read off for finished sequences."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import kl_divergence, text_keys, weighted


class Statistics:
    r"""
    Keeps, for each text that a processor was asked about, what it did to the next token.

    Texts are told apart by their tokens. So it does not matter in which order, how often and in which rows they were
    asked about: rejected drafts and abandoned beams just never show up in what is read off.

    Args:
        n_rewards (`int`):
            Number of reward models.
    """

    # Drafts are tried before it is known which of their tokens are taken; with several rows there are no drafts.
    KEPT_LENGTHS = 64

    def __init__(self, n_rewards: int):
        self._n_rewards = n_rewards
        self._of_text: dict[bytes, dict[str, Any]] = {}
        # Log-probabilities of all tokens, until it is known which one was taken: by length, the row of each text
        self._pending: dict[int, tuple[dict[bytes, int], dict[str, Tensor]]] = {}

    def note(
        self,
        input_ids: Tensor,
        scores: Tensor,
        guided: Tensor,
        rewards: dict[int, Tensor],
        strengths: Sequence[float | Tensor],
    ) -> None:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
                The texts.
            scores (`torch.Tensor` of shape `(batch_size, vocab_size)`):
                Logits or log-probabilities of the base model.
            guided (`torch.Tensor` of shape `(batch_size, vocab_size)`):
                Log-probabilities of the guided model.
            rewards (`dict` of `torch.Tensor` of shape `(batch_size, vocab_size)`):
                What each active reward model says, by its index.
            strengths (sequence of `float` or `torch.Tensor` of shape `(batch_size, 1)`):
                With which strength.
        """
        n_texts, length = input_ids.shape
        texts = text_keys(input_ids)
        self._settle(texts, input_ids)
        base, guided = scores.float().log_softmax(dim=-1), guided.float().log_softmax(dim=-1)
        possible = guided > -torch.inf
        values = {
            "kl": kl_divergence(guided, base),
            "entropy": -(guided.exp() * guided.where(possible, 0.0)).sum(dim=-1),
            "base_entropy": -(base.exp() * base.where(base > -torch.inf, 0.0)).sum(dim=-1),
            "top_token_changed": guided.argmax(dim=-1) != base.argmax(dim=-1),
        }
        log_probs = {"base_log_prob": base, "guided_log_prob": guided}
        product = base
        for (index, reward), alpha in zip(rewards.items(), strengths, strict=True):
            values[f"alpha_{index}"] = torch.as_tensor(alpha, device=base.device).expand(n_texts, 1)[:, 0]
            log_probs[f"reward_log_prob_{index}"] = reward
            product = product + weighted(reward, alpha)
        values["log_z"] = product.logsumexp(dim=-1)
        columns = {name: value.tolist() for name, value in values.items()}
        for row, text in enumerate(texts):
            self._of_text[text] = {name: column[row] for name, column in columns.items()}
        self._pending = {x: y for x, y in self._pending.items() if n_texts == 1 and abs(x - length) < self.KEPT_LENGTHS}
        self._pending[length] = ({text: row for row, text in enumerate(texts)}, log_probs)

    def of(self, sequences: Tensor) -> dict[str, list[Any]]:
        """
        One row for each token that was guided, as columns for a `pandas.DataFrame`.

        Args:
            sequences (`torch.LongTensor` of shape `(n_sequences, length)`):
                What `generate` returned.
        """
        names = ["sequence", "position", "token", "base_log_prob", "guided_log_prob"]
        names += [f"{what}_{index}" for index in range(self._n_rewards) for what in ("reward_log_prob", "alpha")]
        names += ["kl", "log_z", "entropy", "base_entropy", "top_token_changed"]
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for position in range(1, sequences.shape[1]):
            texts = text_keys(sequences[:, :position])
            self._settle(text_keys(sequences[:, : position + 1]), sequences[:, : position + 1])
            for index, text in enumerate(texts):
                noted = self._of_text.get(text)
                if noted is None:
                    continue
                token = int(sequences[index, position])
                row = {"sequence": index, "position": position, "token": token}
                row |= {f"alpha_{k}": 0.0 for k in range(self._n_rewards)} | noted | noted.get(f"token {token}", {})
                for name, column in columns.items():
                    column.append(row.get(name, float("nan")))
        order = sorted(
            range(len(columns["sequence"])), key=lambda at: (columns["sequence"][at], columns["position"][at])
        )
        return {name: [column[at] for at in order] for name, column in columns.items()}

    def _settle(self, texts: list[bytes], input_ids: Tensor) -> None:
        """Keeps the log-probabilities of the tokens that were taken."""
        rows, log_probs = self._pending.get(input_ids.shape[1] - 1, ({}, {}))
        for index, text in enumerate(texts):
            before = text[: -input_ids.element_size()]
            if before in rows:
                token = int(input_ids[index, -1])
                taken = {name: float(value[rows[before], token]) for name, value in log_probs.items()}
                self._of_text[before][f"token {token}"] = taken
