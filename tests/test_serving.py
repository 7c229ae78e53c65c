"""What a server does with requests, without an engine: what is refused, and the batch that is guided, by the oracle."""

import math
import random
from importlib.util import find_spec

import pytest
import torch
from oracle import guided, next_token_log_probs
from peft import PeftModel
from tiny import VOCAB_SIZE, save_adapter, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.hub.info import RewardInfo
from hf_genarm.vllm.batch_guidance import BatchGuidance, GuidedRequest
from hf_genarm.vllm.paged_lm import PagedLM
from hf_genarm.vllm.request_settings import RequestSettings, ServerDefaults, request_settings
from hf_genarm.vllm.reward_lms import RewardLM, load_reward_lms
from hf_genarm.vllm.server_config import ServerConfig

TWO = ServerDefaults(reward_models=("kind", "brief"), alpha=(1.0, 0.0), target_kl=None)


# --- what may be asked for ---


def test_settings():
    assert request_settings(None, TWO).alpha == (1.0, 0.0)
    assert request_settings({"genarm_alpha": 0.5, "session_id": "x"}, TWO).alpha == (0.5, 0.5)
    assert request_settings({"genarm_alpha": [0, -2]}, TWO).alpha == (0.0, -2.0)
    assert not request_settings({"genarm_alpha": 0}, TWO).is_guided
    assert request_settings({"genarm_target_kl": 0.1}, TWO).target_kl == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("genarm_alpah", 1, "no such key. Known are genarm_alpha, genarm_target_kl, genarm_preset"),
        ("GenARM_alpha", 1, "no such key"),
        ("genarm-alpha", 1, "no such key"),
        ("gen_arm_alpha", 1, "no such key"),
        ("alpha", 1, "no such key"),
        ("target_kl", 1, "no such key"),
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
        request_settings({key: value}, TWO)
    assert str(error.value).startswith(f"`{key}` is {value!r}, but ")


@pytest.mark.parametrize("key", ["genarm_alpha", "genarm_target_kl"])
def test_a_number_that_is_no_float_is_refused_too(key):
    with pytest.raises(ValueError, match=rf"`{key}` is 10+…, but must be a (positive, )?finite number"):
        request_settings({key: 10**400}, TWO)


def test_what_is_repeated_of_a_value_is_cut():
    with pytest.raises(ValueError, match="a finite number") as error:
        request_settings({"genarm_alpha": "x" * 10_000}, TWO)
    assert str(error.value).startswith("`genarm_alpha` is 'xxx")
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match="no such key") as error:
        request_settings({"genarm" * 1000: 1}, TWO)
    assert len(str(error.value)) < 400


def test_reward_models_are_named_by_their_ids(tmp_path):
    config = ServerConfig(reward_models=["org/kind", str(tmp_path / "models" / "arm-brief")], alpha=1, reference=None)
    assert config.server_defaults().reward_models == ("org/kind", "arm-brief")


def test_configurations():
    config = ServerConfig.from_additional_config({"genarm": {"reward_models": "a", "alpha": 2}})
    assert (config.reward_models, config.alpha, config.target_kl) == (["a"], [2.0], None)
    both = ServerConfig.from_additional_config({"genarm": {"reward_models": ["a", "b"]}})
    plain, margin = RewardInfo(), RewardInfo(loss={"reference": "base"})
    tuned = RewardInfo(recommended={"alpha": 0.5, "reference": "base", "temperature": 1.0, "measured": {}})
    settled = both.with_recommended([plain, plain])
    assert (settled.alpha, settled.reference) == ([1.0, 1.0], None)
    settled = both.with_recommended([margin, tuned])
    assert (settled.alpha, settled.reference) == ([1.0, 0.5], "base")
    with pytest.raises(ValueError, match=r"different references .* Choose it"):
        both.with_recommended([plain, margin])
    chosen = ServerConfig.from_additional_config(
        {"genarm": {"reward_models": ["a", "b"], "alpha": 2, "reference": None}}
    )
    settled = chosen.with_recommended([plain, margin])
    assert (settled.alpha, settled.reference) == ([2.0, 2.0], None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "has no object `genarm`. Name the reward models to load"),
        ({}, "has no object `genarm`"),
        ({"genarm": "a"}, "has no object `genarm`"),
        ({"genarm": {"reward_model": "a"}}, "has the key `reward_model`, but the known ones are"),
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
        ServerConfig.from_additional_config(given)
        return
    with pytest.raises(ValueError, match=message):
        ServerConfig.from_additional_config(given)


# --- the batch ---


class Batch:
    """Requests that come and go, and the logits that an engine would have for them."""

    def __init__(self, guidance, base):
        self.guidance, self.base, self.texts = guidance, base, {}

    def step(self, settings_of_requests, n_rows=1):
        """One step for these requests, whose texts are given; checks nothing."""
        rows = torch.cat(
            [self.base(input_ids=torch.tensor([self.texts[x][0]])).logits[0, -n_rows:] for x in settings_of_requests]
        )
        requests = [
            GuidedRequest(x, *self.texts[x], range(index * n_rows, (index + 1) * n_rows))
            for index, x in enumerate(settings_of_requests)
            if x.is_guided
        ]
        return rows, self.guidance(rows.clone(), requests)


