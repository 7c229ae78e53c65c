"""
Random requests, most of them odd, to a server that others use at the same time: it never ends, and the others get the
texts that they would have without the odd ones.

`HF_GENARM_FUZZ` is the number of requests, 100 if it is not set; half of them go to a server with sentences.
`HF_GENARM_SEED` is the seed that they are made from.
"""

import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from tiny_server import AT_ONCE, LENGTH, Reference, check, guided_by, save_sentence, save_tiny, server

pytestmark = pytest.mark.slow

N_REQUESTS = int(os.environ.get("HF_GENARM_FUZZ", "100"))
VOCAB_SIZE = 320
N_TOKENS = 12
PRESETS = {"kind": {"alpha": [2, 0]}, "brief": {"alpha": [0, 1]}}
NAMED, OWN = "The day is fine.", ["The sun is up.", "Be brief."]
TEXTS = ["The sun and", "How was the food? The food was", "Tell me about the train ride. It was late, and"]
CHATS = [
    [{"role": "user", "content": "How was the food?"}],
    [{"role": "system", "content": "Be fast."}, {"role": "user", "content": "Tell me about the sun and the day."}],
]
STRENGTHS = [0, 0.5, 1, -1, 3, -20, 1e6, -1e6, 1e-30, 1e7, "1", True, None, [], [1], [1, 0], [0.0, -2.0], [1, 2, 3]]
STRENGTHS += [float("nan"), float("-inf"), 10**400, [1, 0, 1.5]]
SENTENCES = [OWN[0], OWN, [NAMED, *OWN], [], "", " ", "\0", "\ud800", "<eos><bos>", "the " * LENGTH, 3, None, ["a", 3]]
READ = [[], [[]], [[5, 6, 7]], [[], [5, 6]], [[5] * 40, [6] * 40, [7]], [[5] * LENGTH], [[5] * (LENGTH - 20)], [3]]
READ += [[["a"]], [[10**6]], [[-1]], [[True]], [[1.5]], "[[5, 6]]", "[", "[" * 10**5, None, ["the sun"], ["", [5]]]
READ += [CHATS, [[{"role": "user"}]], [[{"role": "system", "content": None}]], [[[{"role": "user", "content": "a"}]]]]
MESSAGES = [[], [{}], "a", [{"role": "user"}], [{"role": "assistant", "content": "the"}], [{"role": 3, "content": "a"}]]
MESSAGES += [[{"role": "system", "content": "the"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}]]
MESSAGES += [[{"role": "user", "content": "the " * LENGTH}], [{"role": "user", "content": None}], CHATS[0] * 2, *CHATS]


def some_value(generator, name):
    """A value of a sampling parameter, possible or not."""
    ids = [generator.choice([0, 1, 2, 5, 40, VOCAB_SIZE - 1, generator.randrange(VOCAB_SIZE)]) for _ in range(3)]
    return generator.choice(
        {
            "temperature": [0, 0, 0.01, 1, 2, 100, -1],
            "top_p": [1, 0.5, 1e-6, 0, 2],
            "top_k": [0, 1, 5, -1, 10**6],
            "min_p": [0, 0.5, 1, 2],
            "presence_penalty": [0, 2, -2, 3],
            "frequency_penalty": [0, 2, -2],
            "repetition_penalty": [1, 0.1, 10, 0, -1],
            "min_tokens": [0, 1, 5, 100],
            "max_tokens": [0, 1, 2, 12, 24, -1],
            "allowed_token_ids": [[2], ids[:1], ids, [], [VOCAB_SIZE + 5], [-1]],
            "stop_token_ids": [[2], ids],
            "bad_words": [["a"], ["the", " the"], [""]],
            "logit_bias": [{"5": 100}, {"2": -100}, {str(ids[0]): 1e9}, {"99999": 1}],
            "ignore_eos": [True, False],
            "seed": [0, 1, -1, 2**40],
            "n": [1, 2, 0],
            "logprobs": [None, 0, 5, 10**4],
            "prompt_logprobs": [None, 1],
            "echo": [True, False],
            "use_beam_search": [True],
            "truncate_prompt_tokens": [None, 1, 5, -1],
            "structured_outputs": [{"regex": "[a-c]+"}, {"choice": ["the", "a"]}, {"json": {"type": "integer"}}],
            "stop": ["a", ["e", "t"], ""],
            "messages": MESSAGES,
            "add_generation_prompt": [False],
            "continue_final_message": [True],
            "chat_template_kwargs": [{"a": 1}, 3],
            "add_special_tokens": [False],
            "prompt": [
                *TEXTS,
                TEXTS[:2],
                [],
                [5] * LENGTH,
                [VOCAB_SIZE],
                [10**9],
                [-1],
                "",
                "the",
                ids,
                [2, 2, 2],
                [0],
            ],
            "genarm_alpha": STRENGTHS,
        }[name]
    )


