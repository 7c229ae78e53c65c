"""The models that all visitors of the playground share."""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..demo import demo_model
from ..hub.reward_model import AutoregressiveRewardModel
from ..hub.sharing import shares_weights

MAX_PROMPT_TOKENS = 512
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Models:
    """
    A base model, the reward models that the playground began with, and a few that visitors have asked for.

    Args:
        base (`str`, *optional*):
            Hub id or folder of the model to be steered. Defaults to the one that the examples run on.
        adapters (list of `str`):
            Hub ids or folders of reward models.
        takes_folders (`bool`, *optional*, defaults to `True`):
            Whether visitors may name folders of this machine.

    Attributes:
        is_demo_model (`bool`):
            Whether the base is the one that the examples run on.
        unguided_speed (`float`):
            Tokens a second that the base writes when it writes one text, unguided.

    Raises:
        ValueError: if the base has no chat template.
    """

    # Adapters that visitors have loaded; the one that was not used for the longest time is dropped.
    KEPT = 4

    def __init__(self, base: str | None, adapters: Sequence[str], takes_folders: bool = True):
        self.is_demo_model, base = base is None, base or demo_model()
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"`{base}` has no chat template, and the playground asks questions. Use a chat model.")
        self.base, self.adapters = base, list(adapters)
        self.takes_folders = takes_folders
        self._own = {name: AutoregressiveRewardModel.from_pretrained(name, self.model) for name in adapters}
        self._guests: OrderedDict[str, AutoregressiveRewardModel] = OrderedDict()
        self._lock = threading.Lock()
        self.unguided_speed = self._measure()

    def _measure(self) -> float:
        """Tokens a second of the base alone; what is slow the first time is then done."""
        inputs, n_tokens = self.question("Hello"), 16
        for _ in range(2):
            start = time.monotonic()
            self.model.generate(**inputs, do_sample=False, max_new_tokens=n_tokens, min_new_tokens=n_tokens)
        return n_tokens / (time.monotonic() - start)

    def reward_model(self, name: str) -> AutoregressiveRewardModel:
        """
        Raises:
            ValueError: if it is no adapter on the base, or not allowed.
            OSError: if it can't be found.
        """
        if name in self._own:
            return self._own[name]
        if Path(name).exists() and not self.takes_folders:
            raise ValueError(
                f"`{name}` is a folder of the machine that serves this page. Give the Hub id of an adapter."
            )
        if not Path(name).is_dir() and not _HUB_ID.fullmatch(name):
            raise ValueError(f"`{name}` is neither a Hub id (`user/my-arm`) nor a folder.")
        with self._lock:
            if name not in self._guests:
                self._guests[name] = self._load(name)
            self._guests.move_to_end(name)
            while len(self._guests) > self.KEPT:
                self._guests.popitem(last=False)
            return self._guests[name]

    def _load(self, name: str) -> AutoregressiveRewardModel:
        arm = AutoregressiveRewardModel.from_pretrained(name, self.model)
        if not shares_weights(arm.model, self.model):
            trained_on = arm.model.config.name_or_path
            raise ValueError(
                f"`{name}` is no adapter on the weights of `{self.base}` (it was trained on `{trained_on}`), and the "
                "playground loads no second model. Start it with the base of that adapter: `hf-genarm demo --base …`."
            )
        return arm

    def question(self, prompt: str) -> Any:
        """
        The tokens of a question, ready for `generate`.

        Raises:
            ValueError: if it is empty or too long.
        """
        if not prompt.strip():
            raise ValueError("The prompt is empty. Ask something.")
        inputs = self.tokenizer.apply_chat_template(
            chat_of(prompt), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        if length > MAX_PROMPT_TOKENS:
            raise ValueError(f"The prompt has {length} tokens, but at most {MAX_PROMPT_TOKENS} are taken. Shorten it.")
        return inputs.to(self.model.device)


def chat_of(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def title_of(name: str, arm: AutoregressiveRewardModel) -> str:
    """A few words for a slider: what it says it rewards, or else its name."""
    return arm.info.objective or Path(name).name
