"""A tiny model and adapters, a server with them, and what `generate` writes with them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import requests
import torch
from tiny import save_adapter, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_genarm import GenARMLogitsProcessor
from hf_genarm.hub.info import RewardInfo

# The smallest head that vLLM has attention for on a CPU
HEAD_SIZE = 32
# Below this log-ratio of best and second-best token, the two engines may choose differently: a tie.
TIE = 1e-3
AT_ONCE = 8
LENGTH = 512
# Fewer blocks of keys and values than eight texts need, and fewer tokens in a step than a long prompt has.
OPTIONS = ["--max-model-len", LENGTH, "--max-num-seqs", AT_ONCE, "--block-size", 32, "--num-gpu-blocks-override", 20]
OPTIONS += ["--max-num-batched-tokens", 128, "--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", 0.1]


def save_tiny(folder, n_adapters=1, **config):
    """Saves a model and adapters on it; returns their folders."""
    tokenizer = tiny_tokenizer()
    base = str(folder / "tiny")
    tiny_llama(vocab_size=len(tokenizer), head_dim=HEAD_SIZE, **config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    return base, [save_adapter(base, str(folder / f"adapter-{seed}"), seed=seed) for seed in range(n_adapters)]


def save_sentence(folder, sentence):
    """Saves a sentence as a reward model; returns its folder."""
    folder.mkdir()
    RewardInfo(sentence=sentence).save(folder)
    return str(folder)


class Reference:
    """Greedy texts by `generate`, and how clear each choice was."""

    def __init__(self, base, rewards, **options):
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.processor = GenARMLogitsProcessor.from_pretrained(rewards, self.model, pad_token_id=0, **options)

    @torch.no_grad()
    def texts(self, prompts, alpha, max_new_tokens, target_kl=None, read=None):
        """
        What follows each prompt, ids or what `encode` takes, and the margin of each token: the log-ratio of best and
        second. `read` has the ids that rewards read in place of the prompt, `None` for the prompt itself.
        """
        self.processor.alpha, self.processor.target_kl = alpha, target_kl
        results = []
        for prompt in prompts:
            if isinstance(prompt, str) or isinstance(prompt[0], dict):
                inputs = self.processor.encode([prompt])
            else:
                inputs = _inputs(prompt)
                self.processor.prompts = read and [x and _inputs(x) for x in read]
            output = self.model.generate(
                **inputs,
                logits_processor=[self.processor],
                do_sample=False,
                max_new_tokens=max_new_tokens,
                output_scores=True,
                return_dict_in_generate=True,
            )
            best = torch.cat(output.scores).log_softmax(dim=-1).topk(2).values
            text = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            results.append((text, (best[:, 0] - best[:, 1]).tolist()))
        return results


def _inputs(ids):
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def check(expected, ids):
    """Whether a text is the expected one: "same", "tie" or "wrong"."""
    tokens, margins = expected
    if ids == tokens:
        return "same"
    at = next((i for i, (x, y) in enumerate(zip(ids, tokens, strict=False)) if x != y), min(len(ids), len(tokens)))
    return "tie" if at < len(margins) and margins[at] < TIE else "wrong"


def guided_by(config):
    """The options of a guided server, for its own command."""
    return ["--additional-config", json.dumps({"genarm": config})]


def _is_up(url):
    try:
        return requests.get(f"{url}/health", timeout=30).ok
    except requests.RequestException:
        return False


@contextmanager
def server(base, log, *options):
    """A server on loopback, its process and its address, until it is ended; guided if it has a configuration."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = "hf_genarm.vllm" if "--additional-config" in options else "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", base, "--served-model-name", "m"]
    command += ["--host", "127.0.0.1", "--port", port, *OPTIONS, *options]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([str(x) for x in command], env=environment, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 1800  # of a busy machine
        while not _is_up(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield process, url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(300)
