"""
What every family of causal LMs in transformers can be: reward model, base, adapter on a base of its kind.

    python tests/families.py        # writes the table into docs/support.md, in some minutes
"""

import contextlib
import warnings
from pathlib import Path

import torch
from oracle import Recompute
from peft import LoraConfig, get_peft_model
from tiny import EOS, left_padded, tiny_llama
from transformers import LogitsProcessor
from zoo import AS_DECODERS, BIDIRECTIONAL, NAMES, tiny

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.hub.sharing import twin

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
START, END = "<!-- families: begin -->", "<!-- families: end -->"
BATCH, N_NEW = left_padded([3, 5]), 4
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj", "in_proj", "x_proj"]


class Compare(LogitsProcessor):
    """Returns what a processor does, after comparing it with recomputation."""

    def __init__(self, processor, reward_model):
        self.processor, self.oracle = processor, Recompute([reward_model], [1.0], BATCH["attention_mask"])
        self.differences = []

    def __call__(self, input_ids, scores):
        guided = self.processor(input_ids, scores)
        torch.testing.assert_close(guided, self.oracle(input_ids, scores), atol=1e-4, rtol=0)
        self.differences.append(float((guided.exp() - scores.softmax(-1)).abs().max()))
        return guided


def run(base, reward_model):
    processor = GenARMLogitsProcessor(reward_model, base_model=base)
    compare = Compare(processor, reward_model)
    base.generate(**BATCH, logits_processor=[compare], max_new_tokens=N_NEW, suppress_tokens=[EOS])
    assert len(compare.differences) == N_NEW, "not every token was guided"
    assert max(compare.differences) > 1e-3, "the reward makes no difference"
    return processor


def as_reward_model(model):
    base = tiny_llama(0, vocab_size=model.config.get_text_config().vocab_size)
    (lockstep,) = run(base, model)._machine.rewards.models
    return "exact" if lockstep.has_cache else "exact, read from its beginning for each token"


def as_base(model):
    run(model, tiny_llama(1, vocab_size=model.config.get_text_config().vocab_size))
    return "exact"


def adapter_on(model):
    """LoRA on all linear layers and experts, or on the usual ones where PEFT fails with all; `None` if with both."""
    for targets in ("all-linear", USUAL):
        with contextlib.suppress(AttributeError, RuntimeError, ValueError):
            config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            adapter = get_peft_model(twin(model), config).eval()
            adapter(input_ids=BATCH["input_ids"])
            return adapter
    return None


def as_adapter(model):
    adapter = adapter_on(model)
    if adapter is None:
        return "PEFT fails"
    processor = run(model, adapter)
    ((engine, _),) = processor._machine.rewards.engines
    # What it is called is true: it was in passes of the base, or it was not.
    assert (engine == "fused") == (processor._machine.rewards.models[0].joint_passes > 0)
    return f"exact, {engine}"


ROLES = [as_reward_model, as_base, as_adapter]
REFUSALS = {
    "is bidirectional": "refused: bidirectional",
    "The base model has read": "refused: reads more than the text",
}


def can_generate(model) -> bool:
    """Whether it does for a padded batch, without guidance."""
    try:
        model.generate(**BATCH, max_new_tokens=N_NEW)
    except (RuntimeError, ValueError):
        return False
    return True


def outcomes(family: str) -> list[str]:
    """
    What happens in each role. Anything but what is exact or refused is an error, unless transformers or PEFT fails with
    the model on its own.
    """
    name, *as_decoder = family.split(AS_DECODER)
    found = []
    for role in ROLES:
        model = tiny(name, **({"is_decoder": bool(as_decoder)} if name in AS_DECODERS else {}))
        model.generation_config.forced_eos_token_id = None
        if role is not as_reward_model and not can_generate(model):
            found.append("transformers fails")
            continue
        try:
            found.append(role(model))
        except (TypeError, ValueError) as error:
            refusals = [refusal for words, refusal in REFUSALS.items() if words in str(error)]
            if not refusals:
                raise
            found += refusals
    return found


AS_DECODER = " with `is_decoder=True`"
AS_DEFAULT = {*NAMES, *BIDIRECTIONAL} - {"reformer"}  # which transformers then refuses to build
FAMILIES = sorted([*AS_DEFAULT, *(name + AS_DECODER for name in AS_DECODERS)])
HEAD = "| as reward model | as base | adapter on all its linear layers | families |\n|---|---|---|---|"


def table() -> str:
    by_outcomes: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES:
        by_outcomes.setdefault(tuple(outcomes(family)), []).append(family)
    rows = sorted(by_outcomes.items(), key=lambda item: -len(item[1]))
    return "\n".join([HEAD, *(f"| {' | '.join(found)} | {', '.join(families)} |" for found, families in rows)])


def read() -> dict[str, list[str]]:
    """What the page says of each family."""
    lines = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0].strip().splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {family: found for *found, families in rows for family in families.split(", ")}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    families = table()
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(f"{before}{START}\n{families}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
