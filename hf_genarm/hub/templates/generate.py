"""
Generation guided by the reward model of this repository:

    model.generate(**inputs, custom_generate=<id or folder of this repository>, trust_remote_code=True)
"""

from transformers import GenerationMixin, LogitsProcessorList

from hf_genarm import GenARMLogitsProcessor

REWARD_MODEL = "{{ model_id }}"


def generate(model, *args, alpha=None, reward_model=REWARD_MODEL, logits_processor=None, **kwargs):
    """
    Args:
        alpha (`float`): strength of the guidance; by default the one that the reward model recommends, or else 1.
        reward_model (`str`): Hub id or folder of the reward model, if it was moved.

    All other arguments are those of `generate`.
    """
    mask = kwargs.get("attention_mask")
    processor = GenARMLogitsProcessor.from_pretrained(reward_model, base_model=model, alpha=alpha, attention_mask=mask)
    # One that is given runs before the reward model, as in `generate`.
    kwargs["logits_processor"] = LogitsProcessorList([*(logits_processor or []), processor])
    return GenerationMixin.generate(model, *args, **kwargs)
