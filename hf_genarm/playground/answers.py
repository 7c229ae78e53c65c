"""One question, answered twice at the same time: with guidance and without, by the same random numbers."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from ..decoding.assembly import assemble
from ..decoding.guided_tokens import GuidedTokens
from ..decoding.processor import GenARMLogitsProcessor
from ..hub.compatibility import chat_of, lacking_tokens
from ..hub.placement import device_of
from ..hub.reward_model import AutoregressiveRewardModel
from .models import Models


@dataclass
class Settings:
    """
    Holds the settings of a visitor. Those marked as live act from the next token on.

    Parameters:
        strengths (`dict[str, float]`):
            The strength of each adapter, by its name; live.
        sentences (list of `str`):
            Sentences to steer by; an empty one is none.
        sentence_strengths (list of `float`):
            The strength of each sentence; live.
        temperature (`float`):
            Temperature of both answers; live.
        target_kl (`float`):
            Target divergence in nats per token, 0 for none; live.
        reference (`str`):
            `"none"` or `"base"`.
        seed (`int`):
            Seed of both answers.
        max_new_tokens (`int`):
            Length of the longest answer.
    """

    strengths: dict[str, float] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    sentence_strengths: list[float] = field(default_factory=list)
    temperature: float = 1.0
    target_kl: float = 0.0
    reference: str = "none"
    seed: int = 0
    max_new_tokens: int = 64


@dataclass
class Frame:
    """
    Holds two answers as far as they are written, unguided first.

    Parameters:
        ids (list of list of `int`):
            The tokens of both.
        seconds (`float`):
            Time since the first token.
        table ([`GuidedTokens`], *optional*):
            Statistics of guidance so far; not every frame has them.
    """

    ids: list[list[int]]
    seconds: float
    table: GuidedTokens | None = None


class Answer:
    """
    Writes both answers to a question, in one batch of two rows whose strengths differ.

    Args:
        models ([`Models`]):
            The base and the reward models.
        prompt (`str`):
            The question.
        settings ([`Settings`]):
            The settings. Strengths, temperature and target KL may change while the answers are written.

    Attributes:
        sentences, adapters (list of `str`):
            What steers: first the sentences, then the adapters.
        titles (list of `str`):
            A title for each of them.
        strengths_at (list of `tuple[int, list[float]]`):
            Strengths, with the token from which on they were in force.
        prompt_length (`int`):
            Number of tokens of the question.

    Raises:
        ValueError: if the prompt is empty or too long, or there is nothing to steer by.
    """

    TABLE_EVERY = 1.0  # seconds

    def __init__(self, models: Models, prompt: str, settings: Settings):
        self.prompt, self.settings = prompt, settings
        self._models = models
        self._inputs = models.question(prompt)
        self.prompt_length = self._inputs["input_ids"].shape[1]
        self._slots = [slot for slot, sentence in enumerate(settings.sentences) if sentence.strip()]
        self.sentences = [settings.sentences[slot].strip() for slot in self._slots]
        self.adapters = list(settings.strengths)
        self._rewards = [*map(models.sentence, self.sentences), *map(models.reward_model, self.adapters)]
        if not self._rewards:
            raise ValueError("There is no sentence and no adapter (`--arm`), so that nothing steers. Add one.")
        self.titles = [str(x.info.title) for x in self._rewards[: len(self.sentences)]]
        self.titles += map(models.title, self.adapters)
        self.strengths_at: list[tuple[int, list[float]]] = []
        self.first_target_kl, self.first_temperature = settings.target_kl, settings.temperature
        self.changed_otherwise = False
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._final: Frame | None = None
        self._frames: queue.SimpleQueue[Frame | Exception | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._started, self._last_table = 0.0, 0.0

    def stop(self) -> None:
        """Stops both answers after at most one more token."""
        self._stopped.set()

    def frames(self) -> Iterator[Frame]:
        """Yields a frame for each token, and a complete one at the end; closing the iterator stops the answers."""
        self._thread.start()
        try:
            while (frame := self._frames.get()) is not None:
                if isinstance(frame, Exception):
                    raise frame
                yield frame
        finally:
            self.stop()
            self._thread.join()

    def result(self) -> Frame | None:
        """Waits for the end of both answers, which have begun, and returns them; `None` if there was an error."""
        self._thread.join()
        return self._final

    def scores(self, frame: Frame) -> list[list[float]]:
        r"""
        Returns the contrast $\log\pi_r - \log\pi_\text{base}$ of both answers by each reward, in nats; with the model
        that it was trained from, if its tokens are not those of the base.
        """
        model, tokenizer = self._models.model, self._models.tokenizer
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in frame.ids]
        chats = [chat_of(self.prompt)] * len(texts)
        base = AutoregressiveRewardModel(model, tokenizer).score(chats, texts)
        scores = []
        for reward in self._rewards:
            if reward.info.sentence is not None:
                scores.append(reward.score(chats, texts))
                continue
            # Of an adapter the plain log-probability, whatever it was trained on
            others = self._reads_other_tokens(reward)
            reader = reward.tokenizer if others else tokenizer
            before = AutoregressiveRewardModel(reward.reference, reader).score(chats, texts) if others else base
            scores.append(AutoregressiveRewardModel(reward.model, reader).score(chats, texts) - before)
        return [x.tolist() for x in scores]

    def _reads_other_tokens(self, arm: AutoregressiveRewardModel) -> bool:
        return bool(lacking_tokens(self._models.tokenizer, arm.tokenizer))

    def _strengths(self, step: int) -> Tensor:
        """Returns the strengths for the next token: the first row is unguided."""
        settings = self.settings
        # An adapter that the visitor has replaced meanwhile is off.
        now = [settings.sentence_strengths[slot] for slot in self._slots]
        now += [settings.strengths.get(name, 0.0) for name in self.adapters]
        if not self.strengths_at or self.strengths_at[-1][1] != now:
            self.strengths_at.append((step, now))
        first = (self.first_target_kl, self.first_temperature)
        self.changed_otherwise |= (settings.target_kl, settings.temperature) != first
        return torch.tensor([[0.0] * len(now), now])

    def _write(self) -> None:
        settings, models = self.settings, self._models
        self.first_target_kl, self.first_temperature = settings.target_kl, settings.temperature
        try:
            has_strings = any(map(self._reads_other_tokens, self._rewards))  # which are contrasts in any case
            # Only this call holds the processor, so that nothing of it stays on the base afterwards.
            parts = assemble(
                self._rewards,
                self.titles,
                models.model,
                models.tokenizer,
                self._strengths,
                None if settings.reference == "none" and not has_strings else "base",
            )
            processor = GenARMLogitsProcessor(**vars(parts), target_kl=self.first_target_kl or None)
            processor.keeps_statistics = True
            rows = processor.encode([chat_of(self.prompt)] * 2)
            model: Any = models.model  # `generate` is a tensor or a module for mypy
            output = model.generate(
                **rows,
                logits_processor=[processor, SameDraw(settings, device_of(models.model))],
                stopping_criteria=StoppingCriteriaList([_AfterEachToken(self, processor)]),
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
            )
            self._final = self._frame(output, processor.statistics(output))
            self._frames.put(self._final)
            self._frames.put(None)
        except Exception as error:
            self._frames.put(error)

    def _after_a_token(self, processor: GenARMLogitsProcessor, input_ids: Tensor) -> bool:
        now = time.monotonic()
        self._started = self._started or now
        table = None
        if now - self._last_table > self.TABLE_EVERY:
            self._last_table, table = now, processor.statistics(input_ids)
        self._frames.put(self._frame(input_ids, table))
        if (self.settings.target_kl or None) != processor.target_kl:
            processor.target_kl = self.settings.target_kl or None
        return self._stopped.is_set()

    def _frame(self, input_ids: Tensor, table: GuidedTokens | None) -> Frame:
        ends = self._models.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        ids = []
        for row in input_ids[:, self.prompt_length :].tolist():
            end = next((index for index, token in enumerate(row) if token in ends), len(row))
            ids.append(row[: end + 1])
        return Frame(ids, time.monotonic() - self._started, table)


@dataclass
class Visitor:
    """
    Holds the state of one open page.

    Parameters:
        settings ([`Settings`]):
            The settings of the page.
        own (`str`, *optional*):
            The adapter that the visitor has loaded.
        asked ([`Answer`], *optional*):
            The answer that waits for its turn.
        answer ([`Answer`], *optional*):
            The answer that is written, or was written last.
        shown ([`Frame`] and [`GuidedTokens`], *optional*):
            The last frame of it that has statistics.
    """

    settings: Settings
    own: str | None = None
    asked: Answer | None = None
    answer: Answer | None = None
    shown: tuple[Frame, GuidedTokens] | None = field(default=None, repr=False)

    def leave(self) -> None:
        """Stops the answer that is written, and drops the one that waits."""
        self.asked = None
        if self.answer is not None:
            self.answer.stop()

    def ask(self, answer: Answer) -> None:
        """Lets an answer wait for its turn, instead of those before."""
        self.leave()
        self.asked, self.answer = answer, None


class SameDraw(LogitsProcessor):
    """
    Draws the next token of all rows by the same random numbers, so that texts differ only where their distributions do.

    The numbers are those of `torch.manual_seed(seed)` and `generate(do_sample=True)` with a batch of one.

    Args:
        settings ([`Settings`]):
            The settings, whose temperature may change at any time.
        device (`torch.device`):
            The device of the scores.
    """

    def __init__(self, settings: Settings, device: torch.device):
        self._settings = settings
        self._generator = torch.Generator(device).manual_seed(settings.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = (scores / self._settings.temperature).softmax(dim=-1)
        # As `torch.multinomial` draws one of a row: the first to arrive, at rates of these probabilities
        arrivals = torch.empty_like(probabilities[:1]).exponential_(generator=self._generator)
        token = (probabilities / arrivals).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class _AfterEachToken(StoppingCriteria):
    def __init__(self, answer: Answer, processor: GenARMLogitsProcessor):
        self._answer, self._processor = answer, processor

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stops = self._answer._after_a_token(self._processor, input_ids)
        return torch.full((len(input_ids),), stops, device=input_ids.device, dtype=torch.bool)
