"""Sampling of answers at many settings, with the divergence of each from the base; known answers are not resampled."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, TemperatureLogitsWarper, set_seed

from ..decoding.meter import Meter, answer_lengths
from ..decoding.processor import GenARMLogitsProcessor
from ..files import write_whole
from ..hub.base_weights import weights_fingerprint
from ..hub.info import chat_template_fingerprint, package_versions
from ..hub.placement import device_of
from ..hub.scoring import end_token_ids
from ..hub.sharing import adapter_tensors
from .prompts import left_padded, token_ids


@dataclass(frozen=True)
class Setting:
    """Holds one point of a sweep; `alpha` is 0 for the base alone."""

    alpha: float
    reference: str | None
    temperature: float


@dataclass
class Answers:
    """
    Holds one answer to each prompt.

    Parameters:
        texts (list of `str`):
            The answers.
        n_tokens (list of `int`):
            Their lengths, ends included.
        kl (list of `float`):
            The divergence of the sampled distributions from those of the base, summed over the tokens, in nats.
        base_log_prob (list of `float`):
            The log-probability of each under the base.
    """

    texts: list[str]
    n_tokens: list[int]
    kl: list[float]
    base_log_prob: list[float]


class Sweep:
    """
    Samples answers to the same prompts with the same seed, in large batches.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The base.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (list of `str` or of messages):
            The prompts.
        folder (`str`):
            Where answers are kept, under a hash of everything that they depend on.
        max_new_tokens, batch_size, seed (`int`):
            The longest answer, the number of answers in a batch, and the seed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list,
        folder: str | Path,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
    ):
        self._model, self._tokenizer, self._prompts, self._folder = model, tokenizer, prompts, Path(folder)
        self._max_new_tokens, self._batch_size, self._seed = max_new_tokens, batch_size, seed
        self._key = {
            "base": base_id(model),
            "dtype": str(model.dtype),
            "template": chat_template_fingerprint(tokenizer),
            "versions": package_versions(),
            "prompts": prompts,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "seed": seed,
        }

    @property
    def n_batches(self) -> int:
        return -(-len(self._prompts) // self._batch_size)

    def __call__(
        self,
        setting: Setting,
        processor: GenARMLogitsProcessor | None,
        arm_id: str | None,
        progress: Callable[[int], Any],
    ) -> Answers:
        """
        Samples one answer to each prompt, or reads those that are kept.

        Args:
            setting ([`Setting`]):
                The setting to sample at.
            processor ([`GenARMLogitsProcessor`], *optional*):
                The processor with the reward model and the reference of the setting; none for the base alone.
            arm_id (`str`, *optional*):
                The [`fingerprint`] of the reward model.
            progress (callable):
                A function that is called with the number of batches that were done.
        """
        key = self._key | {"setting": asdict(setting), "arm": arm_id}
        path = self._folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
        if path.exists():
            progress(self.n_batches)
            return Answers(**json.loads(path.read_text(encoding="utf-8")))
        answers = Answers([], [], [], [])
        if processor is not None:
            processor.alpha = setting.alpha
        for first in range(0, len(self._prompts), self._batch_size):
            set_seed(self._seed + first)
            self._answer(self._prompts[first : first + self._batch_size], setting, processor, answers)
            progress(1)
        write_whole(path, json.dumps(asdict(answers)))
        return answers

    def _answer(
        self, prompts: list, setting: Setting, processor: GenARMLogitsProcessor | None, answers: Answers
    ) -> None:
        processors: list[LogitsProcessor] = [] if processor is None else [processor]
        # As a processor, unlike as an argument of `generate`, it is part of what the meter measures.
        if setting.temperature != 1:
            processors.append(TemperatureLogitsWarper(setting.temperature))
        inputs = None if processor is None else processor.encode(prompts)  # which also gives it to sentences
        batch = sample_answers(self._model, self._tokenizer, prompts, processors, self._max_new_tokens, inputs)
        answers.texts += batch.texts
        answers.n_tokens += batch.n_tokens
        answers.kl += batch.kl
        answers.base_log_prob += batch.base_log_prob


def sample_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    processors: Sequence[LogitsProcessor],
    max_new_tokens: int,
    inputs: Any = None,
) -> Answers:
    """Samples one answer to each prompt, which `inputs` may have as tokens, from what processors make of the base."""
    if inputs is None:
        inputs = left_padded(tokenizer, [token_ids(tokenizer, prompt) for prompt in prompts], device_of(model))
    inputs = {name: x.to(device_of(model)) for name, x in inputs.items()}
    meter = Meter()
    output = model.generate(
        **inputs,
        logits_processor=meter.around(processors),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )[:, inputs["input_ids"].shape[1] :]
    lengths = answer_lengths(output, end_token_ids(model.generation_config, tokenizer))
    kl, base_log_prob = meter.read(output, lengths)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return Answers(texts, lengths.tolist(), kl.tolist(), base_log_prob.tolist())


def base_id(model: PreTrainedModel) -> str:
    """Returns the fingerprint of the weights of a base, or else its name."""
    return weights_fingerprint(model) or str(model.name_or_path)


def fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """Returns a hash of the weights; for an adapter, of its weights only."""
    state: Any = adapter_tensors(model) if isinstance(model, PeftModel) else dict(model.named_parameters())
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(name.encode())
        digest.update(x.detach().float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
