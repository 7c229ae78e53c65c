"""A judge for answers: a second reward model, trained on other pairs, since a reward model can't judge itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..hub.info import INFO_NAME
from ..hub.reward_model import AutoregressiveRewardModel
from ..hub.sharing import frozen_twin
from ..training.config import AutoregressiveRewardConfig
from ..training.trainer import AutoregressiveRewardTrainer
from .pairs import hold_out, load_pairs
from .shared_arguments import PairArguments

HELD_OUT = 0.1


class Judge:
    """
    Trains the reward model that scores answers, with `reference="base"`, on pairs that nothing else was trained on.

    Args:
        dataset (`str`):
            Hub id, folder or file of preference pairs. They are read immediately, so that a wrong name fails early.
        folder (`str`):
            Where the judge is kept, under a hash of the pairs and the base.
    """

    def __init__(self, dataset: str, folder: str | Path):
        self.dataset, self._folder = dataset, Path(folder)
        pairs = load_pairs(PairArguments(dataset=dataset), "train")
        self._train, self._held_out = hold_out(pairs, HELD_OUT)

    def train(self, model: Any, tokenizer: Any, base_id: str) -> AutoregressiveRewardModel:
        """
        Trains the judge, or loads the one that was trained before on the same pairs and base.

        Args:
            model ([`~transformers.PreTrainedModel`]), tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                The base that the judge is an adapter on; it stays as it is.
            base_id (`str`):
                Identifies the base.
        """
        rows = json.dumps([base_id, self._train.to_list(), self._held_out.to_list()], sort_keys=True)
        folder = self._folder / hashlib.sha256(rows.encode()).hexdigest()[:16]
        if not (folder / INFO_NAME).exists():
            network, _ = frozen_twin(model)
            trainer = AutoregressiveRewardTrainer(
                model=network,
                args=AutoregressiveRewardConfig(str(folder), reference="base", save_strategy="no", report_to="none"),
                train_dataset=self._train,
                eval_dataset=self._held_out,
                processing_class=tokenizer,
                peft_config=LoraConfig(target_modules="all-linear"),
            )
            trainer.train()
            trainer.evaluate()
            trainer.save_model()  # writes `genarm_config.json` last but for the card
        return AutoregressiveRewardModel.from_pretrained(str(folder), model)

    def described(self, judge: AutoregressiveRewardModel) -> str:
        """Names the judge, with its accuracy on held-out pairs."""
        accuracy = "{pair_accuracy:.2f} [{pair_accuracy_low:.2f}, {pair_accuracy_high:.2f}]".format(
            **judge.info.metrics
        )
        return f"a judge trained on `{self.dataset}`, right on {accuracy} of the pairs held out"
