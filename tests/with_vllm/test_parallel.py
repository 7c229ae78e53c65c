"""Engines of two processes write the texts that one process writes: tensor, pipeline and data parallel."""

import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import tiny_server
from tiny_server import AT_ONCE, LENGTH, Reference, check, guided_by, save_tiny, server

pytestmark = pytest.mark.slow

STRENGTHS = [[1, 0], [0.5, 0.5], [-0.5, 1], [0, 2], [0, 0]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("served"), n_adapters=2, max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def expected(folders):
    reference = Reference(*folders)
    return [
        reference.texts([x["prompt"]], [float(y) for y in x["vllm_xargs"]["genarm_alpha"]], 16)[0] for x in bodies()
    ]


def bodies():
    generator = random.Random(0)
    for index in range(80):
        prompt = [generator.randrange(3, 300) for _ in range(1 + generator.randrange(100))]
        body = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 16, "return_token_ids": True}
        yield body | {"vllm_xargs": {"genarm_alpha": STRENGTHS[index % len(STRENGTHS)]}}


@pytest.mark.parametrize("kind", ["tensor", "pipeline", "data"])
def test_two_processes_write_the_same_texts(folders, expected, tmp_path, monkeypatch, kind):
    base, adapters = folders
    log = tmp_path / "server.log"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or else each process needs a NUMA node of its own
    options = [f"--{kind}-parallel-size", 2, *guided_by({"reward_models": adapters})]
    if kind == "pipeline":  # with `--enforce-eager`, vLLM's CPU build never allocates what the second process receives
        monkeypatch.setattr(tiny_server, "OPTIONS", [x for x in tiny_server.OPTIONS if x != "--enforce-eager"])
        options += ["--compilation-config", '{"mode": 2, "backend": "eager"}']  # traces without a compiler of C++
    with server(base, log, *options) as (process, url):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(
                pool.map(lambda x: requests.post(f"{url}/v1/completions", json=x, timeout=300).json(), bodies())
            )
        assert process.poll() is None
    results = [check(x, answer["choices"][0]["token_ids"]) for x, answer in zip(expected, answers, strict=True)]
    assert results.count("wrong") == 0
    assert results.count("tie") <= 1
    started = re.findall(r"Guidance is on: .*", log.read_text(encoding="utf-8"))
    assert len(started) == {"tensor": 2, "pipeline": 1, "data": 2}[kind]
    assert all(("in each of 2 processes" in x) == (kind == "tensor") for x in started)
