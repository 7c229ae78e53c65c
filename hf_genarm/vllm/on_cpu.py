"""What reward models have in common with vLLM's own models on a CPU: packed linear layers, and attention over pages."""

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from .attention import Packed, PagedKeysAndValues, Part
from .text_pages import EMPTY_PAGE


def use_linear_layers_of_vllm(network: nn.Module) -> None:
    """Packs the weights of linear layers as vLLM does on a CPU. The network can't be saved or moved any more."""
    for module in network.modules():
        if type(module) is nn.Linear:
            dispatch_cpu_unquantized_gemm(module, remove_weight=True)
            vars(module)["forward"] = functools.partial(_packed_forward, module)


def _packed_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """Runs a linear layer from its packed weights."""
    return layer.cpu_linear(x, layer.weight, layer.bias)  # type: ignore[operator]  # set by vLLM


def keys_and_values(network: PreTrainedModel) -> type[PagedKeysAndValues]:
    """Returns what keeps the keys and values of a network: vLLM's kernels read them in place, if its heads fit them."""
    config = network.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    has_other_values = getattr(config, "kv_lora_rank", None) is not None  # of another size than keys
    fits = (
        network.dtype in CPUAttentionBackend.supported_dtypes and size in CPUAttentionBackend.get_supported_head_sizes()
    )
    return KeysAndValuesForVllm if fits and not has_other_values else PagedKeysAndValues


class KeysAndValuesForVllm(PagedKeysAndValues):
    """
    Keys and values of each layer as vLLM's kernels for CPUs read them, `(n_pages, n_heads, page_size, head_size)`.

    The kernels are those that vLLM's own models call; [`PagedLM`] compares what they return with a pass without them.
    """

    smallest_page = 32

    def packed(self, parts: Sequence[Part], device: torch.device) -> Packed:
        """Returns what a forward pass reads, as [`PagedKeysAndValues.packed`]."""
        return _Tables(self, parts, device)

    def _new(self, of_a_token: Tensor) -> Tensor:
        n_heads, head_size = of_a_token.shape
        return of_a_token.new_zeros(1 + self.n_pages, n_heads, self.page_size, head_size)

    def _first(self, of_pages: Tensor) -> Tensor:
        return of_pages[0, :, 0]


class _Tables(Packed):
    """Parts with the tables of their pages, from which vLLM's kernel reads each text to its end and no further."""

    def __init__(self, memory: PagedKeysAndValues, parts: Sequence[Part], device: torch.device):
        super().__init__(memory, parts, device)
        n_pages = [-(-part.end // memory.page_size) for part in parts]
        tables = [
            (part.text.pages[:n] + [EMPTY_PAGE] * max(n_pages))[: max(n_pages)]
            for part, n in zip(parts, n_pages, strict=True)
        ]
        self._tables = torch.tensor(tables, dtype=torch.int32)
        self._lengths = torch.tensor([part.end for part in parts], dtype=torch.int32)
        self._starts = torch.tensor([0, *accumulate(part.end - part.start for part in parts)], dtype=torch.int32)
        self._plans: dict[tuple[int, int, int], Tensor] = {}

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """Reads and extends pages, as [`Packed.attend`]."""
        keys, values = self.memory.layer(index, key, value)
        own_query, own_key, own_value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        head_size, reach = query.shape[-1], -1 if window is None else window
        isa = _get_attn_isa(query.dtype, self.memory.page_size, head_size)
        ops.cpu_attn_reshape_and_cache(own_key, own_value, keys, values, self.places, isa)
        output = torch.empty_like(own_query)
        ops.cpu_attention_with_kv_cache(
            query=own_query,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=self._starts,
            seq_lens=self._lengths,
            scale=head_size**-0.5 if scaling is None else scaling,
            causal=True,
            alibi_slopes=None,
            sliding_window=reach,
            block_table=self._tables,
            softcap=0.0,
            scheduler_metadata=self._plan(own_query, key.shape[1], reach, isa),
            s_aux=None,
        )
        return output

    def _plan(self, query: Tensor, n_kv_heads: int, reach: int, isa: str) -> Tensor:
        """Returns how the kernel shares out the work among threads; layers of a kind share it."""
        _, n_heads, head_size = query.shape
        if (n_heads, n_kv_heads, reach) not in self._plans:
            self._plans[n_heads, n_kv_heads, reach] = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(self._lengths),
                num_heads=n_heads,
                num_kv_heads=n_kv_heads,
                head_dim=head_size,
                seq_lens=self._lengths,
                dtype=query.dtype,
                query_start_loc=self._starts,
                causal=True,
                sliding_window_size=reach,
                isa=isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            )
        return self._plans[n_heads, n_kv_heads, reach]