@pytest.fixture
def models():
    return [tiny_llama(1), tiny_llama(2)]


def served(models):
    return [RewardLM(PagedLM(tiny_llama(seed), length=128, n_tokens=512, chunk=16), VOCAB_SIZE) for seed in (1, 2)]


@torch.no_grad()
def test_requests_with_strengths_of_their_own(models):
    base, generator = tiny_llama(0), random.Random(0)
    batch = Batch(BatchGuidance(served(models)), base)
    strengths = [(1.0, 0.0), (0.0, 0.0), (0.5, -0.5), (0.0, 2.0)]
    settings_of_requests = [RequestSettings(alpha, None) for alpha in strengths]
    for settings in settings_of_requests:
        prompt = [generator.randrange(3, VOCAB_SIZE) for _ in range(1 + generator.randrange(20))]
        batch.texts[settings] = (prompt, len(prompt))
    for _ in range(8):
        wanted = generator.sample(settings_of_requests, 3)
        logits, result = batch.step(wanted)
        for settings, row, ours in zip(wanted, logits, result, strict=True):
            text = batch.texts[settings][0]
            if settings.is_guided:
                rewards = [next_token_log_probs(model, torch.tensor(text)) for model in models]
                assert not torch.allclose(row.log_softmax(-1), ours, atol=1e-2)
                expected = guided(row.double().log_softmax(-1), rewards, settings.alpha)
                torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=0)
            else:
                assert torch.equal(ours, row)
            batch.texts[settings] = ([*text, int(ours.argmax())], batch.texts[settings][1])
        batch.guidance.release(generator.choice(settings_of_requests))


def test_a_reward_model_is_not_run_where_its_strength_is_0(models):
    lms = served(models)
    guidance = BatchGuidance(lms)
    for lm in lms:
        lm.log_probs = None
    logits = torch.randn(2, VOCAB_SIZE)
    assert guidance(logits, []) is logits
    lms[0].log_probs = lambda texts, n_last: torch.zeros(1, VOCAB_SIZE)
    guidance(logits, [GuidedRequest(RequestSettings((1.0, 0.0), None), [1, 2], 2, [0])])


@torch.no_grad()
@pytest.mark.parametrize("reference", ["base", "model"])
def test_a_reference(models, reference):
    base, other = tiny_llama(0), tiny_llama(3)
    own = "base" if reference == "base" else RewardLM(PagedLM(tiny_llama(3), length=64, n_tokens=128), VOCAB_SIZE)
    batch = Batch(BatchGuidance(served(models)[:1], own), base)
    settings, text = RequestSettings((0.7,), None), [5, 6, 7, 8]
    batch.texts[settings] = (text, 4)
    logits, result = batch.step([settings])
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

    batch = Batch(BatchGuidance(served(models)[:1]), base)
    settings = RequestSettings((1.0,), 0.3)
    for index in range(n_new):
        if index == 10:
            batch.guidance.release(settings)
            settings = RequestSettings((1.0,), 0.3)
        # Every third step ends in two drafts, of which one is wrong.
        n_rows = 3 if index % 3 == 1 and index < n_new - 2 else 1
        text = tokens[: len(prompt) + index]
        drafts = [tokens[len(text)], 4] if n_rows == 3 else []
        batch.texts[settings] = (text + drafts, len(prompt))
        _, result = batch.step([settings], n_rows)
        for row in range(min(n_rows, 2)):
            torch.testing.assert_close(result[row], scores[index + row], atol=1e-3, rtol=0)


# --- one request does not fail the others ---


@pytest.fixture
def bystander(models):
    """A request with its text, and the row that it has to get."""
    settings, text = RequestSettings((1.0, 0.0), None), [5, 6, 7, 8]
    rewards = [next_token_log_probs(model, torch.tensor(text)) for model in models]
    with torch.no_grad():
        logits = tiny_llama(0)(torch.tensor([text])).logits[0, -1]
    return GuidedRequest(settings, text, 4, [0]), logits, guided(logits.double().log_softmax(-1), rewards, (1.0, 0.0))


def errors_of(caplog):
    return [x.getMessage() for x in caplog.records if x.levelname == "ERROR"]


def check_bystander(guidance, bystander, request, logits):
    """The other request keeps the logits of the engine, and the bystander gets its own."""
    expected = logits.clone()
    result = guidance(torch.stack([bystander[1], logits]), [bystander[0], request])
    torch.testing.assert_close(result[0].double(), bystander[2], atol=1e-4, rtol=0)
    assert torch.equal(result[1].nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ([5] * 129, "its 129 tokens are more than the 128 that can be read"),
        ([5, VOCAB_SIZE], "it has the token 48, but only those below 48 are known"),
        ([5, 6, -1], "the engine hides tokens that it has sampled"),
    ],
)
def test_a_text_that_can_not_be_read_keeps_the_logits_of_the_engine(models, bystander, caplog, text, reason):
    guidance = BatchGuidance(served(models))
    request = GuidedRequest(RequestSettings((1.0, 1.0), None), text, 1, [1])
    for _ in range(2):
        check_bystander(guidance, bystander, request, torch.randn(VOCAB_SIZE))
    assert len(errors_of(caplog)) == 1  # once, however often it is read
    assert errors_of(caplog)[0].startswith(f"A request is answered without guidance, because {reason}")


