"""The logits processor that steers `model.generate` with autoregressive reward models."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import refuse_no_tokenizer, shown
from ..functional import guided_product
from ..hub.compatibility import other_tokenizer, prompt_format
from ..hub.info import RewardInfo
from ..hub.kv_cache import network_of, uncompiled
from ..hub.reward_model import AutoregressiveRewardModel
from ..hub.sentence import DEFAULT_STRENGTH
from .assembly import assemble, load_reward_models, names_of
from .assistant import DraftingAssistant
from .guided_tokens import GuidedTokens
from .likely_mistakes import refuse_hidden_text
from .machine import GuidanceMachine
from .padding import pad_token_id_of
from .settings import GuidanceSettings
from .strength import Alpha, strengths_at
from .strings.byte_map import ByteMap
from .strings.prompt_reader import PromptReader
from .strings.starting_model import starting_model
from .vocab import vocab_maps

RewardModel: TypeAlias = AutoregressiveRewardModel | PreTrainedModel | PeftModel


class GenARMLogitsProcessor(GuidanceSettings):
    r"""
    Makes `generate` sample from the base model guided by autoregressive reward models
    ([GenARM](https://hf.co/papers/2410.08193), Eq. 7):

    $$\pi(y_t \mid \cdot) \propto \pi_\text{base}(y_t \mid \cdot) \prod_k \pi_{r,k}(y_t \mid \cdot)^{\alpha_k}$$

    The reward models run in lockstep with `generate`, each with a key-value cache that is keyed by the tokens in it.
    One instance can serve any number of `generate` calls, in any order. It can be copied and pickled, also together
    with the base model.

    Args:
        reward_model ([`AutoregressiveRewardModel`], [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or a list):
            One or several decoder-only language models with the tokenizer of the base model.
        alpha (`float`, list of `float`, `torch.Tensor` or callable, *optional*, defaults to 1.0):
            Strength of the guidance, $\beta_r/\beta$ for a KL temperature $\beta$; one for all rewards, or one for
            each. A tensor of shape `(n_requests, n_rewards)` has a row for each request of a batch; a callable returns
            any of these for a step, the number of tokens that the `generate` call has added. At 0 a reward model is not
            run, and with all at 0 `generate` returns exactly what it does without the processor; negative values steer
            away. Can be set at any time: `processor.alpha = 0.5`.
        target_kl (`float`, *optional*):
            Mean divergence per token, in nats, at which each text is held by scaling its strengths; `alpha` then sets
            how strong the rewards are relative to each other. It can't be held where a reward model agrees with the
            base, or the base leaves no choice: no strength is made more than 16 times as large.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The model to be steered. With it the processor sees what the base reads in `generate`: it takes the mask and
            the beginning of the text from there, and refuses what it can't serve. Reward models that share its weights
            are computed in its forward passes, if they are plain LoRA on linear layers
            ([`~GenARMLogitsProcessor.engine`] shows it). Without it you must make sure that the base reads exactly the
            `input_ids` that the processor is called with.
        reference (`"base"`, [`~transformers.PreTrainedModel`] or another, *optional*):
            A model that the reward models are contrasted with: rewards are then $\log\pi_r - \log\pi_\text{ref}$. So
            any DPO or SFT adapter steers by what it has learned (with the base as reference, as in
            [DeRa](https://hf.co/papers/2402.02992)), and a small pair of tuned and untuned model steers a large one
            ([proxy tuning](https://hf.co/papers/2401.08565)). Its tokenizer must be that of the base; `"base"` is the
            base itself.
        pad_token_id (`int`, *optional*):
            The token that pads prompts: where the mask is not known, a text that starts with it is refused.
            Defaults to the pad (or, as in `generate`, eos) token of `tokenizer`, or else of the first reward model.
        attention_mask (`torch.LongTensor` of shape `(n_prompts, prompt_length)`, *optional*):
            The mask of the prompts, needed only where that of the base is not known. Can be set between calls.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of the base model, needed only if that of a reward model is another one.
        reward_tokenizer ([`~transformers.PreTrainedTokenizerBase`] or a list of them, *optional*):
            The tokenizer of each reward model. Defaults to those that [`AutoregressiveRewardModel`]s have, if
            `tokenizer` is given. Tokens are then aligned by their strings; those that a reward model can't score keep
            the probability that the base model gives them. If its tokens are other strings, its rewards are those of
            strings, for the likeliest tokens of the base. They are contrasted with the model that it was trained from
            if `reference` is `"base"`.

    Raises:
        TypeError: if an argument is of another type, or a reward model is not a decoder-only causal LM.
        ValueError: if `alpha` does not fit the reward models, the tokenizers can't be aligned, or the base model is an
            encoder-decoder; on a call, if the vocabularies differ, a reward model returns NaN, padding can't be
            distinguished from text, the base has read more than the text, or no token is left.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from hf_genarm import GenARMLogitsProcessor
    >>> from hf_genarm.demo import demo_model
    >>> model = AutoModelForCausalLM.from_pretrained(demo_model())
    >>> tokenizer = AutoTokenizer.from_pretrained(demo_model())
    >>> inputs = tokenizer("The weather today is", return_tensors="pt")
    >>> processor = GenARMLogitsProcessor.from_pretrained("model_cards/arm-smollm2-135m-sentiment", base_model=model)
    >>> output = model.generate(**inputs, logits_processor=[processor], do_sample=True, top_k=0, max_new_tokens=20)
    ```
    """

    supports_continuous_batching = False

    def __init__(
        self,
        reward_model: RewardModel | Sequence[RewardModel],
        alpha: Alpha = 1.0,
        *,
        base_model: PreTrainedModel | None = None,
        target_kl: float | None = None,
        reference: RewardModel | Literal["base"] | None = None,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reward_tokenizer: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
    ):
        given = reward_model if isinstance(reward_model, list | tuple) else [reward_model]
        if not given:
            raise ValueError("`reward_model` is an empty list, but at least one reward model is needed.")
        if isinstance(reference, str) and reference == "base" and base_model is None:
            raise ValueError(
                '`reference` is "base", but no base is given. Pass `base_model`, or a model as `reference`.'
            )
        if isinstance(reference, str) and reference != "base":
            raise ValueError(f'`reference` is {reference!r}, but must be a model, "base", or `None`.')
        self._models = [_model_of(x, "reward_model") for x in given]
        self.reference = (
            reference if reference is None or isinstance(reference, str) else _model_of(reference, "reference")
        )
        self._base = None if base_model is None else network_of(base_model, "base_model")
        if base_model is not None:
            refuse_hidden_text(base_model)
        infos = [x.info if isinstance(x, AutoregressiveRewardModel) else RewardInfo() for x in given]
        self._tokenizers = [x.tokenizer if isinstance(x, AutoregressiveRewardModel) else None for x in given]
        own = next((x for x in self._tokenizers if x is not None), None)
        self._tokenizer = own if tokenizer is None else tokenizer  # to show tokens as text, and to encode prompts
        refuse_no_tokenizer("tokenizer", tokenizer)
        if tokenizer is not None and reward_tokenizer is None:
            reward_tokenizer = [other_tokenizer(x, base_model, tokenizer) for x in given]
        self._vocab_maps = vocab_maps(tokenizer, reward_tokenizer, self._models, base_model)
        are_foreign = [isinstance(x, ByteMap) for x in self._vocab_maps]
        self._starting_models = [
            starting_model(x, self.reference, all(are_foreign)) if is_foreign else None
            for x, is_foreign in zip(given, are_foreign, strict=True)
        ]
        readers = [PromptReader(x) if isinstance(x, ByteMap) else None for x in self._vocab_maps]
        self._prompt_format = None if tokenizer is None else prompt_format(infos[0], tokenizer)
        super().__init__(infos, readers, alpha, target_kl, pad_token_id, attention_mask)
        self._machine = self._new_machine()  # which refuses models that can't be guided by
        if pad_token_id is None:
            special_tokens = tokenizer if tokenizer is not None else network_of(self._models[0]).generation_config
            self._prompt_mask.pad_token_id = pad_token_id_of(special_tokens)
        self._keeps_statistics = False

    def _new_machine(self) -> GuidanceMachine:
        """Returns a machine that has read nothing, for these models."""
        return GuidanceMachine(
            self._models,
            self._vocab_maps,
            self._starting_models,
            self._base,
            self.reference,
            self._tokenizer,
            self._prompt_format,
            self._own_prompts,
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_machine": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._machine = self._new_machine()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        base_model: PreTrainedModel | None = None,
        alpha: Alpha | None = None,
        *,
        target_kl: float | None = None,
        reference: RewardModel | Literal["base", "auto"] | None = "auto",
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> "GenARMLogitsProcessor":
        """
        Loads one or several reward models, adapters or full models, and makes the processor.

        Args:
            pretrained_model_name_or_path (`str` or list of `str`):
                Hub ids or local folders.
            base_model ([`~transformers.PreTrainedModel`], *optional*):
                As for the class. An adapter that was trained on it shares its weights; another reward model is put on
                its device and into its dtype, unless `**kwargs` choose others.
            alpha (`float`, list of `float`, `torch.Tensor` or callable, *optional*):
                As for the class. Defaults to the strength that a reward model recommends (`recommended` in its
                `genarm_config.json`), which is then logged, or else to 1.
            reference (`"auto"`, `"base"`, [`~transformers.PreTrainedModel`] or another, *optional*, defaults to \
            `"auto"`):
                As for the class. `"auto"` is what a reward model recommends, or else was trained with.
            target_kl, pad_token_id, attention_mask:
                As for the class.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                The tokenizer of the base model. Defaults to the one in the folder of `base_model`.
            **kwargs:
                Passed to `from_pretrained` of every reward model: `revision`, `subfolder`, `token`, `dtype`,
                `device_map`, `quantization_config`, …
        """
        names, base_model = names_of(pretrained_model_name_or_path), uncompiled(base_model)
        arms, tokenizer = load_reward_models(names, base_model, tokenizer, **kwargs)
        processor = cls(
            **vars(assemble(arms, names, base_model, tokenizer, alpha, reference)),
            target_kl=target_kl,
            pad_token_id=pad_token_id,
            attention_mask=attention_mask,
        )
        processor._machine.rewards.log_engines(names)
        return processor

    @classmethod
    def from_sentences(
        cls,
        sentences: str | Sequence[str],
        base_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        alpha: Alpha = DEFAULT_STRENGTH,
        **kwargs: Any,
    ) -> "GenARMLogitsProcessor":
        r"""
        Makes a processor that steers by what sentences in the prompt do: $\log\pi(y \mid s, x) - \log\pi(y \mid x)$ of
        the base itself, without any training. Its prompts go through [`~GenARMLogitsProcessor.encode`].

        Args:
            sentences (`str` or list of `str`):
                What is asked for, such as `"You are kind."`
            base_model ([`~transformers.PreTrainedModel`]):
                The model to be steered.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                Its tokenizer. Defaults to the one in the folder of `base_model`.
            alpha (`float`, list of `float`, `torch.Tensor` or callable, *optional*, defaults to 1.5):
                As for the class. At 1, one sentence steers as it does in a prompt; from 1.5 to 3 it does more, and
                beyond that texts break. Negative values steer away from it.
            **kwargs:
                Other arguments of the class.

        Raises:
            TypeError: if a sentence is not text.
            ValueError: if a sentence is empty, or there are none.
        """
        base_model, given = uncompiled(base_model), [sentences] if isinstance(sentences, str) else list(sentences)
        arms: list[AutoregressiveRewardModel] = []
        for sentence in given:
            arms.append(AutoregressiveRewardModel.from_sentence(sentence, base_model, tokenizer))
            tokenizer = arms[0].tokenizer  # looked up once
        options: dict[str, Any] = {"base_model": base_model, "reference": "base", "tokenizer": tokenizer}
        return cls(arms, alpha, **options | kwargs)

    def encode(self, prompts: Any, **template_kwargs: Any) -> BatchEncoding:
        """
        Tokenizes prompts for the base, and sets [`~GenARMLogitsProcessor.prompts`]: each reward model that is a
        sentence reads the same prompts with its sentence in them, and one with other tokens reads them in its own
        tokens and chat template. `generate(**processor.encode(chats),
        logits_processor=[processor])` steers with them.

        In a chat the sentence is put at the end of the system message. If there is none, it becomes the system message,
        in place of the one that some templates have by default; if the template has no system messages, the first
        message of the user begins with it. A plain text follows it and a blank line.

        Args:
            prompts (list of `str` or of messages):
                Texts or chats, or one of them.
            **template_kwargs:
                Passed to the chat template, such as `enable_thinking=False`.

        Returns:
            [`~transformers.BatchEncoding`]: what `generate` of the base reads, padded on the left, on its device.

        Raises:
            TypeError: if prompts are neither texts nor chats.
            ValueError: if the processor has no tokenizer, or a prompt has no tokens.
        """
        inputs = self._own_prompts.encode(prompts, self._tokenizer, self._tokenizers, **template_kwargs)
        device = torch.device("cpu") if self._base is None else self._base.device
        return inputs if device.type == "meta" else inputs.to(device)  # offloaded weights are on no device

    @property
    def engine(self) -> str:
        """
        Returns how the reward models are run: `"fused"`, inside the forward passes of the base; `"shared"`, in separate
        passes over the weights of the base; `"separate"`, with weights of their own; `"strings"`, with weights and
        tokens of their own, which gives rewards of strings. Several names, in the order of the
        reward models and separated by commas, if they differ. It makes no difference except in time and memory. After
        `generate`, it is how they were run there: a base without a cache, for example, is not fused.
        """
        engines = [engine for engine, _ in self._machine.rewards.engines]
        return engines[0] if len(set(engines)) == 1 else ", ".join(engines)

    @property
    def log_z(self) -> Tensor:
        r"""$\log Z_t$ of the last call, the logarithm of the sum that normalises Eq. 7; `(batch_size,)`."""
        return self._machine.product.log_z

    @property
    def strengths(self) -> list[float | Tensor]:
        """The strengths in force in the last call, of the rewards that were not at 0."""
        return self._machine.product.strengths

    @property
    def keeps_statistics(self) -> bool:
        """Whether what guidance does to each token is kept, for [`~GenARMLogitsProcessor.statistics`]."""
        return self._keeps_statistics

    @keeps_statistics.setter
    def keeps_statistics(self, keeps_statistics: bool) -> None:
        if not isinstance(keeps_statistics, bool):
            raise TypeError(f"`keeps_statistics` is {shown(keeps_statistics)}, but must be `True` or `False`.")
        self._keeps_statistics = keeps_statistics
        self._machine.statistics.clear()

    def statistics(self, sequences: Tensor) -> GuidedTokens:
        """
        Returns what guidance did to each generated token, as columns for a `pandas.DataFrame` that draw themselves.

        They are `sequence`, `position` and `token`; the `base_log_prob` and the `guided_log_prob` of the token; for
        each reward model `reward_log_prob_0`, … (minus that of the reference, if there is one) and `alpha_0`, …, the
        strength in force; and for the distribution that the token was drawn from `kl`, the divergence from the base,
        `log_z`, the logarithm of the sum that normalises Eq. 7, `entropy`, `base_entropy` and `top_token_changed`. All
        are in nats, before temperature and top-k. Rewards of strings have `coverage_0`, the share of the base's
        probability that has rewards, and `pruned_0`, the share of the text's probability that was dropped before it.

        Args:
            sequences (`torch.LongTensor` of shape `(n_sequences, length)`):
                What `generate` returned.

        Raises:
            ValueError: if nothing was kept: set `processor.keeps_statistics = True` first.
        """
        if not self._keeps_statistics:
            raise ValueError("No statistics were kept. Set `processor.keeps_statistics = True` before `generate`.")
        return self._machine.statistics.read(sequences, [info.title for info in self._infos])

    def assistant(self, num_assistant_tokens: int | None = None) -> DraftingAssistant:
        """
        Lets the smallest reward model draft: `model.generate(..., logits_processor=[processor],
        assistant_model=processor.assistant())` samples from the same distribution, in less time if that model is much
        smaller than the base. Arguments and errors are those of [`DraftingAssistant`].
        """
        return DraftingAssistant(self, self._machine, num_assistant_tokens)

    def reset(self) -> None:
        """
        Forgets what reward models have read.

        It is needed only after a model was changed in the middle of a text, since each `generate` call begins anyway
        with nothing read. In a custom decoding loop, an earlier text and one more token is the middle of a text.
        """
        self._machine.reset()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """
        Guides the scores of the base for the next token.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The prompts and what has been generated so far.
            scores (`torch.FloatTensor` of shape `(batch_size, vocab_size)`):
                Logits or log-probabilities of the base model.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`: log-probabilities of the guided model in float32,
            a new tensor; with all strengths at 0, `scores` itself.
        """
        machine, target_kl = self._machine, self._target_kl  # which another thread may set meanwhile
        drafted = machine.scores_of_draft(input_ids, scores)
        if drafted is not None:
            return drafted
        text = machine.read(input_ids, scores)
        active, n_requests = strengths_at(self._alpha, len(self._models), text, scores.device)
        if not active:
            return scores
        machine.check(text)
        n_requests = max(n_requests, self._own_prompts.n_requests)
        rewards, references = machine.log_probs(text, self._prompt_mask(text), active, scores)
        product = guided_product(
            scores,
            rewards,
            list(active.values()),
            references,
            incomplete=[place for place, index in enumerate(active) if index in machine.rewards.incomplete],
            scale=None if target_kl is None else partial(machine.kl_control, text, n_requests, target_kl),
        )
        guided = machine.keep(product, input_ids)
        if self._keeps_statistics:
            machine.statistics.record(text, n_requests, product, list(active), machine.rewards.of_strings(active))
        return guided


def _model_of(model: Any, name: str) -> PreTrainedModel | PeftModel:
    """Returns the language model of a reward model, which is given for the argument `name`."""
    if isinstance(model, AutoregressiveRewardModel):
        return model.model
    network_of(model, name)  # refuses what is none
    return model
