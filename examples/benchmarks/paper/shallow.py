"""A weak language model: the first layers of SmolLM2, distilled on texts that the whole model has written."""

from pathlib import Path

import torch
from bench import Bench, first_layers
from datasets import Dataset
from settings import DISTILLING
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup, set_seed


def own_samples(pairs: Dataset) -> list[list[dict[str, str]]]:
    """Both answers of each pair, better or worse: the whole model has sampled them all."""
    return [pair["prompt"] + pair[name] for pair in pairs for name in ("chosen", "rejected")]


def make_shallow(bench: Bench, pairs: Dataset, folder: Path) -> None:
    r"""Minimises $\text{KL}(\pi_\text{whole} \,\|\, \pi_\text{shallow})$ of the next token over the texts."""
    whole = bench.model
    student = AutoModelForCausalLM.from_pretrained(bench.model_path, dtype=torch.float32)
    student = first_layers(student, bench.size.n_shallow_layers).train()
    # The embedding is also the head, and stays that of the whole model.
    student.get_input_embeddings().requires_grad_(False)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    texts, n_epochs, batch_size = own_samples(pairs), DISTILLING["n_epochs"], DISTILLING["batch_size"]
    n_steps = n_epochs * -(-len(texts) // batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=DISTILLING["learning_rate"], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, n_steps // 20, n_steps)
    set_seed(0)
    for _ in range(n_epochs):
        order = torch.randperm(len(texts)).tolist()
        for start in range(0, len(order), batch_size):
            inputs = bench.tokenizer.apply_chat_template(
                [texts[index] for index in order[start : start + batch_size]],
                return_dict=True,
                return_tensors="pt",
                padding=True,
                tokenizer_kwargs={"padding_side": "right"},
            )
            loss = _divergence(whole, student, inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    print(f"The shallow model is distilled; the last batch had {loss:.2f} nats per token", flush=True)
    student.save_pretrained(folder)
    bench.tokenizer.save_pretrained(folder)


def _divergence(whole, student, inputs) -> Tensor:
    is_text = inputs.attention_mask.bool()
    with torch.no_grad():
        wanted = whole(**inputs).logits[is_text].log_softmax(dim=-1)
    logits = student(**inputs).logits[is_text]
    return kl_div(logits.log_softmax(dim=-1), wanted, log_target=True, reduction="batchmean")
