"""Requests to real engines of vLLM, in this process, against `generate`; and what engines refuse."""

import random
from pathlib import Path

import pytest
import torch
from tiny_server import Reference, check, save_tiny
from transformers import AutoTokenizer

from hf_genarm.demo import demo_model

NAME = "hf_genarm.vllm:GenARM"
OPTIONS = {"enforce_eager": True, "dtype": "float32", "gpu_memory_utilization": 0.1, "disable_log_stats": True}
LIMITS = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 128}


def engine(base, config, **options):
    from vllm import LLM

    config = {"additional_config": {"genarm": config}, "logits_processors": [NAME]} if config is not None else {}
    return LLM(base, **{**OPTIONS, **LIMITS, **config, **options})


def answers(llm, prompts, settings, max_tokens=16, **options):
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=x, **options) for x in settings]
    return llm.generate([{"prompt_token_ids": x} for x in prompts], params, use_tqdm=False)


def tokens(outputs):
    return [list(x.outputs[0].token_ids) for x in outputs]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("served"), n_adapters=2)


@pytest.fixture(scope="module")
def prompts():
    generator = random.Random(0)
    return [[generator.randrange(3, 200) for _ in range(1 + generator.randrange(60))] for _ in range(12)]


@pytest.fixture(scope="module")
def llm(folders):
    base, adapters = folders
    # Prompts are read in parts, and texts are preempted: 6 blocks of 32 tokens.
    return engine(base, {"reward_models": adapters, "alpha": [1, 0]}, num_gpu_blocks_override=7, block_size=32)


@pytest.fixture(scope="module")
def reference(folders):
    return Reference(*folders)


def test_each_request_has_its_own_strengths(llm, reference, prompts):
    strengths = [[1.0, 0.0], [0.0, 0.0], [0.5, 0.5], [-0.5, 1.0], [2.0, 0.0], [0.0, -1.0]] * 2
    settings = [{"genarm_alpha": x} if x != [1.0, 0.0] else None for x in strengths]
    texts = tokens(answers(llm, prompts, settings, 40))
    expected = [reference.texts([prompt], alpha, 40)[0][0] for prompt, alpha in zip(prompts, strengths, strict=True)]
    unguided = [text for text, _ in reference.texts(prompts, 0.0, 40)]
    changed = [text != plain for text, plain, alpha in zip(expected, unguided, strengths, strict=True) if any(alpha)]
    assert sum(changed) > len(changed) // 2
    assert texts == expected


def test_a_set_divergence(llm, reference, prompts):
    texts = tokens(answers(llm, prompts, [{"genarm_alpha": [1, 0], "genarm_target_kl": 0.2}] * 12, 24))
    expected = [text for text, _ in reference.texts(prompts, [1.0, 0.0], 24, target_kl=0.2)]
    assert texts == expected
    assert expected != [text for text, _ in reference.texts(prompts, [1.0, 0.0], 24)]


@pytest.mark.parametrize(
    "settings", [{"genarm_alpah": 1}, {"genarm_alpha": [1, 2, 3]}, {"genarm_alpha": "1"}, {"genarm_target_kl": -1}]
)
def test_bad_requests_are_refused_and_the_engine_goes_on(llm, reference, prompts, settings):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=f"`{next(iter(settings))}` is"):
        answers(llm, prompts[:1], [settings])
    assert tokens(answers(llm, prompts[:1], [None], 8)) == [reference.texts(prompts[:1], [1.0, 0.0], 8)[0][0]]


def test_a_request_without_a_token_to_choose_from_fails_nobody_else(llm, reference, prompts):
    """Its only token is the one that `min_tokens` forbids; the others in its batch have their own texts."""
    from vllm import SamplingParams

    odd = SamplingParams(temperature=0, max_tokens=8, min_tokens=1, allowed_token_ids=[2], detokenize=False)
    plain = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    params = [odd if index == 1 else plain for index in range(4)]
    outputs = llm.generate([{"prompt_token_ids": x} for x in prompts[:4]], params, use_tqdm=False)
    expected = [text for text, _ in reference.texts(prompts[:4], [1.0, 0.0], 8)]
    assert [x for index, x in enumerate(tokens(outputs)) if index != 1] == [expected[0], *expected[2:]]


def test_settings_that_the_front_end_has_not_checked_end_no_engine(llm, reference, prompts, monkeypatch, caplog):
    from hf_genarm.vllm import logits_processor

    monkeypatch.setattr(logits_processor.handshake, "find", lambda: [])
    monkeypatch.setattr(logits_processor, "genarm_keys", lambda _: {})
    texts = tokens(answers(llm, prompts[:2], [{"genarm_alpha": [1, 2, 3]}, {"genarm_alpha": [1, 0]}], 8))
    assert texts == [reference.texts(prompts[:1], 0.0, 8)[0][0], reference.texts(prompts[1:2], [1.0, 0.0], 8)[0][0]]


