"""Named strengths, in the configuration, in a file, and as names of models; and keys in the wrong place."""

import asyncio
import json
from dataclasses import asdict

import pytest

from hf_genarm.vllm import middleware
from hf_genarm.vllm.request_settings import ServerDefaults, request_settings
from hf_genarm.vllm.server_config import ServerConfig

PRESETS = {"kind": {"alpha": [2.0, 0]}, "held": {"target_kl": 0.5}}


def defaults_of(presets):
    config = ServerConfig(reward_models=["a", "b"], alpha=[1, 0.5], reference=None, presets=presets)
    return config.server_defaults()


def test_a_request_names_a_preset():
    defaults = defaults_of(PRESETS)
    settings = request_settings({"genarm_preset": "kind"}, defaults)
    assert (settings.alpha, settings.target_kl) == ((2.0, 0.0), None)
    settings = request_settings({"genarm_preset": "held"}, defaults)
    assert (settings.alpha, settings.target_kl) == ((1.0, 0.5), 0.5)
    settings = request_settings({"genarm_preset": "held", "genarm_alpha": 3}, defaults)
    assert (settings.alpha, settings.target_kl) == ((3.0, 3.0), 0.5)
    assert request_settings(None, defaults).alpha == (1.0, 0.5)
    assert ServerDefaults.from_json(json.loads(json.dumps(asdict(defaults)))) == defaults


@pytest.mark.parametrize("name", ["Kind", "", 1, None, ["kind"], "default"])
def test_an_unknown_preset_is_refused_with_those_that_there_are(name):
    with pytest.raises(ValueError, match=r"`genarm_preset` is .*, but must be one of `kind`, `held`"):
        request_settings({"genarm_preset": name}, defaults_of(PRESETS))
    with pytest.raises(ValueError, match="this server has no presets"):
        request_settings({"genarm_preset": "kind"}, defaults_of(None))


@pytest.mark.parametrize(
    ("presets", "message"),
    [
        ([], "must be an object such as"),
        ({"kind": 1}, "must be an object of objects with alpha or target_kl, which 'kind' is not"),
        ({"kind": {}}, "which 'kind' is not"),
        ({"kind": {"strength": 1}}, "which 'kind' is not"),
        ({"kind": {"alpha": [1]}}, "such that `alpha` of 'kind' is a finite number, or a list of 2"),
        ("nowhere.json", r"an object, or a file that can be read \(No such file"),
    ],
)
def test_presets_that_are_refused(presets, message):
    with pytest.raises(ValueError, match=message):
        defaults_of(presets)


def test_a_file_is_read_again_when_it_changes(tmp_path, caplog):
    path = tmp_path / "presets.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="an object, or a JSON file"):
        defaults_of(str(path))
    path.write_text(json.dumps(PRESETS), encoding="utf-8")
    defaults = defaults_of(str(path))
    assert request_settings({"genarm_preset": "kind"}, defaults).alpha == (2.0, 0.0)
    path.write_text(json.dumps({"kind": {"alpha": 4.25}, "default": {"alpha": 0}}), encoding="utf-8")
    assert request_settings({"genarm_preset": "kind"}, defaults).alpha == (4.25, 4.25)
    assert not request_settings(None, defaults).is_guided  # the strengths of the server, changed
    path.write_text('{"kind": {"alpha": "strong"}}', encoding="utf-8")
    for _ in range(2):
        assert request_settings({"genarm_preset": "kind"}, defaults).alpha == (4.25, 4.25)
    path.unlink()
    assert request_settings({"genarm_preset": "kind"}, defaults).alpha == (4.25, 4.25)
    messages = [x.getMessage() for x in caplog.records]
    assert len(messages) == 2  # each once
    assert "such that `alpha` of 'kind' is a finite number" in messages[0]
    assert "a file that can be read" in messages[1]


# --- before vLLM reads the body ---


