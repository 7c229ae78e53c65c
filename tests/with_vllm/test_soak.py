"""
A server on loopback under many requests at once: long and short, each with its own strengths, aborted, preempted, read
in parts, and bad ones in between. Every guided text must be that of `generate`.

`HF_GENARM_SOAK` is the number of requests, 60 if it is not set.
"""

import json
import os
import random
import re
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
from tiny_server import AT_ONCE, LENGTH, Reference, check, guided_by, save_tiny, server

pytestmark = pytest.mark.slow

COUNTERS = (
    "guided_requests",
    "refused_requests",
    "unguided_requests",
    "reward_tokens",
    "found_tokens",
    "dropped_texts",
)
N_REQUESTS = int(os.environ.get("HF_GENARM_SOAK", "60"))

BAD = [
    ({"vllm_xargs": {"genarm_alpah": 1}}, "`genarm_alpah` is 1, but there is no such key"),
    ({"vllm_xargs": {"genarm_alpha": [1]}}, r"`genarm_alpha` is \[1\], but must be a finite number, or a list of 2"),
    ({"vllm_xargs": {"genarm_alpha": "strong"}}, "`genarm_alpha` is 'strong', but must be a finite number"),
    ({"vllm_xargs": {"genarm_alpha": 1e9}}, "`genarm_alpha` is 1000000000.0, but must be .* none larger than 1e6"),
    ({"vllm_xargs": {"alpha": 1}}, "`alpha` is 1, but there is no such key"),
    ({"vllm_xargs": {"gen_arm_alpha": 1}}, "`gen_arm_alpha` is 1, but there is no such key"),
    ({"use_beam_search": True, "n": 2, "vllm_xargs": None}, "Beam search can't be guided"),
    ({"use_beam_search": True, "n": 2}, "`genarm_alpha` has no effect on beam search"),
    ({"genarm_alpha": 1}, "`genarm_alpha` is 1 at the top level of the request, but must be in `vllm_xargs`"),
    ({"extra_args": {"genarm_alpha": 1}}, "`genarm_alpha` is 1 in `extra_args`, but must be in `vllm_xargs`"),
    ({"vllm_xargs": {"genarm_preset": "kind"}}, "`genarm_preset` is 'kind', but must be left out"),
    ({"vllm_xargs": {"genarm_target_kl": 0}}, "`genarm_target_kl` is 0, but must be a positive, finite number"),
    ({"vllm_xargs": {"genarm_alpha": {"a": 1}}}, ""),
    ({"vllm_xargs": 3}, ""),
    ({"max_tokens": -1}, ""),
    ({"prompt": [5] * (LENGTH + 1)}, ""),
    ({"prompt": [10**6]}, ""),
    ({"temperature": -1}, ""),
]


def memory_mb(process):
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(x.memory_info().rss for x in family) / 1e6


def some_request(generator):
    """What is sent, and what is to be checked."""
    length = generator.choice([1, 5, 20, 60, 150, 300])
    prompt = [generator.randrange(3, 300) for _ in range(1 + generator.randrange(length))]
    kind = generator.choices(["guided", "unguided", "held", "sampled", "aborted", "bad"], [40, 15, 10, 10, 15, 10])[0]
    body = {"model": "m", "prompt": prompt, "temperature": 0, "return_token_ids": True}
    body["max_tokens"] = generator.choice([1, 8, 32, 64])
    alpha = [generator.choice([0, 0.5, 1, 2, -0.5]), generator.choice([0, 0, 1])]
    if kind == "unguided":
        alpha = [0, 0]
    elif not any(alpha):
        alpha = [1, 0]
    xargs = {"genarm_alpha": alpha}
    if kind == "held":
        xargs["genarm_target_kl"] = 0.2
    body["vllm_xargs"] = xargs
    if kind == "sampled":
        body["temperature"] = 1.0
    message = None
    if kind == "bad":
        wrong, message = generator.choice(BAD)
        body |= wrong
    if kind == "aborted":
        body |= {"stream": True, "max_tokens": 64}
    return kind, body, message


def send(url, kind, body):
    """Returns the status and the answer; of what is aborted, nothing."""
    response = requests.post(f"{url}/v1/completions", json=body, stream=kind == "aborted", timeout=300)
    if kind == "aborted":
        for _ in zip(range(len(body["prompt"]) % 5), response.iter_lines(), strict=False):
            pass
        response.close()
        return response.status_code, None
    return response.status_code, response.json()


