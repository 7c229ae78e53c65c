"""The models that all visitors of the playground share."""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..hub.base_model import Base
from ..hub.compatibility import chat_of
from ..hub.info import HUB_ID, INFO_NAME
from ..hub.loading import ADAPTER_CONFIG, base_of, info_of, short_name
from ..hub.placement import device_of
from ..hub.reward_model import AutoregressiveRewardModel
from ..hub.sharing import shares_weights

MAX_PROMPT_TOKENS = 512


class Models:
    """
    Holds a base, the reward models that the playground was started with, and a few that visitors have loaded.

    Args:
        base ([`Base`]):
            The model to be steered.
        adapters (list of `str`):
            Hub ids or folders of reward models.
        takes_folders (`bool`, *optional*, defaults to `True`):
            Whether visitors may name folders of this machine.

    Attributes:
        about (`str`):
            The base, its devices and its dtype, in a few words.
        unguided_speed (`float`):
            Tokens per second of the base when it writes one text without guidance.

    Raises:
        ValueError: if the base has no chat template.
    """

    # Adapters that visitors have loaded; the one that was not used for the longest time is dropped.
    KEPT = 4

    def __init__(self, base: Base, adapters: Sequence[str], takes_folders: bool = True):
        self.about, self.base, self.model, self.tokenizer = str(base), base.name, base.model, base.tokenizer
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"`{self.base}` has no chat template, which the playground needs for questions. Use a chat model."
            )
        self.adapters = list(adapters)
        self.takes_folders = takes_folders
        self._own = {name: self._load(name) for name in adapters}
        self._guests: OrderedDict[str, AutoregressiveRewardModel] = OrderedDict()
        self._lock = threading.Lock()
        self.unguided_speed = self._measure()

    def _measure(self) -> float:
        """Measures the tokens per second of the base alone, in the second of two runs: the first one warms up."""
        inputs, n_tokens = self.question("Hello"), 16
        for _ in range(2):
            start = time.monotonic()
            self.model.generate(**inputs, do_sample=False, max_new_tokens=n_tokens, min_new_tokens=n_tokens)
        return n_tokens / (time.monotonic() - start)

    def reward_model(self, name: str) -> AutoregressiveRewardModel:
        """
        Returns a reward model by its name, and loads it if necessary.

        Raises:
            ValueError: if it is neither an adapter on the base nor a sentence, or not allowed.
            OSError: if it can't be found.
        """
        if name in self._own:
            return self._own[name]
        is_hub_id = HUB_ID.fullmatch(name) is not None
        if not self.takes_folders and (Path(name).exists() or not is_hub_id):
            # The same message for all names, so that it doesn't reveal which folders exist.
            raise ValueError(
                f"`{name}` is not the Hub id of an adapter (`user/my-arm`), and folders of the machine that serves "
                "this page are not allowed."
            )
        if not Path(name).is_dir() and not is_hub_id:
            raise ValueError(f"`{name}` is neither a Hub id (`user/my-arm`) nor a folder.")
        with self._lock:
            if name not in self._guests:
                self._guests[name] = self._load_guest(name)
            self._guests.move_to_end(name)
            while len(self._guests) > self.KEPT:
                self._guests.popitem(last=False)
            return self._guests[name]

    def sentence(self, text: str) -> AutoregressiveRewardModel:
        """Returns the base with a sentence in its prompt, which steers as a reward model."""
        return AutoregressiveRewardModel.from_sentence(text, self.model, tokenizer=self.tokenizer)

    def title(self, name: str) -> str:
        """Returns the label of a reward model: what it records that it rewards, or else its name."""
        return self.reward_model(name).info.title or Path(name).name

    def _load(self, name: str) -> AutoregressiveRewardModel:
        return AutoregressiveRewardModel.from_pretrained(name, self.model, base_tokenizer=self.tokenizer)

    def _load_guest(self, name: str) -> AutoregressiveRewardModel:
        if info_of(name).sentence is not None:
            return self._load(name)
        trained_on = base_of(name)
        if trained_on is None:
            raise ValueError(
                f"`{name}` is neither an adapter nor a sentence: it has no `{ADAPTER_CONFIG}`, and no `sentence` in a "
                f"`{INFO_NAME}`."
            )
        # Checked before anything large is loaded, and again afterwards: some adapters can't share weights.
        if short_name(trained_on) != short_name(self.base):
            raise ValueError(self._refusal(name, f"it was trained on `{trained_on}`"))
        arm = self._load(name)
        if not shares_weights(arm.model, self.model):
            raise ValueError(self._refusal(name, "it does more than add to them"))
        return arm

    def _refusal(self, name: str, why: str) -> str:
        return (
            f"`{name}` is not an adapter on the weights of `{self.base}`, because {why}, and the playground loads no "
            "second model. Start it with the base of that adapter: `hf-genarm demo --base …`."
        )

    def question(self, prompt: str) -> Any:
        """
        Returns the tokens of a question as arguments of `generate`.

        Raises:
            ValueError: if it is empty or too long.
        """
        if not prompt.strip():
            raise ValueError("The prompt is empty. Write a question.")
        inputs: Any = self.tokenizer.apply_chat_template(
            chat_of(prompt), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        if length > MAX_PROMPT_TOKENS:
            raise ValueError(
                f"The prompt has {length} tokens, but at most {MAX_PROMPT_TOKENS} are allowed. Shorten it."
            )
        return inputs.to(device_of(self.model))
