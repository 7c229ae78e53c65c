"""Token log-probabilities of preference pairs, where the start that both texts of a pair share is forwarded once."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from ..functional import selected_log_probs, shared_prefix_length
from ..hub.kv_cache import network_of
from .chunked_head import ChunkedHead

logger = logging.getLogger(__name__)

# A joint row is used if it has at most this share of the tokens of two rows: its mask costs time, too.
_WORTH_IT = 0.95
_PROBE_LENGTH = 32


@dataclass
class PairBatch:
    """
    Holds the texts of a batch of pairs, and which of their tokens are scored.

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
        """Returns the number of tokens in the chosen responses, at least 1."""
        return self.is_response.chunk(2)[0].sum().clamp(min=1)


class OnHost:
    """
    Holds a batch on the host, where sizes and places are computed: of a batch on a device, it is read in one piece.

    Args:
        pairs ([`PairBatch`]):
            The texts.
        scored (`torch.BoolTensor` of shape `(2 * batch_size, length)`):
            Which tokens are scored.
    """

    def __init__(self, pairs: PairBatch, scored: Tensor):
        ids = pairs.input_ids.masked_fill(pairs.attention_mask == 0, -1)
        ids, its_scored = torch.stack([ids, scored.to(ids.dtype)]).cpu()
        self.scored = its_scored.bool()
        self.pairs = PairBatch(ids.clamp(min=0), (ids >= 0).long())