@pytest.mark.parametrize("reference", [None, "base"])
@pytest.mark.parametrize("target_kl", [None, 0.2])
def test_a_row_without_a_token_to_choose_from_keeps_the_logits_of_the_engine(
    models, bystander, caplog, reference, target_kl
):
    """As `min_tokens` and `allowed_token_ids` may leave it."""
    guidance = BatchGuidance(served(models))
    settings = RequestSettings((1.0, 0.0), target_kl)
    empty = torch.full((VOCAB_SIZE,), -torch.inf)
    check_bystander(guidance, bystander, GuidedRequest(settings, [5, 6], 2, [1]), empty)
    assert not errors_of(caplog)  # it is what was asked for
    # The text continues with tokens to choose from, at the divergence that it is held at.
    logits = torch.randn(VOCAB_SIZE)
    result = guidance(logits[None].clone(), [GuidedRequest(settings, [5, 6, 7], 2, [0])])
    assert result.isfinite().all()
    assert not torch.allclose(result[0], logits.log_softmax(-1), atol=1e-2)


def test_a_reward_model_that_returns_nan_fails_neither_the_batch_nor_the_next_text(models, bystander, caplog):
    broken = tiny_llama(1)
    with torch.no_grad():
        broken.model.embed_tokens.weight[40] = torch.nan
    guidance = BatchGuidance(
        [RewardLM(PagedLM(broken, length=128, n_tokens=256, chunk=16), VOCAB_SIZE), served(models)[1]]
    )
    request = GuidedRequest(RequestSettings((1.0, 0.0), None), [5, 40, 9, 40], 4, [1])
    check_bystander(guidance, bystander, request, torch.randn(VOCAB_SIZE))
    assert len(errors_of(caplog)) == 1
    assert "returned NaN" in errors_of(caplog)[0]
    guidance.release(request.settings)
    # The next text in its pages is shorter, so that it would see what is left of the old one as 0 times NaN.
    again = GuidedRequest(RequestSettings((1.0, 0.0), None), [5, 6], 2, [1])
    logits = torch.randn(VOCAB_SIZE)
    result = guidance(torch.stack([bystander[1], logits]), [bystander[0], again])
    expected = guided(logits.double().log_softmax(-1), [next_token_log_probs(models[0], torch.tensor([5, 6]))], (1.0,))
    torch.testing.assert_close(result[1].double(), expected, atol=1e-4, rtol=0)


def test_tokens_that_are_unknown_to_an_aligned_reward_model_are_its_own_fault(tmp_path, tokenizer, caplog):
    size = len(tokenizer)
    base = folder_of(tmp_path / "base", tiny_llama(vocab_size=size + 6), tokenizer)
    larger = tiny_tokenizer()
    larger.add_tokens(["<more>"])
    reward = folder_of(tmp_path / "reward", tiny_llama(1, vocab_size=size + 1), larger)
    (model,) = load_reward_lms([reward], base, base, size + 6, make_lm, torch.float32)
    logits = torch.randn(2, size + 6)
    texts = [[5, 6, size + 50], [5, 6, 7]]
    requests = [GuidedRequest(RequestSettings((1.0,), None), x, 3, [i]) for i, x in enumerate(texts)]
    result = BatchGuidance([model])(logits.clone(), requests)
    assert torch.equal(result[0], logits[0])
    assert not torch.equal(result[1], logits[1])
    assert "it has the token" in errors_of(caplog)[0]


# --- loading ---


def folder_of(path, model, tokenizer):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_lm(network, name):
    return PagedLM(network, length=64, n_tokens=128, name=name)


@torch.no_grad()
def test_adapters_are_merged_into_a_copy_of_the_served_weights(tmp_path, tokenizer):
    """Of the served model, although the adapter names another folder, since the weights are the same."""
    base = folder_of(tmp_path / "tiny", tiny_llama(vocab_size=len(tokenizer)), tokenizer)
    adapter = save_adapter(base, tmp_path / "adapter")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    (model,) = load_reward_lms([adapter], base, base, len(tokenizer), make_lm, torch.float32)
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
    (model,) = load_reward_lms([reward], base, base, size + 6, make_lm, torch.float32)
    logits = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([[5, 6, 7]])).logits[:, -1]
    result = BatchGuidance([model])(logits.clone(), [GuidedRequest(RequestSettings((1.0,), None), [5, 6, 7], 3, [0])])
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
        load_reward_lms([reward], base, base, len(larger), make_lm, torch.float32)


def test_without_vllm_the_error_names_what_is_missing():
    import hf_genarm.vllm

    if find_spec("vllm"):
        pytest.skip("vLLM is installed")

    with pytest.raises(ModuleNotFoundError, match="vllm"):
        hf_genarm.vllm.GenARM  # noqa: B018
