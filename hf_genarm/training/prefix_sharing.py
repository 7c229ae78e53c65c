"""Token log-probabilities of preference pairs, with the tokens that both texts of a pair begin with forwarded once."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from ..functional import selected_log_probs, shared_prefix_length
from ..hub.kv_cache import network_of

logger = logging.getLogger(__name__)

# Below this share of the tokens, a joint row is faster than two; what it saves must pay for its mask.
_WORTH_IT = 0.95
_PROBE_LENGTH = 32


@dataclass
class PairBatch:
    """
    The texts of a batch of pairs, and which of their tokens are scored.

    Parameters:
        input_ids (`torch.LongTensor` of shape `(2 * batch_size, length)`):
            The chosen texts, then the rejected ones, padded on the right.
        attention_mask (`torch.LongTensor` of shape `(2 * batch_size, length)`):
            1 for tokens, 0 for padding.
        prompt_length (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Number of tokens before the responses. By default, all that the texts of a pair begin with.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_length: Tensor | None = None

    def __post_init__(self) -> None:
        chosen_ids, rejected_ids = self.input_ids.masked_fill(self.attention_mask == 0, -1).chunk(2)
        #: Number of tokens that the two texts share at their start, `(2 * batch_size,)`.
        self.shared = shared_prefix_length(chosen_ids, rejected_ids).repeat(2)
        start = self.shared if self.prompt_length is None else self.prompt_length.repeat(2)
        # The first token of a text has nothing to be predicted from.
        position = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        #: Which tokens belong to a response, `(2 * batch_size, length)`.
        self.is_response = (position >= start.clamp(min=1)[:, None]) & (self.attention_mask == 1)
        #: Which tokens are in one text of the pair only, `(2 * batch_size, length)`.
        self.is_own = self.is_response & (position >= self.shared[:, None])

    @property
    def n_chosen_tokens(self) -> Tensor:
        """Number of tokens in the chosen responses, to divide by."""
        return self.is_response.chunk(2)[0].sum().clamp(min=1)


class PairLogProbs:
    r"""
    $\log\pi_r(y_t \mid x, y_{<t})$ of the tokens of preference pairs, in one forward pass.

    Where it saves time, the two texts of a pair are one row of the batch: what they share is forwarded once, and both
    responses attend to it. The result is that of two rows. Models for which it would not be, or that can't, get two.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal LM.
        mixed_precision (`bool`, *optional*, defaults to `False`):
            Whether it is run in less precision than that of its weights.
        pad_to_multiple_of (`int`, *optional*):
            To a multiple of this, joint rows are padded too.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        mixed_precision: bool = False,
        pad_to_multiple_of: int | None = None,
    ):
        network = network_of(model)
        self._model, self._network = model, network
        self._arguments = inspect.signature(network.forward).parameters.keys()
        config = network.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
        self._window = min((window for window in windows if window), default=None)
        is_precise = network.dtype == torch.float32 and not mixed_precision
        self._tolerance = 1e-3 if is_precise else 0.1
        self._multiple = pad_to_multiple_of or 1
        self._may_share: bool | None = None

    def __call__(self, model: Module, pairs: PairBatch, scored: Tensor) -> Tensor:
        """
        Args:
            model ([`~torch.nn.Module`]):
                The model, or what wraps it in training.
            pairs ([`PairBatch`]):
                The texts.
            scored (`torch.BoolTensor` of shape `(2 * batch_size, length)`):
                Which tokens are wanted; not the first of a text.

        Returns:
            `torch.FloatTensor` of shape `(2 * batch_size, length)`: 0 where not scored.
        """
        if self._may_share is None:
            objection = self._why_not_shared(model, pairs.input_ids.device)
            if objection is not None:
                logger.info("What the texts of a pair begin with is forwarded twice, because %s.", objection)
            self._may_share = objection is None
        column = _joint_columns(pairs, self._multiple)
        width = int(column.max()) + 1
        is_shorter = width <= _WORTH_IT * 2 * pairs.input_ids.shape[1]
        is_within = self._window is None or width <= self._window
        shares = self._may_share and is_shorter and is_within
        return self._forward(model, pairs, scored, column if shares else None)

    def _forward(self, model: Module, pairs: PairBatch, scored: Tensor, column: Tensor | None) -> Tensor:
        n_texts, length = pairs.input_ids.shape
        row = torch.arange(n_texts, device=scored.device)
        inputs = {"input_ids": pairs.input_ids, "attention_mask": pairs.attention_mask}
        if column is None:
            column = torch.arange(length, device=scored.device).expand(n_texts, -1)
        else:
            row = row % (n_texts // 2)
            inputs = self._joint_inputs(pairs, column)

        text, token = scored.nonzero(as_tuple=True)
        predictor = column[text, token - 1]
        width = inputs["input_ids"].shape[1]
        # No logits for the columns before the first that predicts something.
        keeps_logits = "logits_to_keep" in self._arguments and len(predictor) > 0
        first = int(predictor.min()) // self._multiple * self._multiple if keeps_logits else 0
        kept = {"logits_to_keep": width - first} if keeps_logits else {}
        # Prompt tuning puts tokens of its own before them.
        logits = model(**inputs, use_cache=False, **kept).logits[:, first - width :]
        at = row[text] * (width - first) + predictor - first
        log_probs = selected_log_probs(logits.flatten(0, 1), at, pairs.input_ids[text, token])
        return torch.zeros(n_texts, length, device=logits.device).index_put((text, token), log_probs)

    def _joint_inputs(self, pairs: PairBatch, column: Tensor) -> dict[str, Tensor]:
        """Token ids, positions and a mask in which the two responses of a pair do not see each other."""
        n_pairs, width = len(column) // 2, int(column.max()) + 1
        text, token = pairs.attention_mask.nonzero(as_tuple=True)
        at = (text % n_pairs, column[text, token])
        input_ids, position_ids, part = column.new_zeros(3, n_pairs, width)
        input_ids[at] = pairs.input_ids[text, token]
        position_ids[at] = token
        part -= 1  # padding
        part[at] = torch.where(token < pairs.shared[text], 0, 1 + text // n_pairs)

        seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        seen &= (part >= 0)[:, None, :] & torch.ones_like(seen[0]).tril()
        seen |= torch.eye(width, dtype=torch.bool, device=seen.device)  # a softmax over nothing is NaN
        mask = seen[:, None]
        if self._network.config._attn_implementation == "eager":  # adds the mask to its scores
            dtype = self._network.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}

    @torch.no_grad()
    def _why_not_shared(self, model: Module, device: torch.device) -> str | None:
        attention = self._network.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            return f"the attention `{attention}` takes no mask with rows and columns"
        if "position_ids" not in self._arguments:
            return "the model takes no positions"
        if isinstance(self._model, PeftModel) and self._model.active_peft_config.is_prompt_learning:
            return "prompt tuning changes the mask"
        # Whether the model goes by mask and positions alone (recurrent states and ALiBi do not) is found out on a pair,
        # whose responses are long enough to show if one is taken to follow the other.
        ids = (
            torch.arange(2 * _PROBE_LENGTH, device=device).view(2, -1)
            % self._network.config.get_text_config().vocab_size
        )
        ids[:, :3] = ids[:1, :3]
        pairs = PairBatch(ids, torch.ones_like(ids))
        try:
            with evaluating(model):  # dropout would make two passes differ
                joint = self._forward(model, pairs, pairs.is_response, _joint_columns(pairs))
                apart = self._forward(model, pairs, pairs.is_response, None)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"the model refused it: {error}"
        difference = float((joint - apart).abs().max())
        return None if difference <= self._tolerance else f"the log-probabilities would differ, by {difference:.1g}"


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Without dropout; afterwards, every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _joint_columns(pairs: PairBatch, multiple: int = 1) -> Tensor:
    """
    Where the tokens of each text are in a row `[padding | shared | rest of chosen | rest of rejected]`, -1 for padding,
    `(2 * batch_size, length)`. All shared parts end in the same column, so the logits that are needed are the last. The
    row is padded to a multiple.
    """
    shared = pairs.shared[:, None]
    position = torch.arange(pairs.input_ids.shape[1], device=shared.device)
    n_chosen, n_rejected = (pairs.attention_mask.sum(dim=1, keepdim=True) - shared).view(2, -1).amax(dim=1)
    n_shared = shared.max()
    n_shared = n_shared + -(n_shared + n_chosen + n_rejected) % multiple
    rest = n_shared + torch.zeros_like(shared)
    rest[len(rest) // 2 :] += n_chosen
    column = torch.where(position < shared, n_shared - shared + position, rest + position - shared)
    return column.masked_fill(pairs.attention_mask == 0, -1)
