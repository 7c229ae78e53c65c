"""
A fuzzer: processors, settings, modes of `generate`, copies, interruptions and changed weights, in any order.

Every guided distribution is compared with one that is recomputed from scratch. By default a few short examples run, the
same ones each time. For an hour of other ones:

    HF_GENARM_FUZZ_SECONDS=3600 pytest -s tests/test_state_machine.py
"""

import copy
import dataclasses
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from oracle import guided, next_token_log_probs
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import EOS, VOCAB_SIZE, left_padded, random_prompts, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DynamicCache, LogitsProcessor, PreTrainedTokenizerFast

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.decoding.kl_control import controlled_scale
from hf_genarm.hub.kv_cache import CACHE
from hf_genarm.hub.sharing import twin

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

SECONDS = float(os.environ.get("HF_GENARM_FUZZ_SECONDS", 0))
COUNTS: Counter[str] = Counter()

BASE, ASSISTANT = tiny_llama(0, num_hidden_layers=3), tiny_llama(3)
LENGTHS = {1: [[6], [3]], 2: [[3, 7], [5, 5]], 3: [[4, 8, 6]]}  # of prompts, by their number
ORDER = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(1))  # ids of the base in another tokenizer
SAMPLING = {"do_sample": True, "top_k": 0}

# Options of `generate`, for batches and for one text.
BATCHED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": SAMPLING,
    "several sequences": SAMPLING | {"num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "a prompt in parts": {"prefill_chunk_size": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams that stop early": {"num_beams": 2, "early_stopping": True, "length_penalty": 0.5},
    "beam sampling": SAMPLING | {"num_beams": 2},
}
SINGLE: dict[str, dict[str, Any]] = {
    "assisted": {"assistant_model": ASSISTANT},
    "assisted sampling": SAMPLING | {"assistant_model": ASSISTANT},
    "early exit": {"assistant_early_exit": 1},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "drafts of the reward model": {},
    "sampled drafts of the reward model": SAMPLING,
}

CHANGES = ["reward", "reference", "base", "part of the base", "off"]


def rising(step: int) -> float:
    return 0.2 + 0.2 * step


def turning(step: int) -> float:
    return 1.0 if step % 2 else -0.5


STRENGTHS = st.one_of(
    st.sampled_from([0.0, 0.3, 1.0, 1.5, -0.5, rising, turning]),
    st.lists(st.sampled_from([0.0, 0.5, 1.0, -0.3]), min_size=2, max_size=2),
    st.integers(1, 3).map(lambda n_rows: torch.linspace(-0.5, 1.0, 2 * n_rows).view(n_rows, 2).flip(0)),
)


def tokenizer_of(order: torch.Tensor) -> PreTrainedTokenizerFast:
    """The same words, of which word number i has the id `order[i]`."""
    words = {f"word{index}": int(order[index]) for index in range(VOCAB_SIZE)}
    backend = Tokenizer(WordLevel(words, unk_token="word0"))
    special = {"pad_token": "word0", "bos_token": "word1", "eos_token": "word2"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def adapter_on(base, seed: int, **config):
    """An adapter on the very weights of the base."""
    torch.manual_seed(seed)
    config = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False} | config
    adapter = get_peft_model(twin(base), LoraConfig(**config)).eval()
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapter


@dataclass
class Guide:
    """A processor, and what it was made of."""

    base: Any
    rewards: list[tuple[Any, bool]]  # models, and whether their ids are those of another tokenizer
    reference: Any
    is_watched: bool
    processor: GenARMLogitsProcessor
    settings: dict[str, Any] = field(default_factory=lambda: {"target_kl": None, "attention_mask": None})

    def set(self, **settings) -> None:
        for name, value in settings.items():
            setattr(self.processor, name, value)
            self.settings[name] = copy.deepcopy(value)

    @property
    def is_by_tokens(self) -> bool:
        """Whether the tokens alone show which run a text belongs to, and it matters."""
        return not self.is_watched and (callable(self.processor.alpha) or self.processor.target_kl is not None)


