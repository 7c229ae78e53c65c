"""Log-probabilities and gradients of pairs on weights that are sharded over processes, against those of whole ones."""

import copy

import torch
from helpers import batch
from tiny import tiny_llama
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hf_genarm.training.prefix_sharing import PairLogProbs


def main() -> None:
    distributed.init_process_group("gloo")
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    whole = tiny_llama()
    sharded = copy.deepcopy(whole)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert isinstance(sharded, FSDPModule)

    pairs = batch([(9, 4, 5), (8, 3, 2)])
    results = []
    for model in (whole, sharded):
        method = PairLogProbs(model)
        log_probs = method(model, pairs, pairs.is_own)
        assert method._may_share
        log_probs.sum().backward()
        results.append(log_probs.detach())
    torch.testing.assert_close(*results)
    for (name, parameter), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(other, DTensor)
        assert other.to_local().numel() < parameter.numel(), name
        torch.testing.assert_close(other.grad.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-5)
    if distributed.get_rank() == 0:
        print(f"{distributed.get_world_size()} processes, sharded: equal")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
