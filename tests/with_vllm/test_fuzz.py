"""
Random requests, most of them odd, to a server that others use at the same time: it never ends, and the others get the
texts that they would have without the odd ones.

`HF_GENARM_FUZZ` is the number of requests, 100 if it is not set.
"""

import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from tiny_server import AT_ONCE, LENGTH, Reference, check, guided_by, save_tiny, server

pytestmark = pytest.mark.slow

N_REQUESTS = int(os.environ.get("HF_GENARM_FUZZ", "100"))
VOCAB_SIZE = 320
PRESETS = {"kind": {"alpha": [2, 0]}, "brief": {"alpha": [0, 1]}}
STRENGTHS = [0, 0.5, 1, -1, 3, -20, 1e6, -1e6, 1e-30, 1e7, "1", True, None, [], [1], [1, 0], [0.0, -2.0], [1, 2, 3]]


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
            "prompt": [[], [5] * LENGTH, [VOCAB_SIZE], [10**9], [-1], "", "the", ids, [2, 2, 2], [0]],
            "genarm_alpha": STRENGTHS,
        }[name]
    )


NAMES = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
NAMES += ["min_tokens", "max_tokens", "allowed_token_ids", "stop_token_ids", "bad_words", "logit_bias", "ignore_eos"]
NAMES += ["seed", "n", "logprobs", "prompt_logprobs", "echo", "use_beam_search", "truncate_prompt_tokens"]
NAMES += ["structured_outputs", "stop", "prompt", "genarm_alpha"]


def some_request(generator):
    """An odd request, or every third time an ordinary one whose text is known."""
    prompt = [generator.randrange(3, 300) for _ in range(1 + generator.randrange(40))]
    body = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 12, "return_token_ids": True}
    if generator.random() < 1 / 3:
        strengths = [generator.choice([0, 0.5, 1, 2, -0.5]), generator.choice([0, 0, 1])]
        if generator.random() < 0.2:
            return True, body | {"model": f"m:{generator.choice(list(PRESETS))}"}
        return True, body | {"vllm_xargs": {"genarm_alpha": strengths}}
    if generator.random() < 0.1:  # the one that ended a server
        return False, body | {"min_tokens": 1, "allowed_token_ids": [2]}
    xargs = {}
    if generator.random() < 0.6:
        name = generator.choice(["genarm_alpha"] * 5 + ["genarm_alpah", "alpha", "GENARM_ALPHA", "other"])
        xargs[name] = generator.choice(STRENGTHS)
    if generator.random() < 0.3:
        xargs["genarm_target_kl"] = generator.choice([0.1, 1, 1e-9, 1e9, 0, -1, "1"])
    if generator.random() < 0.1:
        xargs["genarm_preset"] = generator.choice(["kind", "brief", "none", "", 3, ["kind"]])
    if generator.random() < 0.05:
        body |= generator.choice([{"genarm_alpha": 1}, {"extra_args": {"genarm_alpha": 1}}, {"model": "m:none"}])
    for name in generator.sample(NAMES, generator.randrange(1, 6)):
        body[name] = some_value(generator, name)
    if xargs:
        body["vllm_xargs"] = xargs
    return False, body


def send(url, is_ordinary, body, seed):
    """Returns the status and the answer of an ordinary request; an odd one may also be given up."""
    generator = random.Random(seed)
    if not is_ordinary and generator.random() < 0.1:
        response = requests.post(f"{url}/v1/completions", json=body | {"stream": True}, stream=True, timeout=300)
        response.close()
        return response.status_code, None
    response = requests.post(f"{url}/v1/completions", json=body, timeout=300)
    return response.status_code, response.json() if is_ordinary else None


def test_odd_requests_end_no_server_and_change_no_text_of_others(tmp_path, capsys):
    base, adapters = save_tiny(tmp_path, n_adapters=2, max_position_embeddings=LENGTH)
    generator = random.Random(int(os.environ.get("HF_GENARM_SEED", "0")))
    todo = [some_request(generator) for _ in range(N_REQUESTS)]
    # Fewer texts fit than are read at once.
    config = {"reward_models": adapters, "chunk": 64, "alpha": [1, 0], "slots": 3, "presets": PRESETS}
    guided = guided_by(config)
    log = tmp_path / "server.log"
    with server(base, log, *guided) as (process, url), ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda x: send(url, *x[1], x[0]), enumerate(todo)))
        assert process.poll() is None, log.read_text(encoding="utf-8")[-5000:]
        assert requests.get(f"{url}/health", timeout=30).ok
    reference, results = Reference(base, adapters), Counter()
    for (is_ordinary, body), (status, answer) in zip(todo, answers, strict=True):
        if not is_ordinary:
            results[f"odd: {status}"] += 1
            continue
        assert status == 200, (body, answer)
        preset = PRESETS.get(body["model"].removeprefix("m:"), {}).get("alpha")
        alpha = [float(x) for x in preset or body["vllm_xargs"]["genarm_alpha"]]
        (expected,) = reference.texts([body["prompt"]], alpha, body["max_tokens"])
        results[f"ordinary: {check(expected, answer['choices'][0]['token_ids'])}"] += 1
    with capsys.disabled():
        print(json.dumps(dict(sorted(results.items())), indent=1))
    assert not [name for name in results if "wrong" in name]
    assert results["ordinary: tie"] <= N_REQUESTS // 100
    assert results["odd: 200"] > 0
    assert results["odd: 400"] > 0