NAMES = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
NAMES += ["min_tokens", "max_tokens", "allowed_token_ids", "stop_token_ids", "bad_words", "logit_bias", "ignore_eos"]
NAMES += ["seed", "n", "logprobs", "prompt_logprobs", "echo", "use_beam_search", "truncate_prompt_tokens"]
NAMES += ["structured_outputs", "stop", "prompt", "genarm_alpha", "messages", "add_generation_prompt"]
NAMES += ["continue_final_message", "chat_template_kwargs", "add_special_tokens"]


def ordinary_request(generator, body, has_sentences):
    """A request, and the arguments for the text that it gets: strengths, and what rewards read if it is given."""
    alpha = [generator.choice([0, 0.5, 1, 2, -0.5]), generator.choice([0, 0, 1])]
    kind = generator.choice(
        ["ids", "ids", "preset", "text", "chat", "read"] if has_sentences else ["ids"] * 4 + ["preset"]
    )
    if kind == "preset":
        name = generator.choice(list(PRESETS))
        return body | {"model": f"m:{name}"}, PRESETS[name]["alpha"] + [0, 0, 0] * has_sentences, None
    if not has_sentences:
        return body | {"vllm_xargs": {"genarm_alpha": alpha}}, alpha, None
    alpha.append(0 if kind == "ids" else generator.choice([0, 1.5, -1]))
    own = [0, 0] if kind == "ids" else [generator.choice([1, 2.5]), generator.choice([-0.5, 2])]
    xargs, read = {"genarm_alpha": alpha}, None
    if kind != "ids":
        xargs["genarm_sentence_alpha"] = own
    if kind == "read":
        read = [[generator.randrange(3, 300) for _ in range(1 + generator.randrange(40))] for _ in range(3)]
        xargs["genarm_prompts"] = read
    elif kind != "ids":
        xargs["genarm_sentences"] = OWN
        prompt = generator.choice(TEXTS if kind == "text" else CHATS)
        body = {name: x for name, x in body.items() if name != "prompt"}
        body |= {"prompt": prompt} if kind == "text" else {"messages": prompt}
    return body | {"vllm_xargs": xargs}, [*alpha, *own], read and [None, None, *read]


def odd_request(generator, body, has_sentences):
    """A request of which something is odd, and perhaps nothing."""
    if generator.random() < 0.1:  # the one that ended a server
        return body | {"min_tokens": 1, "allowed_token_ids": [2]}
    xargs = {}
    if generator.random() < 0.6:
        name = generator.choice(
            ["genarm_alpha"] * 5 + ["genarm_alpah", "alpha", "GENARM_ALPHA", "genarm_\ud800", "other"]
        )
        xargs[name] = generator.choice(STRENGTHS)
    if generator.random() < 0.3:
        xargs["genarm_target_kl"] = generator.choice([0.1, 1, 1e-9, 1e9, 0, -1, "1", 10**400, float("nan")])
    if generator.random() < 0.1:
        xargs["genarm_preset"] = generator.choice(["kind", "brief", "none", "", 3, ["kind"]])
    if has_sentences and generator.random() < 0.7:
        if generator.random() < 0.6:
            body = {name: x for name, x in body.items() if name != "prompt"}
            body |= generator.choice([{"prompt": generator.choice(TEXTS)}, {"messages": generator.choice(CHATS)}])
        if generator.random() < 0.7:
            xargs["genarm_sentences"] = generator.choice(SENTENCES)
        if generator.random() < 0.3:
            xargs["genarm_prompts"] = generator.choice(READ)
        if generator.random() < 0.4:
            xargs["genarm_sentence_alpha"] = generator.choice(STRENGTHS)
    if generator.random() < 0.05:
        body = body | generator.choice([{"genarm_alpha": 1}, {"extra_args": {"genarm_alpha": 1}}, {"model": "m:none"}])
    for name in generator.sample(NAMES, generator.randrange(0 if has_sentences else 1, 6)):
        body[name] = some_value(generator, name)
    return body | {"vllm_xargs": xargs} if xargs else body


