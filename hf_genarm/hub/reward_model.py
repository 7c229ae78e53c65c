"""`AutoregressiveRewardModel`, what is published: weights, tokenizer, and what is recorded about them."""

import logging
import os
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import PushToHubMixin

from ..arguments import refuse_no_tokenizer, shown
from .base_weights import has_weights
from .card import reward_model_card, sentence_card
from .info import INFO_NAME, RewardInfo
from .kv_cache import network_of
from .loading import download, load_adapter, load_full_model
from .placement import loaded_as_base, put_with_base, refuse_no_device_map, refuse_no_dtype
from .scoring import ScoredTexts, Texts, listed, token_rewards
from .sentence import check_sentence, with_sentence
from .sharing import twin, without_adapter

logger = logging.getLogger(__name__)

# Where to find the files; all other arguments are about how to load the weights of the language model.
_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class AutoregressiveRewardModel(PushToHubMixin):
    r"""
    An autoregressive reward model ([GenARM](https://hf.co/papers/2410.08193)): a causal LM $\pi_r$, usually an adapter,
    whose log-probabilities are rewards, $r(x, y) = \sum_t \log\pi_r(y_t \mid x, y_{<t})$. If it was trained with
    `reference="base"`, its rewards are $\log\pi_r - \log\pi_\text{base}$, where the base is the model that training
    started from.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer. Without it, it can steer but not score texts.
        info ([`RewardInfo`], *optional*):
            What is known about it. Defaults to nothing.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            The model that training started from, for the rewards of one that was trained with `reference="base"`.
            Defaults to the model without its adapter.

    Example:

    ```python
    >>> from hf_genarm import AutoregressiveRewardModel

    >>> arm = AutoregressiveRewardModel.from_pretrained("model_cards/arm-smollm2-135m-sentiment")
    >>> answers = ["I loved it.", "I hated it."]
    >>> rewards = arm.score(["How was the hotel?"] * 2, answers)
    >>> best = answers[rewards.argmax()]  # best of n
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        info: RewardInfo | None = None,
        reference: PreTrainedModel | None = None,
    ):
        network_of(model)  # refuses what is none
        refuse_no_tokenizer("tokenizer", tokenizer)
        if info is not None and not isinstance(info, RewardInfo):
            raise TypeError(f"`info` is {shown(info)}, but must be a `RewardInfo`, such as `RewardInfo(beta=0.05)`.")
        if reference is not None:
            network_of(reference, "reference")
        self.model = model
        self._reference = reference
        self.tokenizer = tokenizer
        self.info = RewardInfo() if info is None else info

    @property
    def reference(self) -> PreTrainedModel:
        """
        The model that training started from.

        Raises:
            ValueError: if it is not known.
        """
        if self._reference is not None:
            return self._reference
        if isinstance(self.model, PeftModel):
            return without_adapter(self.model)
        raise ValueError(
            "All weights of this reward model were trained, so that it does not hold the model that training started "
            f"from and that its rewards are contrasted with (`{self.info.base_model}`). Load it with that model: "
            "`from_pretrained(..., base_model=model)`, or `--base` of a command."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        base_model: PreTrainedModel | None = None,
        *,
        base_tokenizer: PreTrainedTokenizerBase | Literal["auto"] | None = "auto",
        trust_remote_code: bool = False,
        subfolder: str = "",
        **kwargs: Any,
    ) -> "AutoregressiveRewardModel":
        """
        Loads a reward model from the Hub or a folder: an adapter or a full model, with or without a
        `genarm_config.json`. Any causal LM or adapter on one will do; what it lacks to be used well is logged.

        Args:
            pretrained_model_name_or_path (`str` or `pathlib.Path`):
                Hub id or local folder. The weights must be safetensors.
            base_model ([`~transformers.PreTrainedModel`], *optional*):
                The model to be steered. An adapter that was trained on it shares its weights, in other modules around
                the same parameters; `base_model` itself is not changed. They are shared if `base_model` has no adapter
                itself, its weights are those that the adapter was trained on (by the fingerprint in
                `genarm_config.json`; where there is none, or they are quantised, by the name in
                `base_model_name_or_path` after its last `/`), the adapter only adds to them, and no argument requires
                other weights. Otherwise the adapter is loaded onto another copy of the model that it was trained on, so
                that its rewards are what it has learned; there is a warning if the weights of that copy are not those
                that it was trained on.
            base_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*, defaults to `"auto"`):
                The tokenizer of `base_model`, for a reward model on its weights that has none in its folder; `None` if
                there is none. `"auto"` looks for it where `base_model` came from.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether to run code from the repository of the language model. There is no interactive question.
            subfolder (`str`, *optional*):
                The folder within the repository.
            **kwargs:
                `revision`, `token`, `cache_dir`, `force_download` and `local_files_only` are used to find it. All
                others are passed to `AutoModelForCausalLM.from_pretrained`: `dtype`, `device_map`,
                `quantization_config`, … For an adapter these are about the model that it is loaded onto. A reward model
                that doesn't share weights is put on the device of `base_model` and into its dtype, unless these
                arguments choose others.

        Returns:
            [`AutoregressiveRewardModel`], in evaluation mode.

        Raises:
            TypeError: if an argument is of another type.
            OSError: if there is no such folder, and no such repository in reach.
            ValueError: if weights are pickled, are not exactly those of the model, or are NaN or infinite; if a file
                that describes them is not valid, or of a format that is newer than this package; if it is a sentence,
                and there is no `base_model` to read it.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in _HUB_KWARGS if key in kwargs}
        if not isinstance(pretrained_model_name_or_path, str | os.PathLike):
            raise TypeError(
                f"`pretrained_model_name_or_path` is {pretrained_model_name_or_path!r:.80}, but it is a Hub id or a "
                "folder. A model that is loaded already goes to the class itself: `AutoregressiveRewardModel(model)`."
            )
        if base_model is not None:
            network_of(base_model, "base_model")
        is_searched = isinstance(base_tokenizer, str) and base_tokenizer == "auto"
        if not is_searched:
            refuse_no_tokenizer("base_tokenizer", base_tokenizer)
        if not isinstance(subfolder, str):
            raise TypeError(f"`subfolder` is {shown(subfolder)}, but must be the name of a folder in the repository.")
        refuse_no_dtype(kwargs)
        refuse_no_device_map(kwargs.get("device_map"))
        name = str(pretrained_model_name_or_path)
        try:
            folder = download(name, subfolder, **hub_kwargs)
        except (LocalEntryNotFoundError, HFValidationError) as error:  # of which the first doesn't name it
            raise OSError(
                f"`{name}` is neither a folder here nor a repository that is cached or in reach. Check the name and "
                f"the connection. {error}"
            ) from error
        has_info = (folder / INFO_NAME).exists()
        info = RewardInfo.load(folder / INFO_NAME) if has_info else RewardInfo()
        if not has_info:
            logger.info(
                "%s has no `%s`: its reward scale `beta`, its objective, and the tokenizer and chat template that it "
                "was trained with are unknown. Look for a good `alpha` yourself.",
                name,
                INFO_NAME,
            )
        access: Any = {"token": hub_kwargs.get("token"), "trust_remote_code": trust_remote_code}
        if info.sentence is not None:
            _refuse_weights(folder, name)
            if base_model is None:
                raise ValueError(
                    f"`{name}` is a sentence, {shown(info.sentence)}, for any model to read, and has no weights. Pass "
                    "the model to be steered: `from_pretrained(..., base_model=model)`, or `--base` of a command."
                )
            found = (
                find_tokenizer(str(network_of(base_model).name_or_path), **access) if is_searched else base_tokenizer
            )
            return cls._of_sentence(base_model, found, info)  # type: ignore[arg-type]  # `is_searched` is "auto"
        model: PreTrainedModel | PeftModel
        reference = None
        kwargs["trust_remote_code"] = trust_remote_code  # if it is left out, transformers asks interactively
        if (folder / "adapter_config.json").exists():
            hub_kwargs.pop("revision", None)  # is that of the adapter
            model = load_adapter(folder, name, info, base_model, hub_kwargs, kwargs)
        else:
            logger.info("%s: engine `separate`, because it is not an adapter.", name)
            model = load_full_model(folder, name, **loaded_as_base(base_model, kwargs))
            if base_model is not None and has_weights(base_model, info.base_weights):
                reference = base_model
        put_with_base(model, base_model, kwargs)
        tokenizer = find_tokenizer(folder, **access)
        if tokenizer is None:
            is_of_base = base_model is not None and model.name_or_path == base_model.name_or_path
            is_known = is_of_base and not is_searched
            tokenizer = base_tokenizer if is_known else find_tokenizer(str(model.name_or_path), **access)  # type: ignore
        return cls(model.eval(), tokenizer, info, reference)

    @classmethod
    def from_sentence(
        cls, sentence: str, base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> "AutoregressiveRewardModel":
        r"""
        Makes a reward model of a sentence: the base itself, which reads the sentence in its prompt. Its rewards are
        $\log\pi(y \mid s, x) - \log\pi(y \mid x)$. It has no weights of its own, and no training is needed.

        Args:
            sentence (`str`):
                What is asked for, such as `"You are kind."`
            base_model ([`~transformers.PreTrainedModel`]):
                The model that reads it. It is not changed; the reward model is other modules around its weights.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                Its tokenizer. Defaults to the one in the folder of `base_model`.

        Raises:
            TypeError: if the sentence is not text, or the base not a model.
            ValueError: if the sentence is empty.
        """
        sentence = check_sentence("sentence", sentence)
        network = network_of(base_model, "base_model")
        refuse_no_tokenizer("tokenizer", tokenizer)
        tokenizer = find_tokenizer(str(network.name_or_path)) if tokenizer is None else tokenizer
        return cls._of_sentence(base_model, tokenizer, RewardInfo(sentence=sentence))

    @classmethod
    def _of_sentence(
        cls, base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, info: RewardInfo
    ) -> "AutoregressiveRewardModel":
        """Returns the base itself as a reward model, whose `info` has a sentence."""
        model = twin(network_of(base_model, "base_model")).eval()
        return cls(model, tokenizer, info, reference=model)

    def save_pretrained(self, save_directory: str, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Writes weights, tokenizer, `genarm_config.json` and, where there is none, a model card into a folder that plain
        PEFT or transformers also load. Of a sentence, it writes `genarm_config.json` and the card alone.

        Args:
            save_directory (`str`):
                The folder.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to push it as well, under the name of the folder or under `repo_id`.
            **kwargs:
                Passed to `save_pretrained` of the language model, or with `push_to_hub` to `push_to_hub`.
        """
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", PurePath(save_directory).name), **kwargs)
            kwargs = {}
        card = Path(save_directory, "README.md")
        existing = card.read_text(encoding="utf-8") if card.exists() else None
        name = PurePath(save_directory).name
        if self.info.sentence is not None:
            card.parent.mkdir(parents=True, exist_ok=True)
            self.info.save(save_directory)
            if existing is None:
                sentence_card(self.info, name).save(card)
            return
        self.model.save_pretrained(save_directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)
        self.info.save(save_directory)
        if existing is not None:
            card.write_text(existing, encoding="utf-8")
        else:  # PEFT writes one that calls the adapter a text generator
            reward_model_card(self.info, name, name, isinstance(self.model, PeftModel)).save(card)

    def score(self, prompts: Texts, responses: Texts, **kwargs: Any) -> Tensor:
        r"""
        Returns the reward of each response, $\log\pi_r(y \mid x)$, its end token included.

        Longer responses have lower rewards: compare only responses to the same prompt, of similar lengths. A reward
        model that was trained with `length_normalized` gives the mean over the tokens instead, and one that was trained
        with `reference="base"` the difference $\log\pi_r(y \mid x) - \log\pi_\text{base}(y \mid x)$.

        Args:
            prompts, responses (list of `str` or of messages):
                As many responses as prompts. A prompt of messages goes through the chat template.
            **kwargs:
                `batch_size`, `chunk_length` and `show_progress`, as for [`~AutoregressiveRewardModel.token_rewards`].

        Returns:
            `torch.FloatTensor` of shape `(n_responses,)`, in nats, on the CPU.
        """
        rows = self.token_rewards(prompts, responses, **kwargs)
        return torch.stack([self.reduce(row.rewards) for row in rows]) if rows else torch.empty(0)

    def reduce(self, token_rewards: Tensor) -> Tensor:
        """Returns the reward of a response from those of its tokens, `(length,)`: their sum, or mean if so trained."""
        return token_rewards.mean() if self.info.loss.get("length_normalized") else token_rewards.sum()

    def token_rewards(
        self,
        prompts: Texts,
        responses: Texts,
        *,
        batch_size: int = 8,
        chunk_length: int = 128,
        show_progress: bool = False,
    ) -> ScoredTexts:
        """
        Returns the reward of each token of each response, with its place in the text, as a list of [`TokenRewards`]
        that draws itself in notebooks.

        Args:
            prompts, responses (list of `str` or of messages):
                As many responses as prompts. A prompt of messages goes through the chat template.
            batch_size (`int`, *optional*, defaults to 8):
                Number of texts in a forward pass.
            chunk_length (`int`, *optional*, defaults to 128):
                Number of tokens of each text in a forward pass; a longer text takes several.
            show_progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.
        """
        if self.tokenizer is None:
            raise ValueError(
                "This reward model has no tokenizer, so it can't score text. Pass `tokenizer` to the class."
            )
        options = (batch_size, chunk_length, show_progress)
        sentence, tokenizer = self.info.sentence, self.tokenizer
        if sentence is not None:
            prompts = listed("prompts", prompts)
            asked = [with_sentence(prompt, sentence, tokenizer) for prompt in prompts]
            rows = token_rewards(self.model, tokenizer, asked, responses, *options)
            without = token_rewards(self.model, tokenizer, prompts, responses, *options)
            for row, other in zip(rows, without, strict=True):
                if not torch.equal(row.input_ids, other.input_ids):
                    raise ValueError(
                        f"The response {shown(row.text)} has other tokens after the prompt with the sentence than "
                        "after the prompt, so that their log-probabilities can't be compared. Begin it with a space."
                    )
                row.rewards = row.rewards - other.rewards
            return rows
        reference = None if self.info.reference is None else self.reference
        return token_rewards(self.model, tokenizer, prompts, responses, *options, reference)

    def as_reward_func(self, batch_size: int = 8) -> Callable[..., list[float]]:
        """Returns `score` of prompts and completions as [`~trl.GRPOTrainer`] expects it in `reward_funcs`."""

        def autoregressive_reward(prompts: list, completions: list, **_: Any) -> list[float]:
            return self.score(prompts, completions, batch_size=batch_size).tolist()

        return autoregressive_reward


def _refuse_weights(folder: Path, name: str) -> None:
    """Refuses the folder of a sentence that has weights too, which would not be used."""
    weights = next((x.name for x in (*folder.glob("*.safetensors"), *folder.glob("adapter_config.json"))), None)
    if weights is not None:
        raise ValueError(
            f"`{name}` has a `sentence` in its `{INFO_NAME}`, and `{weights}` next to it, but a sentence is read by "
            "the base itself. Remove one of them."
        )


def find_tokenizer(
    *names_or_paths: str | Path, token: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of the first of these folders or repositories that has one which may be run."""
    for name_or_path in names_or_paths:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, token=token, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, TypeError):  # a type error: no vocabulary, for a tokenizer written in Python
            continue
        except ImportError as error:
            logger.warning("The tokenizer of `%s` can't be loaded: %s", name_or_path, error)
            continue
        # For a folder of weights alone, some architectures get one that knows nothing but its special tokens.
        if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            return tokenizer
    return None
