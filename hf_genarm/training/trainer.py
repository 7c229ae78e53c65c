"""The trainer of autoregressive reward models: TRL's `RewardTrainer` with another reward."""

import copy
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.nn import Module
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import RewardTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import get_config_model_id

from ..functional import preference_loss
from ..hub.base_weights import weights_fingerprint
from ..hub.card import METRICS, OPTIONAL_METRICS, TAGS, reward_model_card
from ..hub.custom_generate import write_custom_generate
from ..hub.end_of_turn import end_token_ids
from ..hub.info import RewardInfo, chat_template_fingerprint, package_versions, tokenizer_fingerprint
from ..hub.kv_cache import network_of
from .config import AutoregressiveRewardConfig
from .metrics import PreferenceMetrics
from .preference_data import PROMPT_LENGTH, SIDES, DataCollatorForPairs, PairCounts, check_pairs, prepare_pairs
from .prefix_sharing import PairBatch, PairLogProbs
from .push import PushWhole
from .reference import StartingPoint
from .starting_point import as_causal_lm, as_config, check_adapter, check_causal_lm, load_causal_lm


class AutoregressiveRewardTrainer(RewardTrainer):
    r"""
    Trainer for autoregressive reward models (ARM), from [GenARM](https://hf.co/papers/2410.08193).

    It is a [`~trl.RewardTrainer`] in which the reward of a response is its log-probability under a causal LM, scaled by
    `beta`, so the loss is Eq. 5 of the paper, that of a reference-free DPO:

    $$-\log\sigma\big(\beta_r\log\pi_r(y_w \mid x) - \beta_r\log\pi_r(y_l \mid x)\big)$$

    Datasets, arguments, metrics and everything else are those of [`~trl.RewardTrainer`]. What the two texts of a pair
    share at the start cancels in the loss: it is left out of the rewards, and forwarded once where that is faster.

    The arguments have other objectives, off by default. The *decode-aware* one, `decode_alpha`, puts the log-ratio of
    the base into the margin, with the KL temperature $\beta_r / \alpha$ that decoding at $\alpha$ realises:

    $$-\log\sigma\Big(\beta_r\log\frac{\pi_r(y_w \mid x)}{\pi_r(y_l \mid x)} +
    \frac{\beta_r}{\alpha}\log\frac{\pi_\text{base}(y_w \mid x)}{\pi_\text{base}(y_l \mid x)}\Big)$$

    It is Eq. 5 for the unnormalised guided model $\pi_\text{base}\,\pi_r^\alpha$ of Eq. 7; the base is the model
    without the adapter that is trained. With `reference="base"`, the reward is $\log\pi_r - \log\pi_\text{base}$, which
    makes the loss that of DPO, and what steers with `reference="base"` what was trained.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Id or folder of a causal LM, or the model itself. A string is loaded with
            `AutoModelForCausalLM.from_pretrained` and `args.model_init_kwargs`, in float32 unless they name a `dtype`.
        args ([`AutoregressiveRewardConfig`], *optional*):
            Configuration of the trainer.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Defaults to that of the model.
        quantization_config ([`~transformers.BitsAndBytesConfig`] or another, *optional*):
            Quantisation of a model that is given as a string.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train, for instance `LoraConfig()`. Without it, all weights of a plain model are trained.
        **kwargs:
            As for [`~trl.RewardTrainer`]: `train_dataset`, `eval_dataset`, `callbacks`, …

    Raises:
        TypeError: if the model is not a decoder-only causal LM, or `args` are those of another trainer.
        ValueError: if a dataset is empty, has no pairs, or lacks the columns of the preference type.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from hf_genarm import AutoregressiveRewardTrainer

    >>> trainer = AutoregressiveRewardTrainer(
    ...     model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ...     peft_config=LoraConfig(),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names, _name = TAGS, "GenARM"
    # Declared for all trainers at once, they could be anything.
    args: AutoregressiveRewardConfig
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: AutoregressiveRewardConfig | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if not isinstance(model, str):
            check_causal_lm(model)
        args = as_config(args, model)
        init_kwargs: Any = args.model_init_kwargs  # `RewardConfig` has made it a dict
        if isinstance(model, str):
            if processing_class is None:
                processing_class = AutoTokenizer.from_pretrained(
                    model, revision=(init_kwargs or {}).get("revision"), trust_remote_code=args.trust_remote_code
                )
            model = load_causal_lm(model, args, quantization_config)
            args.model_init_kwargs = None  # used; RewardTrainer warns about those that it can't use
        elif quantization_config is not None:
            raise ValueError(
                "`quantization_config` says how to load a model, but `model` is loaded already. Pass its id instead, "
                "or give `quantization_config` to its `from_pretrained`."
            )
        peft_config = peft_config and as_causal_lm(peft_config)
        if isinstance(model, PeftModel):
            configs: Any = model.peft_config
            configs.update({name: as_causal_lm(config) for name, config in configs.items()})

        if kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = PreferenceMetrics()

        if args.decode_alpha is not None and peft_config is None and not is_peft_model(model):
            raise ValueError(
                f"`decode_alpha` is {args.decode_alpha}, but all weights of the model are to be trained, so that there "
                "is no base to compare with. Train an adapter: `peft_config=LoraConfig()`."
            )
        self._generation_config = network_of(model).generation_config
        # What an adapter is trained on, or rewards are contrasted with, read before it is sharded
        has_base = peft_config is not None or is_peft_model(model) or args.reference is not None
        self._base_weights = weights_fingerprint(model) if has_base else None
        self.pair_counts: dict[str, PairCounts] = {}
        self._measured: dict[str, float] = {}

        # RewardTrainer wants a classifier with one label; the causal LM answers to that name while it is set up.
        config = model.config
        labels = config.id2label, config.label2id
        config.num_labels = 1
        try:
            super().__init__(model, args, processing_class=processing_class, peft_config=peft_config, **kwargs)
        finally:
            config.id2label, config.label2id = labels
            args.model_init_kwargs = init_kwargs
        check_adapter(self.model, args)

        multiple: Any = args.pad_to_multiple_of
        if kwargs.get("data_collator") is None:  # the pad token was settled meanwhile
            self.data_collator: Any = DataCollatorForPairs(self.processing_class.pad_token_id, multiple)
        self._starting_point = StartingPoint(self.model, self.accelerator) if has_base else None
        self._pair_log_probs = PairLogProbs(self.model, self.accelerator.mixed_precision != "no", multiple)
        self.add_callback(PushWhole(self._describe))

    def compute_loss(
        self,
        model: Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        args, pairs = self.args, _pairs(inputs)
        log_probs = self._pair_log_probs(model, pairs, self._scored(pairs))
        rewards = args.beta * self._reduce(log_probs, pairs)
        uses_base = args.reference is not None or args.decode_alpha is not None
        base_rewards = self._base_rewards(model, pairs) if uses_base else 0.0
        if args.reference is not None:
            rewards = rewards - base_rewards
        compared = rewards if args.decode_alpha is None else rewards + base_rewards / args.decode_alpha

        # Metrics and gathering are RewardTrainer's, which compares the logits of its classifier.
        outputs = SequenceClassifierOutput(logits=compared[:, None])
        super().compute_loss(lambda **_: outputs, inputs, True, num_items_in_batch)

        chosen, rejected = compared.chunk(2)
        margin = chosen - rejected - args.target_margin - inputs.get("margin", 0.0)
        loss = preference_loss(margin, args.loss_type, args.label_smoothing).mean()
        if args.sft_coefficient:
            n_tokens = pairs.n_chosen_tokens if num_items_in_batch is None else num_items_in_batch
            loss = loss - args.sft_coefficient * log_probs.chunk(2)[0].sum() / n_tokens
        if not return_outputs:
            return loss
        # One row for each pair, by whose number the Trainer gathers and cuts predictions.
        return loss, SequenceClassifierOutput(logits=torch.stack(rewards.chunk(2), dim=1))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """With the number of tokens in chosen responses: of all batches of a step, the mean for one batch."""
        batches, n_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.sft_coefficient and batches:
            n_tokens = torch.stack([_pairs(batch).n_chosen_tokens for batch in batches]).float().mean()
            n_items = self.accelerator.gather(n_tokens.to(device)).mean()
        return batches, n_items

    def _scored(self, pairs: PairBatch) -> Tensor:
        """Responses may begin alike. What they share cancels in a sum; in means and likelihoods it counts."""
        return pairs.is_response if self.args.length_normalized or self.args.sft_coefficient else pairs.is_own

    def _reduce(self, log_probs: Tensor, pairs: PairBatch) -> Tensor:
        if self.args.length_normalized:
            return log_probs.sum(dim=1) / pairs.is_response.sum(dim=1).clamp(min=1)
        return (log_probs * pairs.is_own).sum(dim=1)

    def _base_rewards(self, model: Module, pairs: PairBatch) -> Tensor:
        """The scaled log-probabilities before training, `(2 * batch_size,)`."""
        assert self._starting_point is not None
        with self._starting_point(model) as base:
            log_probs = self._pair_log_probs(base, pairs, self._scored(pairs))
        return self.args.beta * self._reduce(log_probs, pairs)

    def prediction_step(
        self, model: Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        inputs = self._prepare_inputs(inputs)
        loss, rewards, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        pairs = _pairs(inputs)
        # What metrics compare rewards with, one row (chosen, rejected) for each pair: numbers of response tokens, and
        # the rewards before training, if these are not in the rewards already.
        labels = [pairs.is_response.sum(dim=1)]
        if is_peft_model(self.model) and self.args.reference is None:
            labels.append(self._base_rewards(model, pairs))
        return loss, rewards, tuple(torch.stack(label.chunk(2), dim=1) for label in labels)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        first, is_tokenized = check_pairs(dataset, dataset_name)
        if dataset_name == "train":
            self._is_conversational = "chosen" in first and is_conversational(first)
        # RewardTrainer drops what is too long without a word.
        any_length = copy.copy(args)
        any_length.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, any_length, dataset_name)
        ends = end_token_ids(self._generation_config, processing_class)
        with args.main_process_first():
            dataset, counts = prepare_pairs(dataset, dataset_name, processing_class, ends, args, is_tokenized)
        if counts is not None:
            self.pair_counts[dataset_name] = counts
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        # The last is for `train_sampling_strategy="group_by_length"`.
        columns: Any = [*SIDES, PROMPT_LENGTH, "margin", self.args.length_column_name]
        self._signature_columns = columns

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The card tells of the trainer's own `eval_dataset`, or if it has none, of this one; of several, the first."""
        if eval_dataset is self.eval_dataset:
            eval_dataset = None  # it is prepared
        counts = self.pair_counts.copy()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is not None and self.eval_dataset is not None:
            self.pair_counts = counts
            return metrics
        told = self.eval_dataset if eval_dataset is None else eval_dataset
        prefix = f"{metric_key_prefix}_{next(iter(told))}" if isinstance(told, dict) else metric_key_prefix
        names = METRICS + OPTIONAL_METRICS  # some data have not all, such as `length_matched_accuracy`
        self._measured = {name: metrics[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in metrics}
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, counts in self.pair_counts.items():
            prefix = "eval" if name == "eval" else f"eval_{name}"
            if f"{prefix}_pair_accuracy" in logs:
                logs[f"{prefix}_dropped_too_long"] = counts.too_long / counts.n_pairs
                logs[f"{prefix}_dropped_identical"] = counts.identical / counts.n_pairs
        super().log(logs, start_time)

    @property
    def reward_info(self) -> RewardInfo:
        """What the trained model will say about itself, from the arguments, the data and the last evaluation."""
        scale = self._measured.get("rms_margin", 0.0) / self.args.beta
        config = network_of(self.model).config
        base_model = get_config_model_id(config)
        tokenizer = self.processing_class
        return RewardInfo(
            beta=self.args.beta,
            loss=self.args.changed_loss,
            reward_scale=scale if 0 < scale < math.inf else None,  # not after a training that failed
            objective=self.args.objective,
            description=self.args.description,
            base_model=base_model if base_model and not os.path.isdir(base_model) else None,
            base_model_revision=getattr(config, "_commit_hash", None),  # only of what came from the Hub
            base_weights=self._base_weights,
            tokenizer=tokenizer_fingerprint(tokenizer),
            chat_template=chat_template_fingerprint(tokenizer) if self._is_conversational else None,
            dataset=self.args.dataset_name,
            n_pairs=len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None,
            metrics=self._measured,
            versions=package_versions(),
        )

    def create_model_card(  # type: ignore[override]  # as TRL's trainers do
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes `README.md` into `args.output_dir`; the arguments are those of TRL's trainers."""
        if self.is_world_process_zero():
            info = self.reward_info
            info.dataset = dataset_name or info.dataset
            self._card(info, model_name, tags).save(os.path.join(str(self.args.output_dir), "README.md"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._describe(output_dir or str(self.args.output_dir))

    def _describe(self, folder: str) -> None:
        """Writes what makes weights a reward model. PEFT leaves a card that calls an adapter a text generator."""
        info = self.reward_info
        info.save(folder)
        self._card(info).save(os.path.join(folder, "README.md"))
        if self.args.custom_generate:
            write_custom_generate(folder, self.hub_model_id or os.path.abspath(folder))

    def _card(self, info: RewardInfo, model_name: str | None = None, tags: str | list[str] | None = None) -> ModelCard:
        name = model_name or os.path.basename(str(self.args.output_dir))
        return reward_model_card(
            info,
            model_name=name,
            model_id=self.hub_model_id or name,
            is_adapter=is_peft_model(self.model),
            tags=[tags] if isinstance(tags, str) else tags,
        )


def _pairs(inputs: dict[str, Any]) -> PairBatch:
    return PairBatch(inputs["input_ids"], inputs["attention_mask"], inputs.get(PROMPT_LENGTH))
