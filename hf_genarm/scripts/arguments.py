"""The arguments of the commands. Nothing here imports torch, so that a typo is reported before that is loaded."""

import math
from dataclasses import dataclass, field

from .shared_arguments import BaseArguments, GuidanceArguments, PairArguments, refuse_below, refuse_wrong_seed

LOOPBACK = "127.0.0.1"
_JSON = {"help": "Prints the result as JSON, and everything else to stderr."}


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
        refuse_below(self, batch_size=1, max_pairs=1)


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
        refuse_below(self, batch_size=1, max_new_tokens=1)
        refuse_wrong_seed(self)
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
        refuse_below(self, max_new_tokens=1, batch_size=1, n_examples=0)
        refuse_wrong_seed(self)
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
        refuse_below(self, max_new_tokens=1)
        if self.width is not None:
            from ..viewing.terminal import as_width  # which imports torch

            as_width(self.width)
        refuse_wrong_seed(self)
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
