"""Eq. 7 for the batch of an engine: requests with different strengths, whose rows come and go."""

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..decoding.kl_control import controlled_scale
from ..functional import guided_product
from .request_settings import RequestSettings
from .reward_lms import RewardLM

logger = logging.getLogger("vllm.hf_genarm")  # below the logger that vLLM sets up


@dataclass
class GuidedRequest:
    """
    Holds what is guided in a step of a request.

    Parameters:
        settings ([`RequestSettings`]):
            Its settings; the object stands for the request.
        text (list of `int`):
            Its tokens, drafts included.
        prompt_length (`int`):
            How many of them are the prompt.
        rows (sequence of `int`):
            Rows of the logits that predict what follows its last tokens, in order; several if it ends in drafts.
    """

    settings: RequestSettings
    text: list[int]
    prompt_length: int
    rows: Sequence[int]

    def strength(self, index: int) -> float:
        """Returns the strength of a reward model, or of a sentence that the request or another one has added."""
        return self.settings.alpha[index] if index < len(self.settings.alpha) else 0.0

    def read_by(self, index: int) -> list[int]:
        """Returns what a reward model reads: the text, or the answer after a prompt of its own."""
        prompt = self.settings.prompts.get(index)
        return self.text if prompt is None else [*prompt, *self.text[self.prompt_length :]]


