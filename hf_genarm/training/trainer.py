"""The trainer of autoregressive reward models: TRL's `RewardTrainer` with another reward."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PromptLearningConfig
from torch import Tensor
from torch.nn import Module
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import RewardTrainer

from ..functional import preference_loss
from ..hub.base_weights import weights_fingerprint
from ..hub.card import TAGS
from ..hub.info import RewardInfo
from ..hub.kv_cache import network_of
from ..hub.limits import n_positions
from ..hub.scoring import end_token_ids
from .columns import PROMPT_LENGTH, SIDES, check_pairs, is_in_template
from .config import FULL_LEARNING_RATE, AutoregressiveRewardConfig, adapter_learning_rate, n_steps
from .description import Description
from .metrics import PreferenceMetrics
from .model_to_train import (
    as_causal_lm,
    as_config,
    check_active_adapter,
    check_adapter,
    check_causal_lm,
    load_model_to_train,
)
from .preference_data import DataCollatorForPairs, PairCounts, prepare_pairs
from .prefix_sharing import PairBatch, PairLogProbs
from .starting_point import StartingPoint


class AutoregressiveRewardTrainer(RewardTrainer):
    r"""
    Trains autoregressive reward models (ARM), from [GenARM](https://hf.co/papers/2410.08193).

    It is a [`~trl.RewardTrainer`] in which the reward of a response is its log-probability under a causal LM, scaled by
    `beta`. So the loss is Eq. 5 of the paper, that of a reference-free DPO:

    $$-\log\sigma\big(\beta_r\log\pi_r(y_w \mid x) - \beta_r\log\pi_r(y_l \mid x)\big)$$

    Datasets, arguments, metrics and everything else are those of [`~trl.RewardTrainer`]. What the two texts of a pair
    share at the start cancels in the loss. It is left out of the rewards, and forwarded once where that is faster.

    The arguments have other objectives, off by default. With `reference="base"`, the reward is
    $\log\pi_r - \log\pi_\text{base}$, where the base is the model that training starts from: the loss is that of DPO,
    and the reward that is trained is the one that steers with `reference="base"`.

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
    # The parent class declares these for all trainers, with wider types.
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
        chooses_learning_rate = args.learning_rate is None
        if chooses_learning_rate:
            args = copy.copy(args)  # the choice is for this model and these pairs
        init_kwargs: Any = args.model_init_kwargs  # `RewardConfig` has made it a dict
        if isinstance(model, str):
            if processing_class is None:
                processing_class = AutoTokenizer.from_pretrained(
                    model, revision=(init_kwargs or {}).get("revision"), trust_remote_code=args.trust_remote_code
                )
            model = load_model_to_train(model, args, quantization_config)
            args.model_init_kwargs = None  # used; RewardTrainer warns about those that it can't use
        elif quantization_config is not None:
            raise ValueError(
                "`quantization_config` is about loading a model, but `model` is loaded already. Pass its id instead, "
                "or give `quantization_config` to its `from_pretrained`."
            )
        peft_config = peft_config and as_causal_lm(peft_config)
        if isinstance(model, PeftModel):
            check_active_adapter(model)
            configs: Any = model.peft_config
            configs.update({name: as_causal_lm(config) for name, config in configs.items()})

        if kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = PreferenceMetrics()

        self._generation_config = network_of(model).generation_config
        self._n_positions = n_positions(model)
        if isinstance(peft_config, PromptLearningConfig):
            self._n_positions -= peft_config.num_virtual_tokens or 0
        # What an adapter is trained on, or rewards are contrasted with, read before it is sharded
        has_base = peft_config is not None or is_peft_model(model) or args.reference is not None
        base_weights = weights_fingerprint(model) if has_base else None
        self.pair_counts: dict[str, PairCounts] = {}

        # RewardTrainer refuses anything but a classifier with one label, so the causal LM has one while it is set up.
        config = model.config
        self._vocab_size = config.get_text_config().vocab_size
        labels = config.id2label, config.label2id
        config.num_labels = 1
        try:
            super().__init__(model, args, processing_class=processing_class, peft_config=peft_config, **kwargs)
        finally:
            config.id2label, config.label2id = labels
            args.model_init_kwargs = init_kwargs
        check_adapter(self.model, args)
        if chooses_learning_rate:
            # The length of a stream is not known, but its number of steps is given.
            n = n_steps(args, len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else 0)
            args.learning_rate = adapter_learning_rate(n) if is_peft_model(self.model) else FULL_LEARNING_RATE

        multiple: Any = args.pad_to_multiple_of
        if kwargs.get("data_collator") is None:  # the pad token is known now
            self.data_collator: Any = DataCollatorForPairs(self.processing_class.pad_token_id, multiple)
        self._starting_point = StartingPoint(self.model, self.accelerator) if has_base else None
        self._pair_log_probs = PairLogProbs(self.model, self.accelerator.mixed_precision != "no", multiple)
        self._description = Description(self, base_weights, self._is_chat)
        self.add_callback(self._description)

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
        if args.reference is not None:
            rewards = rewards - self._base_rewards(model, pairs)

        # Metrics and gathering are RewardTrainer's, which compares the logits of its classifier.
        outputs = SequenceClassifierOutput(logits=rewards[:, None])
        super().compute_loss(lambda **_: outputs, inputs, True, num_items_in_batch)

        chosen, rejected = rewards.chunk(2)
        margin = chosen - rejected - args.target_margin - inputs.get("margin", 0.0)
        loss = preference_loss(margin, args.loss_type, args.label_smoothing).mean()
        if args.sft_coefficient:
            n_tokens = pairs.n_chosen_tokens if num_items_in_batch is None else num_items_in_batch
            loss = loss - args.sft_coefficient * log_probs.chunk(2)[0].sum() / n_tokens
        if not return_outputs:
            return loss
        # One row for each pair, since the Trainer gathers and cuts predictions by rows.
        return loss, SequenceClassifierOutput(logits=torch.stack(rewards.chunk(2), dim=1))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Returns the batches of a step, and the mean over batches of the number of tokens in chosen responses."""
        batches, n_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.sft_coefficient and batches:
            n_tokens = torch.stack([_pairs(batch).n_chosen_tokens for batch in batches]).float().mean()
            n_items = self.accelerator.gather(n_tokens.to(device)).mean()
        return batches, n_items

    def _scored(self, pairs: PairBatch) -> Tensor:
        """Returns which tokens are scored: what both responses begin with cancels in a sum, but not in a mean."""
        return pairs.is_response if self.args.length_normalized or self.args.sft_coefficient else pairs.is_own

    def _reduce(self, log_probs: Tensor, pairs: PairBatch) -> Tensor:
        """Returns the sum of the log-probabilities of each text, or their mean, `(2 * batch_size,)`."""
        if self.args.length_normalized:
            return log_probs.sum(dim=1) / pairs.is_response.sum(dim=1).clamp(min=1)
        return (log_probs * pairs.is_own).sum(dim=1)

    def _base_rewards(self, model: Module, pairs: PairBatch) -> Tensor:
        """Returns the rewards of the starting point, `(2 * batch_size,)`."""
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
        dataset, is_chat, is_tokenized = check_pairs(dataset, dataset_name, self._vocab_size)
        if dataset_name == "train":
            self._is_chat = is_chat or is_in_template(dataset, processing_class, is_tokenized)
        # RewardTrainer would drop what is too long without counting it.
        any_length = copy.copy(args)
        any_length.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, any_length, dataset_name)
        ends = end_token_ids(self._generation_config, processing_class)
        with args.main_process_first():
            dataset, counts = prepare_pairs(
                dataset, dataset_name, processing_class, ends, args, is_tokenized, self._n_positions
            )
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
        """
        Evaluates, and keeps the metrics for the card if they are those of the trainer's own `eval_dataset`.

        A trainer without one keeps those of the given dataset; of several datasets, those of the first.
        """
        if eval_dataset is self.eval_dataset:
            eval_dataset = None  # it is prepared
        counts = self.pair_counts.copy()
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is not None and self.eval_dataset is not None:
            self.pair_counts = counts
            return metrics
        measured = self.eval_dataset if eval_dataset is None else eval_dataset
        prefix = f"{metric_key_prefix}_{next(iter(measured))}" if isinstance(measured, dict) else metric_key_prefix
        self._description.record(metrics, prefix)
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
        """Returns what is saved next to the weights: from the arguments, the data and an evaluation."""
        return self._description.info

    def create_model_card(  # type: ignore[override]  # as TRL's trainers do
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes `README.md` into `args.output_dir`, with the arguments of TRL's trainers."""
        if self.is_world_process_zero():
            info = self.reward_info
            info.dataset = dataset_name or info.dataset
            self._description.card(info, model_name, tags).save(os.path.join(str(self.args.output_dir), "README.md"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            if not _internal_call:
                self._description.warn_of_metrics()
            self._description.write(output_dir or str(self.args.output_dir))


def _pairs(inputs: dict[str, Any]) -> PairBatch:
    """Returns the pairs in a batch of the collator."""
    return PairBatch(inputs["input_ids"], inputs["attention_mask"], inputs.get(PROMPT_LENGTH))
