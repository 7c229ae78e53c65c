"""Sampling from the optimum over whole texts: particles that are weighted and resampled while they are written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import ModelOutput

from ..arguments import as_number, as_whole_number
from ..hub.kv_cache import n_read
from .processor import GenARMLogitsProcessor


@dataclass
class SMCOutput(ModelOutput):
    r"""
    Holds what [`smc_sample`] returns with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, length)`):
            A text for each prompt, drawn from its particles by their weights.
        particles (`torch.LongTensor` of shape `(batch_size, n_particles, length)`):
            All of them, padded on the right.
        log_weights (`torch.FloatTensor` of shape `(batch_size, n_particles)`):
            Logarithms of their weights, which sum to 1 for each prompt. The mean of any function of a text under the
            target is estimated by its weighted mean.
        log_z (`torch.FloatTensor` of shape `(batch_size,)`):
            An estimate of the logarithm of the sum that normalises the target. Its exponential has no bias.
    """

    sequences: Tensor | None = None
    particles: Tensor | None = None
    log_weights: Tensor | None = None
    log_z: Tensor | None = None


def smc_sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    n_particles: int = 16,
    ess_threshold: float = 0.5,
    streamer: Any = None,
    **model_kwargs: Any,
) -> SMCOutput | Tensor:
    r"""
    Samples from the optimum over whole texts by sequential Monte Carlo, as `custom_generate` of `generate`.

    Guided decoding normalises at each token, by $Z_t = \sum_v \pi_\text{base}(v) \pi_r(v)^\alpha$. The optimum of
    reward and divergence normalises once for each text, which then has $\prod_t Z_t$ times the share, up to a constant:

    $$\pi(y) \propto \prod_t \pi_\text{base}(y_t \mid y_{<t})\, \pi_r(y_t \mid y_{<t})^\alpha$$

    Each prompt has `n_particles` texts, which are written token by token as usual, and weighted by $Z_t$ before a token
    is drawn. When the weights have become too uneven, texts are resampled by them. With one particle this is guided
    sampling, token for token; with many it is the distribution above.

    What the target is, exactly:

    - $\pi_\text{base}$ is the base with whatever runs before guidance (penalties, banned tokens, a minimal length),
      and $\pi_r^\alpha$ stands for all rewards of the processor, each with its strength and minus its reference.
    - With `temperature`, all factors have the power $1/T$: the target is the distribution above, over whole texts,
      at that temperature. The base alone, at $\alpha = 0$, is then sharpened as a distribution over texts, too.
    - With `top_k`, `top_p` and the other filters, it is that distribution over the texts of which no token is filtered
      out. Note that `generate` has `top_k=50` by default.
    - A text that reaches the maximal length, or is stopped, has the weight of what was written.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs:
            From `generate`. There must be one [`GenARMLogitsProcessor`] in `logits_processor`. With
            `num_return_sequences`, each text that is returned has its own particles.
        n_particles (`int`, *optional*, defaults to 16):
            How many texts are written for each one that is returned.
        ess_threshold (`float`, *optional*, defaults to 0.5):
            Texts are resampled when the effective sample size $1 / \sum_i w_i^2$ of the weights falls below this share
            of `n_particles`; never at 0, which is importance sampling.
        streamer (*optional*):
            Is refused, since what has been written may be dropped. `generate` does not hand it on: it gets the prompt,
            and then nothing.

    Returns:
        [`SMCOutput`] with `return_dict_in_generate=True`, else `torch.LongTensor` of shape `(batch_size, length)`.

    Raises:
        TypeError: if `n_particles` or `ess_threshold` is not a number.
        ValueError: if the arguments leave no target that could be sampled from, or request output that is not kept.

    Example:

    ```python
    >>> from hf_genarm import smc_sample
    >>> options = {"do_sample": True, "top_k": 0, "max_new_tokens": 20}
    >>> model.generate(**inputs, logits_processor=[processor], custom_generate=smc_sample, n_particles=8, **options)
    ```
    """
    n_particles = as_whole_number("n_particles", n_particles, "a number of texts, 1 or more")
    ess_threshold = as_number("ess_threshold", ess_threshold, "a share of the particles, from 0 to 1")
    _refuse(generation_config, logits_processor, ess_threshold, streamer)
    _refuse_inputs(model, model_kwargs)
    batch_size, device = len(input_ids), input_ids.device
    logits_processor = LogitsProcessorList(_for_particles(x, n_particles) for x in logits_processor)
    input_ids, model_kwargs = model._expand_inputs_for_generation(
        expand_size=n_particles, input_ids=input_ids, **model_kwargs
    )
    log_weights = torch.zeros(batch_size, n_particles, device=device)  # their mean estimates what normalises the target
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=device)
    # As in `generate`: without a token that ends texts, there may be none that pads them.
    pad = generation_config._pad_token_tensor if any(hasattr(x, "eos_token_id") for x in stopping_criteria) else None
    temperature = generation_config.temperature or 1.0

    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=device)
        scores, log_sums = _next_token(logits_processor, input_ids, logits, temperature)
        log_weights = log_weights + log_sums.where(unfinished, 0.0).view_as(log_weights)
        rows, log_weights = _resample(log_weights, ess_threshold)
        if rows is not None:
            input_ids, scores, unfinished = input_ids[rows], scores[rows], unfinished[rows]
            _reorder_cache(model, model_kwargs, rows)

        tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        if pad is not None:
            tokens = tokens.where(unfinished, pad.to(device))
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if not unfinished.any():
            break
        n_new = 1 if model_kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=n_new, **model_kwargs)
        outputs = model(**inputs, return_dict=True)

    particles = input_ids.view(batch_size, n_particles, -1)
    # With one particle no random number is drawn here, so that what is generated next doesn't change.
    chosen = systematic_resampling(log_weights, 1) if n_particles > 1 else torch.zeros_like(particles[:, :, 0])
    sequences = particles[torch.arange(batch_size, device=device), chosen[:, 0]]
    if not generation_config.return_dict_in_generate:
        return sequences
    return SMCOutput(sequences, particles, log_weights.log_softmax(dim=-1), _log_mean(log_weights)[:, 0])


def systematic_resampling(log_weights: Tensor, n: int) -> Tensor:
    """
    Draws by weights, with one random number for all: each is drawn `n` times its weight, rounded up or down.

    Args:
        log_weights (`torch.Tensor` of shape `(batch_size, n_particles)`):
            Logarithms of weights, up to a constant for each row.
        n (`int`):
            How many are drawn.

    Returns:
        `torch.LongTensor` of shape `(batch_size, n)`: their indices, in order.
    """
    shares = log_weights.softmax(dim=-1).cumsum(dim=-1)
    start = torch.rand(len(shares), 1, device=shares.device)
    points = (torch.arange(n, device=shares.device) + start) / n * shares[:, -1:]
    return torch.searchsorted(shares, points, right=True).clamp(max=shares.shape[1] - 1)


def _log_mean(log_weights: Tensor) -> Tensor:
    """Returns the logarithm of the mean weight, `(batch_size, 1)`."""
    return log_weights.logsumexp(dim=-1, keepdim=True) - math.log(log_weights.shape[1])


def _resample(log_weights: Tensor, ess_threshold: float) -> tuple[Tensor | None, Tensor]:
    """Returns which row each row continues, `None` if all continue themselves, and their weights afterwards."""
    batch_size, n_particles = log_weights.shape
    effective_size = (2 * log_weights.logsumexp(dim=-1) - (2 * log_weights).logsumexp(dim=-1)).exp()
    is_uneven = (effective_size < ess_threshold * n_particles * (1 - 1e-4))[:, None]  # not by rounding alone
    if not is_uneven.any():
        return None, log_weights
    own = torch.arange(n_particles, device=log_weights.device).expand(batch_size, -1)
    parents = systematic_resampling(log_weights, n_particles).where(is_uneven, own)
    first_rows = torch.arange(batch_size, device=log_weights.device)[:, None] * n_particles
    return (first_rows + parents).flatten(), _log_mean(log_weights).where(is_uneven, log_weights)


def _next_token(
    processors: Sequence[LogitsProcessor], input_ids: Tensor, scores: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns the scores `(n_rows, vocab_size)` to draw by, and the log `(n_rows,)` of the sum of their factors."""
    for processor in processors:
        scores = processor(input_ids, scores)
        if isinstance(processor, GenARMLogitsProcessor):
            factors = (scores.log_softmax(dim=-1) + processor.log_z[:, None]) / temperature
    left = factors.where(scores > -torch.inf, -torch.inf)
    if ((left.softmax(dim=-1) - scores.softmax(dim=-1)).abs().sum(dim=-1) > 1e-3).any():
        names = ", ".join(f"`{type(x).__name__}`" for x in processors)
        raise ValueError(
            f"After guidance, more is done to probabilities than a temperature and filters do, in {names}, so that no "
            "distribution over whole texts is defined. Put the other processors before the `GenARMLogitsProcessor`, "
            "and set the temperature by `temperature`."
        )
    return scores, left.logsumexp(dim=-1)


def _for_particles(processor: LogitsProcessor, n_particles: int) -> LogitsProcessor:
    """Returns a processor for all particles of its prompts: the penalty knows how much of each row is padding."""
    if not isinstance(processor, RepetitionPenaltyLogitsProcessor):
        return processor
    padding = processor.prompt_ignore_length
    expanded = padding.repeat_interleave(n_particles) if isinstance(padding, Tensor) else padding
    return RepetitionPenaltyLogitsProcessor(processor.penalty, expanded)


def _cache(model_kwargs: dict[str, Any]) -> Cache | None:
    return next((model_kwargs[name] for name in ALL_CACHE_NAMES if model_kwargs.get(name) is not None), None)


def _reorder_cache(model: Any, model_kwargs: dict[str, Any], rows: Tensor) -> None:
    if not model_kwargs["use_cache"]:
        return
    cache = _cache(model_kwargs)
    if not isinstance(cache, Cache) or (model._is_stateful and not _has_states(cache)):
        raise ValueError(
            f"`{type(model).__name__}` keeps what it has read in its modules, where rows can't be exchanged. Use "
            "`use_cache=False`, or `ess_threshold=0`, with which no text is resampled."
        )
    cache.reorder_cache(rows)  # type: ignore[arg-type]  # for mypy, no tensor is a `torch.LongTensor`


def _has_states(cache: Cache) -> bool:
    layers = [x for x in cache.layers if isinstance(x, LinearAttentionCacheLayerMixin)]
    states = [(*x.is_conv_states_initialized.values(), *x.is_recurrent_states_initialized.values()) for x in layers]
    return any(map(any, states))


def _refuse_inputs(model: Any, model_kwargs: dict[str, Any]) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"The base is a `{type(model).__name__}`, whose encoder reads the prompt, but guidance reads what the "
            "decoder does. Use a decoder-only base."
        )
    if n_read(_cache(model_kwargs)):
        raise ValueError(
            "`generate` was given the cache of an earlier text, which has one row for each prompt. Leave it out: "
            "the particles read the whole text."
        )


def _refuse(
    config: GenerationConfig,
    processors: Sequence[LogitsProcessor],
    ess_threshold: float,
    streamer: Any,
) -> None:
    guides = [x for x in processors if isinstance(x, GenARMLogitsProcessor)]
    if len(guides) != 1:
        raise ValueError(
            f"`logits_processor` has {len(guides)} `GenARMLogitsProcessor`, but particles are weighted by one. "
            "Pass one, with all reward models, and not inside of another processor."
        )
    if guides[0].target_kl is not None:
        raise ValueError(
            f"`target_kl` is {guides[0].target_kl}, which holds the divergence of sampling token by token; weights "
            "over whole texts change it. Set the strength by `alpha`, and `processor.target_kl = None`."
        )
    if not 0 <= ess_threshold <= 1:
        raise ValueError(f"`ess_threshold` is {ess_threshold}, but must be a share of the particles, from 0 to 1.")
    if streamer is not None:
        raise ValueError("`streamer` can't be served: what particles have written may be dropped later. Leave it out.")
    if not config.do_sample or (config.num_beams or 1) > 1:
        raise ValueError(
            f"`do_sample` is {config.do_sample} and `num_beams` is {config.num_beams}, but particles are sampled. Use "
            "`do_sample=True` without beams."
        )
    outputs = ("scores", "logits", "attentions", "hidden_states")
    requested = [f"`output_{name}`" for name in outputs if getattr(config, f"output_{name}")]
    if config.return_dict_in_generate and requested:
        raise ValueError(
            f"{', '.join(requested)} can't be served: particles are exchanged while they are written, and what they "
            "were drawn from is not kept. With `processor.keeps_statistics`, `processor.statistics` returns what "
            "guidance did to each of their tokens."
        )
