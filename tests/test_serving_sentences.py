"""Sentences on a server, without an engine: what requests may ask for, how prompts are made, and what is guided."""

import asyncio
import json
from dataclasses import asdict

import pytest
import torch
from oracle import guided, next_token_log_probs
from test_sentences import CHATS, NO_SYSTEM
from test_serving_startup import started
from tiny import VOCAB_SIZE, save_adapter, save_llama, tiny_llama
from transformers import AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo
from hf_genarm.vllm import middleware
from hf_genarm.vllm.batch_guidance import BatchGuidance, GuidedRequest
from hf_genarm.vllm.paged_lm import PagedLM
from hf_genarm.vllm.request_settings import RequestSettings, ServerDefaults, refuse_long, request_settings
from hf_genarm.vllm.reward_lms import RewardLM, load_reward_lms
from hf_genarm.vllm.sentence_prompts import with_prompts
from hf_genarm.vllm.server_config import ServerConfig
from hf_genarm.vllm.startup_checks import check_reward_models

KIND = {"name": "kind", "sentence": "Be kind."}
# An adapter, a sentence of the server, and up to two of a request
DEFAULTS = ServerDefaults(
    ("brief", "kind"), (1.0, 0.0), None, sentences=(None, "Be kind."), max_sentences=2, max_length=40, vocab_size=50
)


# --- the batch ---


@torch.no_grad()
@pytest.mark.parametrize("n_rows", [1, 3])
def test_each_sentence_reads_the_answer_after_its_own_prompt(n_rows):
    """Of three requests, with one, two and no sentences, read together in one pass."""
    base, arm = tiny_llama(0), tiny_llama(1)
    arm_lm, reader = (RewardLM(PagedLM(tiny_llama(x), length=64, n_tokens=512), VOCAB_SIZE) for x in (1, 0))
    guidance, calls = BatchGuidance([arm_lm, reader], "base", reader), []
    read, reader.lm._read = reader.lm._read, lambda ends: calls.append(1) or read(ends)
    settings = [
        RequestSettings((0.5, 1.5), None, {1: (9, 8, 7, 6, 5)}),
        RequestSettings((0.0, 2.0, -1.0), None, {1: (20, 21), 2: (30,)}),
        RequestSettings((1.0, 0.0), None),
    ]
    prompts = [[5, 6, 7], [11, 12, 13, 14], [40]]
    for n_new in (0 if n_rows == 1 else 2, 4):
        answers = [[3 + i, 4, 5, 6][:n_new] for i in range(3)]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        logits = torch.cat([base(torch.tensor([text])).logits[0, -n_rows:] for text in texts])
        requests = [
            GuidedRequest(x, text, len(prompt), range(i * n_rows, (i + 1) * n_rows))
            for i, (x, text, prompt) in enumerate(zip(settings, texts, prompts, strict=True))
        ]
        if n_rows > n_new + 1:
            continue
        calls.clear()
        ours = guidance(logits.clone(), requests)
        assert len(calls) == 1
        for i, (x, text) in enumerate(zip(settings, texts, strict=True)):
            for row in range(n_rows):
                end = len(text) - n_rows + 1 + row
                own = {index: [*x.prompts[index], *text[len(prompts[i]) : end]] for index in x.prompts}
                models = {0: arm} | dict.fromkeys(own, base)
                scores = next_token_log_probs(base, torch.tensor(text[:end]))
                used = [index for index, alpha in enumerate(x.alpha) if alpha]
                rewards = [next_token_log_probs(models[k], torch.tensor(own.get(k, text[:end]))) - scores for k in used]
                expected = guided(scores, rewards, [x.alpha[k] for k in used])
                torch.testing.assert_close(ours[i * n_rows + row].double(), expected, atol=1e-4, rtol=0)
    assert guidance.all_models() == [arm_lm, reader]
    for x in settings:
        guidance.release(x)
    assert reader.lm.pages.n_in_use == 0


def test_a_prompt_that_can_not_be_read_is_the_fault_of_its_request(caplog):
    reader = RewardLM(PagedLM(tiny_llama(0), length=64, n_tokens=128), VOCAB_SIZE)
    settings = RequestSettings((1.0,), None, {0: (5,) * 70})
    logits = torch.randn(1, VOCAB_SIZE)
    assert torch.equal(
        BatchGuidance([], "base", reader)(logits.clone(), [GuidedRequest(settings, [5], 1, [0])]), logits
    )
    assert "because its 70 tokens are more than the 64 that can be read" in caplog.text


# --- what a request may ask for ---