class BatchGuidance:
    """
    Guides the rows of requests in a batch, each by its strengths.

    No request fails the others: where a reward model can't read a text or returns NaN, or no token is left to choose
    from, the row keeps the logits of the engine. An error is logged once for each request.

    Args:
        reward_models (sequence of [`RewardLM`]):
            The reward models; for a sentence, `reader`.
        reference (`"base"` or [`RewardLM`], *optional*):
            The model that they are contrasted with.
        reader ([`RewardLM`], *optional*):
            The served model once more, which reads sentences.

    Attributes:
        n_unguided (`int`):
            Number of requests that were answered without guidance.
    """

    # Texts whose divergence so far is remembered, for requests that are interrupted.
    KEPT_TEXTS = 65536

    def __init__(
        self,
        reward_models: Sequence[RewardLM],
        reference: Literal["base"] | RewardLM | None = None,
        reader: RewardLM | None = None,
    ):
        self._models, self._reference, self._reader = reward_models, reference, reader
        self._missing: OrderedDict[Hashable, float] = OrderedDict()
        self._reported: set[RequestSettings] = set()
        self.n_unguided = 0
        no_tokens = [x.no_tokens for x in (*reward_models, *([reader] if reader else [])) if x.no_tokens is not None]
        self._no_tokens = torch.stack(no_tokens).any(dim=0) if no_tokens else None

    def release(self, settings: RequestSettings) -> None:
        """Frees what is held for a request."""
        self._reported.discard(settings)
        for model in self.all_models():
            for owner in settings.owners:
                model.release(owner)

    def __call__(self, logits: Tensor, requests: Sequence[GuidedRequest]) -> Tensor:
        """
        Guides the rows of the requests, in place.

        Args:
            logits (`torch.FloatTensor` of shape `(n_rows, vocab_size)`):
                Logits of the served model.
            requests (sequence of [`GuidedRequest`]):
                The guided requests of this step.

        Returns:
            `torch.FloatTensor` of shape `(n_rows, vocab_size)`: the logits.
        """
        if not requests:
            return logits
        rows = torch.tensor([row for x in requests for row in x.rows], device=logits.device)
        unguided = logits[rows]
        scores = unguided
        if self._no_tokens is not None:  # nothing is lost: a text never has them
            self._no_tokens = self._no_tokens.to(scores.device)
            scores = scores.masked_fill(self._no_tokens, float("-inf"))
        n_rewards = max(len(x.settings.alpha) for x in requests)  # requests may have added sentences
        strengths = [
            torch.tensor([[x.strength(index)] for x in requests for _ in x.rows], device=scores.device)
            for index in range(n_rewards)
        ]
        rewards = self._rewards(n_rewards, requests, scores)
        read = list(rewards)
        reference = None
        if self._reference == "base":
            reference = scores.log_softmax(dim=-1)
        elif self._reference is not None:
            texts = {x.settings: x.text for x in requests}
            reference = self._reference.log_probs(texts, [len(x.rows) for x in requests]).to(scores.device)
            read.append(reference)
        unread = torch.stack([x.isnan().any(dim=-1) for x in read]).any(dim=0)
        rewards = [x.masked_fill(unread[:, None], 0.0) for x in rewards]
        reference = None if reference is None else reference.masked_fill(unread[:, None], 0.0)
        is_scaled = any(x.settings.target_kl is not None for x in requests)
        scale = partial(self._scale, requests) if is_scaled else None
        product = guided_product(scores, rewards, strengths, reference, scale=scale)
        failed = unread | product.is_empty
        logits[rows] = torch.where(failed[:, None], unguided, product.log_probs.to(logits.dtype))
        if failed.any():
            has_choice = (unguided > -torch.inf).any(dim=-1) | unread
            self._report(requests, failed & has_choice, unread)
        return logits

    def all_models(self) -> list[RewardLM]:
        """Returns the reward models, what reads sentences, and the reference if it is a model, each once."""
        models = [*self._models, self._reader, self._reference]
        return list(dict.fromkeys(x for x in models if isinstance(x, RewardLM)))

    def _rewards(self, n_rewards: int, requests: Sequence[GuidedRequest], scores: Tensor) -> list[Tensor]:
        """
        Returns log-probabilities of each reward model for all rows; 0 where its strength is 0 and it isn't run. All
        sentences of all requests are read together.
        """
        of_models: dict[RewardLM, list[int]] = {}
        for index in range(n_rewards):
            if any(x.strength(index) for x in requests):
                of_models.setdefault(self._model(index), []).append(index)
        rewards = [torch.zeros_like(scores)] * n_rewards
        for model, indices in of_models.items():
            wanted = [(index, x) for index in indices for x in requests if x.strength(index)]
            texts = {x.settings.owner(index): x.read_by(index) for index, x in wanted}
            log_probs = model.log_probs(texts, [len(x.rows) for _, x in wanted]).to(scores.device)
            n_rows = [sum(len(x.rows) for at, x in wanted if at == index) for index in indices]
            for index, own in zip(indices, log_probs.split(n_rows), strict=True):
                if len(own) == len(scores):
                    rewards[index] = own
                else:
                    is_wanted = torch.tensor([bool(x.strength(index)) for x in requests for _ in x.rows])
                    rewards[index] = rewards[index].masked_scatter(is_wanted[:, None].to(scores.device), own)
        return rewards

    def _model(self, index: int) -> RewardLM:
        """Returns what computes a reward."""
        if index < len(self._models):
            return self._models[index]
        assert self._reader is not None  # requests with sentences are refused without it
        return self._reader

    def _report(self, requests: Sequence[GuidedRequest], failed: Tensor, unread: Tensor) -> None:
        """Logs once for each request with failed rows why it is not guided, and clears pages that have NaN in them."""
        first = 0
        for request in requests:
            rows, first = slice(first, first + len(request.rows)), first + len(request.rows)
            if not failed[rows].any():
                continue
            settings, reason = request.settings, None
            if unread[rows].any():
                objections = [model.objection(x) for model in self.all_models() for x in settings.owners]
                reason = next((x for x in objections if x is not None), None)
                if reason is None:
                    reason = "a reward model returned NaN; load it with `dtype` `float32`, or check its training"
                    for model in self.all_models():
                        for owner in settings.owners:
                            model.erase(owner)
            if settings not in self._reported:
                self._reported.add(settings)
                self.n_unguided += 1
                logger.error(
                    "A request is answered without guidance, because %s.",
                    reason or f"its strengths {list(settings.alpha)} leave no token to choose from",
                )

    def _scale(
        self, requests: Sequence[GuidedRequest], scores: Tensor, rewards: list[Tensor], strengths: list[Any]
    ) -> Tensor:
        """Returns the factors of the strengths, `(n, 1)`: 1 for requests without a set divergence."""
        scale = torch.ones(len(scores), 1, device=scores.device)
        firsts = [0, *(torch.tensor([len(x.rows) for x in requests]).cumsum(0).tolist())]
        held = [(x, first) for x, first in zip(requests, firsts, strict=False) if x.settings.target_kl is not None]
        # What a token may spend depends on those before it, drafts too.
        for offset in range(max(len(x.rows) for x, _ in held)):
            turn = [(x, first + offset) for x, first in held if offset < len(x.rows)]
            at = [row for _, row in turn]
            lengths = [len(x.text) - len(x.rows) + 1 + offset for x, _ in turn]
            before = [self._find(x, length - 1) for (x, _), length in zip(turn, lengths, strict=True)]
            target = torch.tensor([x.settings.target_kl for x, _ in turn], device=scores.device)
            factor, after = controlled_scale(
                scores[at],
                [x[at] for x in rewards],
                [x[at] for x in strengths],
                target,
                torch.tensor(before, device=scores.device),
            )
            scale[at] = factor[:, None]
            for (x, _), length, missing in zip(turn, lengths, after.nan_to_num(0.0).tolist(), strict=True):
                self._missing[_text_key(x, length)] = missing
        while len(self._missing) > self.KEPT_TEXTS:
            self._missing.popitem(last=False)
        return scale

    def _find(self, request: GuidedRequest, length: int) -> float:
        """Returns the divergence that the first tokens of a text have left unspent."""
        return self._missing.get(_text_key(request, length), 0.0) if length >= request.prompt_length else 0.0


def _text_key(request: GuidedRequest, length: int) -> Hashable:
    """Returns a key of the first tokens of a text, which is the same when an interrupted request comes back."""
    settings = request.settings
    prompts = hash(tuple(settings.prompts.items()))
    return settings.alpha, settings.target_kl, prompts, request.prompt_length, hash(tuple(request.text[:length]))