class PairLogProbs:
    r"""
    Computes $\log\pi_r(y_t \mid x, y_{<t})$ of the tokens of preference pairs, in one forward pass.

    Where it saves time, the two texts of a pair are one row of the batch: the start that they share is forwarded once,
    and both responses attend to it. Where the result would differ from that with two rows, two rows are used.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal LM.
        mixed_precision (`bool`, *optional*, defaults to `False`):
            Whether the model computes in a lower precision than that of its weights.
        pad_to_multiple_of (`int`, *optional*):
            The multiple to which rows are padded.
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
        self._head: ChunkedHead | None = None

    def __call__(self, model: Module, pairs: PairBatch, scored: Tensor) -> Tensor:
        """
        Returns the log-probabilities of the scored tokens.

        Args:
            model ([`~torch.nn.Module`]):
                The model, or its wrapper in training.
            pairs ([`PairBatch`]):
                The texts.
            scored (`torch.BoolTensor` of shape `(2 * batch_size, length)`):
                Which tokens are scored; never the first of a text.

        Returns:
            `torch.FloatTensor` of shape `(2 * batch_size, length)`: 0 where not scored.
        """
        if self._may_share is None:
            objection = self._why_not_shared(model, pairs.input_ids.device)
            if objection is not None:
                # What the user chose is worth a line; what the model is, isn't.
                level = logging.INFO if self._takes_a_mask else logging.WARNING
                logger.log(level, "What the texts of a pair begin with is forwarded twice, because %s.", objection)
            self._may_share = objection is None
            self._head = self._chunked_head(model, pairs.input_ids.device)
        on_host = OnHost(pairs, scored)
        column = _joint_columns(on_host.pairs, self._multiple)
        width = int(column.max()) + 1
        is_shorter = width <= _WORTH_IT * 2 * pairs.input_ids.shape[1]
        is_within = self._window is None or width <= self._window
        shares = self._may_share and is_shorter and is_within
        return self._forward(model, pairs, on_host, column if shares else None, self._head)

    def _forward(
        self,
        model: Module,
        pairs: PairBatch,
        on_host: "OnHost",
        column: Tensor | None,
        head: ChunkedHead | None = None,
    ) -> Tensor:
        """
        Runs the model on joint rows with the given columns, or on two rows for each pair; with a head, this one is run
        outside of the model if the logits are large.
        """
        (n_texts, length), device = pairs.input_ids.shape, pairs.input_ids.device
        row = torch.arange(n_texts)
        inputs = {"input_ids": pairs.input_ids, "attention_mask": pairs.attention_mask}
        if column is None:
            column = torch.arange(length).expand(n_texts, -1)
        else:
            row = row % (n_texts // 2)
            inputs = self._joint_inputs(pairs, on_host.pairs, column)

        text, token = on_host.scored.nonzero(as_tuple=True)
        predictor = column[text, token - 1]
        width = inputs["input_ids"].shape[1]
        # No logits for the columns before the first that predicts something.
        keeps_logits = "logits_to_keep" in self._arguments and len(predictor) > 0
        first = int(predictor.min()) // self._multiple * self._multiple if keeps_logits else 0
        # Places and not their number: a slice is not contiguous, so that PyTorch would copy the head for each row.
        # They are counted from the end, because prompt tuning adds virtual tokens before the text.
        kept = {"logits_to_keep": torch.arange(first - width, 0, device=device)} if keeps_logits else {}
        at, tokens = row[text] * (width - first) + predictor - first, on_host.pairs.input_ids[text, token]
        head = head if head is not None and head.is_worth_it(len(tokens)) else None
        with nullcontext() if head is None else head.left_out():
            rows = model(**inputs, use_cache=False, **kept).logits[:, first - width :].flatten(0, 1)
        text, token, at, tokens = (x.to(rows.device, non_blocking=True) for x in (text, token, at, tokens))
        log_probs = selected_log_probs(rows, at, tokens) if head is None else head.log_probs(rows[at], tokens)
        return torch.zeros(n_texts, length, device=rows.device).index_put((text, token), log_probs)

    def _joint_inputs(self, pairs: PairBatch, on_host: PairBatch, column: Tensor) -> dict[str, Tensor]:
        """Returns token ids, positions, and a mask in which the two responses of a pair do not see each other."""
        n_pairs, width = len(column) // 2, int(column.max()) + 1
        text, token = on_host.attention_mask.nonzero(as_tuple=True)
        at = (text % n_pairs, column[text, token])
        inputs = column.new_zeros(3, n_pairs, width)
        inputs[2] -= 1  # padding
        for row, values in enumerate(
            (on_host.input_ids[text, token], token, torch.where(token < on_host.shared[text], 0, 1 + text // n_pairs))
        ):
            inputs[row][at] = values
        input_ids, position_ids, part = inputs.to(pairs.input_ids.device, non_blocking=True)

        seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        seen &= (part >= 0)[:, None, :] & torch.ones_like(seen[0]).tril()
        seen |= torch.eye(width, dtype=torch.bool, device=seen.device)  # a softmax over nothing is NaN
        # Numbers, which all layers share: each would make its own of booleans, and keep them for the backward pass.
        # Rows begin at multiples of 8, as kernels of CUDA need.
        dtype = self._network.dtype
        mask = part.new_zeros(n_pairs, 1, width, width + -width % 8, dtype=dtype)[..., :width]
        mask.masked_fill_(~seen[:, None], torch.finfo(dtype).min)
        return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}

    @torch.no_grad()
    def _why_not_shared(self, model: Module, device: torch.device) -> str | None:
        """Returns why a pair needs two rows, or None if one is enough."""
        if not self._takes_a_mask:
            attention = self._network.config._attn_implementation
            return f"the attention `{attention}` takes no mask with rows and columns, as `sdpa` does"
        if "position_ids" not in self._arguments:
            return "the model takes no positions"
        if isinstance(self._model, PeftModel) and self._model.active_peft_config.is_prompt_learning:
            return "prompt tuning changes the mask"
        # A model may use more than mask and positions, as recurrent states and ALiBi do. This shows in a pair with long
        # responses: the second one changes where it follows the first.
        pairs = self._probe(device)
        try:
            with evaluating(model):  # dropout would make two passes differ
                on_host = OnHost(pairs, pairs.is_response)
                joint = self._forward(model, pairs, on_host, _joint_columns(on_host.pairs))
                separate = self._forward(model, pairs, on_host, None)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"the model refused it: {error}"
        difference = float((joint - separate).abs().max())
        return None if difference <= self._tolerance else f"the log-probabilities would differ, by {difference:.1g}"

    @torch.no_grad()
    def _chunked_head(self, model: Module, device: torch.device) -> ChunkedHead | None:
        """Returns the head of the model, if it can be run outside: nothing but a linear layer makes the logits."""
        if not ChunkedHead.is_usable(self._network):
            return None
        pairs = self._probe(device)
        try:
            with evaluating(model):
                on_host = OnHost(pairs, pairs.is_response)
                expected = self._forward(model, pairs, on_host, None)
                found = self._forward(model, pairs, on_host, None, ChunkedHead(self._network, 0))
        except (RuntimeError, TypeError, ValueError):  # what stands where logits were has another shape
            return None
        is_same = float((found - expected).abs().max()) <= self._tolerance
        return ChunkedHead(self._network) if is_same else None

    def _probe(self, device: torch.device) -> PairBatch:
        """Returns a pair with long responses."""
        vocab_size = self._network.config.get_text_config().vocab_size
        ids = torch.arange(2 * _PROBE_LENGTH, device=device).view(2, -1) % vocab_size
        ids[:, :3] = ids[:1, :3]
        return PairBatch(ids, torch.ones_like(ids))

    @property
    def _takes_a_mask(self) -> bool:
        return self._network.config._attn_implementation in ("sdpa", "eager")


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Puts a model into evaluation mode, without dropout; at the end, restores the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, training in modes:
        if type(module).__module__.startswith("bitsandbytes."):  # on CPUs, 4-bit layers have no gradients afterwards
            module.training = training
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _joint_columns(pairs: PairBatch, multiple: int = 1) -> Tensor:
    """
    Returns the column of each token in a joint row, -1 for padding, `(2 * batch_size, length)`.

    A row is `[padding | shared | rest of chosen | rest of rejected]`, padded to a multiple. All shared parts end in the
    same column, so that the logits that are needed are the last ones.
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
