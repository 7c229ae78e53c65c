"""
Prints an answer without guidance next to one with it, each token coloured by what the reward models have learned.

    hf-genarm show --arm model_cards/arm-smollm2-135m-sentiment --prompt "What did you think of the hotel?" --alpha 1.5

Both answers are on one scale: blue tokens are likelier under the reward model than under the base, orange ones less
likely. The score of an answer is the sum over its tokens. `--alpha` takes one strength for all reward models, or one
for each.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import set_seed

from ..arguments import refuse_no_seed
from ..hub.compatibility import as_trained
from ..hub.loading import info_of
from ..hub.placement import device_of
from ..viewing.terminal import as_width
from .guided_model import GuidanceArguments, load_guided
from .prompts import left_padded, token_ids

_LEARNED = "{} minus base, nats"


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
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both answers; 0 takes the likeliest token."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random numbers."})
    width: int | None = field(default=None, metadata={"help": "Width in columns. Defaults to that of the terminal."})

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {self.max_new_tokens}, but must be at least 1.")
        if self.width is not None:
            as_width(self.width)
        refuse_no_seed(self.seed)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` is {self.temperature}, but must be 0 or a positive number.")
        if not self.prompt.strip():
            raise ValueError("`prompt` is empty. Write a question.")


ARGUMENTS = (GuidanceArguments, ShowArguments)


def main(guidance_args: GuidanceArguments, args: ShowArguments) -> None:
    if guidance_args.alpha is not None and not any(guidance_args.alpha):
        raise ValueError(f"`alpha` is {guidance_args.alpha}, at which nothing is guided. Give a strength other than 0.")
    base, processor = load_guided(guidance_args)
    model, tokenizer = base.model, base.tokenizer
    strengths: Any = processor.alpha  # one for each
    ids = token_ids(tokenizer, as_trained(args.prompt, tokenizer, [info_of(name) for name in guidance_args.arm]))
    rows = left_padded(tokenizer, [ids] * 2, device_of(model))
    processor.alpha = torch.tensor([[0.0] * len(strengths), strengths])  # a row for each request
    processor.keeps_statistics = True
    set_seed(args.seed)
    sampling = {"temperature": args.temperature, "top_k": 0} if args.temperature else {}
    output = model.generate(
        **rows,
        **sampling,
        logits_processor=[processor],
        do_sample=args.temperature > 0,
        max_new_tokens=args.max_new_tokens,
    )
    table: Any = processor.statistics(output)
    for index, (name, strength) in enumerate(zip(guidance_args.arm, strengths, strict=True)):
        if strength == 0:
            continue  # it was not run
        learned = table[f"reward_log_prob_{index}"]
        if processor.reference is None:
            learned = [reward - base for reward, base in zip(learned, table["base_log_prob"], strict=True)]
        measure = _LEARNED.format(name)
        table[measure] = learned
        scores = [0.0, 0.0]
        for (sequence, _), token in table.tokens(measure).items():
            scores[sequence] += 0.0 if math.isnan(token.value) else token.value  # a token that it doesn't know
        titles = [f"unguided: {scores[0]:+.1f}", f"guided, alpha {strength:g}: {scores[1]:+.1f}"]
        print(table.by(measure).beside(titles=titles).to_ansi(args.width))
