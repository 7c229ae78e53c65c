"""The logits processor that steers `model.generate` with autoregressive reward models."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..functional import contrast, guided_log_probs
from ..hub.compatibility import generation_prompt_ids, has_same_ids, warn_of_differences
from ..hub.info import RewardInfo
from ..hub.reward_model import AutoregressiveRewardModel, find_tokenizer
from ..hub.sharing import follow, shares_weights, twin
from .advice import Advice
from .engines import refuse_continuous_batching
from .fusion.joint_pass import Fusion
from .kl_control import KLControl
from .lockstep import LockstepLM
from .padding import PromptMask
from .rewards import NextTokenRewards
from .statistics import Statistics
from .step import RunningGeneration
from .strength import Alpha, Strengths, alpha_of_beta, alpha_of_weights, by_reward, check_alpha
from .vocab import vocab_maps

logger = logging.getLogger(__name__)

RewardModel: TypeAlias = AutoregressiveRewardModel | PreTrainedModel | PeftModel


class GenARMLogitsProcessor(LogitsProcessor):
    r"""
    [`LogitsProcessor`] that makes `generate` sample from the base model guided by autoregressive reward models
    ([GenARM](https://hf.co/papers/2410.08193), Eq. 7):

    $$\pi(y_t \mid \cdot) \propto \pi_\text{base}(y_t \mid \cdot) \prod_k \pi_{r,k}(y_t \mid \cdot)^{\alpha_k}$$

    The reward models run in lockstep with `generate`, each with a key-value cache that is keyed by the tokens in it.
    One instance can serve any number of `generate` calls, in any order.

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
        reference ([`~transformers.PreTrainedModel`] or another, *optional*):
            A model that the reward models are contrasted with: rewards are then $\log\pi_r - \log\pi_\text{ref}$. So
            any DPO or SFT adapter steers by what it has learned (with the base as reference, as in
            [DeRa](https://hf.co/papers/2402.02992)), and a small pair of tuned and untuned model steers a large one
            ([proxy tuning](https://hf.co/papers/2401.08565)). It has the tokenizer of the base model.
        pad_token_id (`int`, *optional*):
            The token that pads prompts on the left, from which their attention mask is inferred. Defaults to the pad
            token (or, as in `generate`, the eos token) of `tokenizer`, or else of the first reward model.
        attention_mask (`torch.LongTensor` of shape `(n_prompts, prompt_length)`, *optional*):
            The mask that goes to `generate`, needed only where tokens can't tell padding from text (you are told).
            Can be set between calls: `processor.attention_mask = inputs["attention_mask"]`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer of the base model, needed only if that of a reward model is another one.
        reward_tokenizer ([`~transformers.PreTrainedTokenizerBase`] or a list of them, *optional*):
            The tokenizer of each reward model. Tokens are then aligned by their strings; those that a reward model
            can't score keep the probability that the base model gives them.

    Raises:
        TypeError: if a reward model is not a decoder-only causal LM.
        ValueError: if `alpha` does not fit the reward models, or the tokenizers can't be aligned; on a call, if the
            vocabularies differ, if a reward model returns NaN, if the padding can't be told from the text, or if the
            base model is an encoder-decoder.

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
        target_kl: float | None = None,
        reference: RewardModel | None = None,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reward_tokenizer: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
    ):
        given = reward_model if isinstance(reward_model, Sequence) else [reward_model]
        if not given:
            raise ValueError("`reward_model` is an empty list, but at least one reward model is needed.")
        models = [x.model if isinstance(x, AutoregressiveRewardModel) else x for x in given]
        self._infos = [x.info if isinstance(x, AutoregressiveRewardModel) else RewardInfo() for x in given]
        self._reward_models = [LockstepLM(model) for model in models]
        if isinstance(reference, AutoregressiveRewardModel):
            reference = reference.model
        self._reference = None if reference is None else LockstepLM(reference)
        self._reference_is_base = False
        self.alpha = alpha
        self.target_kl = target_kl
        self.keeps_statistics = False
        self._rewards = NextTokenRewards(self._reward_models, vocab_maps(tokenizer, reward_tokenizer, len(models)))
        special_tokens = tokenizer if tokenizer is not None else models[0].generation_config
        if pad_token_id is None:
            pad_token_id = _pad_token_id(special_tokens)
        self._prompt_mask = PromptMask(pad_token_id, special_tokens.bos_token_id, attention_mask)
        self._advice = Advice()
        self._fusion: Fusion | None = None
        self._engines = ["separate"] * len(models)
        self._next_shape: tuple[int, int] | None = None  # of `input_ids`, if the same generation goes on
        self._prompt_length = 0

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
                second time and, if it is plain LoRA on linear layers, is computed in its forward passes
                ([`~GenARMLogitsProcessor.engine`] says so). Outside of `generate`, the model stays as it is. Has no
                effect on other reward models.
            alpha, target_kl, pad_token_id, attention_mask:
                As for the class.
            reference (`"base"` or a model, *optional*):
                As for the class; `"base"` is the base model. With a fused adapter it takes no pass of its own after the
                prompt.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                The tokenizer of the base model. Defaults to the one in the folder of `base_model`. It is compared with
                the tokenizers of reward models that don't share the weights of the base model.
            **kwargs:
                Passed to `from_pretrained` of every reward model: `revision`, `subfolder`, `token`, `dtype`,
                `device_map`, `quantization_config`, …
        """
        given = pretrained_model_name_or_path
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
        if reference == "base" and base_model is None:
            raise ValueError(
                '`reference` is "base", but no base model is given. Pass `base_model`, or a model as `reference`.'
            )
        processor = cls(
            arms,
            alpha,
            target_kl=target_kl,
            reference=twin(base_model) if reference == "base" else reference,
            pad_token_id=pad_token_id,
            attention_mask=attention_mask,
            tokenizer=tokenizer,
            reward_tokenizer=reward_tokenizers,
        )
        processor._reference_is_base = reference == "base"
        if tokenizer is not None:
            processor._advice = Advice(generation_prompt_ids(arms[0].info, tokenizer))
        if base_model is not None and any(shared):
            processor._fusion = Fusion(base_model)
            for index in [index for index, same in enumerate(shared) if same]:
                objection = processor._fusion.why_not(processor._reward_models[index])
                processor._engines[index] = "fused" if objection is None else "shared"
                why = "it is plain LoRA on the weights of the base" if objection is None else objection
                logger.info("%s: engine `%s`, because %s.", names[index], processor._engines[index], why)
        return processor

    @property
    def engine(self) -> str:
        """
        How the reward models are run: `"fused"`, inside the forward passes of the base; `"shared"`, in passes of their
        own over the weights of the base; `"separate"`, with weights of their own. Several names, in the order of the
        reward models and separated by commas, if they differ. Makes no difference but in time and memory.
        """
        return self._engines[0] if len(set(self._engines)) == 1 else ", ".join(self._engines)

    @property
    def alpha(self) -> list[float] | Tensor | Callable[[int], Strengths]:
        """
        The strength of each reward. It can be set at any time, also from another thread while `generate` runs: each
        token is chosen under one setting.
        """
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: Alpha) -> None:
        self._alpha = check_alpha(alpha, len(self._reward_models))

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
        self._statistics = Statistics(len(self._reward_models)) if keeps_statistics else None

    def statistics(self, sequences: Tensor) -> dict[str, list[Any]]:
        """
        What guidance did to each generated token, as columns for a `pandas.DataFrame`.

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
        self._next_shape = None

    def reset(self) -> None:
        """Frees the memory of the reward models' caches. Never needed for a right result."""
        for reward_model in [*self._reward_models, *([self._reference] if self._reference else [])]:
            reward_model.reset()

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
        is_prompt = input_ids.shape != self._next_shape
        self._next_shape = (len(input_ids), input_ids.shape[1] + 1)
        alphas = by_reward(self._alphas_now(input_ids, is_prompt), scores)
        active = [(index, alpha) for index, alpha in enumerate(alphas) if torch.as_tensor(alpha).any()]
        if not active and not callable(self._alpha):
            return scores
        attention_mask = self._prompt_mask(input_ids, is_prompt)  # also where a schedule has yet to begin
        if not active:
            return scores
        if is_prompt and self._fusion is not None:
            for reward_model, engine in zip(self._reward_models, self._engines, strict=True):
                if engine != "separate":
                    follow(reward_model.model, self._fusion.base)
            if self._reference_is_base and self._reference is not None:
                follow(self._reference.model, self._fusion.base)
        generation = RunningGeneration.of_processor()
        self._advice(generation, input_ids, attention_mask, is_prompt)
        rewards = {index: self._rewards.of(index, input_ids, attention_mask, scores) for index, _ in active}
        if self._reference is not None:
            reference = self._reference_log_probs(input_ids, attention_mask, scores, generation)
            rewards = {index: contrast(log_probs, reference) for index, log_probs in rewards.items()}
        if self._fusion is not None:
            fused = [self._reward_models[index] for index, _ in active if self._engines[index] == "fused"]
            self._fusion.join_next_pass(fused, generation)
        strengths = [alpha for _, alpha in active]
        kl_control, statistics = self._kl_control, self._statistics  # which another thread may set meanwhile
        if kl_control is not None:
            filled = self._rewards.filled(rewards, strengths, scores)
            scale = kl_control(input_ids, scores, filled, strengths)
            strengths = [alpha * scale for alpha in strengths]
        guided = guided_log_probs(scores, self._rewards.filled(rewards, strengths, scores), strengths)
        per_row = [alpha != 0 for _, alpha in active if isinstance(alpha, Tensor)]
        if per_row:  # a request without guidance gets what it would get without a processor
            guided = torch.where(torch.stack(per_row).any(dim=0), guided, scores.float())
        if statistics is not None:
            statistics.note(input_ids, scores, guided, rewards, strengths)
        return guided

    def _alphas_now(self, input_ids: Tensor, is_prompt: bool) -> list[float] | Tensor:
        alpha = self._alpha
        if not callable(alpha):
            return alpha
        prompt_length = RunningGeneration.prompt_length()
        if prompt_length is None:  # a loop of the user's own
            self._prompt_length = prompt_length = input_ids.shape[1] if is_prompt else self._prompt_length
        step = input_ids.shape[1] - prompt_length
        alphas = check_alpha(alpha(step), len(self._reward_models))
        if callable(alphas):
            raise ValueError(f"`alpha` returned a function for step {step}, but it must return strengths.")
        return alphas

    def _reference_log_probs(
        self, input_ids: Tensor, attention_mask: Tensor, scores: Tensor, generation: RunningGeneration
    ) -> Tensor:
        assert self._reference is not None
        logits = None
        if self._fusion is not None and self._reference_is_base:
            logits = self._fusion.base_logits(input_ids, attention_mask, generation)
        if logits is None:
            logits = self._reference(input_ids, attention_mask)
        if logits.shape[-1] != scores.shape[-1]:
            raise ValueError(
                f"The reference scores {logits.shape[-1]} tokens, but the base model has {scores.shape[-1]}. Use one "
                "with the tokenizer of the base model."
            )
        return logits.to(scores.device).float().log_softmax(dim=-1)


def _pad_token_id(special_tokens: PreTrainedTokenizerBase | GenerationConfig) -> int | None:
    if special_tokens.pad_token_id is not None:
        return special_tokens.pad_token_id
    eos_token_id = special_tokens.eos_token_id
    return eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id


refuse_continuous_batching(GenARMLogitsProcessor)
