"""A reward model drafts what the base verifies: speculative decoding of the guided distribution."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from ..arguments import as_whole_number
from ..hub.kv_cache import network_of
from .draft_length import DraftLength
from .drafts import Draft
from .fusion.joint_pass import Fusion
from .line import Line
from .machine import GuidanceMachine


class DraftingAssistant:
    r"""
    Lets a reward model draft for the base: pass it to `generate` as `assistant_model`, for one text at a time.

    The reward model reads every token anyway. Here it reads them first: it draws K tokens, and what it computes for
    them are the rewards that the processor verifies them with. So a cycle takes K + 1 of its passes and one of the
    base, and writes up to K + 1 tokens. The text has exactly the distribution that it has without drafts, or without
    sampling exactly the same tokens: `generate`'s own assisted decoding accepts or rejects them.

    Drafts are drawn from $\pi_r^{1 + \alpha}$, the guided distribution if base and reward model agree, or from $\pi_r$
    if there is a reference. The other processors of the call act on it. If there are stop strings, drafts are among the
    likeliest tokens that complete none.

    It is not a model, but has what `generate` needs of one that assists: `config`, `generation_config`, `device`,
    `generate`.

    Args:
        processor ([`GenARMLogitsProcessor`]):
            The one in `logits_processor`.
        machine ([`GuidanceMachine`]):
            The machine of the processor.
        num_assistant_tokens (`int`, *optional*):
            The number of drafts. By default it follows from how many of the call's drafts were accepted.

    Attributes:
        draft_length ([`DraftLength`]):
            How many drafts of the last call were accepted.

    Raises:
        ValueError: if no reward model is smaller than the base, the base is not known, or the number is not positive.
    """

    # If there are stop strings, this many of the likeliest tokens are checked for whether they complete one.
    N_LIKELIEST = 64

    def __init__(self, processor: LogitsProcessor, machine: GuidanceMachine, num_assistant_tokens: int | None = None):
        if num_assistant_tokens is not None:
            rule = "a number of tokens, 1 or more. Leave it out to have it chosen"
            num_assistant_tokens = as_whole_number("num_assistant_tokens", num_assistant_tokens, rule)
        if machine.base is None or machine.watch is None:
            raise ValueError(
                "The processor was made without `base_model`, so that drafts can't be distinguished from what the base "
                "has verified. Pass it: `GenARMLogitsProcessor(reward_model, base_model=model)`."
            )
        self._processor, self._machine = processor, machine
        self._base, self._watch = machine.base, machine.watch
        self._index, self._fusion = _smallest(machine, self._base), Fusion.on(self._watch)
        self._number, self.draft_length = num_assistant_tokens, DraftLength()
        self.config = self._base.config  # drafts are tokens of the base, also if those of the reward model differ
        self.generation_config = GenerationConfig(
            num_assistant_tokens=num_assistant_tokens or DraftLength.LARGEST,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        self._stops: dict[tuple[str, ...], StopStringCriteria] = {}
        self._call: GenerationConfig | None = None
        self._last: tuple[Line, int, int] | None = None  # text with drafts, length without, number of drafts
        self._origin: Line | None = None  # the prompt

    @property
    def device(self) -> torch.device:
        """The device of the base; inputs are moved to that of the reward model."""
        device: torch.device = self._base.device
        return device

    def _supports_logits_to_keep(self) -> bool:
        """Does nothing: `generate` calls it to check the arguments of an assistant that is a model."""
        return True

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        logits_processor: list[LogitsProcessor],
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput:
        """
        Writes drafts. `generate` of the base calls it.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)`):
                The text so far.
            generation_config ([`~transformers.GenerationConfig`]), logits_processor (list of \
            [`~transformers.LogitsProcessor`]):
                The configuration and the processors of the call.
            max_new_tokens (`int`):
                The largest number of drafts.
            attention_mask (`torch.LongTensor` of shape `(1, prompt_length)`, *optional*):
                The mask of the prompt, if it is padded.

        Returns:
            [`~transformers.generation.GenerateDecoderOnlyOutput`]: the text with one draft or more, and as scores of
            each draft the logarithm of what it was drawn from.
        """
        machine = self._machine
        if generation_config is not self._call:  # a copy that `generate` makes for each call
            self._call, self._last, self.draft_length = generation_config, None, DraftLength()
            machine.begin_with_drafts(input_ids)
            self._fusion.forget()
            self._origin = _line_of(input_ids, attention_mask, None)
        line = _line_of(input_ids, attention_mask, self._origin)
        self._count_accepted(line)
        ends, stops = _ends_of(generation_config), self._stops_of(generation_config)
        n_drafts = self.draft_length.n_drafts() if self._number is None else self._number
        n_drafts = min(max(n_drafts, 0 if ends else 1), max_new_tokens)

        draft = machine.draft = Draft(self._watch, self._index, self._exponent())
        is_over, waits_for_ends = False, bool(ends) and input_ids.device.type != "cpu"
        distributions: list[Tensor] = []
        try:
            while len(distributions) < n_drafts and not is_over:
                distribution = self._log_probs(line)
                for other in logits_processor:
                    distribution = other(line.input_ids, distribution)
                if stops is not None:
                    distribution = _without_stops(distribution, line.input_ids, stops)
                    if not distribution.isfinite().any():
                        break
                token = _choose(distribution, generation_config.do_sample)
                line.extend(*_longer(line, token))
                distributions.append(distribution)
                is_over = bool(ends) and not waits_for_ends and int(token) in ends
        except BaseException:
            machine.draft = None  # or the next call would be about drafts, too
            raise
        if waits_for_ends:  # all of them are read at once, and what follows an end is left out
            drafted = line.ids(line.length)[0, input_ids.shape[1] :].tolist()
            n_until_end = next((n for n, token in enumerate(drafted, start=1) if token in ends), None)
            if n_until_end is not None:
                is_over, distributions = True, distributions[:n_until_end]
                line = line.first(input_ids.shape[1] + n_until_end)
        self._last = line, input_ids.shape[1], len(distributions)
        if not distributions:
            distribution = self._draft_of_nothing(line, ends, stops)
            distributions, is_over = [distribution], bool(ends)
        draft.close(line, is_over, self._is_greedy(generation_config, logits_processor))
        self._fusion.hasten_next_pass()
        # The fields are annotated with `LongTensor`, which no tensor is for mypy, and with a tuple of one.
        return GenerateDecoderOnlyOutput(sequences=line.input_ids, scores=tuple(distributions))  # type: ignore[arg-type]

    def _is_greedy(self, generation_config: GenerationConfig, logits_processor: list[LogitsProcessor]) -> bool:
        """Returns whether a draft is rejected as soon as the processor prefers another token."""
        is_plain = not generation_config.do_sample and generation_config.assistant_ensemble_weight is None
        return is_plain and bool(logits_processor) and logits_processor[-1] is self._processor

    def _exponent(self) -> float:
        """Returns the power of the reward model that drafts are drawn from."""
        if self._machine.reference is not None:
            return 1.0
        return max(1.0 + sum(float(alpha) for alpha in self._machine.product.strengths), 0.1)

    def _log_probs(self, line: Line) -> Tensor:
        """Returns the next-token log-probabilities of the reward model, for the tokens of the base."""
        like = torch.empty(1, self.config.get_text_config().vocab_size, device=line.input_ids.device)
        log_probs = self._machine.log_probs_to_draft(self._index, line, like)
        return log_probs.masked_fill(log_probs.isnan(), -torch.inf)  # tokens that it doesn't know

    def _draft_of_nothing(self, line: Line, ends: list[int], stops: StopStringCriteria | None) -> Tensor:
        """
        Adds one draft of probability 1, since `generate` needs a draft, and returns its distribution. It is verified
        like any other.

        The draft is an end token, after which no reward is needed; if there is none, a token that completes no stop
        string.
        """
        vocab_size = self.config.get_text_config().vocab_size
        for token in ends or range(vocab_size):
            longer = _longer(line, torch.full_like(line.input_ids[:, :1], token))
            if ends or stops is None or not stops(longer[0], None).any():
                break
        line.extend(*longer)
        distribution = torch.full((1, vocab_size), -torch.inf, device=line.input_ids.device)
        distribution[0, token] = 0.0
        return distribution

    def _count_accepted(self, line: Line) -> None:
        """Counts which of the last drafts are in the text."""
        if self._last is None:
            return
        last, length, n_drafts = self._last
        columns = slice(length, length + n_drafts)
        drafted, taken = (x.ids(min(x.length, columns.stop))[0, columns] for x in (last, line))
        n_accepted = int((drafted[: len(taken)] == taken).cumprod(dim=0).sum())
        self.draft_length.record(n_drafts, n_accepted)

    def _stops_of(self, generation_config: GenerationConfig) -> StopStringCriteria | None:
        """Returns the rule by which the stop strings of a call end texts."""
        strings = generation_config.stop_strings
        if strings is None:
            return None
        tokenizer = self._machine.tokenizer
        if tokenizer is None:
            raise ValueError(
                f"`stop_strings` is {strings!r}, but the processor has no tokenizer, and drafts could go beyond them. "
                "Pass that of the base: `GenARMLogitsProcessor(reward_model, base_model=model, tokenizer=tokenizer)`."
            )
        key = (strings,) if isinstance(strings, str) else tuple(strings)
        return self._stops.setdefault(key, StopStringCriteria(tokenizer, list(key)))


def _line_of(input_ids: Tensor, prompt_mask: Tensor | None, origin: Line | None) -> Line:
    """Returns the line of a text `(1, length)`, given the mask of its prompt, if that is padded."""
    if prompt_mask is None:
        return Line(input_ids, None, origin)
    mask = torch.ones_like(input_ids)
    mask[:, : prompt_mask.shape[1]] = prompt_mask
    return Line(input_ids, mask, origin)


def _longer(line: Line, token: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns a text with one more token `(1, 1)`, and its mask."""
    mask = line.attention_mask
    mask = None if mask is None else torch.cat([mask, mask.new_ones(1, 1)], dim=1)
    return torch.cat([line.input_ids, token], dim=1), mask


def _smallest(machine: GuidanceMachine, base: Any) -> int:
    """Returns the index of the smallest reward model with weights of its own."""
    engines = [engine for engine, _ in machine.rewards.engines]
    sizes = {
        network_of(model.model).num_parameters(): index
        for index, (model, engine) in enumerate(zip(machine.rewards.models, engines, strict=True))
        if engine == "separate"
    }
    if not sizes and "strings" in engines:
        raise ValueError(
            "The tokens of the reward model are other strings than those of the base, which must read its drafts. Call "
            "`generate` without `assistant_model`, or use a small reward model with the tokenizer of the base."
        )
    if not sizes:
        raise ValueError(
            f"The reward model is run as `{', '.join(sorted(set(engines)))}`, on the weights of the base: no pass of "
            "it takes less time than one of the base, and drafts would gain nothing. Call `generate` without "
            "`assistant_model`, or use a reward model that is smaller than the base."
        )
    if min(sizes) >= base.num_parameters():
        raise ValueError(
            f"The smallest reward model has {min(sizes):,} parameters, and the base {base.num_parameters():,}: drafts "
            "would gain nothing. Call `generate` without `assistant_model`, or use a reward model that is smaller."
        )
    return sizes[min(sizes)]


def _without_stops(distribution: Tensor, text: Tensor, stops: StopStringCriteria) -> Tensor:
    """
    Keeps the likeliest tokens that complete no stop string, or none if the very likeliest token completes one.

    The token that ends a text must be the last one of a cycle, which is not a draft. Tokens are excluded before a draft
    is drawn, since dropping it afterwards would change the distribution of the text.
    """
    likeliest = distribution.topk(min(DraftingAssistant.N_LIKELIEST, distribution.shape[-1])).indices[0]
    ends = stops(torch.cat([text.expand(len(likeliest), -1), likeliest[:, None]], dim=1), None)
    kept = likeliest[~ends] if not ends[0] else likeliest[:0]
    return torch.full_like(distribution, -torch.inf).index_copy(1, kept, distribution[:, kept])


def _choose(distribution: Tensor, do_sample: bool) -> Tensor:
    return distribution.softmax(dim=-1).multinomial(1) if do_sample else distribution.argmax(dim=-1, keepdim=True)


def _ends_of(generation_config: GenerationConfig) -> list[int]:
    eos = generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
