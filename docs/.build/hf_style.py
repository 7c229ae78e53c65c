"""Translates docstrings in the style of Hugging Face to the Google style that mkdocstrings reads."""

import re

from griffe import Extension, Object

PUBLIC = {
    "AutoregressiveRewardConfig": "hf_genarm.training.config.AutoregressiveRewardConfig",
    "AutoregressiveRewardModel": "hf_genarm.hub.reward_model.AutoregressiveRewardModel",
    "AutoregressiveRewardTrainer": "hf_genarm.training.trainer.AutoregressiveRewardTrainer",
    "DraftingAssistant": "hf_genarm.decoding.assistant.DraftingAssistant",
    "GenARMLogitsProcessor": "hf_genarm.decoding.processor.GenARMLogitsProcessor",
    "LogitsProcessor": "transformers.LogitsProcessor",
    "SMCOutput": "hf_genarm.decoding.particles.SMCOutput",
    "RewardInfo": "hf_genarm.hub.info.RewardInfo",
    "TokenRewards": "hf_genarm.hub.scoring.TokenRewards",
}
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
TYPE = re.compile(r"^(\s+\*{0,2}\w+) \((.*)\):$", re.MULTILINE)


class HuggingFaceStyle(Extension):
    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = REFERENCE.sub(_link, TYPE.sub(_plain_type, obj.docstring.value))


def _plain_type(match: re.Match) -> str:
    """Removes the marks from ``name ([`~peft.PeftModel`], *optional*):``, because types are shown as code."""
    of_type = REFERENCE.sub(lambda found: found[2].split(".")[-1], match[2])
    return f"{match[1]} ({re.sub('[`*]', '', of_type)}):"


def _link(match: re.Match) -> str:
    first, *rest = match[2].split(".")
    name = match[2].split(".")[-1] if match[1] else match[2]
    if first not in PUBLIC and not rest:  # not on the page
        return f"`{name}`"
    return f"[`{name}`][{'.'.join([PUBLIC.get(first, first), *rest])}]"
