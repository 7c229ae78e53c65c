"""Sequential Monte Carlo: the distribution of its texts against the optimum over whole texts, written out."""

import importlib

import pytest
import torch
from helpers import generate, joint_passes
from support import ARCHITECTURES, ARM, BASE, BATCH, FILTERS, ONE, SAMPLING, Ban, chat_continues, embeddings
from tiny import EOS, PAD, VOCAB_SIZE, tiny_llama
from transformers import T5Config, T5ForConditionalGeneration, TemperatureLogitsWarper

from hf_genarm import GenARMLogitsProcessor, SMCOutput, smc_sample
from hf_genarm.decoding.particles import systematic_resampling

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")


def sample(base, processor, inputs=BATCH, seed=0, **options):
    """Sequential Monte Carlo, unless `custom_generate` says otherwise."""
    options = SAMPLING | {"custom_generate": smc_sample, "output_scores": False, "max_new_tokens": 8} | options
    return generate(base, [processor], inputs, seed, **options)


# --- the distribution ---


@pytest.fixture(scope="module")
def law():
    """What the benchmark writes out."""
    return importlib.import_module("examples.benchmarks.sequence_law")


def language(law, alpha=0.7, seed=30, **options):
    return law.Language(law.random_model(seed, 5), law.random_model(seed + 1, 5), alpha, length=3, **options)


class WithoutNormaliser(GenARMLogitsProcessor):
    """Guides as ever, and says that nothing was normalised: all weights are then 1."""

    @property
    def log_z(self):
        return torch.zeros_like(super().log_z)


