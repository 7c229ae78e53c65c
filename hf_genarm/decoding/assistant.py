"""A reward model drafts what the base verifies: speculative decoding of the guided law."""

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from ..hub.kv_cache import network_of
from .drafts import Draft
from .fusion.joint_pass import Fusion
from .pace import Pace

if TYPE_CHECKING:
    from .processor import GenARMLogitsProcessor


class DraftingAssistant:
    r"""
    Lets a reward model draft for the base: pass it to `generate` as `assistant_model`, for one text at a time.

    The reward model reads every token anyway. Here it reads them first: it draws K tokens, and what it computes for
    them are the rewards that the processor verifies them with. So a cycle takes K + 1 of its passes and one of the
    base, and writes up to K + 1 tokens. The text has the very law that it has without drafts, or without sampling the
    very tokens: it is for `generate`'s own assisted decoding to take or reject them.

    Drafts are drawn from $\pi_r^{1 + \alpha}$, what the guided law would be if base and reward model agreed (with a
    reference from $\pi_r$), through the other processors of the call; if there are stop strings, among the likeliest
    tokens that complete none.

    It is no model, only what `generate` asks of one that assists: `config`, `generation_config`, `device`, `generate`.

    Args:
        processor ([`GenARMLogitsProcessor`]):
            Which is in `logits_processor`, too.
        num_assistant_tokens (`int`, *optional*):
            The number of drafts. As a default it follows from what is measured, and sampled text may then differ from
            run to run under one seed.

    Attributes:
        pace ([`Pace`]):
            What was measured.

    Raises:
        ValueError: if no reward model is smaller than the base, the base is not known, or the number is not positive.
    """

    # Where there are stop strings, it is asked of so many tokens whether they complete one.
    N_LIKELIEST = 64

    def __init__(self, processor: "GenARMLogitsProcessor", num_assistant_tokens: int | None = None):
        if num_assistant_tokens is not None and num_assistant_tokens < 1:
            raise ValueError(
                f"`num_assistant_tokens` is {num_assistant_tokens}, but at least one token must be drafted. Leave it "
                "out to have it measured, or call `generate` without `assistant_model`."
            )
        if processor._base is None or processor._watch is None:
            raise ValueError(
                "The processor was made without `base_model`, and can't tell drafts from what the base has verified. "
                "Pass it: `GenARMLogitsProcessor(reward_model, base_model=model)`."
            )
        self._processor, self._base, self._watch = processor, processor._base, processor._watch
        self._index, self._fusion = _smallest(processor, self._base), Fusion.of(self._watch)
        self._number, self.pace = num_assistant_tokens, Pace()
        self.config = self._base.config  # drafts are tokens of the base, also if those of the reward model differ
        self.generation_config = GenerationConfig(
            num_assistant_tokens=num_assistant_tokens or Pace.LARGEST,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        self._stops: dict[tuple[str, ...], StopStringCriteria] = {}
        self._call: GenerationConfig | None = None
        self._last: _Cycle | None = None

    @property
    def device(self) -> torch.device:
        """Of the base; the reward model fetches what it reads."""
        device: torch.device = self._base.device
        return device

    def _supports_logits_to_keep(self) -> bool:
        return True  # asked of assistants that are models, which must not be given what they don't take

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
        Writes drafts. Called by `generate` of the base.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)`):
                The text so far.
            generation_config ([`~transformers.GenerationConfig`]), logits_processor (list of \
            [`~transformers.LogitsProcessor`]):
                Of the call.
            max_new_tokens (`int`):
                How many there may be.
            attention_mask (`torch.LongTensor` of shape `(1, prompt_length)`, *optional*):
                Of the prompt, if it is padded.

        Returns:
            [`~transformers.generation.GenerateDecoderOnlyOutput`]: the text with one draft or more, and as scores of
            each draft the logarithm of what it was drawn from.
        """
        begins_at, processor = time.perf_counter(), self._processor
        is_new = generation_config is not self._call  # a copy that `generate` makes for each call
        if is_new:
            self._call = generation_config
            processor._reader.begin(input_ids)
            processor.reset()
            self._fusion.forget()
        self._note_last(input_ids, is_new, begins_at)
        ends, stops = _ends_of(generation_config), self._stops_of(generation_config)
        n_drafts = self.pace.n_drafts() if self._number is None else self._number
        n_drafts = min(max(n_drafts, 0 if ends else 1), max_new_tokens)

        draft = processor.draft = Draft(self._watch, self._index, self._exponent())
        text, is_over = input_ids, False
        laws: list[Tensor] = []
        try:
            while len(laws) < n_drafts and not is_over:
                law = self._log_probs(text, attention_mask)
                for other in logits_processor:
                    law = other(text, law)
                if stops is not None:
                    law = _that_go_on(law, text, stops)
                    if not law.isfinite().any():
                        break
                token = _choose(law, generation_config.do_sample)
                text, is_over = torch.cat([text, token], dim=1), int(token) in ends
                laws.append(law)
        except BaseException:
            processor.draft = None  # or the next call would be about drafts, too
            raise
        n_drafts = len(laws)
        if not laws:
            text, law = self._draft_of_nothing(input_ids, ends, stops)
            laws, is_over = [law], bool(ends)
        draft.close(text, is_over, self._decides(generation_config, logits_processor))
        self._fusion.hasten_next_pass()
        ends_at = time.perf_counter()
        self._last = _Cycle(text, input_ids.shape[1], n_drafts, is_new, ends_at - begins_at, ends_at)
        # They are said to be a `LongTensor`, which no tensor is for mypy, and a tuple of one.
        return GenerateDecoderOnlyOutput(sequences=text, scores=tuple(laws))  # type: ignore[arg-type]

    def _decides(self, generation_config: GenerationConfig, logits_processor: list[LogitsProcessor]) -> bool:
        """Whether a draft is rejected as soon as the processor prefers another token."""
        is_plain = not generation_config.do_sample and generation_config.assistant_ensemble_weight is None
        return is_plain and bool(logits_processor) and logits_processor[-1] is self._processor

    def _exponent(self) -> float:
        if self._processor._reference is not None:
            return 1.0
        return max(1.0 + sum(float(alpha) for alpha in self._processor.strengths), 0.1)

    def _log_probs(self, text: Tensor, prompt_mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(text)
        if prompt_mask is not None:
            mask[:, : prompt_mask.shape[1]] = prompt_mask
        like = torch.empty(1, self.config.get_text_config().vocab_size, device=text.device)
        log_probs = self._processor._rewards.of(self._index, text, mask, like)
        return log_probs.masked_fill(log_probs.isnan(), -torch.inf)  # tokens that it doesn't know

    def _draft_of_nothing(
        self, text: Tensor, ends: list[int], stops: StopStringCriteria | None
    ) -> tuple[Tensor, Tensor]:
        """
        The end of the text, as a certainty: exact like any other law, and no reward is needed for what follows. There
        must be a draft. Without a token that ends texts, it is any that completes no stop string.
        """
        vocab_size = self.config.get_text_config().vocab_size
        for token in ends or range(vocab_size):
            longer = torch.cat([text, text.new_tensor([[token]])], dim=1)
            if ends or stops is None or not stops(longer, None).any():
                break
        law = torch.full((1, vocab_size), -torch.inf, device=text.device)
        law[0, token] = 0.0
        return longer, law

    def _note_last(self, input_ids: Tensor, is_new: bool, now: float) -> None:
        """What has become of the last drafts."""
        last, self._last = self._last, None
        if last is None or is_new:
            return
        drafted = last.text[0, last.n_read : last.n_read + last.n_drafts]
        taken = input_ids[0, last.n_read : last.n_read + last.n_drafts]
        n_taken = int((drafted[: len(taken)] == taken).cumprod(dim=0).sum())
        self.pace.note_drafts(last.n_drafts, n_taken)
        if not last.is_first:  # when the prompt was read, too
            self.pace.note_seconds(last.n_drafts, last.seconds, now - last.ends_at)

    def _stops_of(self, generation_config: GenerationConfig) -> StopStringCriteria | None:
        strings = generation_config.stop_strings
        if strings is None:
            return None
        tokenizer = self._processor._tokenizer
        if tokenizer is None:
            raise ValueError(
                f"`stop_strings` is {strings!r}, but the processor has no tokenizer, and drafts could run over them. "
                "Pass that of the base: `GenARMLogitsProcessor(reward_model, base_model=model, tokenizer=tokenizer)`."
            )
        key = (strings,) if isinstance(strings, str) else tuple(strings)
        return self._stops.setdefault(key, StopStringCriteria(tokenizer, list(key)))


class _Cycle:
    """Drafts, and when they were given to the base."""

    def __init__(self, text: Tensor, n_read: int, n_drafts: int, is_first: bool, seconds: float, ends_at: float):
        self.text, self.n_read, self.n_drafts = text, n_read, n_drafts
        self.is_first, self.seconds, self.ends_at = is_first, seconds, ends_at


def _smallest(processor: "GenARMLogitsProcessor", base: Any) -> int:
    """Index of the smallest reward model with weights of its own."""
    sizes = {
        network_of(model.model).num_parameters(): index
        for index, (model, (engine, _)) in enumerate(
            zip(processor._rewards.models, processor._rewards.engines, strict=True)
        )
        if engine == "separate"
    }
    if not sizes:
        raise ValueError(
            f"The reward model is run as `{processor.engine}`, on the weights of the base: no pass of it takes less "
            "time than one of the base, and drafts would gain nothing. Call `generate` without `assistant_model`, or "
            "use a reward model that is smaller than the base."
        )
    if min(sizes) >= base.num_parameters():
        raise ValueError(
            f"The smallest reward model has {min(sizes):,} parameters, and the base {base.num_parameters():,}: drafts "
            "would gain nothing. Call `generate` without `assistant_model`, or use a reward model that is smaller."
        )
    return sizes[min(sizes)]


def _that_go_on(law: Tensor, text: Tensor, stops: StopStringCriteria) -> Tensor:
    """
    Leaves the likeliest tokens that complete no stop string: what ends a text must be the last token of a cycle, which
    is no draft. Nothing is left if the likeliest completes one. A draft that is dropped for what was drawn, and not
    for what could be, would give the text another law.
    """
    likeliest = law.topk(min(DraftingAssistant.N_LIKELIEST, law.shape[-1])).indices[0]
    ends = stops(torch.cat([text.expand(len(likeliest), -1), likeliest[:, None]], dim=1), None)
    kept = likeliest[~ends] if not ends[0] else likeliest[:0]
    return torch.full_like(law, -torch.inf).index_copy(1, kept, law[:, kept])


def _choose(law: Tensor, do_sample: bool) -> Tensor:
    return law.softmax(dim=-1).multinomial(1) if do_sample else law.argmax(dim=-1, keepdim=True)


def _ends_of(generation_config: GenerationConfig) -> list[int]:
    eos = generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
