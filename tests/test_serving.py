"""What a server does with requests, without an engine: what is refused, and the batch that is guided, by the oracle."""

import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from oracle import guided, next_token_log_probs
from peft import PeftModel
from tiny import VOCAB_SIZE, save_adapter, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.hub.info import RewardInfo
from hf_genarm.vllm import notice
from hf_genarm.vllm.guidance import Guidance, Reading
from hf_genarm.vllm.loading import ServedLM, load
from hf_genarm.vllm.requests import Offer, ServerConfig, Wish, wish_of
from hf_genarm.vllm.slots import SlotLM

TWO = Offer(reward_models=("kind", "brief"), alpha=(1.0, 0.0), target_kl=None, refuses_bias=False)


# --- what may be asked for ---


def test_wishes():
    assert wish_of(None, TWO).alpha == (1.0, 0.0)
    assert wish_of({"genarm_alpha": 0.5, "session_id": "x"}, TWO).alpha == (0.5, 0.5)
    assert wish_of({"genarm_alpha": [0, -2]}, TWO).alpha == (0.0, -2.0)
    assert not wish_of({"genarm_alpha": 0}, TWO).is_guided
    assert wish_of({"genarm_target_kl": 0.1}, TWO).target_kl == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("genarm_alpah", 1, "no such key. Known are genarm_alpha, genarm_target_kl"),
        ("GenARM_alpha", 1, "no such key"),
        ("genarm-alpha", 1, "no such key"),
        ("genarm_alpha", math.nan, "a finite number"),
        ("genarm_alpha", math.inf, "a finite number"),
        ("genarm_alpha", 1e7, "none larger than 1e6"),
        ("genarm_alpha", "1", "a finite number"),
        ("genarm_alpha", True, "a finite number"),
        ("genarm_alpha", None, "a finite number"),
        ("genarm_alpha", [], "a list of 2"),
        ("genarm_alpha", [1.0], "a list of 2, one for each reward model"),
        ("genarm_alpha", [1, 2, 3], "a list of 2, one for each reward model"),
        ("genarm_alpha", [1, "a"], "a list of 2"),
        ("genarm_alpha", [[1, 2]], "a list of 2"),
        ("genarm_alpha", {"kind": 1}, "a finite number"),
        ("genarm_target_kl", 0, "a positive, finite number"),
        ("genarm_target_kl", -1, "a positive, finite number"),
        ("genarm_target_kl", math.nan, "a positive, finite number"),
        ("genarm_target_kl", [0.1], "a positive, finite number"),
    ],
)
def test_what_can_not_be_done_is_refused_with_key_value_and_rule(key, value, rule):
    with pytest.raises(ValueError, match=rule) as error:
        wish_of({key: value}, TWO)
    assert str(error.value).startswith(f"`{key}` is {value!r}, but ")


def test_configurations():
    config = ServerConfig.of({"genarm": {"reward_models": "a", "alpha": 2}})
    assert (config.reward_models, config.alpha, config.target_kl) == (["a"], [2.0], None)
    both = ServerConfig.of({"genarm": {"reward_models": ["a", "b"]}})
    plain, margin = RewardInfo(), RewardInfo(loss={"reference": "base"})
    tuned = RewardInfo(recommended={"alpha": 0.5, "reference": "base", "temperature": 1.0, "measured": {}})
    settled = both.with_recommended([plain, plain])
    assert (settled.alpha, settled.reference) == ([1.0, 1.0], None)
    settled = both.with_recommended([margin, tuned])
    assert (settled.alpha, settled.reference) == ([1.0, 0.5], "base")
    with pytest.raises(ValueError, match=r"different references .* Choose it"):
        both.with_recommended([plain, margin])
    chosen = ServerConfig.of({"genarm": {"reward_models": ["a", "b"], "alpha": 2, "reference": None}})
    settled = chosen.with_recommended([plain, margin])
    assert (settled.alpha, settled.reference) == ([2.0, 2.0], None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "has no object `genarm`. Say which reward models to load"),
        ({}, "has no object `genarm`"),
        ({"genarm": "a"}, "has no object `genarm`"),
        ({"genarm": {"reward_model": "a"}}, "has the key `reward_model`, but knows"),
        ({"genarm": {"reward_models": []}}, r"`reward_models` .* is \[\]"),
        ({"genarm": {"reward_models": "a", "alpha": [1, 2]}}, r"`alpha` .* is \[1, 2\]"),
        ({"genarm": {"reward_models": "a", "target_kl": -1}}, "`target_kl` .* is -1"),
        ({"genarm": {"reward_models": "a", "dtype": "float"}}, None),
        ({"genarm": {"reward_models": "a", "dtype": "f32"}}, "`dtype` .* is 'f32'"),
        ({"genarm": {"reward_models": "a", "slots": 0}}, "`slots` .* is 0"),
        ({"genarm": {"reward_models": "a", "chunk": 1.5}}, "`chunk` .* is 1.5"),
        ({"genarm": {"reward_models": "a", "reference": 1}}, "`reference` .* is 1"),
    ],
)
def test_configurations_that_are_refused(given, message):
    if message is None:
        ServerConfig.of(given)
        return
    with pytest.raises(ValueError, match=message):
        ServerConfig.of(given)


