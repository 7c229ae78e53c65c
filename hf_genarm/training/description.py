"""What is published next to the weights of a reward model: its configuration, its card, and code that generates."""

import math
import os
import warnings
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import TrainerCallback
from trl.trainer.utils import get_config_model_id

from ..demo import hub_id
from ..hub.card import METRICS, OPTIONAL_METRICS, reward_model_card, write_custom_generate
from ..hub.info import (
    INFO_NAME,
    GuidanceWarning,
    RewardInfo,
    chat_template_fingerprint,
    package_versions,
    tokenizer_fingerprint,
)
from ..hub.kv_cache import network_of
from .learned import learned

if TYPE_CHECKING:
    from .trainer import AutoregressiveRewardTrainer


class Description(TrainerCallback):
    """
    Describes the reward model of a trainer as it is at the moment.

    What was measured belongs to the weights of one step, and is not reported for those of another.

    Args:
        trainer ([`AutoregressiveRewardTrainer`]):
            The trainer.
        base_weights (`str`, *optional*):
            Fingerprint of the weights that an adapter is trained on, or that rewards are contrasted with.
        is_chat (`bool`):
            Whether the training data consist of messages, or of texts in the chat template.
    """

    def __init__(self, trainer: "AutoregressiveRewardTrainer", base_weights: str | None, is_chat: bool):
        self._trainer, self._base_weights, self._is_chat = trainer, base_weights, is_chat
        self._measured: dict[str, float] = {}
        self._measured_at = 0

    def record(self, metrics: dict[str, float], prefix: str) -> None:
        """Keeps what was measured with the current weights, of metrics whose names begin with `prefix`."""
        names = METRICS + OPTIONAL_METRICS  # some are missing for some data, such as `length_matched_accuracy`
        self._measured = {name: metrics[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in metrics}
        self._measured_at = self._trainer.state.global_step

    def warn_of_metrics(self) -> None:
        """Warns if the last evaluation was of other weights than the current ones, or found too little to be seen."""
        step = self._trainer.state.global_step
        if self._measured and step != self._measured_at:
            warnings.warn(
                f"The last evaluation was at step {self._measured_at}, and the weights are those of step {step}, so "
                "that the card has no metrics. Call `trainer.evaluate()` before saving.",
                GuidanceWarning,
                stacklevel=3,
            )
        elif step > 0 and (what := learned(self.info)) is not None:
            what.warn_if_too_little(self._trainer.args.learning_rate, step)

    @property
    def info(self) -> RewardInfo:
        """Returns what is known about the current weights."""
        trainer, args, tokenizer = self._trainer, self._trainer.args, self._trainer.processing_class
        metrics = self._measured if trainer.state.global_step == self._measured_at else {}
        scale = metrics.get("rms_margin", 0.0) / args.beta
        config = network_of(trainer.model).config
        base_model = get_config_model_id(config)
        data = trainer.train_dataset
        return RewardInfo(
            beta=args.beta,
            loss=args.changed_loss,
            reward_scale=scale if 0 < scale < math.inf else None,  # not after a training that failed
            objective=args.objective,
            description=args.description,
            base_model=hub_id(base_model),
            base_model_revision=getattr(config, "_commit_hash", None),  # only of what came from the Hub
            base_weights=self._base_weights,
            tokenizer=tokenizer_fingerprint(tokenizer),
            chat_template=chat_template_fingerprint(tokenizer) if self._is_chat else None,
            dataset=args.dataset_name,
            n_pairs=len(data) if isinstance(data, Dataset) else None,
            metrics=metrics,
            versions=package_versions(),
        )

    def card(self, info: RewardInfo, model_name: str | None = None, tags: str | list[str] | None = None) -> ModelCard:
        """Returns the card of what is described by `info`."""
        trainer = self._trainer
        name = model_name or os.path.basename(str(trainer.args.output_dir))
        return reward_model_card(
            info,
            model_name=name,
            model_id=trainer.hub_model_id or name,
            is_adapter=is_peft_model(trainer.model),
            tags=[tags] if isinstance(tags, str) else tags,
        )

    def write(self, folder: str) -> None:
        """Writes all of it into the folder of the weights, and replaces the card of PEFT, which names another task."""
        info = self.info
        info.save(folder)
        self.card(info).save(os.path.join(folder, "README.md"))
        if self._trainer.args.custom_generate:
            write_custom_generate(folder, self._trainer.hub_model_id or os.path.abspath(folder))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forgets what was measured before the weights change."""
        self._measured = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes over what was measured with the best weights, if these were loaded."""
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        path = os.path.join(state.best_model_checkpoint, INFO_NAME)
        self._measured = RewardInfo.load(path).metrics if os.path.exists(path) else {}
        self._measured_at = state.global_step

    def on_push_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Completes the folder that is pushed, into which the trainer copies only the files of a checkpoint."""
        if args.should_save:
            self.write(str(args.output_dir))