def test_settings():
    assert request_settings(None, DEFAULTS).alpha == (1.0, 0.0)
    prompts = [[5, 6], [7]]
    settings = request_settings({"genarm_prompts": prompts, "genarm_alpha": [0, 2]}, DEFAULTS)
    assert (settings.alpha, settings.prompts) == ((0.0, 2.0, 1.5), {1: (5, 6), 2: (7,)})
    settings = request_settings({"genarm_prompts": "[[], [7], [8]]", "genarm_sentence_alpha": [3, 0]}, DEFAULTS)
    assert (settings.alpha, settings.prompts) == ((1.0, 0.0, 3.0, 0.0), {2: (7,)})
    assert ServerDefaults.from_json(json.loads(json.dumps(asdict(DEFAULTS)))) == DEFAULTS


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"genarm_sentences": "Be kind."}, "`genarm_sentences` is 'Be kind.', but must be in a request to "),
        ({"genarm_alpha": 1}, "The sentence `kind` has strength 1, but what it reads is not there"),
        ({"genarm_prompts": [[], []]}, "The sentence of the request has strength 1.5, but what it reads is not there"),
        ({"genarm_prompts": []}, "but must be 1 prompts, one for each sentence of the server, and up to 2 more"),
        ({"genarm_prompts": [[], [1], [2], [3]]}, "and up to 2 more"),
        ({"genarm_prompts": [[], [50]]}, "each a list of token ids below 50"),
        ({"genarm_prompts": [[], [-1]]}, "each a list of token ids"),
        ({"genarm_prompts": [[], [True]]}, "each a list of token ids"),
        ({"genarm_prompts": [[], "x"]}, "each a list of token ids"),
        ({"genarm_prompts": "[[1"}, "each a list of token ids"),
        ({"genarm_prompts": "[" * 10**5}, "each a list of token ids"),
        ({"genarm_prompts": 7}, "each a list of token ids"),
        ({"genarm_sentence_alpha": 2}, "is 2, but must be left out, since there is no sentence of the request"),
        ({"genarm_prompts": [[], [1]], "genarm_sentence_alpha": "2"}, "must be a finite number, or a list of 1"),
        ({"genarm_sentence": "x"}, "there is no such key"),
        ({"genarm_\ud800": "x"}, r"`genarm_\ud800` is 'x', but there is no such key"),
    ],
)
def test_what_is_refused(keys, message):
    with pytest.raises(ValueError, match=r"genarm|sentence") as error:
        request_settings(keys, DEFAULTS)
    assert message in str(error.value)


def test_a_server_without_sentences_says_how_to_get_them():
    with pytest.raises(ValueError, match="this server takes none: it was started without `max_sentences` in `genarm`"):
        request_settings({"genarm_sentences": ["Be kind."]}, ServerDefaults(("a",), (1.0,), None))


def test_an_answer_has_to_fit_after_the_longest_prompt():
    settings = request_settings({"genarm_prompts": [[], [5] * 30]}, DEFAULTS)
    refuse_long(settings, 10, DEFAULTS)
    for wrong in (11, None):
        with pytest.raises(ValueError, match=f"`max_tokens` is {wrong}, but must be a number up to 10"):
            refuse_long(settings, wrong, DEFAULTS)
    refuse_long(request_settings(None, DEFAULTS), None, DEFAULTS)


# --- the prompts that the front end makes ---


class Rendering:
    """What vLLM's endpoints for rendering answer, with a tokenizer, for texts of 300 tokens."""

    def __init__(self, tokenizer):
        self.tokenizer, self.bodies = tokenizer, []

    async def __call__(self, body):
        self.bodies.append(body)
        try:
            ids = self.ids(body)
        except Exception as error:  # whatever the template raises
            return 400, {"error": {"message": str(error)}}
        most = body.get("max_completion_tokens") or body.get("max_tokens") or 300
        answer = {"token_ids": ids, "sampling_params": {"max_tokens": min(most, 300 - len(ids))}}
        return 200, answer if "messages" in body else [answer]

    def ids(self, body):
        if "prompt" in body:
            return self.tokenizer(body["prompt"])["input_ids"]
        text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def made(tokenizer, body, path=None, **xargs):
    rendering = Rendering(tokenizer)
    path = path or ("/v1/chat/completions" if "messages" in body else "/v1/completions")
    request = body | {"model": "m", "vllm_xargs": xargs}
    return asyncio.run(with_prompts(request, path, DEFAULTS, rendering)), rendering


