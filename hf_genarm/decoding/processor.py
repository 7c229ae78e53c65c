"""The logits processor that steers `model.generate` with autoregressive reward models."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..functional import contrast, guided_log_probs
from ..hub.cache import network_of, uncompiled
from ..hub.compatibility import generation_prompt_ids, has_same_ids, warn_of_differences
from ..hub.info import RewardInfo
from ..hub.reward_model import AutoregressiveRewardModel, find_tokenizer
from ..hub.sharing import shares_weights
from .advice import Advice, refuse_encoder_decoder
from .guided_tokens import GuidedTokens
from .kl_control import KLControl
from .padding import PromptMask
from .reference import Reference
from .rewards import NextTokenRewards, refuse_nan
from .statistics import Statistics
from .step import Run, StepWatch
from .strength import Alpha, Strengths, alpha_of_beta, alpha_of_weights, check_alpha, strengths_at, unguided_where_zero
from .texts import Text, TextReader
from .vocab import vocab_maps

logger = logging.getLogger(__name__)

RewardModel: TypeAlias = AutoregressiveRewardModel | PreTrainedModel | PeftModel


class GenARMLogitsProcessor(LogitsProcessor):
    r"""
    [`LogitsProcessor`] that makes `generate` sample from the base model guided by autoregressive reward models
    ([GenARM](https://hf.co/papers/2410.08193), Eq. 7):

    $$\pi(y_t \mid \cdot) \propto \pi_\text{base}(y_t \mid \cdot) \prod_k \pi_{r,k}(y_t \mid \cdot)^{\alpha_k}$$

    The reward models run in lockstep with `generate`, each with a key-value cache that is keyed by the tokens in it.
    One instance can serve any number of `generate` calls, in any order. It can be copied and pickled, also together
    with the base model.

    Args:
        reward_model ([`AutoregressiveRewardModel`], [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or a list):
            One or several decoder-only language models with the tokenizer of the base model.
        alpha (`float`, list of `float`, `torch.Tensor` or callable, *optional*, defaults to 1.0):
            Strength of the guidance, $1/\beta$ in the paper; one for all rewards, or one for each. A tensor of shape
            `(n_requests, n_rewards)` has a row for each request of a batch; a callable gives any of these for a step,
            the number of tokens that the `generate` call has added. At 0 a reward model is not run, and with all at 0
            `generate` returns exactly what it does without the processor; negative values steer away. Can be set at any
            time: `processor.alpha = 0.5`.
        target_kl (`float`, *optional*):
            Mean divergence per token, in nats, at which each text is held by scaling its strengths; `alpha` then says
            how strong the rewards are relative to each other. It can't be held where a reward model agrees with the
            base, or the base leaves no choice: no strength is made more than 16 times as large.
        base_model ([`~transformers.PreTrainedModel`], *optional*):
            The model to be steered. With it the processor knows what `generate` is about to read: it takes the mask and
            the beginning of the text from there, and refuses what it can't serve. Reward models that share its weights
            are computed in its forward passes, if they are plain LoRA on linear layers
            ([`~GenARMLogitsProcessor.engine`] says so). Without it you must see to it that the base reads the very
            `input_ids` that the processor is called with.
        reference (`"base"`, [`~transformers.PreTrainedModel`] or another, *optional*):
            A model that the reward models are contrasted with: rewards are then $\log\pi_r - \log\pi_\text{ref}$. So
            any DPO or SFT adapter steers by what it has learned (with the base as reference, as in
            [DeRa](https://hf.co/papers/2402.02992)), and a small pair of tuned and untuned model steers a large one
            ([proxy tuning](https://hf.co/papers/2401.08565)). It has the tokenizer of the base model. `"base"` is the
            base model, whose own passes are used.
        pad_token_id (`int`, *optional*):
            The token that pads prompts. A text that starts with it is asked about where the mask of the base is not
            known. Defaults to the pad token (or, as in `generate`, the eos token) of `tokenizer`, or else of the first
            reward model.
        attention_mask (`torch.LongTensor` of shape `(n_prompts, prompt_length)`, *optional*):
            The mask of the prompts, needed only where that of the base is not known (you are told). Can be set between
            calls: `processor.attention_mask = inputs["attention_mask"]`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of the base model, needed only if that of a reward model is another one.
        reward_tokenizer ([`~transformers.PreTrainedTokenizerBase`] or a list of them, *optional*):
            The tokenizer of each reward model. Tokens are then aligned by their strings; those that a reward model
            can't score keep the probability that the base model gives them.

    Raises:
        TypeError: if a reward model is not a decoder-only causal LM.
        ValueError: if `alpha` does not fit the reward models, the tokenizers can't be aligned, or the base model is an
            encoder-decoder; on a call, if the vocabularies differ, if a reward model returns NaN, if the padding can't
            be told from the text, if the base has read more than the text, or if no token is left.

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
        if reference == "base" and base_model is None:
            raise ValueError(
                '`reference` is "base", but no base model is given. Pass `base_model`, or a model as `reference`.'
            )
        self._infos = [x.info if isinstance(x, AutoregressiveRewardModel) else RewardInfo() for x in given]
        self._models = [_model_of(x) for x in given]
        self._reference_model = reference if reference in (None, "base") else _model_of(reference)
        self._base = None if base_model is None else network_of(base_model)
        if self._base is not None:
            refuse_encoder_decoder(self._base)
        own = next((x.tokenizer for x in given if isinstance(x, AutoregressiveRewardModel)), None)
        self._tokenizer = own if tokenizer is None else tokenizer  # to show tokens as text
        self._vocab_maps = vocab_maps(tokenizer, reward_tokenizer, len(given))
        chat_ids = None if tokenizer is None else generation_prompt_ids(self._infos[0], tokenizer)
        self._advice = Advice(self._base, chat_ids)
        self.alpha = alpha
        self.target_kl = target_kl
        self.keeps_statistics = False
        self._attach()
        special_tokens = tokenizer if tokenizer is not None else network_of(self._models[0]).generation_config
        if pad_token_id is None:
            pad_token_id = _pad_token_id(special_tokens)
        self._prompt_mask = PromptMask(pad_token_id, attention_mask)

    def _attach(self) -> None:
        """Sets up what belongs to one instance: what is known of runs, and the caches."""
        self._watch = None if self._base is None else StepWatch.on(self._base, self)
        self._reader = TextReader(self._watch)
        self._run: Run | None = None
        self._rewards = NextTokenRewards(self._models, self._vocab_maps, self._watch)
        self._reference = None
        if self._reference_model is not None:
            self._reference = Reference(self._reference_model, self._watch)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_watch", "_reader", "_run", "_rewards", "_reference", "_kl_control", "_statistics")
        state = {name: value for name, value in vars(self).items() if name not in own}
        return state | {"target_kl": self.target_kl, "keeps_statistics": self.keeps_statistics}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._attach()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Sequence[str],
        base_model: PreTrainedModel | None = None,
        alpha: Alpha = 1.0,
        *,
        target_kl: float | None = None,
        reference: RewardModel | Literal["base"] | None = None,
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
                The model to be steered. An adapter that was trained on it shares its weights instead of loading them a
                second time. See the class for what else it is good for.
            alpha, target_kl, reference, pad_token_id, attention_mask:
                As for the class.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                The tokenizer of the base model. Defaults to the one in the folder of `base_model`. It is compared with
                the tokenizers of reward models that don't share the weights of the base model.
            **kwargs:
                Passed to `from_pretrained` of every reward model: `revision`, `subfolder`, `token`, `dtype`,
                `device_map`, `quantization_config`, …
        """
        given, base_model = pretrained_model_name_or_path, uncompiled(base_model)
        names = [given] if isinstance(given, str) else list(given)
        arms = [AutoregressiveRewardModel.from_pretrained(name, base_model, **kwargs) for name in names]
        if tokenizer is None and base_model is not None:
            tokenizer = find_tokenizer(base_model.name_or_path, token=kwargs.get("token"))
        # Ids that index the same embeddings are the same ids.
        shared = [base_model is not None and shares_weights(arm.model, base_model) for arm in arms]
        reward_tokenizers = None
        if tokenizer is not None:
            reward_tokenizers = [
                None if same or (base_model is not None and has_same_ids(arm, base_model, tokenizer)) else arm.tokenizer
                for arm, same in zip(arms, shared, strict=True)
            ]
            for arm, name, same in zip(arms, names, shared, strict=True):
                warn_of_differences(arm.info, name, tokenizer, same)
        processor = cls(
            arms,
            alpha,
            base_model=base_model,
            target_kl=target_kl,
            reference=reference,
            pad_token_id=pad_token_id,
            attention_mask=attention_mask,
            tokenizer=tokenizer,
            reward_tokenizer=reward_tokenizers,
        )
        for name, same, (engine, why) in zip(names, shared, processor._rewards.engines, strict=True):
            if same:  # why the others do not is known where they are loaded
                logger.info("%s: engine `%s`, because %s.", name, engine, why)
        return processor

    @property
    def engine(self) -> str:
        """
        How the reward models are run: `"fused"`, inside the forward passes of the base; `"shared"`, in passes of their
        own over the weights of the base; `"separate"`, with weights of their own. Several names, in the order of the
        reward models and separated by commas, if they differ. Makes no difference but in time and memory.
        """
        engines = [engine for engine, _ in self._rewards.engines]
        return engines[0] if len(set(engines)) == 1 else ", ".join(engines)

    @property
    def alpha(self) -> list[float] | Tensor | Callable[[int], Strengths]:
        """
        The strength of each reward. It can be set at any time, also from another thread while `generate` runs: each
        token is chosen under one setting.
        """
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: Alpha) -> None:
        self._alpha = check_alpha(alpha, len(self._models))

    @property
    def target_kl(self) -> float | None:
        """
        The mean divergence per token of the guided from the unguided distribution, in nats, that each text is held at
        by scaling its strengths; `None` if they act as they are. Can be set at any time.
        """
        return None if self._kl_control is None else self._kl_control.target

    @target_kl.setter
    def target_kl(self, target_kl: float | None) -> None:
        self._kl_control = None if target_kl is None else KLControl(target_kl)

    @property
    def keeps_statistics(self) -> bool:
        """Whether it is kept what guidance does to each token, for [`~GenARMLogitsProcessor.statistics`]."""
        return self._statistics is not None

    @keeps_statistics.setter
    def keeps_statistics(self, keeps_statistics: bool) -> None:
        self._statistics = Statistics(len(self._models), self._tokenizer) if keeps_statistics else None

    def statistics(self, sequences: Tensor) -> GuidedTokens:
        """
        What guidance did to each generated token, as columns for a `pandas.DataFrame`. The table draws itself, in
        notebooks, with `plot()` and with `to_ansi()`.

        `sequence`, `position` and `token` say which token it is. `base_log_prob`, `guided_log_prob` and for each reward
        model `reward_log_prob_0`, … are its log-probabilities (of the reward less the reference, if there is one);
        `alpha_0`, … the strengths in force. Of the distribution that it was drawn from there are `kl`, its divergence
        from the base, `log_z`, the logarithm of the sum that normalises Eq. 7, `entropy` and `base_entropy`, and
        whether the likeliest token is another one, `top_token_changed`. All are in nats, before temperature and top-k.

        Args:
            sequences (`torch.LongTensor` of shape `(n_sequences, length)`):
                What `generate` returned.

        Raises:
            ValueError: if nothing was kept: set `processor.keeps_statistics = True` first.
        """
        if self._statistics is None:
            raise ValueError("No statistics were kept. Set `processor.keeps_statistics = True` before `generate`.")
        return self._statistics.of(sequences)

    def set_beta(self, beta: float) -> None:
        """
        Sets `alpha` so that decoding realises a KL temperature, by the scales that the reward models were trained with.

        Args:
            beta (`float`):
                The KL temperature; with several reward models, of each. The smaller, the stronger the guidance.

        Raises:
            ValueError: if a reward model does not say with which `beta` it was trained.
        """
        self.alpha = alpha_of_beta(beta, [info.beta for info in self._infos])

    def set_weights(self, weights: Sequence[float] | Tensor, alpha: float = 1.0) -> None:
        """
        Sets `alpha` so that several objectives are traded off on one scale, that of their rewards on held-out pairs.

        Args:
            weights (list of `float`, or `torch.Tensor` of shape `(n_requests, n_rewards)`):
                One for each objective, summing to 1.
            alpha (`float`, *optional*, defaults to 1.0):
                The strength that they share.

        Raises:
            ValueError: if the weights do not sum to 1, or a reward model does not say its scale.
        """
        self.alpha = alpha_of_weights(weights, alpha, [info.reward_scale for info in self._infos])

    @property
    def attention_mask(self) -> Tensor | None:
        """The explicit mask of the prompts, if one was given."""
        return self._prompt_mask.attention_mask

    @attention_mask.setter
    def attention_mask(self, attention_mask: Tensor | None) -> None:
        self._prompt_mask.attention_mask = attention_mask

    def reset(self) -> None:
        """
        Frees the memory of the reward models' caches. Needed only after a reward model was changed in the middle of a
        text: each `generate` call begins without them.
        """
        self._rewards.begin()
        if self._reference is not None:
            self._reference.reset()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The prompts and what has been generated so far.
            scores (`torch.FloatTensor` of shape `(batch_size, vocab_size)`):
                Logits or log-probabilities of the base model.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`: log-probabilities of the guided model in float32,
            a new tensor; with all strengths at 0, `scores` itself.
        """
        text = self._read(input_ids, scores)
        alphas, n_requests = strengths_at(self._alpha, len(self._models), text.n_new, text.prompts)
        active = {index: alpha for index, alpha in enumerate(alphas) if torch.as_tensor(alpha).any()}
        if not active:
            return scores
        self._advice(text, self._rewards.models)
        mask, strengths = self._prompt_mask(text), list(active.values())
        kl_control, statistics = self._kl_control, self._statistics  # which another thread may set meanwhile

        rewards = {index: self._rewards.of(index, input_ids, mask, scores) for index in active}
        if self._reference is not None:
            reference = self._reference.log_probs(text, mask, scores)
            rewards = {index: contrast(log_probs, reference) for index, log_probs in rewards.items()}
        if kl_control is not None:
            filled = self._rewards.filled(rewards, strengths, scores)
            scale = kl_control(text, n_requests, scores, filled, strengths)
            strengths = [alpha * scale for alpha in strengths]
        guided = guided_log_probs(scores, self._rewards.filled(rewards, strengths, scores), strengths)
        guided = unguided_where_zero(guided, scores, active.values())
        refuse_nan(guided, scores, strengths)
        if statistics is not None:
            statistics.note(text, n_requests, scores, guided, rewards, strengths)
        return guided

    def _read(self, input_ids: Tensor, scores: Tensor) -> Text:
        """What is known about the texts of a call; where a run begins, what is left of the last one is dropped."""
        if len(input_ids) != len(scores):
            raise ValueError(
                f"`input_ids` has {len(input_ids)} rows, but `scores` has {len(scores)}. Give one text for each."
            )
        text = self._reader(input_ids)
        if text.run is not self._run:
            # What was drafted before the first pass of the base is part of the run.
            goes_on = text.is_drafted and self._run is not None and self._run.is_by_hand
            self._run = text.run
            if not goes_on:
                self.reset()
        return text


def _model_of(model: Any) -> PreTrainedModel | PeftModel:
    return model.model if isinstance(model, AutoregressiveRewardModel) else model


def _pad_token_id(special_tokens: PreTrainedTokenizerBase | GenerationConfig) -> int | None:
    if special_tokens.pad_token_id is not None:
        return special_tokens.pad_token_id
    eos_token_id = special_tokens.eos_token_id
    return eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