@dataclass
class Oracle:
    """What a processor with the present settings must return, recomputed for each unpadded text."""

    guide: Guide
    mask: torch.Tensor  # of the prompts
    known: dict = field(default_factory=dict)

    def __post_init__(self):
        self.alpha, self.target_kl = self.guide.processor.alpha, self.guide.processor.target_kl

    def log_probs(self, model, input_ids, other_ids=False):
        """Log-probabilities after each text, `(batch_size, vocab_size)`."""
        rows, repeats = [], len(input_ids) // len(self.mask)
        for index, row in enumerate(input_ids.long()):
            is_text = self.mask[index // repeats].bool()
            row = torch.cat([row[: len(is_text)][is_text], row[len(is_text) :]])
            key = (id(model), tuple(row.tolist()))
            if key not in self.known:
                result = next_token_log_probs(model, ORDER[row] if other_ids else row)
                self.known[key] = result[ORDER] if other_ids else result
            rows.append(self.known[key])
        return torch.stack(rows)

    def parts(self, input_ids):
        """Log-probabilities of the base, rewards, and strengths `(batch_size, n_rewards)` as they are set."""
        base = self.log_probs(self.guide.base, input_ids)
        rewards = [self.log_probs(model, input_ids, other_ids) for model, other_ids in self.guide.rewards]
        if self.guide.reference is not None:
            model = self.guide.base if self.guide.reference == "base" else self.guide.reference
            rewards = [reward - self.log_probs(model, input_ids) for reward in rewards]
        step = input_ids.shape[1] - self.mask.shape[1]
        alphas = torch.as_tensor(self.alpha(step) if callable(self.alpha) else self.alpha, dtype=torch.float64)
        if alphas.ndim < 2:
            alphas = alphas.expand(len(self.mask), len(rewards))
        return base, rewards, alphas.repeat_interleave(len(input_ids) // len(alphas), dim=0)

    def strengths(self, input_ids):
        """Strengths `(batch_size, n_rewards)` in force: with a target, what the texts have spent is replayed."""
        if self.target_kl is None:
            return self.parts(input_ids)[2]
        missing = torch.zeros(len(input_ids))
        for length in range(self.mask.shape[1], input_ids.shape[1] + 1):
            base, rewards, alphas = self.parts(input_ids[:, :length])
            rewards, columns = [x.float() for x in rewards], list(alphas.float().split(1, dim=1))
            target = torch.full_like(missing, self.target_kl)
            scale, missing = controlled_scale(base, rewards, columns, target, missing)
        return alphas * scale[:, None]

    def __call__(self, input_ids, scores=None):
        base, rewards, _ = self.parts(input_ids)
        base = base if scores is None else scores.double().log_softmax(dim=-1)
        rows = zip(base, zip(*rewards, strict=True), self.strengths(input_ids).tolist(), strict=True)
        return torch.stack([guided(row, list(of_row), alphas) for row, of_row, alphas in rows])

    def check(self, input_ids, result, scores=None):
        """Compares what a processor returned."""
        expected, ours = self(input_ids, scores), result.double().log_softmax(dim=-1)
        if self.target_kl is None:
            torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
        else:  # which is found by bisection in float32
            torch.testing.assert_close(ours.exp(), expected.exp(), atol=1e-3, rtol=0)
        COUNTS["rows recomputed"] += len(input_ids)


class Around(LogitsProcessor):
    """Keeps what a processor was given and returned; calls something before or after one of its calls."""

    def __init__(self, processor, event: Callable | None = None, at: int = 0, is_before: bool = True):
        self.processor, self.event, self.at, self.is_before, self.calls = processor, event, at, is_before, []

    def __call__(self, input_ids, scores):
        is_now = self.event is not None and len(self.calls) == self.at
        if is_now and self.is_before:
            self.event(input_ids)
        given = input_ids.clone(), scores.clone()
        result = self.processor(input_ids, scores)
        self.calls.append((*given, result.clone()))
        if is_now and not self.is_before:
            self.event(input_ids)
        return result


def interrupt(input_ids):
    raise InterruptedError


class Fuzzer(RuleBasedStateMachine):
    """Guides share one base and a pool of reward models, copies apart."""

    guides = Bundle("guides")

    def __init__(self):
        super().__init__()
        self.base = copy.deepcopy(BASE)
        self.full, self.reference = [tiny_llama(1), tiny_llama(2)], tiny_llama(4)
        self.adapters = [adapter_on(self.base, 5), adapter_on(self.base, 6, target_modules="all-linear")]
        self.all: list[Guide] = []
        COUNTS["examples"] += 1

    # --- processors and their settings ---

    @rule(
        target=guides,
        kinds=st.lists(st.sampled_from(["full 0", "full 1", "adapter 0", "adapter 1", "other ids"]), min_size=1)
        .map(lambda kinds: kinds[:2])
        .filter(lambda kinds: len({*kinds} & {"full 1", "other ids"}) < 2),
        is_watched=st.sampled_from([True, True, True, False]),
        reference=st.sampled_from([None, None, "base", "model"]),
    )
    def make(self, kinds, is_watched, reference):
        """A processor without strengths that are set."""
        COUNTS["operations"] += 1
        pools = {"full": self.full, "adapter": self.adapters}
        models = [self.full[1] if x == "other ids" else pools[x.split()[0]][int(x.split()[1])] for x in kinds]
        reference = self.reference if reference == "model" else reference if is_watched else None
        others = [tokenizer_of(ORDER) if kind == "other ids" else None for kind in kinds]
        tokenizer = tokenizer_of(torch.arange(VOCAB_SIZE)) if any(others) else None
        processor = GenARMLogitsProcessor(
            models,
            base_model=self.base if is_watched else None,
            reference=reference,
            tokenizer=tokenizer,
            reward_tokenizer=others if any(others) else None,
        )
        rewards = [(model, kind == "other ids") for model, kind in zip(models, kinds, strict=True)]
        return self.keep(Guide(self.base, rewards, reference, is_watched, processor))

    def keep(self, guide):
        self.all.append(guide)
        return guide

    @invariant()
    def settings_are_as_they_were_set(self):
        for guide in self.all:
            for name, value in guide.settings.items():
                now = getattr(guide.processor, name)
                if isinstance(value, float):
                    value = [value] * len(guide.rewards) if name == "alpha" else value
                is_same = torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value
                assert is_same, f"{name} is {now}, but was set to {value}"

    @rule(guide=guides, alpha=STRENGTHS)
    def set_strengths(self, guide, alpha):
        COUNTS["operations"] += 1
        n_rewards = len(guide.rewards)
        if isinstance(alpha, torch.Tensor):
            alpha = alpha[:, :n_rewards]
        guide.set(alpha=alpha[:n_rewards] if isinstance(alpha, list) else alpha)

    @rule(guide=guides, target_kl=st.sampled_from([None, 0.05, 0.5]))
    def set_target(self, guide, target_kl):
        COUNTS["operations"] += 1
        guide.set(target_kl=target_kl)

    @rule(guide=guides, keeps=st.booleans())
    def keep_statistics(self, guide, keeps):
        COUNTS["operations"] += 1
        guide.processor.keeps_statistics = keeps

    @rule(guide=guides)
    def reset(self, guide):
        COUNTS["operations"] += 1
        guide.processor.reset()

    @rule(target=guides, guide=guides, how=st.sampled_from(["copy", "deepcopy", "pickle", "deepcopy alone"]))
    def copied(self, guide, how):
        """A copy with everything that it was made of, or of the processor alone."""
        COUNTS["operations"] += 1
        if how == "deepcopy":
            return self.keep(copy.deepcopy(guide))
        if how == "pickle":
            return self.keep(pickle.loads(pickle.dumps(guide)))
        other = dataclasses.replace(guide, settings=dict(guide.settings))
        if how == "copy":
            other.processor = copy.copy(guide.processor)
            return self.keep(other)
        other.processor = processor = copy.deepcopy(guide.processor)
        other.rewards = [(model, ids) for model, (_, ids) in zip(processor._models, guide.rewards, strict=True)]
        other.base, other.reference = processor._base if guide.is_watched else guide.base, processor.reference
        return self.keep(other)

    # --- models ---

    @rule(guide=guides, seed=st.integers(0, 9), what=st.sampled_from(CHANGES))
    def change_weights(self, guide, seed, what):
        """Of a reward model, the reference or the base, in place or not; or switches adapters off and on."""
        COUNTS["operations"] += 1
        self.change(guide, seed, what)

    def change(self, guide, seed, what):
        torch.manual_seed(seed)
        if what == "reference" and guide.reference == "base":
            what = "part of the base"
        if what in ("reward", "reference"):
            model = guide.rewards[seed % len(guide.rewards)][0]
            if what == "reference" and guide.reference is not None:
                model = guide.reference
            layers = [
                x for name, x in model.named_parameters() if name.endswith(("norm.weight", "lora_A.default.weight"))
            ]
            for weight in layers:
                weight.data.add_(torch.randn_like(weight), alpha=0.3)
        elif what == "off":
            for model, _ in guide.rewards:
                if isinstance(model, PeftModel):
                    (model.base_model.enable_adapter_layers if seed % 2 else model.base_model.disable_adapter_layers)()
        else:
            layer = guide.base.model.layers[seed % 3].self_attn.q_proj
            new = torch.randn_like(layer.weight) * 0.4
            if what == "base":
                layer.weight.data.copy_(new)
            else:  # an adapter that shares it keeps the old one
                layer.weight = torch.nn.Parameter(new)

    # --- texts ---

    def inputs_for(self, guide, data, n_prompts=None):
        """Prompts that fit the strengths, and the mask that the processor may need."""
        alpha = guide.processor.alpha
        if isinstance(alpha, torch.Tensor):
            n_prompts = len(alpha)
        if n_prompts is None:
            n_prompts = data.draw(st.integers(1, 3))
        lengths = data.draw(st.sampled_from(LENGTHS[n_prompts]))
        # No prompt is another one and one more token: a loop would continue the text, also after a change of weights.
        inputs = left_padded(lengths, data.draw(st.integers(0, 5)) + 6 * (max(lengths) % 2))
        if data.draw(st.integers(0, 3)) == 0:
            inputs["input_ids"] = inputs["input_ids"].int()
        return inputs

    def give_mask(self, guide, mask, data):
        is_needed = not guide.is_watched and not mask.all()
        guide.set(attention_mask=mask if is_needed or data.draw(st.booleans()) else None)

    def write(self, guide, inputs, processors, seed=0, n_new=5, **options):
        COUNTS["generate calls"] += 1
        torch.manual_seed(seed)
        kept = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": n_new}
        return guide.base.generate(**inputs, **kept, **options, logits_processor=processors)

    def check(self, guide, inputs, output, is_greedy=False, may_skip=False, has_own_texts=True):
        """Compares the scores of each step, and the statistics, of texts that no beams wrote."""
        oracle, length = Oracle(guide, inputs["attention_mask"]), inputs["input_ids"].shape[1]
        sequences = output.sequences
        is_over = torch.zeros(len(sequences), dtype=torch.bool)
        for at, scores in enumerate(output.scores, start=length):
            oracle.check(sequences[:, :at], scores)
            if is_greedy:
                likeliest = oracle(sequences[:, :at]).argmax(dim=-1)
                assert ((sequences[:, at] == likeliest) | is_over).all()
            is_over |= sequences[:, at] == EOS
        if has_own_texts:
            self.check_statistics(guide, oracle, sequences, may_skip)

    def check_statistics(self, guide, oracle, sequences, may_skip=False):
        if not guide.processor.keeps_statistics or not torch.as_tensor(oracle.parts(sequences)[2]).any():
            return
        table = guide.processor.statistics(sequences)
        length = oracle.mask.shape[1]
        found = set(zip(table["sequence"], table["position"], strict=True))
        ends = [
            next((at + 1 for at in range(length, len(row)) if row[at] == 2), len(row)) for row in sequences.tolist()
        ]
        wanted = {(index, at) for index, end in enumerate(ends) for at in range(length, end)}
        assert wanted <= found or may_skip
        for row in range(len(table["token"])):
            index, at = table["sequence"][row], table["position"][row]
            if (index, at) not in wanted:
                continue
            text, token = sequences[:, :at], int(sequences[index, at])
            assert table["token"][row] == token
            distribution, strengths = oracle(text)[index], oracle.strengths(text)[index]
            close = {"abs": 5e-4} if oracle.target_kl is None else {"abs": 2e-2, "rel": 1e-2}
            assert table["guided_log_prob"][row] == pytest.approx(float(distribution[token]), **close)
            base = oracle.log_probs(guide.base, text)[index]
            divergence = float((distribution.exp() * (distribution - base)).sum())
            assert table["kl"][row] == pytest.approx(divergence, **close)
            for place, strength in enumerate(strengths.tolist()):
                assert table[f"alpha_{place}"][row] == pytest.approx(strength, **close)
        COUNTS["tables read"] += 1

    @rule(guide=guides, data=st.data(), seed=st.integers(0, 9), mode=st.sampled_from([*BATCHED, *SINGLE]))
    def generate(self, guide, data, seed, mode):
        COUNTS["operations"] += 1
        inputs = self.inputs_for(guide, data, 1 if mode in SINGLE else None)
        if mode in SINGLE and len(inputs["input_ids"]) > 1:
            mode = "greedy"
        options = dict(BATCHED | SINGLE)[mode]
        self.give_mask(guide, inputs["attention_mask"], data)
        is_drafted = mode.endswith("drafts of the reward model")
        if is_drafted:
            if not guide.is_watched or "separate" not in guide.processor.engine:
                return
            options = options | {"assistant_model": guide.processor.assistant(data.draw(st.sampled_from([None, 3])))}
        if options.get("num_beams", 1) > 1:
            around, oracle = Around(guide.processor), Oracle(guide, inputs["attention_mask"])
            output = self.write(guide, inputs, [around], seed, **options)
            for input_ids, scores, result in around.calls:
                oracle.check(input_ids, result, scores)
            self.check_statistics(guide, oracle, output.sequences)
        else:
            output = self.write(guide, inputs, [guide.processor], seed, **options)
            self.check(guide, inputs, output, not options.get("do_sample"), may_skip=is_drafted)

    @rule(guide=guides, data=st.data(), seed=st.integers(0, 9), n_more=st.integers(2, 4))
    def go_on_with_a_chat(self, guide, data, seed, n_more):
        """With the cache of the answer before."""
        COUNTS["operations"] += 1
        inputs, cache = self.inputs_for(guide, data), DynamicCache(config=guide.base.config)
        self.give_mask(guide, inputs["attention_mask"], data)
        output = self.write(guide, inputs, [guide.processor], seed, 4, **{CACHE: cache})
        self.check(guide, inputs, output)
        written = output.sequences
        more = random_prompts(len(written), n_more, seed).to(written.dtype)
        new = inputs["attention_mask"].new_ones(len(written), written.shape[1] + n_more - inputs["input_ids"].shape[1])
        mask = torch.cat([inputs["attention_mask"], new], dim=1)
        longer = {"input_ids": torch.cat([written, more], dim=1), "attention_mask": mask}
        self.give_mask(guide, mask, data)
        self.check(guide, longer, self.write(guide, longer, [guide.processor], seed, 2, **{CACHE: cache}))

    @rule(guide=guides, data=st.data(), at=st.integers(0, 3), is_before=st.booleans(), n_beams=st.integers(1, 2))
    def interrupted(self, guide, data, at, is_before, n_beams):
        COUNTS["operations"] += 1
        inputs = self.inputs_for(guide, data)
        self.give_mask(guide, inputs["attention_mask"], data)
        around = Around(guide.processor, interrupt, at, is_before)
        try:
            self.write(guide, inputs, [around], min_new_tokens=5, num_beams=n_beams)
        except InterruptedError:
            COUNTS["interruptions"] += 1
        else:
            raise AssertionError("nothing was interrupted")

    @rule(guide=guides, data=st.data(), n_steps=st.integers(1, 4))
    def custom_loop(self, guide, data, n_steps):
        """Calls the processor without `generate`, also on what `generate` has written."""
        COUNTS["operations"] += 1
        inputs = self.inputs_for(guide, data)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if not guide.is_by_tokens and data.draw(st.booleans()):
            self.give_mask(guide, mask, data)
            written = self.write(guide, inputs, [guide.processor], n_new=2)
            self.check(guide, inputs, written)
            new = mask.new_ones(len(mask), written.sequences.shape[1] - mask.shape[1])
            ids, mask = written.sequences, torch.cat([mask, new], dim=1)
        self.loop(guide, ids, mask, n_steps)

    def loop(self, guide, ids, mask, n_steps):
        guide.set(attention_mask=mask)
        oracle = Oracle(guide, mask)
        for _ in range(n_steps):
            scores = oracle.log_probs(guide.base, ids).float()
            result = guide.processor(ids, scores)
            oracle.check(ids, result, scores)
            ids = torch.cat([ids, result.argmax(dim=-1, keepdim=True).to(ids.dtype)], dim=1)

    @rule(
        guide=guides.filter(lambda guide: guide.reference is not None),
        data=st.data(),
        seed=st.integers(0, 9),
        what=st.sampled_from(["reference", "reference", "reward", "base"]),
        is_loop=st.booleans(),
    )
    def the_same_prompts_after_a_change(self, guide, data, seed, what, is_loop):
        """What was read of them with other weights is useless. After a loop, unlike `generate`, nothing is released."""
        COUNTS["operations"] += 1
        inputs = self.inputs_for(guide, data)
        for _ in range(2):
            if is_loop:
                self.loop(guide, inputs["input_ids"], inputs["attention_mask"], 2)
            else:
                self.give_mask(guide, inputs["attention_mask"], data)
                output = self.write(guide, inputs, [guide.processor], seed)
                self.check(guide, inputs, output, is_greedy=True)
            self.change(guide, seed, what)

    @rule(
        outer=guides,
        inner=guides,
        data=st.data(),
        at=st.integers(0, 3),
        is_before=st.booleans(),
        schedule=st.sampled_from([None, rising, turning]),
        n_rows=st.sampled_from([1, None]),
    )
    def nested(self, outer, inner, data, at, is_before, schedule, n_rows):
        """`generate` inside of another processor, with the same processor or another one, for all rows or the first."""
        COUNTS["operations"] += 1
        if not outer.is_watched or not inner.is_watched or outer.base is not inner.base:
            return
        if isinstance(inner.processor.alpha, torch.Tensor):  # which has rows for other prompts
            return
        if schedule is not None:
            outer.set(alpha=schedule)
        inputs, rollouts = self.inputs_for(outer, data), []
        for guide in (outer, inner):
            guide.set(attention_mask=None)

        def roll_out(input_ids):
            new = input_ids.shape[1] - inputs["input_ids"].shape[1]
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(input_ids), new, dtype=torch.long)], dim=1)
            ours = {"input_ids": input_ids[:n_rows], "attention_mask": mask[:n_rows]}
            rollouts.append((ours, self.write(inner, ours, [inner.processor], n_new=2)))

        around = Around(outer.processor, roll_out, at, is_before)
        self.check(outer, inputs, self.write(outer, inputs, [around]))
        for ours, output in rollouts:
            COUNTS["nested calls"] += 1
            # What two runs of one processor have written is in the table of the run that went on.
            self.check(inner, ours, output, has_own_texts=inner is not outer)


def run(n_examples: int, n_steps: int, is_fixed: bool) -> None:
    options = settings(
        max_examples=n_examples,
        stateful_step_count=n_steps,
        deadline=None,
        derandomize=is_fixed,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Fuzzer, settings=options)


def test_any_order():
    end = time.monotonic() + SECONDS
    run(n_examples=8, n_steps=20, is_fixed=True)
    while time.monotonic() < end:
        run(n_examples=20, n_steps=30, is_fixed=False)
    print(dict(COUNTS))