# --- how the front end comes to know ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(notice.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def _post_and_wait(alpha, folder, posted, done):
    notice.tempfile.gettempdir = lambda: folder
    notice.post(Offer(("a",), (alpha,), None, False))
    posted.set()
    done.wait(60)


def test_a_front_end_finds_the_notice_of_its_own_engine(folder):
    assert notice.find() is None
    context = multiprocessing.get_context("fork")
    posted, done = context.Event(), context.Event()
    engine = context.Process(target=_post_and_wait, args=(0.25, str(folder), posted, done))
    engine.start()
    assert posted.wait(60)
    assert notice.find() == Offer(("a",), (0.25,), None, False)
    # Nor does a process find it that has nothing to do with it.
    code = "import sys; from hf_genarm.vllm import notice; print(notice.find())"
    stranger = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True
    )
    assert stranger.stdout.strip() == "None", stranger.stderr
    done.set()
    engine.join()
    assert notice.find() is None


def test_a_notice_of_a_process_that_is_gone_is_no_notice(folder):
    notice.post(TWO)
    assert notice.find() == TWO
    path = folder / f"hf_genarm-{os.getuid()}" / f"{os.getpid()}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": 1.0}))
    assert notice.find() is None
    notice.post(TWO)
    notice.post(TWO)
    assert notice.find() == TWO


# --- the batch ---


class Batch:
    """Requests that come and go, and the logits that an engine would have for them."""

    def __init__(self, guidance, base):
        self.guidance, self.base, self.texts = guidance, base, {}

    def step(self, wishes, n_rows=1):
        """One step for these requests, whose texts are given; checks nothing."""
        rows = torch.cat([self.base(input_ids=torch.tensor([self.texts[x][0]])).logits[0, -n_rows:] for x in wishes])
        readings = [
            Reading(x, *self.texts[x], range(index * n_rows, (index + 1) * n_rows))
            for index, x in enumerate(wishes)
            if x.is_guided
        ]
        return rows, self.guidance(rows.clone(), readings)


@pytest.fixture
def models():
    return [tiny_llama(1), tiny_llama(2)]


def served(models):
    return [ServedLM(SlotLM(tiny_llama(seed), n_slots=4, length=128, chunk=16), VOCAB_SIZE) for seed in (1, 2)]


@torch.no_grad()
def test_requests_with_strengths_of_their_own(models):
    base, generator = tiny_llama(0), random.Random(0)
    batch = Batch(Guidance(served(models)), base)
    wishes = [Wish((1.0, 0.0), None), Wish((0.0, 0.0), None), Wish((0.5, -0.5), None), Wish((0.0, 2.0), None)]
    for wish in wishes:
        prompt = [generator.randrange(3, VOCAB_SIZE) for _ in range(1 + generator.randrange(20))]
        batch.texts[wish] = (prompt, len(prompt))
    for _ in range(8):
        wanted = generator.sample(wishes, 3)
        logits, result = batch.step(wanted)
        for wish, row, ours in zip(wanted, logits, result, strict=True):
            text = batch.texts[wish][0]
            if wish.is_guided:
                rewards = [next_token_log_probs(model, torch.tensor(text)) for model in models]
                assert not torch.allclose(row.log_softmax(-1), ours, atol=1e-2)
                expected = guided(row.double().log_softmax(-1), rewards, wish.alpha)
                torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=0)
            else:
                assert torch.equal(ours, row)
            batch.texts[wish] = ([*text, int(ours.argmax())], batch.texts[wish][1])
        batch.guidance.release(generator.choice(wishes))


def test_a_reward_model_is_not_run_where_its_strength_is_0(models):
    lms = served(models)
    guidance = Guidance(lms)
    for lm in lms:
        lm.log_probs = None
    logits = torch.randn(2, VOCAB_SIZE)
    assert guidance(logits, []) is logits
    lms[0].log_probs = lambda texts, n_last: torch.zeros(1, VOCAB_SIZE)
    guidance(logits, [Reading(Wish((1.0, 0.0), None), [1, 2], 2, [0])])


