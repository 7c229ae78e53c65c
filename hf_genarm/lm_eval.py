"""Guided models for the [Language Model Evaluation Harness](https://github.com/EleutherAI/lm-evaluation-harness)."""

from typing import Any, Literal

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from .decoding.assembly import assemble, load_reward_models, names_of
from .decoding.processor import GenARMLogitsProcessor
from .decoding.strings.byte_map import ByteMap
from .decoding.vocab import VocabMap
from .demo import DEMO_MODEL_ID, demo_model
from .functional import guided_product
from .hub.base_model import named_base, where_and_how
from .hub.reward_model import AutoregressiveRewardModel
from .hub.sentence import in_text


@register_model("hf-genarm")
class GuidedHFLM(HFLM):
    r"""
    Guides the harness's own `hf` model: `generate_until` writes with guidance, and `loglikelihood` and
    `loglikelihood_rolling` score under the distribution that is written from,

    $$\log\pi(y_t) = \log\pi_\text{base}(y_t) + \sum_k \alpha_k \log\pi_{r,k}(y_t) - \log Z_t$$

    It is a subclass that changes what a forward pass returns, and what `generate` is called with.

    Args:
        pretrained (`str`, *optional*):
            Hub id or folder of the base. Defaults to the one that the reward models name.
        arm (`str` or list of `str`, *optional*):
            Hub ids or folders of reward models.
        sentence (`str` or list of `str`, *optional*):
            Sentences to steer by, after the reward models. Each is read, with a blank line, before the text of a
            request.
        alpha (`float` or list of `float`, *optional*):
            Strength of all of them, or one for each. At 0, all numbers are those of `hf`. Defaults to what they
            recommend, or else 1.
        reference (`"auto"`, `"base"` or `None`, *optional*, defaults to `"auto"`):
            `"base"` steers by what reward models have learned, their log-probability minus that of the base; `"auto"`
            as they recommend, or else were trained.
        **kwargs:
            All other arguments of `hf`, such as `device`, `dtype` and `parallelize` for the base.

    Raises:
        ValueError: if the base is not decoder-only, `alpha` or the vocabularies don't fit, or there is nothing to steer
            by; in a call, if a chat template is applied next to a sentence.
    """

    _longest_prefix = 0  # of a sentence, in tokens; read before it is known

    def __init__(
        self,
        pretrained: str | None = None,
        arm: str | list[str] | None = None,
        alpha: float | list[float] | None = None,
        reference: Literal["auto", "base"] | None = "auto",
        sentence: str | list[str] | None = None,
        **kwargs: Any,
    ):
        if reference not in (None, "auto", "base"):
            raise ValueError(f"`reference` is {reference!r}, but must be 'auto', 'base' or None.")
        if not arm and not sentence:
            raise ValueError(
                "`arm` is missing: the Hub id or folder of a reward model, or a list of them; or `sentence`."
            )
        names = names_of(arm) if arm else []
        sentences = [sentence] if isinstance(sentence, str) else list(sentence or [])
        if pretrained is None and not names:
            pretrained = DEMO_MODEL_ID
        elif pretrained is None:
            pretrained, revision = named_base(names)
            kwargs.setdefault("revision", revision or "main")
        super().__init__(demo_model() if pretrained == DEMO_MODEL_ID else pretrained, **kwargs)
        print(f"Base: `{pretrained}` {where_and_how(self.model)}", flush=True)
        trust = bool(kwargs.get("trust_remote_code"))
        arms, _ = load_reward_models(names, self.model, self.tokenizer, trust_remote_code=trust)
        arms += [AutoregressiveRewardModel.from_sentence(x, self.model, self.tokenizer) for x in sentences]
        names += sentences
        parts = assemble(arms, names, self.model, self.tokenizer, alpha, reference)
        if parts.reference not in (None, "base"):
            raise ValueError(
                f"The rewards of `{names[0]}` are contrasts with the model that it was trained from, which is not the "
                "base, and is not scored here. Choose the reference: `reference=base` or `reference=None`."
            )
        self._processor = GenARMLogitsProcessor(**vars(parts))
        self._arms = [loaded.model for loaded in arms]
        self._prefixes = [self._prefix(loaded.info.sentence) for loaded in arms]
        self._longest_prefix = max(map(len, self._prefixes))
        self._vocab_maps: list[VocabMap | None] = []
        for name, vocab_map in zip(names, self._processor._vocab_maps, strict=True):
            if isinstance(vocab_map, ByteMap):
                raise ValueError(
                    f"The tokens of `{name}` are other strings than those of the base, and whole texts are scored "
                    "here, where rewards are only given token by token. Use a reward model with the tokenizer of the "
                    "base; answers are written with this one by `hf-genarm generate`."
                )
            self._vocab_maps.append(vocab_map)
        self._is_contrasted = parts.reference is not None

    def _prefix(self, sentence: str | None) -> Tensor:
        """Returns the tokens of a sentence and a blank line; none for a reward model that reads texts as they are."""
        text = "" if sentence is None else in_text("", sentence)
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    @property
    def max_length(self) -> int:
        """The longest text, in tokens, that the base can read after each of the sentences."""
        return super().max_length - self._longest_prefix

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """Applies the chat template, unless there is a sentence, whose place would be inside of it."""
        if self._longest_prefix:
            raise ValueError(
                "A sentence is read before the plain text of a request here, but the chat template is applied, in "
                "which its place is the system message. Leave out `--apply_chat_template`, or the sentence."
            )
        return super().apply_chat_template(*args, **kwargs)

    def _with_prefix(self, index: int, input_ids: Tensor, first: list[int]) -> Tensor:
        """
        Puts the sentence of a reward model into texts, where they begin, after a token that begins all texts.

        Args:
            index (`int`):
                Which reward model.
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
                The texts.
            first (list of `int`):
                The column at which each begins.
        """
        prefix, rows = self._prefixes[index].to(input_ids.device), []
        for row, start in zip(input_ids, first, strict=True):
            start += int(row[start] == self.prefix_token_id)
            rows.append(torch.cat([row[:start], prefix, row[start:]]))
        return torch.stack(rows)

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Returns guided log-probabilities of all positions, `(batch_size, length, vocab_size)`, instead of logits."""
        scores = super()._model_call(inps, attn_mask, labels)
        strengths: Any = self._processor.alpha  # a number for each, as no other kind is taken here
        active = [index for index, alpha in enumerate(strengths) if alpha != 0]
        if not active:
            return scores
        logits = {index: self._reward_logits(index, inps) for index in active}
        alphas = [strengths[index] for index in active]
        incomplete = [place for place, index in enumerate(active) if self._vocab_maps[index] is not None]
        # Row by row, since float32 copies of all logits are large
        rows = []
        for row, base in enumerate(scores):
            rewards = [self._log_probs(index, logits[index][row], base.shape[-1]) for index in active]
            reference = base.float().log_softmax(dim=-1) if self._is_contrasted else None
            product = guided_product(base, rewards, alphas, reference, incomplete)
            product.refuse_empty_rows()
            rows.append(product.log_probs)
        return torch.stack(rows)

    def _reward_logits(self, index: int, input_ids: Tensor) -> Tensor:
        vocab_map = self._vocab_maps[index]
        if vocab_map is not None:
            input_ids = vocab_map.reward_ids(input_ids, torch.ones_like(input_ids))
        input_ids = self._with_prefix(index, input_ids, [0] * len(input_ids))
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            return self._arms[index](input_ids).logits[:, len(self._prefixes[index]) :]

    def _log_probs(self, index: int, logits: Tensor, vocab_size: int) -> Tensor:
        """Returns the log-probabilities of one text for the tokens of the base, `(length, vocab_size)`."""
        log_probs = logits.float().log_softmax(dim=-1)
        vocab_map = self._vocab_maps[index]
        return log_probs if vocab_map is None else vocab_map.base_log_probs(log_probs, vocab_size)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Generates as the harness does, with the processor."""
        mask = generation_kwargs["attention_mask"]
        first = mask.argmax(dim=1).tolist()
        self._processor.prompts = [
            {
                "input_ids": self._with_prefix(index, context, first),
                "attention_mask": torch.cat([mask, mask.new_ones(len(mask), len(prefix))], dim=1),
            }
            if len(prefix)
            else None
            for index, prefix in enumerate(self._prefixes)
        ]
        return super()._model_generate(
            context, max_length, stop, logits_processor=[self._processor], **generation_kwargs
        )