@pytest.mark.parametrize(
    ("prompt", "template"),
    [(CHATS[0], None), (CHATS[1], None), ("The sun", None), (CHATS[0], NO_SYSTEM)],
    ids=["chat", "system", "text", "no system messages"],
)
def test_prompts_are_those_of_the_processor(tokenizer, monkeypatch, prompt, template):
    if template is not None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    body = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    sentences = ["Be brief.", "The sun is up."]
    xargs = {"genarm_sentences": sentences, "genarm_alpha": [0, 2], "session_id": "x"}
    request, _ = made(tokenizer, body, **xargs)
    base = tiny_llama(vocab_size=len(tokenizer))
    processor = GenARMLogitsProcessor.from_sentences(["Be kind.", *sentences], base, tokenizer)
    processor.encode([prompt])
    expected = [x["input_ids"][0].tolist() for x in processor.prompts]
    keys = request["vllm_xargs"]
    assert json.loads(keys.pop("genarm_prompts")) == expected
    assert keys == {"genarm_alpha": [0, 2], "session_id": "x"}


def test_no_more_tokens_than_fit_after_the_longest_prompt(tokenizer):
    request, rendering = made(tokenizer, {"messages": CHATS[0]}, genarm_sentences="Be brief.", genarm_alpha=0)
    plain, longer = (len(rendering.ids(x)) for x in rendering.bodies)
    assert longer > plain
    assert request["max_completion_tokens"] == 300 - longer
    request, _ = made(tokenizer, {"messages": CHATS[0], "max_tokens": 7}, genarm_sentences="Be brief.", genarm_alpha=0)
    assert request["max_completion_tokens"] == 7
    assert all("vllm_xargs" not in x for x in rendering.bodies)


def test_prompts_of_the_client_and_strengths_of_0(tokenizer):
    body = {"messages": CHATS[0]}
    request, rendering = made(tokenizer, body, genarm_prompts=[[], CHATS[1], [7, 8]])
    expected = [[], rendering.ids({"messages": CHATS[1]}), [7, 8]]
    assert json.loads(request["vllm_xargs"]["genarm_prompts"]) == expected
    request, rendering = made(tokenizer, body)
    assert json.loads(request["vllm_xargs"]["genarm_prompts"]) == [[]]
    assert not rendering.bodies
    assert asyncio.run(with_prompts({"vllm_xargs": None}, "/v1/completions", DEFAULTS, rendering)) == {
        "vllm_xargs": {"genarm_prompts": "[[]]"}
    }
    for path, other in (("/v1/responses", {}), ("/v1/chat/completions", {"use_beam_search": True})):
        asked = body | other
        assert made(tokenizer, asked, path)[0] == asked | {"model": "m", "vllm_xargs": {}}


@pytest.mark.parametrize(
    ("body", "keys", "message"),
    [
        ({"messages": CHATS[0]}, {"genarm_sentences": ["a", "b", "c"]}, "2 sentences at most"),
        ({"messages": CHATS[0]}, {"genarm_sentences": ["a", ""]}, "a text that asks for something, or a list of them"),
        ({"messages": CHATS[0]}, {"genarm_sentences": 7}, "a text that asks for something, or a list of them"),
        ({"messages": CHATS[0]}, {"genarm_sentences": "a", "genarm_prompts": [[]]}, "is given with `genarm_prompts`"),
        ({"messages": CHATS[0]}, {"genarm_prompts": ["The sun"]}, "must have messages or token ids"),
        ({"messages": "x"}, {"genarm_sentences": "a"}, "`messages` is 'x', but must be a chat"),
        ({"prompt": "x"}, {"genarm_prompts": [CHATS[0]]}, "must have a text or token ids"),
        ({"prompt": [5, 6]}, {"genarm_sentences": "a"}, "can be put into one text, but `prompt` is [5, 6]"),
        ({"prompt": ["x", "y"]}, {"genarm_sentences": "a"}, "can be put into one text"),
        (
            {"prompt": "x", "truncate_prompt_tokens": 5},
            {"genarm_sentences": "a"},
            "`truncate_prompt_tokens` is 5, but would cut off what a sentence puts before the prompt",
        ),
    ],
)
def test_what_the_front_end_refuses(tokenizer, body, keys, message):
    with pytest.raises(ValueError, match=r".") as error:
        made(tokenizer, body, genarm_alpha=[1, 0], **keys)
    assert message in str(error.value)


def test_a_template_without_any_place_for_a_sentence_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "<bos>the sun")
    with pytest.raises(ValueError, match=r"The chat template leaves out the sentence 'Be brief.'"):
        made(tokenizer, {"messages": CHATS[0]}, genarm_sentences="Be brief.")