@torch.no_grad()
@pytest.mark.parametrize("reference", ["base", "model"])
def test_a_reference(models, reference):
    base, other = tiny_llama(0), tiny_llama(3)
    own = "base" if reference == "base" else ServedLM(SlotLM(tiny_llama(3), n_slots=2, length=64), VOCAB_SIZE)
    batch = Batch(Guidance(served(models)[:1], own), base)
    wish, text = Wish((0.7,), None), [5, 6, 7, 8]
    batch.texts[wish] = (text, 4)
    logits, result = batch.step([wish])
    row = torch.tensor(text)
    scores = logits[0].double().log_softmax(-1)
    contrasted = next_token_log_probs(models[0], row) - (
        scores if reference == "base" else next_token_log_probs(other, row)
    )
    expected = (scores + 0.7 * contrasted).log_softmax(-1)
    torch.testing.assert_close(result[0].double(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_set_divergence_is_that_of_generate_also_after_an_interruption_and_with_drafts(models):
    base, prompt, n_new = tiny_llama(0), [5, 9, 11, 30], 24
    processor = GenARMLogitsProcessor(models[0], alpha=1.0, target_kl=0.3, pad_token_id=0)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}
    expected = base.generate(
        torch.tensor([prompt]), logits_processor=[processor], max_new_tokens=n_new, pad_token_id=0, **options
    )
    tokens = expected.sequences[0].tolist()
    scores = torch.cat(expected.scores)
    unheld = GenARMLogitsProcessor(models[0], alpha=1.0, pad_token_id=0)
    unscaled = unheld(expected.sequences[:, :-1], base(expected.sequences[:, :-1]).logits[:, -1])
    assert not torch.allclose(unscaled[0], scores[-1], atol=1e-2)

    batch = Batch(Guidance(served(models)[:1]), base)
    wish = Wish((1.0,), 0.3)
    for index in range(n_new):
        if index == 10:
            batch.guidance.release(wish)
            wish = Wish((1.0,), 0.3)
        # Every third step ends in two drafts, of which one is wrong.
        n_rows = 3 if index % 3 == 1 and index < n_new - 2 else 1
        text = tokens[: len(prompt) + index]
        drafts = [tokens[len(text)], 4] if n_rows == 3 else []
        batch.texts[wish] = (text + drafts, len(prompt))
        _, result = batch.step([wish], n_rows)
        for row in range(min(n_rows, 2)):
            torch.testing.assert_close(result[row], scores[index + row], atol=1e-3, rtol=0)


# --- loading ---


def folder_of(path, model, tokenizer):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_slots(network, name):
    return SlotLM(network, n_slots=2, length=64, name=name)


@torch.no_grad()
def test_adapters_are_merged_into_a_copy_of_the_served_weights(tmp_path, tokenizer):
    """Of the served model, although the adapter says that its own is elsewhere, since the weights are the same."""
    base = folder_of(tmp_path / "tiny", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    (model,) = load([adapter], base, base, len(tokenizer), make_slots, torch.float32)
    text = [5, 6, 7, 8, 9]
    ours = model.log_probs({0: text}, [1])[0]
    theirs = next_token_log_probs(expected, torch.tensor(text))
    assert model.no_tokens is None
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)
    plain = next_token_log_probs(AutoModelForCausalLM.from_pretrained(base), torch.tensor(text))
    assert not torch.allclose(theirs, plain, atol=1e-2)


@torch.no_grad()
def test_vocabularies_of_other_sizes_are_aligned_and_logits_without_a_token_are_not_sampled(tmp_path, tokenizer):
    size = len(tokenizer)
    base = folder_of(tmp_path / "base", tiny_llama(vocab_size=size + 6), tokenizer)  # six logits without a token
    larger = tiny_tokenizer()
    larger.add_tokens(["<more>"])
    arm = tiny_llama(1, vocab_size=size + 1)
    reward = folder_of(tmp_path / "reward", arm, larger)
    (model,) = load([reward], base, base, size + 6, make_slots, torch.float32)
    logits = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([[5, 6, 7]])).logits[:, -1]
    result = Guidance([model])(logits.clone(), [Reading(Wish((1.0,), None), [5, 6, 7], 3, [0])])
    assert (result[0, size:] == -torch.inf).all()
    reward_log_probs = next_token_log_probs(arm, torch.tensor([5, 6, 7]))[:size]
    expected = guided(logits[0, :size].double().log_softmax(-1), [reward_log_probs], [1.0])
    torch.testing.assert_close(result[0, :size].double(), expected, atol=1e-4, rtol=0)


def test_a_reward_model_that_lacks_tokens_is_refused(tmp_path, tokenizer):
    larger = tiny_tokenizer()
    larger.add_tokens(["<more>"])
    base = folder_of(tmp_path / "base", tiny_llama(vocab_size=len(larger)), larger)
    reward = folder_of(tmp_path / "reward", tiny_llama(1, vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(ValueError, match=r"lacks tokens of the served model, such as \['<more>'\]"):
        load([reward], base, base, len(larger), make_slots, torch.float32)


def test_without_vllm_the_name_says_what_is_missing():
    import hf_genarm.vllm

    if find_spec("vllm"):
        pytest.skip("vLLM is installed")

    with pytest.raises(ModuleNotFoundError, match="vllm"):
        hf_genarm.vllm.GenARM  # noqa: B018