def test_beam_search_is_refused(llm, prompts):
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(VLLMValidationError, match="Beam search can't be guided"):
        llm.beam_search([{"prompt_token_ids": prompts[0]}], BeamSearchParams(beam_width=2, max_tokens=3))


def test_a_logit_bias_that_can_not_be_checked_is_refused(monkeypatch):
    from vllm import SamplingParams

    from hf_genarm.vllm import logits_processor

    monkeypatch.setattr(logits_processor.handshake, "find", lambda: [])
    for params in (SamplingParams(logit_bias={5: 1.0}), SamplingParams(extra_args={"genarm_alpha": 1})):
        with pytest.raises(ValueError, match=r"can't be checked, .* `HF_GENARM_VLLM`"):
            logits_processor.GenARM.validate_params(params)
    logits_processor.GenARM.validate_params(SamplingParams())


# --- the second model runner, which needs a GPU: its loader and its interface, with contexts made by hand ---


class Buffer:
    def __init__(self, values):
        self.gpu, self.np = values, values.numpy()


class Runner:
    """The states of the second model runner, and its steps, for a tiny model: real tokens, real contexts."""

    def __init__(self, llm, base):
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState
        from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs

        self.model = base
        tokens, lengths = torch.zeros(4, 128, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        self.states = LogitsProcRequestState(
            device=torch.device("cpu"),
            max_num_reqs=4,
            vocab_size=base.config.vocab_size,
            all_token_ids=Buffer(tokens),
            prompt_len=Buffer(lengths),
            prefill_len=Buffer(lengths.clone()),
            total_len=Buffer(lengths.clone()),
        )
        (processor,) = _load_v2_logitsprocs([NAME])
        self.processor = processor(llm.llm_engine.vllm_config, self.states)

    def add(self, slot, prompt, settings):
        from vllm import SamplingParams

        self.states.all_token_ids.gpu[slot, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        self.states.prompt_len.gpu[slot] = len(prompt)
        return self.processor.add_request(slot, SamplingParams(extra_args=settings))

    @torch.no_grad()
    def step(self, rows):
        """`rows` has (slot, text, number of drafts that it ends in) for each request."""
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

        flat = [(slot, offset, text[: len(text) - n + offset]) for slot, text, n in rows for offset in range(n + 1)]
        for slot, text, n in rows:
            self.states.all_token_ids.gpu[slot, : len(text) - n] = torch.tensor(text[: len(text) - n])
            self.states.all_token_ids.gpu[slot, len(text) - n :] = -7  # of nobody
        slots = torch.tensor([slot for slot, _, _ in rows], dtype=torch.int32)
        ctx = LogitsContext(
            expanded_idx_mapping=torch.tensor([slot for slot, _, _ in flat], dtype=torch.int32),
            idx_mapping=slots,
            idx_mapping_np=slots.numpy(),
            expanded_local_pos=torch.tensor([offset for _, offset, _ in flat], dtype=torch.int32),
            input_ids=torch.tensor([text[-1] for _, _, text in flat], dtype=torch.int32),
            pos=torch.tensor([len(text) - 1 for _, _, text in flat]),
            seq_lens_upper_bound_np=torch.tensor([len(text) for _, text, _ in rows]).numpy(),
        )
        logits = torch.cat([self.model(torch.tensor([text])).logits[:, -1] for _, _, text in flat])
        return logits, self.processor.apply(logits.clone(), ctx)


@torch.no_grad()
def test_the_second_model_runner_with_contexts_made_by_hand(llm, reference):
    runner = Runner(llm, reference.model)
    assert type(runner.processor).__name__ == "V2GenARM"
    assert runner.add(2, [5, 6, 7], {"genarm_alpha": [1, 0]})
    assert not runner.add(0, [9, 9], {"genarm_alpha": 0})
    assert runner.add(3, [20, 21, 22, 23, 24], {"genarm_alpha": [0.5, -0.5]})

    def check(rows, alphas):
        logits, result = runner.step(rows)
        row = 0
        for (_, text, n), alpha in zip(rows, alphas, strict=True):
            for offset in range(n + 1):
                reference.processor.alpha = alpha
                ids = torch.tensor([text[: len(text) - n + offset]])
                expected = reference.processor(ids, logits[row][None])[0]
                torch.testing.assert_close(result[row], expected, atol=1e-4, rtol=0)
                assert torch.equal(result[row], logits[row]) == (alpha == [0.0, 0.0])
                row += 1

    one, other, off = [1.0, 0.0], [0.5, -0.5], [0.0, 0.0]
    check([(3, [20, 21, 22], 0), (2, [5, 6, 7], 0), (0, [9, 9], 0)], [other, one, off])  # a prompt read in part
    check([(0, [9, 9, 4], 0), (3, [20, 21, 22, 23, 24], 0)], [off, other])
    check([(2, [5, 6, 7, 30, 31, 32], 2), (3, [20, 21, 22, 23, 24, 8, 8, 8], 2)], [one, other])  # drafts
    check([(3, [20, 21, 22, 23, 24, 8, 9], 0), (2, [5, 6, 7, 30, 31, 40, 41], 1)], [other, one])  # and refused ones
    assert runner.add(2, [40, 41, 42], {"genarm_alpha": [0.5, -0.5]})  # in the place of another
    check([(2, [40, 41, 42], 0)], [other])
    logits, result = runner.step([(0, [9, 9, 4, 4], 0)])
    assert torch.equal(logits, result)


# --- other engines: the first is of no use once there was one ---


def test_at_0_it_is_the_engine_without_it_bit_for_bit(folders, llm, prompts):
    ours = answers(llm, prompts[:4], [{"genarm_alpha": 0}] * 4, 24, logprobs=5)
    theirs = answers(engine(folders[0], None), prompts[:4], [None] * 4, 24, logprobs=5)
    assert tokens(ours) == tokens(theirs)
    assert [x.outputs[0].cumulative_logprob for x in ours] == [x.outputs[0].cumulative_logprob for x in theirs]


def test_a_reference_and_a_logit_bias(folders, prompts):
    from vllm.exceptions import VLLMValidationError

    base, adapters = folders
    llm = engine(base, {"reward_models": adapters[0], "reference": "base", "alpha": 0.7})
    reference = Reference(base, adapters[:1], reference="base")
    expected = [text for text, _ in reference.texts(prompts[:4], 0.7, 16)]
    assert tokens(answers(llm, prompts[:4], [None] * 4)) == expected
    with pytest.raises(VLLMValidationError, match=r"`logit_bias` is .* contrasted with its base"):
        answers(llm, prompts[:1], [None], logit_bias={5: 1.0})
    answers(llm, prompts[:1], [{"genarm_alpha": 0}], logit_bias={5: 1.0})


def test_fewer_texts_fit_than_are_read_at_once(folders, reference, prompts):
    base, adapters = folders
    llm = engine(base, {"reward_models": adapters, "alpha": [1, 0], "slots": 1})
    settings = [None, {"genarm_alpha": 0.5}] * 6
    expected = [
        reference.texts([x], 0.5 if y else [1.0, 0.0], 16)[0][0] for x, y in zip(prompts, settings, strict=True)
    ]
    assert tokens(answers(llm, prompts, settings)) == expected


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, {"logits_processors": [NAME]}, "has no object `genarm`"),
        ({"reward_model": "x"}, {}, "has the key `reward_model`"),
        ({}, {"logits_processors": [NAME, NAME]}, "2 times, but it must be there once"),
        ({"reward_memory": 1e4}, {}, r"is 10000, but .* one text of 128 tokens take [0-9,]+ bytes"),
        ({}, {"enable_prompt_embeds": True}, "can't be served with `--enable-prompt-embeds`"),
        ({}, {"max_model_len": 256, "hf_overrides": {"max_position_embeddings": 512}}, None),
    ],
)
def test_configurations_that_are_refused(folders, config, options, message):
    base, adapters = folders
    config = config if config is None or "reward_model" in config else {"reward_models": adapters[0], **config}
    if message is None:
        engine(base, config, **options)
        return
    with pytest.raises(ValueError, match=message):
        engine(base, config, **options)


