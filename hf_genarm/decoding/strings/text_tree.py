"""A causal LM that has read a tree of texts: what follows each place in it is read in one pass over the new places."""

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Optional
from weakref import WeakValueDictionary, ref

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ...hub.kv_cache import CACHE, network_of, new_cache
from ...hub.limits import (
    fixed_length,
    n_positions,
    refuse_nan,
    refuse_too_long,
    refuse_unfilled_cache,
    refuse_unknown_ids,
    why_no_cache,
)
from ...hub.sharing import frozen_twin
from ..fusion.joint_network import JointNetwork, NotFusableError, products_of
from ..lockstep import LockstepLM

# Entries of the largest mask of a pass: of more new places, there are several passes
_LARGEST_MASK = 2**24
# Numbers in the distributions that are kept from one step to the next
_KEPT_NUMBERS = 2**25


class Node:
    """
    Is one place in a tree of texts: the text of its parent, and one token more.

    Parents are kept by their children, and not the other way round: what nothing refers to any more is forgotten.

    Args:
        parent ([`Node`], *optional*):
            The place before it; `None` for the empty text.
        token (`int`):
            The token.

    Attributes:
        depth (`int`):
            The number of tokens of its text.
        following (`np.ndarray` of shape `(n_models, vocab_size)`, *optional*):
            The log-probabilities of what follows it, if they are known.
    """

    __slots__ = ("__weakref__", "_children", "column", "depth", "following", "parent", "token")

    def __init__(self, parent: Optional["Node"] = None, token: int = -1):
        self.parent, self.token = parent, token
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.column: int | None = None  # its keys and values in the cache
        self.following: np.ndarray | None = None
        self._children: WeakValueDictionary[int, Node] | None = None

    def child(self, token: int) -> "Node":
        """Returns the place after one token more."""
        if self._children is None:
            self._children = WeakValueDictionary()
        node = self._children.get(token)
        if node is None:
            node = self._children[token] = Node(self, token)
        return node

    def after(self, tokens: Iterable[int]) -> "Node":
        """Returns the place after several tokens more."""
        node = self
        for token in tokens:
            node = node.child(token)
        return node

    def path(self) -> Iterator["Node"]:
        """Yields the node and those before it, up to its first token."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def tokens(self) -> list[int]:
        """Returns the tokens of its text."""
        return [node.token for node in self.path()][::-1]


class TextTree:
    """
    Returns what follows the places in a tree of texts, for one model, or a model and its reference.

    All texts are in one row, in whatever order they were read: each new token sees those before it in its own text by a
    mask with a line for each token, and its position is its place in that text. So texts that begin alike are read
    once, texts of all lengths are read together, and a text that is given up only leaves a gap. A model that takes no
    such mask reads each text as a row of a padded batch instead.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            Another one with the same tokens.
        is_off (`bool`, *optional*, defaults to `False`):
            Whether the reference is the model with its adapter off: both are then two rows of one pass, if they can be.

    Attributes:
        root ([`Node`]):
            The empty text.
        models (list of [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, and the reference if there is one.
        n_passes, n_read (`int`):
            How many passes were made, and how many tokens were read in them.
        why_rows (`str`, *optional*):
            Why texts are rows of a batch; `None` if they are a tree.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reference: PreTrainedModel | PeftModel | None = None,
        is_off: bool = False,
    ):
        self.models = [model] if reference is None else [model, reference]
        self.n_passes = self.n_read = 0
        # Both are made in any case, as they refuse models that are not causal
        rows = [LockstepLM(x, role) for x, role in zip(self.models, ("reward model", "reference"), strict=False)]
        self.why_rows = next((why for why in map(why_no_tree, self.models) if why is not None), None)
        self._rows = None if self.why_rows is None else rows
        self._is_off, self._model = is_off, rows[0]
        self.reset()

    def reset(self) -> None:
        """Forgets what has been read."""
        self.root = Node()
        self._columns: list[ref[Node]] = []
        self._sorted_out_at = 1024
        self._known: OrderedDict[Node, None] = OrderedDict()
        self._passes: list[_Pass] = []  # made again at the first use, as the model may have changed
        for lockstep in self._rows or []:
            lockstep.reset()

    @torch.no_grad()
    def read(self, nodes: Iterable[Node]) -> None:
        """
        Makes sure that what follows some places is known.

        Raises:
            ValueError: if a text is too long, or a model returns NaN.
        """
        wanted = dict.fromkeys(nodes)
        for node in wanted:
            if node.following is not None:
                self._known.move_to_end(node)
        missing = [node for node in wanted if node.following is None]
        if not missing:
            return
        for nodes_read, logits in self._in_rows(missing) if self._rows is not None else self._in_tree(missing):
            log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
            if log_probs.isnan().any():
                name = network_of(self.models[0]).config.name_or_path
                refuse_nan(f"The reward model `{name}` or its reference", logits.dtype)
            for node, following in zip(nodes_read, log_probs.transpose(0, 1).cpu().numpy(), strict=True):
                node.following = following
                self._known[node] = None

    def trim(self) -> None:
        """Forgets what follows places that were not needed for the longest time, if that is much."""
        size = sum(node.following.size for node in self._known if node.following is not None)
        while size > _KEPT_NUMBERS:
            node, _ = self._known.popitem(last=False)
            size -= 0 if node.following is None else node.following.size
            node.following = None

    def _in_tree(self, missing: list[Node]) -> Iterator[tuple[list[Node], Tensor]]:
        """Reads what is new in the texts of some places, and yields places with the logits after them."""
        if not self._passes:
            joint = _both_in_one(self._model) if self._is_off else None
            self._passes = [_Pass(x) for x in self.models] if joint is None else [_Pass(self.models[0], joint)]
        self._sort_out()
        new: dict[Node, None] = {}
        for node in missing:
            unread = [node]
            for before in node.path():
                if before is not node:
                    if before.column is not None or before in new:
                        break
                    unread.append(before)
            new |= dict.fromkeys(reversed(unread))
        left, wanted = list(new), set(missing)
        while left:
            n_read = len(self._columns)
            n_new = max(1, min(len(left), _LARGEST_MASK // (n_read + len(left))))
            part, left = left[:n_new], left[n_new:]
            places = [index for index, node in enumerate(part) if node in wanted] or [len(part) - 1]
            mask = self._mask(part)
            logits = torch.cat([x(part, mask, places) for x in self._passes])
            for column, node in enumerate(part, start=n_read):
                node.column = column
                self._columns.append(ref(node))
            self.n_passes, self.n_read = self.n_passes + 1, self.n_read + len(part)
            read = [part[index] for index in places]
            kept = [index for index, node in enumerate(read) if node in wanted]
            yield [read[index] for index in kept], logits[:, kept]

    def _mask(self, part: Sequence[Node]) -> Tensor:
        """Returns which columns of the cache the new tokens see, `(n_new, n_read + n_new)`."""
        n_read = len(self._columns)
        mask, places = np.zeros((len(part), n_read + len(part)), dtype=bool), dict[Node, int]()
        for index, node in enumerate(part):
            parent: Any = node.parent
            if parent in places:
                mask[index] = mask[places[parent]]
            else:
                mask[index, [x.column for x in parent.path()]] = True
            mask[index, n_read + index] = True
            places[node] = index
        return torch.from_numpy(mask)

    def _sort_out(self) -> None:
        """Drops the columns of what has been forgotten, if they are many."""
        if len(self._columns) < self._sorted_out_at:
            return
        kept: list[int] = []
        for column, weak in enumerate(self._columns):
            node = weak()
            if node is not None and node.column == column:
                node.column = len(kept)
                kept.append(column)
        self._columns = [self._columns[column] for column in kept]
        for part in self._passes:
            part.keep(kept)
        self._sorted_out_at = max(1024, 2 * len(kept))

    def _in_rows(self, missing: list[Node]) -> Iterator[tuple[list[Node], Tensor]]:
        """Reads the texts of some places as rows of a batch that is padded on the left."""
        assert self._rows is not None
        texts = [node.tokens() for node in missing]
        longest = max(map(len, texts))
        ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        yield missing, torch.stack([lockstep(ids, mask) for lockstep in self._rows])
        self.n_passes, self.n_read = self.n_passes + 1, self.n_read + ids.numel()


class _Pass:
    """
    Reads new tokens of a tree in a forward pass of one model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        joint ([`JointNetwork`], *optional*):
            What computes it in the second of two rows, of which the first is the model without its adapter.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, joint: JointNetwork | None = None):
        self._model, self._network, self._joint = model, network_of(model), joint
        self._n_positions = n_positions(model)
        self._forward_args = set(inspect.signature(type(self._network).forward).parameters)
        self._cache: DynamicCache | None = None

    def keep(self, columns: list[int]) -> None:
        """Drops all other columns of keys and values."""
        layers: Any = [] if self._cache is None else self._cache.layers
        for layer in layers:
            kept = torch.tensor(columns, device=layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(2, kept), layer.values.index_select(2, kept)

    def __call__(self, nodes: Sequence[Node], mask: Tensor, places: list[int]) -> Tensor:
        """
        Returns the logits after some of the new tokens.

        Args:
            nodes (sequence of [`Node`]):
                The new places, none before one that it follows.
            mask (`torch.BoolTensor` of shape `(n_new, n_columns)`):
                Which tokens each of them sees.
            places (list of `int`):
                Which of them have the logits that are returned.

        Returns:
            `torch.Tensor` of shape `(n_rows, len(places), vocab_size)`.
        """
        if self._cache is None:
            self._cache = new_cache(self._network)
        assert self._cache is not None
        refuse_too_long(self._network, max(node.depth for node in nodes), self._n_positions, "reward model")
        device = self._model.device
        ids = torch.tensor([[node.token for node in nodes]], device=device)
        refuse_unknown_ids(self._network, ids, "reward model")
        dtype = self._network.dtype
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=device)
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": torch.tensor([[node.depth - 1 for node in nodes]], device=device),
            "attention_mask": torch.where(mask.to(device), torch.zeros_like(hidden), hidden)[None, None],
        }
        if self._joint is not None:
            inputs = {name: x.expand(2, *x.shape[1:]) for name, x in inputs.items()}
        keeps = "logits_to_keep" in self._forward_args
        if keeps:
            inputs["logits_to_keep"] = torch.tensor(places, device=device)
        inputs |= {CACHE: self._cache, "use_cache": True}
        output: Any = self._model(**inputs) if self._joint is None else self._joint(inputs)
        refuse_unfilled_cache(self._network, self._cache, mask.shape[1])
        logits = output.logits if keeps else output.logits[:, places]
        return logits if self._joint is None else logits.flip(0)


def _both_in_one(model: LockstepLM) -> JointNetwork | None:
    """Returns a network that computes a model with and without its adapter as two rows; `None` if that can't be."""
    if not isinstance(model.model, PeftModel):
        return None
    base: Any = frozen_twin(model.model)[0].unload()
    try:
        joint = JointNetwork(base, [products_of(model, base)])
    except NotFusableError:
        return None
    ids = torch.zeros(2, 2, dtype=torch.long, device=base.device)
    return joint if joint({"input_ids": ids, "use_cache": False}) is not None else None


def why_no_tree(model: PreTrainedModel | PeftModel) -> str | None:
    """Returns why a model can't read several texts in one row, with a mask for each token; `None` if it can."""
    network = network_of(model)
    reason = why_no_cache(model)
    if reason is not None:
        return reason
    if fixed_length(network) < float("inf"):
        return "its rotary frequencies depend on the length of the text"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=network.config).layers):
        return "some of its layers see a window of the text"
    if network.config._attn_implementation not in ("eager", "sdpa"):
        return f"its attention, `{network.config._attn_implementation}`, takes no mask for each token"
    return None if _reads_trees(model, network) else "it takes no mask for each token"


@torch.no_grad()
def _reads_trees(model: PreTrainedModel | PeftModel, network: PreTrainedModel) -> bool:
    """Returns whether two texts in one row, which begin alike, are followed by what follows each alone."""
    if network.device.type == "meta" or "position_ids" not in inspect.signature(type(network).forward).parameters:
        return False
    first = Node().child(min(5, int(network.config.get_text_config().vocab_size) - 1))
    one, other = first.child(0), first.child(1)
    nodes = [first, one, one.child(1), other, other.child(0)]
    ids = torch.tensor([nodes[2].tokens(), nodes[4].tokens()], device=model.device)
    seen = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    try:
        alone = model(input_ids=ids, use_cache=False).logits[:, -1].double()
        together = _Pass(model)(nodes, torch.tensor(seen, dtype=torch.bool), [2, 4])[0].double()
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError):  # it can't be called with such a mask
        return False
    scale = 64 * torch.finfo(network.dtype).eps * max(1.0, float(alone.abs().max()))
    return bool((alone - together).abs().max() <= scale)
