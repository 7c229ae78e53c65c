"""The `custom_generate` folder: what `generate` runs, with the mask that it was given, and nothing else."""

import ast

import pytest
import torch
from oracle import Recompute
from tiny import PAD, left_padded, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardModel
from hf_genarm.hub.card import write_custom_generate

NAMES = [
    "me/my-arm",
    'say "hi"',
    "back\\slash\\",
    "new\nline",
    "'''",
    '"""',
    "Größe/模型",
    '"; import os; os.abort(); "',
]


def code_of(model_id, folder) -> ast.Module:
    folder.mkdir()
    write_custom_generate(folder, model_id)
    return ast.parse((folder / "custom_generate" / "generate.py").read_bytes())


@pytest.mark.parametrize("model_id", NAMES, ids=ascii)
def test_the_model_id_is_data(model_id, tmp_path):
    code, usual = code_of(model_id, tmp_path / "odd"), code_of("usual", tmp_path / "usual")
    (constant,) = [node for node in code.body if isinstance(node, ast.Assign)]
    assert ast.literal_eval(constant.value) == model_id
    constant.value = ast.Constant("usual")
    assert ast.dump(code) == ast.dump(usual)


@pytest.mark.parametrize("mode", ["beams", "drafts"])
def test_the_mask_is_handed_over(mode, tmp_path):
    """The processor reads drafts before the base has read anything, and the caller of `generate` can't reach it."""
    tokenizer = tiny_tokenizer()
    reward_model = tiny_llama(1, vocab_size=len(tokenizer))
    AutoregressiveRewardModel(reward_model, tokenizer).save_pretrained(tmp_path / "arm")
    write_custom_generate(tmp_path / "arm", str(tmp_path / "arm"))
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_llama(0, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    batch, options = left_padded([3, 6]), {"max_new_tokens": 6}
    if mode == "beams":
        options |= {"num_beams": 2, "num_return_sequences": 2}
    else:  # of a text that begins with the pad token, as where that is the bos token
        batch = {"input_ids": torch.tensor([[PAD, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
        options |= {"assistant_model": tiny_llama(3, vocab_size=len(tokenizer))}
    guided = base.generate(**batch, **options, custom_generate=str(tmp_path / "arm"), trust_remote_code=True)
    oracle = Recompute([reward_model], [1.0], batch["attention_mask"])
    assert guided.tolist() == base.generate(**batch, **options, logits_processor=[oracle]).tolist()
    assert guided.tolist() != base.generate(**batch, **options).tolist()
