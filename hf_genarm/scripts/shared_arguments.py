"""The arguments that several commands share, and checks of them. Nothing here imports torch before it is needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..hub.base_model import Base


class UsageError(ValueError):
    """Is raised when the command line itself is wrong."""


def refuse_below(arguments: Any, **least: int) -> None:
    """
    Refuses numbers that are too small.

    Raises:
        ValueError: if a number is below the least one that is allowed; `None` is allowed.
    """
    for name, limit in least.items():
        value = getattr(arguments, name)
        if value is not None and value < limit:
            raise ValueError(f"`{name}` is {value}, but must be at least {limit}.")


def refuse_wrong_seed(arguments: Any) -> None:
    """
    Refuses a seed that random numbers can't have.

    Raises:
        ValueError: if it is one.
    """
    from ..arguments import refuse_no_seed  # which imports torch

    refuse_no_seed(arguments.seed)


@dataclass(kw_only=True)
class BaseArguments:
    """
    Chooses the model that is steered, its device and its dtype.

    Parameters:
        base (`str`, *optional*):
            Hub id or folder. Defaults to the base that the reward models name.
        device (`str`, *optional*):
            A device of PyTorch. Defaults to the one that `accelerate` chooses.
        device_map (`str`, *optional*):
            As for `from_pretrained`, instead of `device`: `"auto"` spreads the layers over all devices.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Of the weights; `"auto"` is that of the checkpoint.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the Hub.
    """

    base: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the base model. Defaults to the one that the reward models name."},
    )
    device: str | None = field(
        default=None,
        metadata={"help": "Where to put it: 'cuda', 'cuda:1', 'mps', 'xpu', 'cpu', … Chosen by default."},
    )
    device_map: str | None = field(
        default=None, metadata={"help": "Instead of a device: 'auto' spreads the layers over all devices."}
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "Of the weights of the base; 'auto' is that of its checkpoint."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code from the Hub."})

    def load(self, reward_models: Sequence[str], announce: bool = True, revision: str | None = None) -> "Base":
        """
        Loads the base, and prints one line with its name, its device and its dtype.

        Args:
            reward_models (sequence of `str`):
                Hub ids or folders of the reward models, which name the default.
            announce (`bool`, *optional*, defaults to `True`):
                Whether to print the line.
            revision (`str`, *optional*):
                Revision of the reward models.
        """
        from ..hub.base_model import load_base

        base = load_base(
            self.base,
            reward_models,
            device=self.device,
            device_map=self.device_map,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            reward_model_revision=revision,
        )
        if announce:
            print(f"Base: {base}", flush=True)
        return base


@dataclass
class GuidanceArguments(BaseArguments):
    """
    Chooses what is steered, by which reward models, and how strongly.

    Parameters:
        arm (list of `str`, *optional*):
            Hub ids or folders of reward models.
        sentence (list of `str`, *optional*):
            Sentences that steer as reward models do; they come after those of `arm`.
        alpha (list of `float`, *optional*):
            The strength of all reward models, or one for each. Defaults to what they recommend, or else 1, for a
            sentence 1.5.
        reference (`str`, *optional*, defaults to `"auto"`):
            `"base"` steers by what reward models have learned, their log-probability minus that of the base; `"none"`
            by Eq. 7; `"auto"` as they recommend, or else were trained.
        target_kl (`float`, *optional*):
            The mean divergence per token, in nats, that each text is held at.
        base, device, device_map, dtype, trust_remote_code:
            As for [`BaseArguments`].

    Raises:
        ValueError: if there is nothing to steer by, there are not as many strengths as reward models, or one is not a
            number.
    """

    arm: list[str] = field(
        default_factory=list,
        metadata={"help": "Hub id or folder of a reward model. Repeatable.", "action": "extend"},
    )
    sentence: list[str] = field(
        default_factory=list,
        metadata={"help": "A sentence to steer by, such as 'You are kind.' Repeatable.", "action": "extend"},
    )
    alpha: list[float] | None = field(
        default=None,
        metadata={
            "help": "Strength of all, or one for each. Defaults to what they recommend, or else 1, for a sentence 1.5.",
            "nargs": "+",
        },
    )
    reference: Literal["auto", "base", "none"] = field(
        default="auto",
        metadata={"help": "'base' steers by log-probs minus those of the base; 'auto' as reward models recommend."},
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "Mean divergence per token, in nats, that each text is held at."}
    )

    @property
    def names(self) -> list[str]:
        """The reward models, as they are called in what is printed."""
        return [*self.arm, *self.sentence]

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("There is nothing to steer by. Give a reward model, `--arm`, or a sentence, `--sentence`.")
        if not all(sentence.strip() for sentence in self.sentence):
            raise ValueError(f"`sentence` is {self.sentence}, of which one is empty. Write what is asked for.")
        if self.alpha is not None:
            from ..decoding.strength import check_alpha

            strengths: Any = check_alpha(self.alpha[0] if len(self.alpha) == 1 else self.alpha, len(self.names))
            self.alpha = strengths  # one for each
        if self.target_kl is not None:
            from ..decoding.kl_control import check_target_kl

            check_target_kl(self.target_kl)


@dataclass
class PairArguments:
    """
    Chooses the source of preference pairs, and the meaning of its columns.

    Parameters:
        dataset (`str`):
            Hub id or folder of a dataset, or a JSON, JSONL, CSV, TSV or Parquet file, which may be compressed.
        dataset_config, dataset_data_dir (`str`, *optional*):
            Name and `data_dir` as for `datasets.load_dataset`.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            The split to train on. A file has this one only.
        dataset_test_split (`str`, *optional*):
            The split to evaluate on. Without one, pairs are held out.
        test_size (`float`, *optional*):
            Share of the pairs, or if it is 1 or more their number, that is held out; no prompt is in both parts.
        prompt_column, chosen_column, rejected_column (`str`, *optional*):
            Names of the columns, if they are not `prompt`, `chosen` and `rejected`.
        prompt_template (`str`, *optional*):
            The text that prompts are inserted into, in place of `{prompt}`, if they are text.
        response_columns (list of `str`, *optional*):
            Names of two columns of responses; `preferred_column` holds which one is preferred.
        preferred_column (`str`, *optional*):
            Name of a column that is 0 if the first of `response_columns` is preferred, and 1 if it is the second.
    """

    dataset: str = field(metadata={"help": "Hub id or folder of a dataset, or a file of pairs."})
    dataset_config: str | None = field(default=None, metadata={"help": "Name of its configuration."})
    dataset_data_dir: str | None = field(default=None, metadata={"help": "`data_dir` as for `load_dataset`."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Without one, pairs are held out."}
    )
    test_size: float | None = field(
        default=None,
        metadata={"help": "Share (below 1) or number of the pairs to hold out; no prompt is in both parts."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts, if there is one."})
    chosen_column: str = field(default="chosen", metadata={"help": "Column of the chosen responses."})
    rejected_column: str = field(default="rejected", metadata={"help": "Column of the rejected responses."})
    prompt_template: str = field(
        default="{prompt}", metadata={"help": "Text that prompts are inserted into, in place of `{prompt}`."}
    )
    response_columns: list[str] | None = field(
        default=None, metadata={"help": "Two columns of responses, instead of chosen and rejected."}
    )
    preferred_column: str | None = field(
        default=None, metadata={"help": "Column with the number of the preferred one, 0 or 1."}
    )

    def __post_init__(self) -> None:
        if (self.response_columns is None) != (self.preferred_column is None) or (
            self.response_columns is not None and len(self.response_columns) != 2
        ):
            raise ValueError(
                f"`response_columns` is {self.response_columns} and `preferred_column` is {self.preferred_column!r}, "
                "but they go together: two columns of responses, and the column with the number of the preferred one."
            )
        if "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"`prompt_template` is {self.prompt_template!r}, in which prompts have no place. Write `{{prompt}}` "
                "where they go."
            )
        size = self.test_size
        if size is not None and not (0 <= size < 1 or (math.isfinite(size) and size >= 1 and size == int(size))):
            raise ValueError(
                f"`test_size` is {size}, but must be a share of the pairs (0 to below 1) or their number (1, 2, …)."
            )
