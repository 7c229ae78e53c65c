"""Decoding with and without drafts: times, passes, and how many drafts are accepted. `speculation.py` compares them."""

import time
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from examples.benchmarks.measuring import spread
from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
from hf_genarm.decoding.draft_length import DraftLength

WAYS = ("unguided", "guided", "drafted", "assisted, unguided")
MODES: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True, "top_k": 0}}


class Clock(BaseStreamer):
    """Records when tokens come."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        pass

    def seconds_per_token(self) -> float:
        """Returns seconds per token, without the prompt and the tokens that came with it."""
        (start, _), *later = self.times[1:]
        return (later[-1][0] - start) / sum(n_tokens for _, n_tokens in later)

    def tokens_per_pass(self) -> float:
        """Returns the mean number of tokens that come with a pass of the base."""
        return sum(n_tokens for _, n_tokens in self.times[2:]) / len(self.times[2:])


class CountedDrafts:
    """Counts the drafts of all calls in a `with` block. Those after the first rejected one of a cycle don't count."""

    def __init__(self) -> None:
        self.cycles: list[tuple[int, int]] = []  # drafts, and how many of them were accepted

    def __enter__(self) -> "CountedDrafts":
        record = DraftLength.record

        def recorded(length: DraftLength, n_drafts: int, n_accepted: int) -> None:
            self.cycles.append((n_drafts, n_accepted))
            record(length, n_drafts, n_accepted)

        self._patch = mock.patch.object(DraftLength, "record", recorded)
        self._patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._patch.stop()

    @property
    def acceptance(self) -> float:
        """The share of drafts that were accepted."""
        n_accepted = sum(accepted for _, accepted in self.cycles)
        n_rejected = sum(accepted < drafts for drafts, accepted in self.cycles)
        return n_accepted / max(n_accepted + n_rejected, 1)

    @property
    def mean_number(self) -> float:
        """The mean number of drafts in a cycle."""
        return sum(drafts for drafts, _ in self.cycles) / max(len(self.cycles), 1)


class Passes:
    """Counts forward passes of a model."""

    def __init__(self, model: PreTrainedModel):
        self.n = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.n += 1


class Bench:
    """Runs all ways of decoding with one base and its reward model."""

    def __init__(self, base: PreTrainedModel, arm: AutoregressiveRewardModel, small: PreTrainedModel, args) -> None:
        self.base, self.small, self.args = base, small, args
        self.processor = GenARMLogitsProcessor(arm, args.alpha, base_model=base)
        self.passes = Passes(arm.model)
        self.assistants = {mode: self.processor.assistant(args.drafts) for mode in MODES}

    def run(self, way: str, mode: str, prompt: torch.Tensor, seed: int) -> dict[str, float]:
        clock, options = Clock(), dict(MODES[mode])
        if way in ("guided", "drafted"):
            options["logits_processor"] = [self.processor]
        if way == "drafted":
            options["assistant_model"] = self.assistants[mode]
        if way == "assisted, unguided":
            options["assistant_model"] = self.small
        torch.manual_seed(seed)
        self.passes.n, n_tokens = 0, self.args.new_tokens
        self.base.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=clock,
            min_new_tokens=n_tokens,
            max_new_tokens=n_tokens,
            pad_token_id=0,
            **options,
        )
        return {
            "seconds": clock.seconds_per_token(),
            "tokens_per_pass": clock.tokens_per_pass(),
            "reward_passes": self.passes.n / n_tokens,
        }

    def compare(self, mode: str, prompts: list[torch.Tensor], bar: tqdm) -> dict[str, Any]:
        """Measures all ways of decoding, one round per prompt."""
        rounds: list[dict[str, dict[str, float]]] = []
        for way in self.ways:  # to warm up
            self.run(way, mode, prompts[0], 0)
        with CountedDrafts() as counted:
            for seed, prompt in enumerate(prompts):
                turn = seed % len(self.ways)
                rounds.append({way: self.run(way, mode, prompt, seed) for way in self.ways[turn:] + self.ways[:turn]})
                bar.update()

        def ratio(way: str, to: str) -> list[float]:
            return spread([x[way]["seconds"] / x[to]["seconds"] for x in rounds])

        result: dict[str, Any] = {
            "mode": mode,
            "drafted_to_guided": ratio("drafted", "guided"),
            "drafted_to_unguided": ratio("drafted", "unguided"),
            "guided_to_unguided": ratio("guided", "unguided"),
            "acceptance": counted.acceptance,
            "drafts": counted.mean_number,
            "tokens_per_base_pass": spread([x["drafted"]["tokens_per_pass"] for x in rounds]),
            "reward_passes_per_token": spread([x["drafted"]["reward_passes"] for x in rounds]),
            "seconds_per_token": {way: spread([x[way]["seconds"] for x in rounds]) for way in self.ways},
        }
        if "assisted, unguided" in self.ways:
            result["assisted_to_unguided"] = ratio("assisted, unguided", "unguided")
            result["drafted_to_assisted"] = ratio("drafted", "assisted, unguided")
        return result

    @property
    def ways(self) -> tuple[str, ...]:
        return WAYS[:3] if self.args.simulate else WAYS
