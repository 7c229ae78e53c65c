"""Log-probabilities from hidden states, a few rows of logits at a time, so that all logits are never in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..hub.sharing import is_plain

# Numbers in the logits that are made at once: 64 MB in float32
_AT_ONCE = 2**24


class ChunkedHead:
    """
    Runs the LM head of a network outside of its forward pass, on the tokens that are scored only.

    Args:
        network ([`~transformers.PreTrainedModel`]):
            A causal LM whose head `is_usable`.
        from_size (`int`, *optional*):
            From how many logits on it is worth a second product in the backward pass. Defaults to 512 MB in bfloat16.
    """

    def __init__(self, network: PreTrainedModel, from_size: int = 2**28):
        self._head: Any = network.get_output_embeddings()
        self._from_size = from_size
        self._dtype: torch.dtype | None = None

    @staticmethod
    def is_usable(network: PreTrainedModel) -> bool:
        """Returns whether the head is a linear layer, with nothing around it, whose weights this process holds."""
        head = network.get_output_embeddings()
        if type(head) is not nn.Linear or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
            return False
        # With several processes, gradients of weights are collected within the forward pass.
        is_alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        return is_plain(head.weight) and (is_alone or not head.weight.requires_grad)

    def is_worth_it(self, n_tokens: int) -> bool:
        """Returns whether the logits of so many tokens are large enough."""
        return n_tokens * self._head.out_features >= self._from_size

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Lets the network return the input of its head in place of logits."""
        device = self._head.weight.device.type

        def forward(hidden: Tensor) -> Tensor:
            # What the head would compute in; the trainer may turn outputs into float32 afterwards.
            self._dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
            return hidden

        self._head.forward = forward
        try:
            yield
        finally:
            del self._head.forward

    def log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """
        Returns the log-probability of one token for each hidden state, in float32.

        Args:
            hidden (`torch.Tensor` of shape `(n_tokens, hidden_size)`):
                What the network returned last while its head was left out.
            tokens (`torch.LongTensor` of shape `(n_tokens,)`):
                The tokens.

        Returns:
            `torch.Tensor` of shape `(n_tokens,)`.
        """
        weight, bias = self._head.weight.to(self._dtype), self._head.bias
        bias = bias if bias is None else bias.to(self._dtype)
        return head_log_probs(hidden.to(self._dtype), weight, bias, tokens)


def head_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    """
    Returns the log-probability of one token for each hidden state under a linear head.

    The backward pass makes the logits again, a few rows at a time.

    Args:
        hidden (`torch.Tensor` of shape `(n_tokens, hidden_size)`), weight (`torch.Tensor` of shape `(vocab_size, \
        hidden_size)`), bias (`torch.Tensor` of shape `(vocab_size,)`, *optional*):
            The hidden states and the head, in one dtype.
        tokens (`torch.LongTensor` of shape `(n_tokens,)`):
            The tokens.

    Returns:
        `torch.Tensor` of shape `(n_tokens,)`, in float32, or in float64 if that is the dtype of the rest.
    """
    return _HeadLogProbs.apply(hidden, weight, bias, tokens)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, tokens)
        parts = _parts(len(hidden), len(weight))
        chosen = [_log_probs(hidden[x], weight, bias).gather(1, tokens[x, None])[:, 0] for x in parts]
        return torch.cat(chosen) if chosen else hidden.new_zeros(0, dtype=_precise(hidden.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        precise = _precise(hidden.dtype)
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=precise) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=precise) if needs_bias else None
        for part in _parts(len(hidden), len(weight)):
            # d log p(token) / d logits = one-hot(token) - softmax, rounded once
            exact = _log_probs(hidden[part], weight, bias).exp_().mul_(-gradient[part, None])
            of_logits = exact.scatter_add_(1, tokens[part, None], gradient[part, None]).to(hidden.dtype)
            if of_hidden is not None:
                of_hidden[part] = of_logits @ weight
            if of_weight is not None:
                of_weight += of_logits.T @ hidden[part]
            if of_bias is not None:
                of_bias += of_logits.sum(dim=0, dtype=precise)
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(weight.dtype),
            None,
        )


def _parts(n_rows: int, vocab_size: int) -> list[slice]:
    n_at_once = max(1, _AT_ONCE // vocab_size)
    return [slice(first, first + n_at_once) for first in range(0, n_rows, n_at_once)]


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the log-probabilities of all tokens, `(n_rows, vocab_size)`, not in half precision."""
    logits = nn.functional.linear(hidden, weight, bias)
    return logits.to(_precise(logits.dtype)).log_softmax(dim=-1)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
