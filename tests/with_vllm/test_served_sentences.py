"""Sentences over HTTP, in chats and texts, against `generate` with the processor that reads the same sentences."""

import pytest
import requests
from tiny_server import LENGTH, Reference, check, guided_by, save_sentence, save_tiny, server
from transformers import AutoTokenizer

NAMED, OWN = "The day is fine.", ["The sun is up.", "Be brief."]
CHATS = [
    [{"role": "user", "content": "How was the food?"}],
    [{"role": "system", "content": "Be fast."}, {"role": "user", "content": "Tell me about the sun and the day."}],
]
TEXT = "The sun and"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, adapters = save_tiny(
        tmp_path_factory.mktemp("sentences"), initializer_range=0.2, max_position_embeddings=LENGTH
    )
    return base, adapters[0]


@pytest.fixture(scope="module")
def ask(folders, tmp_path_factory):
    """Sends a request; returns the token ids of its answer, or the message of an error 400."""
    base, adapter = folders
    config = {"reward_models": [{"name": "fine", "sentence": NAMED}, adapter], "alpha": [1.5, 0], "max_sentences": 2}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with server(base, log, *guided_by(config | {"reference": "base"})) as (_, url):

        def ask(prompt, **xargs):
            body = {"model": "m", "temperature": 0, "max_tokens": 16, "return_token_ids": True, "vllm_xargs": xargs}
            is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
            path, name = ("chat/completions", "messages") if is_chat else ("completions", "prompt")
            answer = requests.post(f"{url}/v1/{path}", json=body | {name: prompt}, timeout=600)
            if answer.status_code == 400:
                return answer.json()["error"]["message"]
            assert answer.ok, answer.text
            return answer.json()["choices"][0]["token_ids"]

        yield ask
        assert "Guidance is on: fine at 1.5, " in log.read_text()
        assert "and up to 2 sentences of a request; reference: base; " in log.read_text()
        assert "MB of weights, with another copy of the base that reads sentences" in log.read_text()


@pytest.fixture(scope="module")
def texts(folders, tmp_path_factory):
    """What `generate` writes for a prompt, and how clear each choice was."""
    base, adapter = folders
    folder = tmp_path_factory.mktemp("texts")
    sentences = [save_sentence(folder / str(index), x) for index, x in enumerate((NAMED, *OWN))]
    reference = Reference(base, [sentences[0], adapter, *sentences[1:]], reference="base")
    return lambda prompt, alpha: reference.texts([prompt], alpha, 16)[0]


@pytest.mark.parametrize("prompt", [*CHATS, TEXT], ids=["chat", "system", "text"])
def test_sentences_of_the_server_and_of_requests(ask, texts, prompt):
    alphas = {
        (1.5, 0.0, 0.0, 0.0): {},
        (0.0, 0.0, 2.0, 0.0): {"genarm_alpha": 0, "genarm_sentences": OWN[0], "genarm_sentence_alpha": 2},
        (2.0, 0.5, 1.5, -1.0): {
            "genarm_alpha": [2, 0.5],
            "genarm_sentences": OWN,
            "genarm_sentence_alpha": [1.5, -1],
        },
    }
    unguided = texts(prompt, 0.0)[0]
    expected = {alpha: texts(prompt, list(alpha)) for alpha in alphas}
    assert len({tuple(unguided), *(tuple(text) for text, _ in expected.values())}) == 4
    for alpha, xargs in alphas.items():
        assert check(expected[alpha], ask(prompt, **xargs)) in ("same", "tie")
    assert ask(prompt, genarm_alpha=0) == unguided


def test_prompts_in_place_of_sentences(ask, texts, folders):
    expected = texts(CHATS[0], [0.0, 0.0, 2.0, 0.0])
    asked = [{"role": "system", "content": OWN[0]}, *CHATS[0]]
    ids = AutoTokenizer.from_pretrained(folders[0]).apply_chat_template(asked, add_generation_prompt=True)
    for prompt in (asked, list(ids["input_ids"])):
        xargs = {"genarm_alpha": 0, "genarm_prompts": [[], prompt], "genarm_sentence_alpha": 2}
        assert check(expected, ask(CHATS[0], **xargs)) in ("same", "tie")


@pytest.mark.parametrize(
    ("prompt", "xargs", "message"),
    [
        (CHATS[0], {"genarm_sentences": [*OWN, NAMED]}, "but must be 2 sentences at most"),
        (CHATS[0], {"genarm_sentences": " "}, "but must be a text that asks for something"),
        (CHATS[0], {"genarm_sentences": OWN, "genarm_sentence_alpha": [1]}, "a list of 2, one for each sentence"),
        (CHATS[0], {"genarm_prompts": [[], [10**6]]}, "a list of prompts, each a list of token ids below"),
        (CHATS[0], {"genarm_prompts": [[5] * 500]}, "`max_tokens` is 16, but must be a number up to 12"),
        ([5, 6, 7], {}, "can be put into one text, but `prompt` is [5, 6, 7]"),
    ],
)
def test_what_is_refused(ask, prompt, xargs, message):
    assert message in ask(prompt, **xargs)
