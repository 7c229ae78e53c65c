"""What a worker of the example for Ray does with a batch, without Ray: the answers of `hf-genarm generate`."""

import json

from helpers import run
from tiny import save_adapter, save_llama

from examples.ray_answers import Answerer
from hf_genarm.scripts.shared_arguments import GuidanceArguments


def test_a_worker_answers_as_one_process(tmp_path):
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "arm")
    prompts = ["How was the food?", [{"role": "user", "content": "Tell me about the train"}], "The sun and"]
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text(lines, encoding="utf-8")
    files = ["--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "answers.jsonl"]
    run("generate", "--base", base, "--arm", adapter, *files, "--max_new_tokens", 8)
    expected = [json.loads(x)["completion"] for x in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    answerer = Answerer(GuidanceArguments(base=base, arm=[adapter]), {"do_sample": False, "max_new_tokens": 8})
    for batch in ([1], [0, 2]):
        row = {"numbers": json.dumps(batch), "prompts": json.dumps([prompts[n] for n in batch])}
        answered = answerer(row)
        texts = [x if isinstance(x, str) else x[0]["content"] for x in (expected[n] for n in batch)]
        assert (answered["numbers"], json.loads(answered["texts"])) == (row["numbers"], texts)
