"""The arguments of the trainer: those of TRL's `RewardConfig`, and `beta`."""

from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available
from trl import RewardConfig


@dataclass
class AutoregressiveRewardConfig(RewardConfig):
    r"""
    Configuration class for the [`AutoregressiveRewardTrainer`].

    This class includes only the parameters that are specific to autoregressive reward models. For the others, see
    [`~trl.RewardConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        beta (`float`, *optional*, defaults to `0.05`):
            Scale of the reward in the loss, $\beta_r$ in Eq. 5 of the [paper](https://hf.co/papers/2410.08193), which
            uses 0.05 for HH-RLHF. A smaller value lets the reward model move further from its starting point, so that
            the same `alpha` steers more strongly at generation time.
        objective (`str`, *optional*):
            What the pairs prefer, in a few words, for the card and the `genarm_config.json` of the reward model.
        description (`str`, *optional*):
            What is rewarded and what is not, in a few sentences, for the same.
        dataset_name (`str`, *optional*):
            Hub id or name of the preference data, for the same.
        custom_generate (`bool`, *optional*, defaults to `False`):
            Whether to save a `custom_generate` folder beside the weights, for
            `model.generate(custom_generate="user/my-arm", trust_remote_code=True)`.

    > [!NOTE]
    > This parameter has another default than in [`~trl.RewardConfig`]:
    > - `bf16`: Defaults to `True` only on an accelerator that supports it, so that training on a CPU just works.

    Raises:
        ValueError: if `beta` is not positive, or if `center_rewards_coefficient` is set.
    """

    beta: float = field(
        default=0.05,
        metadata={"help": "Scale of the reward in the loss (beta_r in Eq. 5 of the GenARM paper)."},
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
        default=False, metadata={"help": "Whether to save a `custom_generate` folder beside the weights."}
    )

    # Another default than in RewardConfig
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to use bf16 (mixed) precision instead of 32-bit. If not set, it defaults to `True` on an "
            "accelerator that supports it, unless `fp16` is set."
        },
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            self.bf16 = is_torch_bf16_gpu_available()
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"`beta` is {self.beta}, but the scale of the reward must be positive. The paper: 0.05.")
        if self.center_rewards_coefficient is not None:
            raise ValueError(
                f"`center_rewards_coefficient` is {self.center_rewards_coefficient}, but the reward of an "
                "autoregressive reward model is a sum of log-probabilities, which is never centred at 0. Leave it at "
                "`None`."
            )
