"""
What every family of causal LMs in transformers can be: reward model, base, adapter on a base of its kind.

    python tests/families.py        # writes the table into docs/support.md, in some minutes
"""

import sys
import warnings
from pathlib import Path

import torch
from oracle import Recompute
from peft import LoraConfig, get_peft_model
from tiny import EOS, left_padded, tiny_llama
from transformers import LogitsProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo import AS_DECODERS, NAMES, tiny

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.hub.sharing import twin

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
START, END = "<!-- families: begin -->", "<!-- families: end -->"
BATCH, N_NEW = left_padded([3, 5]), 4


class Compare(LogitsProcessor):
    """Returns what a processor does, after comparing it with recomputation."""

    def __init__(self, processor, reward_model):
        self.processor, self.oracle, self.n_calls = (
            processor,
            Recompute([reward_model], [1.0], BATCH["attention_mask"]),
            0,
        )

    def __call__(self, input_ids, scores):
        guided = self.processor(input_ids, scores)
        torch.testing.assert_close(guided, self.oracle(input_ids, scores), atol=1e-4, rtol=0)
        assert (guided.exp() - scores.softmax(-1)).abs().max() > 1e-3
        self.n_calls += 1
        return guided


def run(base, reward_model):
    processor = GenARMLogitsProcessor(reward_model, base_model=base)
    compare = Compare(processor, reward_model)
    base.generate(**BATCH, logits_processor=[compare], max_new_tokens=N_NEW, suppress_tokens=[EOS])
    assert compare.n_calls == N_NEW
    return processor


def as_reward_model(model):
    (lockstep,) = run(
        tiny_llama(0, vocab_size=model.config.get_text_config().vocab_size), model
    )._machine.rewards.models
    return "exact" if lockstep.has_cache else "exact, slow"


def as_base(model):
    run(model, tiny_llama(1, vocab_size=model.config.get_text_config().vocab_size))
    return "exact"


def as_adapter(model):
    adapter = get_peft_model(twin(model), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    processor = run(model, adapter)
    ((engine, why),) = processor._machine.rewards.engines
    assert (engine == "fused") == (processor._machine.rewards.models[0].joint_passes > 0), "engine is not true"
    return engine if engine == "fused" else f"{engine}: {why}"


def outcome(role, model):
    try:
        return role(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in sys.argv[1:] or NAMES:
        results = [outcome(role, tiny(name)) for role in (as_reward_model, as_base, as_adapter)]
        print(name, *(x.replace("\n", " ")[:330] for x in results), sep="\t", flush=True)
