"""The arguments of the trainer: those of TRL's `RewardConfig`, and those of the reward, such as `beta`."""

import math
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import RewardConfig

_CHOICES = {"loss_type": ("sigmoid", "hinge"), "truncation_mode": ("drop", "keep_start", "keep_end")}
_NUMBERS = {
    "beta": (lambda value: value > 0, "must be positive, as the scale of a reward. The paper uses 0.05"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "must be from 0 to below 0.5, as a share of wrong labels"),
    "target_margin": (lambda value: True, "must be a finite number. The default is 0"),
    "sft_coefficient": (lambda value: value >= 0, "must not be negative, as the weight of a loss. The default is 0"),
}
FULL_LEARNING_RATE = 1e-4  # if all weights are trained, as in TRL's `RewardConfig`
_FLAGS = ("length_normalized", "custom_generate")
_TEXTS = ("objective", "description", "dataset_name")
_LOSS = ("loss_type", "label_smoothing", "target_margin", "length_normalized", "sft_coefficient", "reference")


def _choice(name: str, what: str) -> Any:
    """Declares an argument that is one of some values, by default the first."""
    return field(default=_CHOICES[name][0], metadata={"help": what, "choices": _CHOICES[name]})


@dataclass
class AutoregressiveRewardConfig(RewardConfig):
    r"""
    Holds the arguments of the [`AutoregressiveRewardTrainer`].

    This class includes only the parameters that are specific to autoregressive reward models. For the others, see
    [`~trl.RewardConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        beta (`float`, *optional*, defaults to `0.05`):
            Scale of the reward in the loss, $\beta_r$ in Eq. 5 of the [paper](https://hf.co/papers/2410.08193), which
            uses 0.05 for HH-RLHF. A smaller value lets the reward model move further from its starting point, so that
            the same `alpha` steers more strongly at generation time.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` is Eq. 5; `"hinge"` is the loss of [SLiC-HF](https://hf.co/papers/2305.10425), which is 0 from a
            margin of 1 on.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Share of the labels that are expected to be wrong, below 0.5, from [conservative
            DPO](https://ericmitchell.ai/cdpo.pdf). For `"sigmoid"` only.
        target_margin (`float`, *optional*, defaults to `0.0`):
            Subtracted from every margin, $\gamma$ in Eq. 6 of [SimPO](https://hf.co/papers/2405.14734), in addition
            to a column `margin` of the data.
        length_normalized (`bool`, *optional*, defaults to `False`):
            Whether the reward is the mean log-probability of the tokens of a response instead of the sum, as in SimPO;
            `beta` is then larger, 2 to 2.5 there.
        sft_coefficient (`float`, *optional*, defaults to `0.0`):
            Weight of the mean negative log-likelihood of the tokens of chosen responses, which is added to the loss, as
            in [CPO](https://hf.co/papers/2401.08417).
        reference (`str`, *optional*):
            `"base"` makes the reward $\log\pi_r - \log\pi_\text{base}$, where the base is the model that training
            starts from. The loss is then that of [DPO](https://hf.co/papers/2305.18290), and the reward that is trained
            is the one that steers with `reference="base"`. For an adapter, the base is the model without it; if all
            weights are trained, a copy of the model is kept.
        truncation_mode (`str`, *optional*, defaults to `"drop"`):
            What happens to pairs that are longer than `max_length`: `"drop"` leaves them out, `"keep_start"` cuts the
            end of both texts, `"keep_end"` cuts the start of the prompt, and the end of a text that is still too long.
            Such pairs are always counted.
        objective (`str`, *optional*):
            What the pairs prefer, in a few words. This and the next two are written into the card and the
            `genarm_config.json` of the reward model.
        description (`str`, *optional*):
            What is rewarded and what is not, in a few sentences.
        dataset_name (`str`, *optional*):
            Hub id or name of the preference data.
        custom_generate (`bool`, *optional*, defaults to `False`):
            Whether to save a `custom_generate` folder next to the weights, for
            `model.generate(custom_generate="user/my-arm", trust_remote_code=True)`.

    > [!NOTE]
    > Three defaults differ from those of [`~trl.RewardConfig`]:
    > - `bf16` is `True` only on an accelerator that supports it, so that training on a CPU just works.
    > - `dataloader_pin_memory` is `True` only if there is an accelerator, since PyTorch warns of it otherwise.
    > - `learning_rate` is that of [`adapter_learning_rate`] for an adapter, which depends on the number of steps. If
    >   all weights are trained, it is `1e-4`, as in [`~trl.RewardConfig`].

    Raises:
        ValueError: if a value is of the wrong type or outside of its range, or if `center_rewards_coefficient` is set.
    """

    beta: float = field(
        default=0.05,
        metadata={"help": "Scale of the reward in the loss (beta_r in Eq. 5 of the GenARM paper)."},
    )

    loss_type: str = _choice("loss_type", "Loss of a margin: 'sigmoid' (Eq. 5) or 'hinge' (SLiC-HF).")
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of the labels that are expected to be wrong (conservative DPO)."}
    )
    target_margin: float = field(
        default=0.0, metadata={"help": "Subtracted from every margin (gamma in the SimPO paper)."}
    )
    length_normalized: bool = field(
        default=False, metadata={"help": "Whether rewards are means over the tokens of a response (SimPO), not sums."}
    )
    sft_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the negative log-likelihood of chosen responses in the loss (CPO)."}
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "'base' makes the reward a contrast with the model that training starts from: the loss of DPO.",
            "choices": ("base",),
        },
    )
    truncation_mode: str = _choice(
        "truncation_mode",
        "What happens to pairs that are longer than `max_length`: 'drop', 'keep_start' or 'keep_end'.",
    )
    objective: str | None = field(
        default=None, metadata={"help": "What the pairs prefer, in a few words, for the card of the reward model."}
    )
    description: str | None = field(
        default=None, metadata={"help": "What is rewarded and what is not, in a few sentences, for the card."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or name of the preference data, for the card."}
    )
    custom_generate: bool = field(
        default=False, metadata={"help": "Whether to save a `custom_generate` folder next to the weights."}
    )

    # The default of RewardConfig is True.
    bf16: bool | None = field(  # type: ignore[assignment]  # as `RewardConfig` has it
        default=None,
        metadata={
            "help": "Whether to use bf16 (mixed) precision instead of 32-bit. If not set, it defaults to `True` on an "
            "accelerator that supports it, unless `fp16` is set."
        },
    )

    # Set by the trainer, which knows the model and the number of pairs
    learning_rate: float | None = field(  # type: ignore[assignment]  # as for `bf16`
        default=None,
        metadata={
            "help": "The initial learning rate for AdamW. Defaults to 1e-4 if all weights are trained; for an adapter "
            "it depends on the number of steps: 1e-3 for 16, 7e-4 for 256, and 5e-4 for 4,096."
        },
    )

    @property
    def changed_loss(self) -> dict[str, Any]:
        """Returns the arguments of the loss, except `beta`, that differ from their defaults."""
        loss = {x.name: x.default for x in fields(AutoregressiveRewardConfig) if x.name in _LOSS}
        return {name: getattr(self, name) for name, default in loss.items() if getattr(self, name) != default}

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            self.bf16 = is_torch_bf16_gpu_available()
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        learning_rate = self.learning_rate
        if learning_rate is None:  # DeepSpeed takes a number for its own optimizer now
            self.learning_rate = FULL_LEARNING_RATE
        super().__post_init__()
        self.learning_rate = learning_rate
        for name, (is_allowed, rule) in _NUMBERS.items():
            number = _finite_number(getattr(self, name))
            if number is None or not is_allowed(number):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but {rule}.")
            setattr(self, name, number)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but must be one of {', '.join(choices)}.")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but must be True or False.")
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but must be a text, or None.")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"`label_smoothing` is {self.label_smoothing}, but it belongs to the loss `sigmoid`, and `loss_type` "
                f"is `{self.loss_type}`. Set one of them to its default."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}, but it is about labels of classes or "
                "tokens, and pairs have none. For the share of pairs with a wrong label, use `label_smoothing`."
            )
        if self.reference not in (None, "base"):
            raise ValueError(
                f"`reference` is {self.reference!r}, but must be 'base', the model that training starts from, or None."
            )
        if self.center_rewards_coefficient is not None:
            raise ValueError(
                f"`center_rewards_coefficient` is {self.center_rewards_coefficient}, but the reward of an "
                "autoregressive reward model is a sum of log-probabilities, which is never centred at 0. Leave it at "
                "`None`."
            )


def n_steps(args: AutoregressiveRewardConfig, n_pairs: int) -> int:
    """Returns the number of steps of a training on some pairs."""
    if args.max_steps > 0:
        return args.max_steps
    n_batches = math.ceil(n_pairs / (args.train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * math.ceil(n_batches / args.gradient_accumulation_steps))


def adapter_learning_rate(n: int) -> float:
    r"""
    Returns the default learning rate for an adapter, $0.001 \sqrt[8]{16 / n}$.

    A step of Adam moves each weight by about the learning rate, so that few steps need a higher one to get anywhere:
    1e-3 for 16 steps, 7e-4 for 256, and 5e-4, that of the [paper](https://hf.co/papers/2410.08193), for 4,096. Measured
    by `examples/benchmarks/training_defaults.py`.

    Args:
        n (`int`):
            Number of steps of the whole training.
    """
    return 1e-3 * (16 / max(n, 1)) ** 0.125


def _finite_number(value: Any) -> float | None:
    """Returns the value as a `float`, or None if it is not a finite number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer that no float holds
        return None
