"""
Answers prompts with guidance, in batches of similar lengths.

    hf-genarm generate --arm model_cards/arm-smollm2-135m-sentiment --prompts prompts.jsonl --output answers.jsonl

Each line of `--prompts` is an object with a `prompt`, text or messages; its other keys are carried over. `--output`
has the same lines in the same order, with a `completion`. `--sentence "You are kind."` steers by a sentence, with or
without reward models. A command that was killed continues where it stopped when it
is started again. `torchrun --nproc_per_node 2 -m hf_genarm generate …` splits the prompts over processes; answers are
the same.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import set_seed

from ..decoding.recommended import recommended_temperature
from ..hub.loading import info_of
from ..hub.placement import device_of
from .arguments import GenerateArguments
from .guided_model import load_guided
from .prompts import completion_of, read_rows, token_ids
from .shards import Shards, digest
from .shared_arguments import GuidanceArguments

_WHERE = ("output", "device", "device_map")  # what answers don't depend on


def main(guidance_args: GuidanceArguments, args: GenerateArguments) -> None:
    rows = read_rows(args.prompts, args.prompt_column)
    # The process that finishes first waits for the others.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(weeks=52))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise RuntimeError(
            f"{started} processes were started, but {state.num_processes} work together, so that prompts would be "
            "answered twice. Start them by `torchrun` or `accelerate launch`."
        )
    settings = {name: value for name, value in (asdict(guidance_args) | asdict(args)).items() if name not in _WHERE}
    shards = Shards(args.output, settings | {"prompts": digest(rows)}, state.process_index)
    state.wait_for_everyone()

    base, processor = load_guided(guidance_args, announce=state.is_main_process)
    model, tokenizer = base.model, base.tokenizer
    recommended = recommended_temperature([info_of(name) for name in guidance_args.arm])
    temperature = args.temperature or recommended or 1.0
    prompts = [row[args.prompt_column] for row in rows]
    ids = [token_ids(tokenizer, prompt) for prompt in prompts]
    done = shards.done()
    if state.is_main_process:
        print(f"Sampling: {sampling_in_words(args.do_sample, temperature, recommended)}")
        print(f"Prompts: {len(rows)}, answered before: {len(done)}, processes: {state.num_processes}", flush=True)
    own = list(batches_by_length(ids, args.batch_size))[state.process_index :: state.num_processes]
    options: dict[str, Any] = {"do_sample": args.do_sample, "max_new_tokens": args.max_new_tokens}
    if args.do_sample:
        options |= {"temperature": temperature, "top_p": args.top_p, "top_k": args.top_k}
    with tqdm(total=sum(map(len, own)), unit="answer", disable=not state.is_main_process) as progress:
        for numbers in own:
            if not done.issuperset(numbers):
                set_seed(args.seed + numbers[0])  # so that the answers of a batch don't depend on the process
                texts = answer(model, tokenizer, [prompts[number] for number in numbers], processor, options)
                answers = {n: completion_of(prompts[n], text) for n, text in zip(numbers, texts, strict=True)}
                shards.add({n: completion for n, completion in answers.items() if n not in done})
            progress.update(len(numbers))
    state.wait_for_everyone()
    if state.is_main_process:
        shards.merge(rows)
        print(f"The answers are in {args.output}.")
    state.destroy_process_group()


def sampling_in_words(do_sample: bool, temperature: float, recommended: float | None) -> str:
    """Returns how answers are sampled, and whether a recommended temperature is applied."""
    if do_sample:
        return f"temperature {temperature:g}{', as recommended' if temperature == recommended else ''}"
    unused = "" if recommended is None else f" The recommended temperature, {recommended:g}, is for `--do_sample`."
    return f"none, answers are greedy.{unused}"


def batches_by_length(ids: list[list[int]], size: int) -> Iterator[list[int]]:
    """Yields the numbers of prompts in batches of similar lengths, the longest first, so that memory runs out early."""
    order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def answer(model: Any, tokenizer: Any, prompts: list, processor: Any, options: dict[str, Any]) -> list[str]:
    """Answers prompts, texts or chats, with guidance; returns the answers as text without special tokens."""
    inputs = processor.encode(prompts).to(device_of(model))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    output = model.generate(**inputs, logits_processor=[processor], pad_token_id=pad, **options)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
