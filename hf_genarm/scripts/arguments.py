"""The arguments of the commands. Nothing here imports torch, so that a typo is reported before that is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..hub.base_model import Base

LOOPBACK = "127.0.0.1"
_JSON = {"help": "Prints the result as JSON, and everything else to stderr."}


class UsageError(ValueError):
    """Is raised when the command line itself is wrong."""


def _refuse_below(arguments: Any, **least: int) -> None:
    """
    Raises:
        ValueError: if a number is below the least one that is allowed; `None` is.
    """
    for name, limit in least.items():
        value = getattr(arguments, name)
        if value is not None and value < limit:
            raise ValueError(f"`{name}` is {value}, but must be at least {limit}.")


def _refuse_no_seed(arguments: Any) -> None:
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


@dataclass
class EvaluateArguments(BaseArguments):
    """
    Chooses the reward model to evaluate, and the folder of the report.

    The base is that of an adapter, or the model that the training of all weights with `reference="base"` started from;
    another full model has none.
    """

    model: str = field(metadata={"help": "Hub id or folder of a reward model.", "aliases": ["--arm"]})
    model_revision: str = field(default="main", metadata={"help": "Revision of the reward model."})
    output_dir: str = field(default="evaluation", metadata={"help": "Folder of the report."})
    batch_size: int = field(default=8, metadata={"help": "Texts in a forward pass."})
    max_pairs: int | None = field(default=None, metadata={"help": "Evaluate on the first pairs only."})
    json: bool = field(default=False, metadata=_JSON)

    def __post_init__(self) -> None:
        _refuse_below(self, batch_size=1, max_pairs=1)


@dataclass
class GenerateArguments:
    """Chooses the prompts, how they are answered, and the file of the answers."""

    prompts: str = field(metadata={"help": "JSONL file of prompts."})
    output: str = field(metadata={"help": "JSONL file of answers, which must not exist yet."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    batch_size: int = field(default=8, metadata={"help": "Prompts in a forward pass."})
    max_new_tokens: int = field(default=256, metadata={"help": "Length of the answers."})
    do_sample: bool = field(default=False, metadata={"help": "Whether to sample. By default, answers are greedy."})
    temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of sampling. Defaults to what the reward models recommend, or else 1."},
    )
    top_p: float = field(default=1.0, metadata={"help": "Top-p of sampling."})
    top_k: int = field(default=0, metadata={"help": "Top-k of sampling. 0 keeps all tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling, together with the number of the batch."})

    def __post_init__(self) -> None:
        _refuse_below(self, batch_size=1, max_new_tokens=1)
        _refuse_no_seed(self)
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"`temperature` is {self.temperature}, but must be positive. Leave out `--do_sample`.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}, but must be above 0, and at most 1.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` is {self.top_k}, but must be at least 0, which keeps all tokens.")


@dataclass
class TuneArguments(BaseArguments):
    """Chooses what to tune, on which prompts, and within which limits."""

    prompts: str = field(
        metadata={"help": "Hub id, folder or file (JSONL, CSV, …) with a column `prompt` of texts or messages."}
    )
    arm: str | None = field(default=None, metadata={"help": "Hub id or folder of a reward model."})
    sentence: str | None = field(
        default=None, metadata={"help": "Instead of a reward model, a sentence to steer by, such as 'You are kind.'"}
    )
    scorer: str | None = field(
        default=None,
        metadata={
            "help": "`module:function`, a reward function as TRL's GRPOTrainer takes it: of `prompts` and "
            "`completions`, one number for each."
        },
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a scorer, preference pairs that the reward model has not seen: a judge is trained on "
            "them. A reward model can't be its own judge."
        },
    )
    prompts_split: str = field(default="train", metadata={"help": "Split of the prompts. A file has this one only."})
    max_kl: float = field(
        default=20.0, metadata={"help": "Largest mean divergence from the base that is recommended, nats per answer."}
    )
    max_perplexity: float = field(
        default=1.2,
        metadata={
            "help": "Largest perplexity under the base that is recommended, as a multiple of that of unguided text at "
            "temperature 1."
        },
    )
    alpha: list[float] | None = field(
        default=None,
        metadata={"help": "Strengths to try. Defaults to 0.25 0.5 1 2 4, for a sentence to 1 1.5 2 3."},
    )
    reference: list[str] | None = field(
        default=None,
        metadata={
            "help": "References to try: 'none' (Eq. 7) and 'base'. Defaults to 'base' for an adapter or a sentence, "
            "and 'none' for another model.",
            "choices": ["none", "base"],
        },
    )
    temperature: list[float] = field(default_factory=lambda: [1.0, 0.7, 0.5], metadata={"help": "Temperatures to try."})
    max_prompts: int = field(default=64, metadata={"help": "Take the first different prompts only."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer."})
    n_examples: int = field(
        default=0, metadata={"help": "Answers at the recommended setting that the card shows, evenly from all prompts."}
    )
    batch_size: int = field(default=32, metadata={"help": "Answers that are written at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the answers and of the intervals."})
    output_dir: str = field(default="tuning", metadata={"help": "Folder of the answers and of the report."})
    json: bool = field(default=False, metadata=_JSON)

    def __post_init__(self) -> None:
        if (self.arm is None) == (self.sentence is None):
            raise ValueError(
                f"`arm` is {self.arm!r} and `sentence` is {self.sentence!r}, but one of them is to be tuned. Give one."
            )
        if self.alpha is None:
            self.alpha = [0.25, 0.5, 1.0, 2.0, 4.0] if self.sentence is None else [1.0, 1.5, 2.0, 3.0]
        if (self.scorer is None) == (self.pairs is None):
            raise ValueError(
                f"`scorer` is {self.scorer!r} and `pairs` is {self.pairs!r}, but one of them defines what a good "
                "answer is: a function, or pairs that the reward model has not seen. Give one."
            )
        _refuse_below(self, max_new_tokens=1, batch_size=1, n_examples=0)
        _refuse_no_seed(self)
        if self.max_prompts < 2:
            raise ValueError(f"`max_prompts` is {self.max_prompts}, but intervals need at least 2 prompts.")
        for name in ("alpha", "temperature"):
            if not all(0 < value < math.inf for value in getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be positive numbers.")
        if not self.max_kl > 0:
            raise ValueError(f"`max_kl` is {self.max_kl}, but a divergence is positive.")
        if not self.max_perplexity > 0:
            raise ValueError(f"`max_perplexity` is {self.max_perplexity}, but a multiple of a perplexity is positive.")


@dataclass
class ShowArguments:
    """Chooses the question, and how it is answered."""

    prompt: str = field(
        metadata={
            "help": "A question. It goes through the chat template of the base, unless the reward model was trained on "
            "plain text."
        }
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Length of the answers."})
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of both answers; 0 takes the likeliest token. Defaults to what the reward models "
            "recommend, or else 1."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random numbers, which are the same for both answers."})
    width: int | None = field(default=None, metadata={"help": "Width in columns. Defaults to that of the terminal."})

    def __post_init__(self) -> None:
        _refuse_below(self, max_new_tokens=1, width=1)
        _refuse_no_seed(self)
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` is {self.temperature}, but must be 0 or a positive number.")
        if not self.prompt.strip():
            raise ValueError("`prompt` is empty. Write a question.")


@dataclass
class DemoArguments(BaseArguments):
    """Chooses the sentences and adapters to begin with, and the address of the page."""

    sentence: list[str] | None = field(
        default=None, metadata={"help": "A sentence to steer by. Repeatable.", "action": "extend"}
    )
    arm: list[str] | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a reward model, an adapter on the base. Repeatable.",
            "action": "extend",
        },
    )
    host: str = field(default=LOOPBACK, metadata={"help": "Address to serve on. '0.0.0.0' serves the whole network."})
    port: int | None = field(default=None, metadata={"help": "Port to serve on. Defaults to a free one from 7860 on."})
    share: bool = field(default=False, metadata={"help": "Whether to open a public link through gradio.live."})
    export: str | None = field(default=None, metadata={"help": "Writes a Hugging Face Space into this folder instead."})

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"`port` is {self.port}, but must be from 1 to 65535. Leave it out for a free one.")


@dataclass
class PublishArguments:
    """Chooses what is published, and where."""

    arm: str = field(metadata={"help": "Folder of a reward model. Also the first argument without a name."})
    repo_id: str = field(metadata={"help": "Its id on the Hub, `user/name`. Also the second one."})
    private: bool = field(default=False, metadata={"help": "Whether a new repository is private."})
    base: str | None = field(
        default=None, metadata={"help": "Hub id of the base, for an adapter that was trained on a folder."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Identifier of its licence, such as 'apache-2.0'. Defaults to that of the card or the base."},
    )
    dry_run: bool = field(default=False, metadata={"help": "Lists what would be published, and publishes nothing."})


@dataclass
class EnvArguments(BaseArguments):
    """Chooses models to load, to report how they are run; none by default."""

    arm: list[str] | None = field(
        default=None, metadata={"help": "Hub id or folder of a reward model. Repeatable.", "action": "extend"}
    )
    json: bool = field(default=False, metadata=_JSON)

    def __post_init__(self) -> None:
        if self.base is not None and self.arm is None:
            raise ValueError(f"`base` is {self.base}, but there is no reward model to run with it. Name one: `--arm`.")


# Those of `train`, which include TRL's, are in its script.
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "evaluate": (PairArguments, EvaluateArguments),
    "tune": (TuneArguments,),
    "generate": (GuidanceArguments, GenerateArguments),
    "show": (GuidanceArguments, ShowArguments),
    "demo": (DemoArguments,),
    "publish": (PublishArguments,),
    "env": (EnvArguments,),
}