@pytest.mark.parametrize("status", [200, 403])
def test_the_middleware_asks_the_application_itself(tokenizer, monkeypatch, status):
    monkeypatch.setattr(middleware.handshake, "find", lambda: [DEFAULTS])
    rendering, got, answers = Rendering(tokenizer), [], []

    async def app(scope, receive, send):
        body = (await receive())["body"]
        assert dict(scope["headers"]) == {b"x": b"y", b"content-length": str(len(body)).encode()}
        if not scope["path"].endswith("/render"):
            got.append(json.loads(body))
            return
        assert (scope["path"], scope["raw_path"]) == ("/v1/chat/completions/render", b"/v1/chat/completions/render")
        _, answer = await rendering(json.loads(body))
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def receive():
        xargs = {"genarm_sentences": ["Be brief."]}
        body = {"model": "m", "messages": CHATS[0], "vllm_xargs": xargs, "max_tokens": 5}
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message):
        answers.append(message)

    path = "/v1/chat/completions"
    headers = [(b"x", b"y"), (b"content-length", b"1")]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers}
    asyncio.run(middleware.KeysInBody(app)(scope, receive, send))
    if status == 403:
        assert not got
        assert "which is closed. Start the server with `python -m hf_genarm.vllm`" in answers[1]["body"].decode()
        return
    asked = [{"role": "system", "content": "Be brief."}, *CHATS[0]]
    xargs = {"genarm_prompts": json.dumps([[], rendering.ids({"messages": asked})])}
    assert got == [
        {"model": "m", "messages": CHATS[0], "max_tokens": 5, "max_completion_tokens": 5, "vllm_xargs": xargs}
    ]


# --- the configuration, and what is loaded ---


@pytest.fixture
def base(tmp_path):
    return save_llama(tmp_path / "tiny", initializer_range=0.2)


def test_sentences_of_a_server_are_texts_or_folders(base, tmp_path):
    (tmp_path / "arm-brief").mkdir()
    RewardInfo(sentence="Be brief.").save(tmp_path / "arm-brief")
    names = [str(tmp_path / "arm-brief"), KIND, {"sentence": "Be fast."}]
    config = check_reward_models(ServerConfig(reward_models=names), base, None, 128)
    defaults = config.server_defaults()
    assert defaults.reward_models == ("arm-brief", "kind", "Be fast.")
    assert defaults.sentences == ("Be brief.", "Be kind.", "Be fast.")
    assert (defaults.alpha, config.reference, config.n_sentences, config.models) == ((1.5, 1.5, 1.5), "base", 3, [])
    alone = ServerConfig(max_sentences=2).with_recommended([])
    assert (alone.alpha, alone.reference, alone.n_sentences) == ([], "base", 2)
    assert alone.server_defaults().sentence_places(2) == [0, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"reward_models": {"name": "kind"}}, "`reward_models` .* must be a Hub id or a folder, or a sentence such as"),
        ({"reward_models": {"sentence": " "}}, "`reward_models` .* must be"),
        ({"reward_models": {"sentence": "a", "alpha": 1}}, "`reward_models` .* must be"),
        ({"reward_models": []}, "only with `max_sentences` it can be left out"),
        ({"reward_models": KIND, "max_sentences": -1}, "`max_sentences` .* must be a whole number"),
        ({"reward_models": KIND, "reference": None}, '`reference` .* must be "base", because sentences are contrasted'),
        ({"max_sentences": 1, "alpha": 1}, "`alpha` .* must be left out, since there is no reward model"),
    ],
)
def test_configurations_that_are_refused(config, message):
    def settled():
        given = ServerConfig.from_additional_config({"genarm": config})
        return given.with_recommended(given.infos())

    with pytest.raises(ValueError, match=message):
        settled()


@torch.no_grad()
def test_the_served_model_is_loaded_once_more_and_adapters_stay_as_they_were(base, tmp_path, tokenizer):
    adapter = save_adapter(base, tmp_path / "adapter")

    def make_lm(network, name):
        return PagedLM(network, length=64, n_tokens=128, name=name)

    size = len(tokenizer)
    arm, reader = load_reward_lms([adapter], base, base, size, make_lm, torch.float32, and_served=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    text = [5, 6, 7, 8]
    expected = next_token_log_probs(model, torch.tensor(text))
    torch.testing.assert_close(reader.log_probs({0: text}, [1])[0].double(), expected, atol=1e-4, rtol=0)
    adapted = next_token_log_probs(AutoregressiveRewardModel.from_pretrained(adapter, model).model, torch.tensor(text))
    torch.testing.assert_close(arm.log_probs({0: text}, [1])[0].double(), adapted, atol=1e-4, rtol=0)
    assert not torch.allclose(adapted, expected, atol=1e-2)


def test_a_server_with_sentences_can_render_them(base, monkeypatch):
    config = json.dumps({"genarm": {"max_sentences": 2}})
    assert started(monkeypatch, "--model", base, "--additional-config", config)[-1] == "--enable-scale-out"
