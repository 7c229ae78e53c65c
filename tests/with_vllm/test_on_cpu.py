"""Reward models that are read with vLLM's kernels for CPUs, against forward passes from scratch."""

import pytest
import torch
from test_paged_lm import check_random_life, gpt2, sliding
from tiny import tiny_llama

from hf_genarm.vllm.attention import PagedKeysAndValues
from hf_genarm.vllm.paged_lm import PagedLM


def grouped():
    return tiny_llama(num_attention_heads=4, num_key_value_heads=2, head_dim=32)


@pytest.mark.parametrize(
    "make",
    [lambda: tiny_llama(head_dim=64), grouped, lambda: sliding(5, head_dim=32)],
    ids=["llama", "grouped", "sliding"],
)
@pytest.mark.parametrize(("chunk", "n_tokens"), [(7, 640), (64, 640), (64, 128)])
def test_texts_that_come_go_and_are_cut_are_read_as_from_scratch(make, chunk, n_tokens):
    from hf_genarm.vllm.on_cpu import KeysAndValuesForVllm, keys_and_values, use_linear_layers_of_vllm

    network = make()
    use_linear_layers_of_vllm(network)
    assert keys_and_values(network) is KeysAndValuesForVllm
    lm = PagedLM(network, length=100, chunk=chunk, memory=KeysAndValuesForVllm)
    lm.allocate(n_tokens, page_size=32)
    check_random_life(make(), lm)
    assert (lm.pages.n_dropped > 0) == (n_tokens == 128)


@pytest.mark.parametrize("make", [gpt2, lambda: grouped().double()], ids=["heads of 8", "float64"])
def test_what_the_kernels_do_not_have_is_read_with_the_attention_of_pytorch(make):
    from hf_genarm.vllm.on_cpu import keys_and_values

    assert keys_and_values(make()) is PagedKeysAndValues


def test_half_precision():
    from hf_genarm.vllm.on_cpu import KeysAndValuesForVllm

    lm = PagedLM(grouped().bfloat16(), length=100, n_tokens=320, memory=KeysAndValuesForVllm)  # which compares
    assert lm({0: [5, 6, 7]}, [1]).dtype == torch.bfloat16
