"""
Generation guided by the reward model of this repository:

    model.generate(**inputs, custom_generate=<id or folder of this repository>, trust_remote_code=True)
"""

import re
from pathlib import Path

from transformers import GenerationMixin, LogitsProcessorList

from hf_genarm import GenARMLogitsProcessor

REWARD_MODEL = "{{ model_id }}"


def generate(model, *args, alpha=None, reward_model=REWARD_MODEL, logits_processor=None, **kwargs):
    """
    Generates with guidance.

    Args:
        alpha (`float`): strength of the guidance; by default the one that the reward model recommends, or else 1.
        reward_model (`str`): Hub id or folder of the reward model, if it was moved.

    `revision`, `token` and `cache_dir` are used to find the reward model; by default its revision is that of this file.
    All other arguments are those of `generate`.
    """
    hub = {name: kwargs.pop(name) for name in ("revision", "token", "cache_dir") if name in kwargs}
    # transformers keeps this file in a folder that is named after its commit.
    commit = Path(__file__).parents[1].name
    if reward_model == REWARD_MODEL and re.fullmatch("[0-9a-f]{40}", commit):
        hub["revision"] = commit
    processor = GenARMLogitsProcessor.from_pretrained(
        reward_model, base_model=model, alpha=alpha, attention_mask=kwargs.get("attention_mask"), **hub
    )
    # A processor that is given runs before the reward model, as in `generate`.
    kwargs["logits_processor"] = LogitsProcessorList([*(logits_processor or []), processor])
    return GenerationMixin.generate(model, *args, **kwargs)
