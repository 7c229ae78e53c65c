"""
Weights that are sharded over processes, against whole ones: log-probabilities and gradients of pairs, and guided texts.
"""

import copy
import sys

import pytest
import torch
from helpers import batch
from oracle import Recompute
from support import BATCH
from tiny import save_adapter, tiny_llama, tiny_tokenizer
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.training.prefix_sharing import PairLogProbs

GREEDY = {"do_sample": False, "max_new_tokens": 6}
TOKENIZER = tiny_tokenizer()
SIZE = {"vocab_size": len(TOKENIZER), "num_key_value_heads": 2}


def shard(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def check_training(mesh):
    """Log-probabilities and gradients of pairs."""
    whole = tiny_llama()
    sharded = shard(copy.deepcopy(whole), mesh)
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


def check_guidance(sharded, whole, adapter):
    """A reward model with weights of its own steers a sharded base; an adapter on its weights is refused."""
    assert any(isinstance(x, DTensor) for x in sharded.parameters())
    arm = tiny_llama(1, **SIZE)
    ours, oracle = GenARMLogitsProcessor(arm, base_model=sharded), Recompute([arm], [1.0], BATCH["attention_mask"])
    text = sharded.generate(**BATCH, **GREEDY, logits_processor=[ours]).tolist()
    assert text == whole.generate(**BATCH, **GREEDY, logits_processor=[oracle]).tolist()
    assert text != whole.generate(**BATCH, **GREEDY).tolist()
    with pytest.raises(ValueError, match=r"sharded over processes .* Load it with weights of its own"):
        GenARMLogitsProcessor.from_pretrained(adapter, base_model=sharded)


def check_sentence(sharded, whole):
    """A sentence shares what tensor parallelism has sharded."""
    texts = []
    for base, engine in ((sharded, "shared"), (whole, "fused")):
        processor = GenARMLogitsProcessor.from_sentences("Be kind.", base_model=base, tokenizer=TOKENIZER)
        inputs = processor.encode("How was the train?")
        texts.append(base.generate(**inputs, **GREEDY, logits_processor=[processor]).tolist())
        assert processor.engine == engine
    assert texts[0] == texts[1] != whole.generate(**inputs, **GREEDY).tolist()


def main(folder: str) -> None:
    distributed.init_process_group("gloo")
    n_processes = distributed.get_world_size()
    mesh = distributed.init_device_mesh("cpu", (n_processes,))
    check_training(mesh)
    whole = tiny_llama(**SIZE)
    if distributed.get_rank() == 0:
        whole.save_pretrained(f"{folder}/base")
        save_adapter(f"{folder}/base", f"{folder}/adapter")
    distributed.barrier()
    by_plan = AutoModelForCausalLM.from_pretrained(f"{folder}/base", tp_plan="auto", device_mesh=mesh)
    check_guidance(by_plan, whole, f"{folder}/adapter")
    check_sentence(by_plan, whole)
    by_fsdp = shard(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), mesh)
    check_guidance(by_fsdp, whole, f"{folder}/adapter")
    with pytest.raises(ValueError, match="sharded by FSDP, so that other modules, as a sentence"):
        check_sentence(by_fsdp, whole)
    if distributed.get_rank() == 0:
        print(f"{n_processes} processes, sharded: equal")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