def some_request(generator, has_sentences):
    """An odd request, or every third time an ordinary one, with the arguments for its text."""
    prompt = [generator.randrange(3, 300) for _ in range(1 + generator.randrange(40))]
    body = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": N_TOKENS, "return_token_ids": True}
    if generator.random() < 1 / 3:
        return ordinary_request(generator, body, has_sentences)
    return odd_request(generator, body, has_sentences), None, None


def send(url, is_ordinary, body, seed):
    """Returns the status and the answer of an ordinary request; an odd one may also be given up."""
    generator = random.Random(seed)
    path = "chat/completions" if "messages" in body else "completions"
    gives_up = not is_ordinary and generator.random() < 0.1
    data = json.dumps(body | {"stream": True} if gives_up else body)  # unlike `requests`, with NaN in it
    headers = {"Content-Type": "application/json"}
    response = requests.post(f"{url}/v1/{path}", data=data, headers=headers, stream=gives_up, timeout=300)
    if gives_up:
        response.close()
    elif is_ordinary:
        return response.status_code, response.json()
    return response.status_code, None if gives_up else response.text


@pytest.mark.parametrize("has_sentences", [False, True], ids=["adapters", "sentences"])
def test_odd_requests_end_no_server_and_change_no_text_of_others(tmp_path, capsys, has_sentences):
    base, adapters = save_tiny(tmp_path, n_adapters=2, max_position_embeddings=LENGTH)
    seed = os.environ.get("HF_GENARM_SEED", "0")
    generator = random.Random(f"{seed} {has_sentences}")
    todo = [some_request(generator, has_sentences) for _ in range(-(-N_REQUESTS // 2))]
    # Fewer texts fit than are read at once.
    config = {"reward_models": adapters, "chunk": 64, "alpha": [1, 0], "slots": 3, "presets": PRESETS}
    rewards, options = adapters, {}
    if has_sentences:
        sentences = [save_sentence(tmp_path / f"sentence-{index}", x) for index, x in enumerate((NAMED, *OWN))]
        presets = {name: {"alpha": [*x["alpha"], 0]} for name, x in PRESETS.items()}
        config |= {"reward_models": [*adapters, sentences[0]], "alpha": [1, 0, 0], "presets": presets}
        config |= {"max_sentences": 2, "reference": "base"}
        rewards, options = [*adapters, *sentences], {"reference": "base"}
    log = tmp_path / "server.log"
    with server(base, log, *guided_by(config)) as (process, url), ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda x: send(url, x[1][1] is not None, x[1][0], x[0]), enumerate(todo)))
        assert process.poll() is None, log.read_text(encoding="utf-8")[-5000:]
        assert requests.get(f"{url}/health", timeout=30).ok
    reference, results, errors = Reference(base, rewards, **options), Counter(), Counter()
    for (body, alpha, read), (status, answer) in zip(todo, answers, strict=True):
        if alpha is None:
            results[f"odd: {status}"] += 1
            if status >= 500:
                errors[f"{json.dumps(body)[:2000]}: {answer}"] += 1
            continue
        assert status == 200, (body, answer)
        prompt = body["messages"] if "messages" in body else body["prompt"]
        (expected,) = reference.texts([prompt], [float(x) for x in alpha], N_TOKENS, read=read)
        results[f"ordinary: {check(expected, answer['choices'][0]['token_ids'])}"] += 1
    with capsys.disabled():
        print(json.dumps(dict(sorted(results.items())) | errors, indent=1))
    assert not [name for name in results if "wrong" in name]
    assert results["ordinary: tie"] <= N_REQUESTS // 100
    assert results["odd: 200"] > 0
    assert results["odd: 400"] > 0