def test_an_entry_point_is_refused(folders, monkeypatch):
    from importlib.metadata import EntryPoint

    from hf_genarm.vllm import engine as ours

    installed = [EntryPoint("genarm", NAME, "vllm.logits_processors")]
    monkeypatch.setattr(ours, "entry_points", lambda group: installed)
    with pytest.raises(ValueError, match=r"The entry point `genarm` loads .* into every engine"):
        engine(folders[0], {"reward_models": folders[1][0]})


@pytest.mark.slow
def test_a_shipped_adapter_on_the_real_model():
    base, adapter = demo_model(), str(Path(__file__).parents[2] / "model_cards" / "arm-smollm2-135m-sentiment")
    questions = [
        "How was the hotel?",
        "Hello",
        "Describe a rainy Monday in one sentence.",
        "Is tea better than coffee?",
    ]
    chat = AutoTokenizer.from_pretrained(base)
    prompts = [
        chat.apply_chat_template([{"role": "user", "content": x}], add_generation_prompt=True, return_dict=False)
        for x in questions
    ]
    strengths = [0.5, 1.0, 2.0, -0.5]
    # Two models of 540 MB and their runtime leave nothing for a cache in the usual share of a small machine.
    sizes = {"max_model_len": 256, "max_num_batched_tokens": 256, "gpu_memory_utilization": 0.2}
    llm = engine(base, {"reward_models": adapter}, **sizes)  # the reference is what it recommends
    texts = tokens(answers(llm, prompts, [{"genarm_alpha": x} for x in strengths], 20))
    reference = Reference(base, [adapter])
    for prompt, alpha, text in zip(prompts, strengths, texts, strict=True):
        (expected,) = reference.texts([prompt], alpha, 20)
        assert check(expected, text) != "wrong"
        assert expected[0] != reference.texts([prompt], 0.0, 20)[0][0]