def sent(monkeypatch, body, path="/v1/completions", defaults=None, parts=1):
    """What comes out of the middleware: the body that the application gets, or the answer in its place."""
    monkeypatch.setattr(middleware.handshake, "find", lambda: [defaults or defaults_of(PRESETS)])
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = -(-len(data) // parts)
    chunks = [data[i * size : (i + 1) * size] for i in range(parts)]
    incoming = [
        {"type": "http.request", "body": x, "more_body": index < parts - 1} for index, x in enumerate(chunks)
    ] + [{"type": "http.disconnect"}]
    got, answers = [], []

    async def app(scope, receive, send):
        while (message := await receive())["type"] != "http.disconnect":
            got.append(message)
        assert dict(scope["headers"])[b"content-length"] == str(sum(len(x["body"]) for x in got)).encode()

    async def receive():
        return incoming.pop(0)

    async def send(message):
        answers.append(message)

    headers = [(b"content-length", str(len(data)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(middleware.KeysInBody(app)(scope, receive, send))
    if answers:
        assert not got
        assert answers[0]["status"] == 400
        return json.loads(answers[1]["body"])["error"]["message"]
    return b"".join(x["body"] for x in got)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_model_names_a_preset(monkeypatch, parts):
    body = {"model": "base:kind", "prompt": "x"}
    named = json.loads(sent(monkeypatch, body, parts=parts))
    assert named == body | {"vllm_xargs": {"genarm_preset": "kind"}}
    own = body | {"vllm_xargs": {"genarm_preset": "held", "genarm_alpha": 1}}
    assert json.loads(sent(monkeypatch, own, parts=parts)) == own


@pytest.mark.parametrize(
    "body", [{"model": "base"}, {"model": "org/base:Q4"}, {}, {"model": 1}, [1], b"{", b"", b"[" * 10**5]
)
def test_other_bodies_go_on_as_they_are(monkeypatch, body):
    assert sent(monkeypatch, body) == (body if isinstance(body, bytes) else json.dumps(body).encode())
    wrong = {"genarm_alpha": 1}
    assert json.loads(sent(monkeypatch, wrong, path="/tokenize")) == wrong


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"genarm_alpha": 2}, "`genarm_alpha` is 2 at the top level of the request, but must be in `vllm_xargs`"),
        ({"genarm_preset": "kind"}, "`genarm_preset` is 'kind' at the top level of the request"),
        ({"gen_arm_alpha": 2}, "`gen_arm_alpha` is 2, but there is no such key"),
        ({"extra_args": {"genarm_alpha": 2}}, "`genarm_alpha` is 2 in `extra_args`, but must be in `vllm_xargs`"),
        ({"extra_body": {"genarm_alpha": 2}}, "in `extra_body`, but must be in `vllm_xargs`"),
        ({"use_beam_search": True, "vllm_xargs": {"genarm_alpha": 1}}, "`genarm_alpha` has no effect on beam search"),
    ],
)
def test_keys_that_would_be_dropped_are_refused(monkeypatch, body, message):
    for path in ("/v1/completions", "/v1/chat/completions/batch", "/invocations"):
        assert message in sent(monkeypatch, body, path=path)


@pytest.mark.parametrize("body", [{"genarm_alpha": 2}, {"model": "base:kind"}])
def test_where_tokens_are_sent_keys_are_among_sampling_parameters(monkeypatch, body):
    path = "/inference/v1/generate"
    assert "must be" in (message := sent(monkeypatch, body, path=path))
    assert message.endswith("in `extra_args` of `sampling_params`.")
    right = {"model": "base", "sampling_params": {"extra_args": {"genarm_alpha": 2}}}
    assert json.loads(sent(monkeypatch, right, path=path)) == right


def test_of_a_very_large_body_nothing_is_read(monkeypatch):
    monkeypatch.setattr(middleware, "_LARGEST", 10)
    body = {"genarm_alpha": 2, "prompt": "x" * 100}
    assert json.loads(sent(monkeypatch, body, parts=4)) == body