def metric(url, name):
    text = requests.get(f"{url}/metrics", timeout=30).text
    return sum(float(x) for x in re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("slots", [None, 1], ids=["all texts fit", "one long text fits"])
def test_soak(tmp_path, capsys, slots):
    base, adapters = save_tiny(tmp_path, n_adapters=2, max_position_embeddings=LENGTH)
    generator = random.Random(0)
    todo = [some_request(generator) for _ in range(N_REQUESTS)]
    guided = guided_by({"reward_models": adapters, "chunk": 64} | ({"slots": slots} if slots else {}))
    log = tmp_path / "server.log"
    with server(base, log, *guided) as (process, url), ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda x: send(url, *x[:2]), todo[: N_REQUESTS // 2]))  # allocators settle
        before = memory_mb(process)
        started = time.perf_counter()
        answers = list(pool.map(lambda x: send(url, *x[:2]), todo))
        seconds = time.perf_counter() - started
        for _ in range(60):
            if not metric(url, "vllm:num_requests_running"):
                break
            time.sleep(0.5)
        assert metric(url, "vllm:num_requests_running") == 0
        counters = {x: metric(url, f"genarm:{x}_total") for x in COUNTERS}
        preemptions, after = metric(url, "vllm:num_preemptions_total"), memory_mb(process)
        assert "Traceback" not in log.read_text(), log.read_text()[-5000:]  # vLLM leaves some when it is ended
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert not psutil.wait_procs(family, timeout=20)[1], "a part of the server still runs"
    assert "hf_genarm/" not in log.read_text()

    with server(base, tmp_path / "plain.log") as (_, url), ThreadPoolExecutor(AT_ONCE) as pool:
        of_plain = [{**body, "vllm_xargs": None} for kind, body, _ in todo if kind == "unguided"]
        plain = iter(list(pool.map(lambda body: send(url, "plain", body)[1], of_plain)))

    reference, results, n_tokens, changed = Reference(base, adapters), Counter(), 0, 0
    for (kind, body, message), (status, answer) in zip(todo, answers, strict=True):
        if kind == "bad":
            assert status == 400, (body, status, answer)
            assert re.search(message, answer["error"]["message"]), (message, answer)
            results["refused"] += 1
            continue
        assert status == 200, (body, answer)
        if kind == "aborted":
            results["aborted"] += 1
            continue
        ids = answer["choices"][0]["token_ids"]
        n_tokens += len(ids)
        if kind == "sampled":
            results["sampled"] += 1
            continue
        xargs, n = body["vllm_xargs"], body["max_tokens"]
        held = xargs.get("genarm_target_kl")
        (expected,) = reference.texts([body["prompt"]], [float(x) for x in xargs["genarm_alpha"]], n, held)
        results[f"{kind}: {check(expected, ids)}"] += 1
        if kind == "unguided":
            theirs = next(plain)["choices"][0]["token_ids"]
            results[f"unguided engine: {check((theirs, expected[1]), ids)}"] += 1
        else:
            changed += expected[0] != reference.texts([body["prompt"]], 0.0, n)[0][0]
    figures = {
        "requests": N_REQUESTS,
        "at once": AT_ONCE,
        "tokens": n_tokens,
        "seconds": round(seconds, 1),
        "preemptions": int(preemptions),
        **{name: int(n) for name, n in counters.items()},
        "results": dict(sorted(results.items())),
        "guided texts that are not the unguided ones": changed,
        "memory before, MB": round(before),
        "memory after, MB": round(after),
        "exit status after SIGTERM": process.returncode,
    }
    with capsys.disabled():
        print(json.dumps(figures, indent=1))
    assert not [name for name in results if "wrong" in name]
    assert sum(n for name, n in results.items() if "tie" in name) <= N_REQUESTS // 100
    assert changed > results["guided: same"] // 2
    assert preemptions > 0
    assert counters["unguided_requests"] == 0
    assert counters["guided_requests"] > N_REQUESTS // 2
    assert counters["refused_requests"] > 0
    assert counters["reward_tokens"] > n_tokens // 2
    assert (counters["dropped_texts"] > N_REQUESTS // 10) == (slots is not None)
    assert (counters["found_tokens"] > 0) or slots is not None
    assert after < 1.02 * before + 20
    assert process.returncode == 0