def measure(law, tiny, processor=None, n_texts=24_000):
    """By number of particles, the distance to the optimum over whole texts, and the ratio of the estimate of Z to Z."""
    torch.manual_seed(0)
    return {n: law.measure(tiny, n, n_texts // n, processor) for n in (1, 4, 16)}


def check(law, tiny, measured):
    token_law = law.total_variation(tiny.token_law, tiny.target - tiny.log_z)
    assert token_law > 0.1
    (first, first_error), (second, second_error), (third, third_error) = (x["smc"] for x in measured.values())
    assert first == pytest.approx(token_law, abs=4 * first_error)
    assert second + 2 * second_error < 0.5 * first
    assert third + 2 * third_error < 0.6 * second  # with ever more, a quarter
    for at in measured.values():
        ratio, error = at["z"]
        assert ratio == pytest.approx(1.0, abs=3.5 * error)
        assert error < 0.02


def test_the_distribution_approaches_the_optimum_over_whole_texts(law):
    """And the estimate of Z has no bias, with any number of particles."""
    tiny = language(law)
    check(law, tiny, measure(law, tiny))


def test_a_wrong_weight_is_found(law):
    tiny = language(law)
    measured = measure(law, tiny, WithoutNormaliser(tiny.arm, tiny.alpha, base_model=tiny.base), 4000)
    with pytest.raises(AssertionError):
        check(law, tiny, measured)
    assert measured[16]["smc"][0] > 0.8 * measured[1]["smc"][0]
    assert abs(measured[16]["z"][0] - 1.0) > 0.5


def test_the_target_with_temperature_and_filters(law):
    """All factors to the power 1 / T, over the texts of which no token is filtered out."""
    tiny, plain = language(law, temperature=0.7, top_k=3), language(law)
    torch.manual_seed(0)
    measured = law.measure(tiny, 16, 500)
    assert measured["z"][0] == pytest.approx(1.0, abs=3.5 * measured["z"][1])
    assert measured["z"][1] < 0.02
    assert measured["smc"][0] < 0.3 * law.total_variation(tiny.token_law, tiny.target - tiny.log_z)
    of_plain = dict(zip(map(tuple, plain.texts), plain.target - plain.log_z, strict=True))
    others = torch.stack([of_plain[tuple(text)] for text in tiny.texts])
    assert law.total_variation(others, tiny.target - tiny.log_z) > 0.1


def test_weights_without_resampling(law):
    tiny = language(law)
    torch.manual_seed(0)
    output = tiny.sample(500, 16, ess_threshold=0.0)
    ratio, error = law.mean((output.log_z.double() - tiny.log_z).exp())
    assert ratio == pytest.approx(1.0, abs=3.5 * error)
    centre, error = law.distance(tiny.distributions(output), tiny.target - tiny.log_z)
    assert centre < 0.3 * law.total_variation(tiny.token_law, tiny.target - tiny.log_z)


def test_the_returned_text_is_drawn_by_weight(law):
    tiny = language(law, alpha=2.0)
    torch.manual_seed(0)
    output = tiny.sample(4000, 3, ess_threshold=0.0)
    heaviest = output.particles[torch.arange(4000), output.log_weights.argmax(dim=-1)]
    is_heaviest = (output.sequences == heaviest).all(dim=-1).double()
    same = (output.particles == heaviest[:, None]).all(dim=-1)
    expected = (output.log_weights.exp() * same).sum(dim=-1).double()
    assert expected.mean() < 0.95
    difference, error = law.mean(is_heaviest - expected)
    assert abs(difference) < 3.5 * error


def test_best_of_n_equals_drawing_and_comparing(law):
    tiny = language(law)
    torch.manual_seed(0)
    drawn = torch.multinomial(tiny.base_law.exp(), 3 * 20_000, replacement=True).view(-1, 3)
    best = drawn.gather(1, tiny.rewards[drawn].argmax(dim=1, keepdim=True))[:, 0]
    counted = torch.bincount(best, minlength=len(tiny.texts)) / len(best)
    assert 0.5 * (counted - law.best_of_n(tiny, 3).exp()).abs().sum() < 0.02
    assert law.total_variation(tiny.base_law, law.best_of_n(tiny, 3)) > 0.1


def test_systematic_resampling_rounds_up_or_down_and_has_no_bias():
    torch.manual_seed(0)
    weights = torch.tensor([0.05, 0.5, 0.0, 0.33, 0.12])
    drawn = systematic_resampling(weights.log().expand(4000, -1) + 7.0, 8)
    counts = torch.stack([(drawn == index).sum(dim=-1) for index in range(5)], dim=-1).double()
    assert ((counts - 8 * weights).abs() < 1).all()
    torch.testing.assert_close(counts.mean(dim=0), 8 * weights.double(), atol=0.03, rtol=0)


# --- in `generate` ---


@pytest.mark.parametrize("options", [{}, FILTERS, {"num_return_sequences": 2}, {"renormalize_logits": True}])
def test_one_particle_is_guided_sampling(options):
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    plain = sample(BASE, processor, custom_generate=None, **options).sequences
    after = torch.rand(1)
    output = sample(BASE, processor, n_particles=1, **options)
    assert output.sequences.tolist() == output.particles[:, 0].tolist() == plain.tolist()
    assert torch.rand(1) == after
    assert sample(BASE, processor, n_particles=1, return_dict_in_generate=False, **options).equal(plain)
    assert output.log_weights.tolist() == [[0.0]] * len(plain)
    assert sample(BASE, processor, seed=1, n_particles=1, **options).sequences.tolist() != plain.tolist()


def test_what_is_returned():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    output = sample(BASE, processor, n_particles=6, num_return_sequences=2)
    assert type(output) is SMCOutput
    prompts = BATCH["input_ids"].repeat_interleave(2, dim=0)
    n_texts = len(prompts)
    assert output.particles.shape[:2] == (n_texts, 6)
    assert output.particles[:, :, : prompts.shape[1]].equal(prompts[:, None].expand(-1, 6, -1))
    torch.testing.assert_close(output.log_weights.exp().sum(dim=-1), torch.ones(n_texts))
    assert output.log_z.shape == (n_texts,)
    assert all(
        text.tolist() in particles.tolist() for text, particles in zip(output.sequences, output.particles, strict=True)
    )
    written = output.particles[:, :, prompts.shape[1] :]
    has_ended = (written == EOS).cumsum(dim=-1) - (written == EOS).int() > 0
    assert has_ended.any()
    assert (written[has_ended] == PAD).all()


def test_it_stops_when_all_have_ended():
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    output = sample(BASE, processor, n_particles=4, sequence_bias=[[[EOS], 100.0]], max_new_tokens=20)
    assert output.particles.shape[-1] == BATCH["input_ids"].shape[1] + 1
    torch.testing.assert_close(output.log_weights, torch.full_like(output.log_weights, -torch.tensor(4.0).log()))


def test_each_request_has_its_own_particles_and_strengths():
    """The estimate for each prompt is that of the prompt alone."""
    strengths = torch.tensor([[0.0], [0.7], [1.4]])
    together = sample(BASE, GenARMLogitsProcessor(ARM, strengths, base_model=BASE), n_particles=400, max_new_tokens=2)
    assert together.log_z[0].item() == pytest.approx(0.0, abs=1e-4)
    for index in (1, 2):
        alone = {name: value[index : index + 1] for name, value in BATCH.items()}
        processor = GenARMLogitsProcessor(ARM, float(strengths[index]), base_model=BASE)
        of_one = sample(BASE, processor, alone, n_particles=400, max_new_tokens=2)
        assert together.log_z[index].item() == pytest.approx(of_one.log_z.item(), abs=0.15)
    assert (together.log_z[1] - together.log_z[2]).abs() > 1.0


def test_particles_are_exchanged_in_all_caches(base, adapters):
    """Of the base, of a reward model in its passes, and of one with passes of its own; against no cache at all."""
    fused = GenARMLogitsProcessor.from_pretrained(adapters[0], base_model=base)
    separate = GenARMLogitsProcessor(tiny_llama(1), base_model=base)
    unaware = GenARMLogitsProcessor(tiny_llama(1), attention_mask=BATCH["attention_mask"])
    for processor in (fused, separate, unaware):
        options = {"n_particles": 5, "ess_threshold": 1.0}
        output = sample(base, processor, **options)
        expected = sample(base, processor, use_cache=False, **options)
        assert output.particles.tolist() == expected.particles.tolist()
        torch.testing.assert_close(output.log_z, expected.log_z, atol=1e-3, rtol=0)
        assert output.particles.tolist() != sample(base, processor, ess_threshold=0, n_particles=5).particles.tolist()
    assert joint_passes(fused) > 0


@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.name)
def test_every_cache_of_the_base(family):
    base, processor = family.model(), GenARMLogitsProcessor(ARM)
    one = {"input_ids": ONE["input_ids"][:, :5]}
    options = {"n_particles": 4, "ess_threshold": 1.0, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 1}
    if family.name == "RecurrentGemma":
        with pytest.raises(ValueError, match="keeps what it has read in its modules"):
            sample(base, processor, one, **options)
        assert sample(base, processor, one, **options | {"ess_threshold": 0.0}).log_z.isfinite().all()
        return
    output = sample(base, processor, one, **options)
    expected = sample(base, processor, one, use_cache=False, **options)
    assert output.particles.tolist() == expected.particles.tolist()
    torch.testing.assert_close(output.log_z, expected.log_z, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"min_new_tokens": 6, "repetition_penalty": 1.3},
        {"suppress_tokens": list(Ban.tokens)},
        embeddings(),
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options_of_generate(options):
    """With one particle they are as in plain sampling, and with several as without a cache."""
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    plain = sample(BASE, processor, ONE, custom_generate=None, **options)
    assert sample(BASE, processor, ONE, n_particles=1, **options).sequences.tolist() == plain.sequences.tolist()
    of_cache = ("cache_implementation", "prefill_chunk_size", "inputs_embeds")  # embeddings of the prompt need one
    others = {name: value for name, value in options.items() if name not in of_cache}
    output = sample(BASE, processor, ONE, n_particles=5, ess_threshold=1.0, **options)
    expected = sample(BASE, processor, ONE, n_particles=5, ess_threshold=1.0, use_cache=False, **others)
    assert output.particles.tolist() == expected.particles.tolist()


def test_a_reference_and_several_rewards():
    """log Z is that of what guides, whatever it consists of."""
    models = [ARM, tiny_llama(3)]
    processor = GenARMLogitsProcessor(models, [0.8, -0.3], base_model=BASE, reference="base")
    processor.keeps_statistics = True
    output = sample(BASE, processor, n_particles=3, ess_threshold=0.0)
    table = processor.statistics(output.particles.flatten(0, 1))
    log_z = torch.zeros(output.particles.shape[0] * 3)
    start = BATCH["input_ids"].shape[1]
    written = output.particles.flatten(0, 1)[:, start:]
    lengths = torch.where((written == EOS).any(-1), (written == EOS).int().argmax(-1) + 1, written.shape[1])
    for sequence, position, value in zip(table["sequence"], table["position"], table["log_z"], strict=True):
        if position < start + lengths[sequence]:
            log_z[sequence] += value
    expected = log_z.view(-1, 3).log_softmax(dim=-1)
    assert expected.std() > 0.1
    torch.testing.assert_close(output.log_weights, expected, atol=1e-3, rtol=0)


def test_the_full_contrast_with_the_base_is_sampled_exactly_by_tokens(base, adapters):
    """π_base (π_r / π_base) is π_r, which is normalised at each token."""
    contrast = GenARMLogitsProcessor.from_pretrained(adapters[0], base_model=base, reference="base")
    output = sample(base, contrast, n_particles=5)
    torch.testing.assert_close(output.log_z, torch.zeros(len(output.log_z)), atol=1e-4, rtol=0)
    contrast.alpha = 0.5
    assert (sample(base, contrast, n_particles=5).log_z.abs() > 0.1).all()


class Twice(Ban):
    """Changes what guidance said."""

    def __call__(self, input_ids, scores):
        return 2 * scores


REFUSED = {
    "`logits_processor` has 2 `GenARMLogitsProcessor`": lambda own: {"logits_processor": [own, ANOTHER]},
    "`logits_processor` has 0 `GenARMLogitsProcessor`": lambda own: {"logits_processor": []},
    "`target_kl` is 0.5": lambda own: {
        "logits_processor": [GenARMLogitsProcessor(ARM, target_kl=0.5, base_model=BASE)]
    },
    "more is done to probabilities .*`Twice`": lambda own: {"logits_processor": [own, Twice()]},
    "set the temperature by": lambda own: {"logits_processor": [own, TemperatureLogitsWarper(0.5)]},
    "`n_particles` is 0": lambda own: {"n_particles": 0},
    "`ess_threshold` is 1.5": lambda own: {"ess_threshold": 1.5},
    "`do_sample` is False": lambda own: {"do_sample": False},
    "`num_beams` is 2": lambda own: {"num_beams": 2},
    "`output_scores`, `output_hidden_states` can't be": lambda own: {
        "output_scores": True,
        "output_hidden_states": True,
    },
    "cache of an earlier text": lambda own: chat_continues(),
}
ANOTHER = GenARMLogitsProcessor(ARM, base_model=BASE)


@pytest.mark.parametrize("message", REFUSED)
def test_combinations_without_a_distribution_are_refused(message):
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    options = REFUSED[message](processor)
    with pytest.raises(ValueError, match=message):
        BASE.generate(
            **(ONE | SAMPLING | {"logits_processor": [processor], "custom_generate": smc_sample} | options),
            max_new_tokens=4,
            return_dict_in_generate=True,
        )


def test_a_streamer_is_refused_where_it_is_handed_on():
    with pytest.raises(ValueError, match="`streamer` can't be served"):
        smc_sample(BASE, ONE["input_ids"], [ANOTHER], [], BASE.generation_config, streamer=object())


def test_an_encoder_decoder_is_refused():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB_SIZE}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=PAD)).eval()
    with pytest.raises(ValueError, match="whose encoder reads the prompt"):
        sample(base, GenARMLogitsProcessor(ARM), ONE)


def test_a_repetition_penalty_of_several_prompts():
    """It is per row, and knows how much of each row is padding."""
    processor = GenARMLogitsProcessor(ARM, base_model=BASE)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "repetition_penalty": 1.3}
    texts = []
    for custom in ({"custom_generate": smc_sample, "n_particles": 1}, {}):
        torch.manual_seed(0)
        texts.append(BASE.generate(**BATCH, logits_processor=[processor], **options, **custom).tolist())
    assert texts[0] == texts[1]
    BASE.generate(**BATCH, logits_processor=[processor], custom_generate=smc_sample, n_particles=4, **options)
    with pytest.raises(TypeError, match=r"`n_particles` is 1\.5"):
        BASE.generate(**BATCH, logits_processor=[processor], custom_generate=smc_sample, n_particles=1.5, **options)
