"""
Prints an answer without guidance next to one with it, each token coloured by what the reward models have learned.

    hf-genarm show --arm model_cards/arm-smollm2-135m-sentiment --prompt "What did you think of the hotel?" --alpha 1.5

Both answers are drawn by the same random numbers, so that they differ only where guidance makes a difference. Their
tokens are on one scale, the same for every reward model: blue tokens are likelier under the reward model than under the
base, orange ones less likely. From 0.5 nats on (1.6 times as likely) letters are coloured, from 1.5 nats on (4.5 times)
what is behind them. The score of an answer is the sum over its tokens. `--alpha` takes one strength for all reward
models, or one for each. `--sentence "You are kind."` steers by a sentence, with or without reward models. There are no
colours in files and pipes, nor if `NO_COLOR` is set in the environment.
"""

import math
import os
import sys
from typing import Any

import torch

from ..decoding.recommended import recommended_temperature
from ..hub.compatibility import as_trained
from ..hub.loading import info_of
from ..hub.placement import device_of
from ..playground.answers import SameDraw, Settings
from .arguments import ShowArguments
from .guided_model import load_guided
from .shared_arguments import GuidanceArguments

_LEARNED = "{} minus base, nats"
_SCALE = 3.0  # nats; the colours of the terminal begin at a sixth and at a half of it


def main(guidance_args: GuidanceArguments, args: ShowArguments) -> None:
    if guidance_args.alpha is not None and not any(guidance_args.alpha):
        raise ValueError(f"`alpha` is {guidance_args.alpha}, at which nothing is guided. Give a strength other than 0.")
    base, processor = load_guided(guidance_args)
    model, tokenizer = base.model, base.tokenizer
    if "strings" in processor.engine:
        print(f"Engine: {processor.engine} (other tokens than those of the base)")
    infos = [info_of(name) for name in guidance_args.arm]
    recommended = recommended_temperature(infos)
    temperature = (recommended or 1.0) if args.temperature is None else args.temperature
    print(f"Temperature: {temperature:g}{', as recommended' if temperature == recommended else ''}")
    strengths: Any = processor.alpha  # one for each
    prompt = as_trained(args.prompt, tokenizer, infos)
    rows = processor.encode([prompt] * 2).to(device_of(model))
    processor.alpha = torch.tensor([[0.0] * len(strengths), strengths])  # a row for each request
    processor.keeps_statistics = True
    draws = [SameDraw(Settings(temperature=temperature, seed=args.seed), device_of(model))] if temperature else []
    output = model.generate(
        **rows, logits_processor=[processor, *draws], do_sample=False, max_new_tokens=args.max_new_tokens
    )
    has_colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    table: Any = processor.statistics(output)
    for index, (name, strength) in enumerate(zip(guidance_args.names, strengths, strict=True)):
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
        print(table.by(measure).beside(titles=titles).to_ansi(args.width, _SCALE, has_colors))
