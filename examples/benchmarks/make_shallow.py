"""
Makes a shallow reward model of SmolLM2-135M-Instruct from its first layers and its head, since no smaller model of its
family can be had without the Hub.

    python -m examples.benchmarks.make_shallow       # about 35 minutes on one core

The whole model answers the prompts of `examples/data/sentiment/train.jsonl`, and the likeliest next tokens at each step
are kept. The first layers are distilled on these, and then trained as a reward model on the preference pairs.
Everything is kept in `~/.cache/hf_genarm`, and is not made twice.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from examples.pairs import DATA, training_pairs
from examples.quickstart import train
from examples.small import output_folder, sized
from hf_genarm import AutoregressiveRewardModel
from hf_genarm.demo import DEMO_MODEL_ID, demo_model
from hf_genarm.hub.compatibility import chat_of

N_LIKELIEST = 64
DISTILLED = Path("parts") / "distilled"

CARD = """---
license: apache-2.0
language: en
base_model: {base}
library_name: transformers
---

# A shallow reward model of SmolLM2-135M-Instruct

The first {n_layers} of {n_all_layers} layers of [{base}](https://huggingface.co/{base}) with its head, made to measure
how fast a small reward model drafts for a large base. It is not a language model for general use: it was distilled for
{n_epochs} epochs on {n_texts} short answers of the whole model to questions about everyday things ({nats:.2f} nats per
token from it on the last batches), and then trained on {n_pairs} preference pairs that the word list VADER has labelled
by sentiment. Made by `python -m examples.benchmarks.make_shallow`.
"""


class Likeliest(LogitsProcessor):
    """Keeps the likeliest next tokens of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs, tokens = scores.float().log_softmax(dim=-1).topk(N_LIKELIEST)
        self.steps.append((log_probs, tokens.int()))
        return scores


def chats(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> dict[str, Tensor]:
    """Returns the inputs of `generate` for chats with one question each."""
    return tokenizer.apply_chat_template(
        [chat_of(prompt) for prompt in prompts],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[dict]:
    """Samples answers of the whole model at temperature 1, with the likeliest tokens at each step."""
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = list(dict.fromkeys(json.loads(line)["prompt"][0]["content"] for line in lines))
    prompts = prompts[: args.prompts] * args.answers
    texts = []
    set_seed(args.seed)
    for start in tqdm(range(0, len(prompts), args.sampling_batch), desc="sampling"):
        inputs, likeliest = chats(tokenizer, prompts[start : start + args.sampling_batch]), Likeliest()
        answers = model.generate(
            **inputs, do_sample=True, top_k=0, max_new_tokens=args.new_tokens, logits_processor=[likeliest]
        )
        log_probs, tokens = (torch.stack(x, dim=1) for x in zip(*likeliest.steps, strict=True))
        prompt_length = inputs["input_ids"].shape[1]
        for row, mask in enumerate(inputs["attention_mask"]):
            ends = (answers[row, prompt_length:] == tokenizer.eos_token_id).nonzero()
            length = int(ends[0]) + 1 if len(ends) else len(answers[row]) - prompt_length
            ids = answers[row, prompt_length - int(mask.sum()) : prompt_length + length]
            texts.append({"ids": ids, "log_probs": log_probs[row, :length], "tokens": tokens[row, :length]})
    return texts


def first_layers(n_layers: int) -> PreTrainedModel:
    """Returns the first layers of the whole model with its head."""
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    model.model.layers = model.model.layers[:n_layers]
    model.config.num_hidden_layers, model.config.layer_types = n_layers, None
    return model


def distil(student: PreTrainedModel, texts: list[dict], pad: int, args: argparse.Namespace) -> float:
    r"""Minimises $\text{KL}(\pi_\text{whole} \,\|\, \pi_\text{student})$ on the likeliest tokens; returns the last."""
    # The embedding is also the head, and stays that of the whole model.
    student.train().get_input_embeddings().requires_grad_(False)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    n_steps = args.epochs * -(-len(texts) // args.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, n_steps // 20, n_steps)
    losses: list[float] = []
    progress = tqdm(total=n_steps, desc="distilling")
    for _ in range(args.epochs):
        for indices in torch.randperm(len(texts)).split(args.batch_size):
            loss = divergence(student, [texts[index] for index in indices], pad)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update()
            progress.set_postfix(nats=sum(losses[-20:]) / len(losses[-20:]))
    student.eval()
    return sum(losses[-20:]) / len(losses[-20:])


def divergence(student: PreTrainedModel, texts: list[dict], pad: int) -> Tensor:
    """Returns the mean divergence per token of a batch."""
    ids = torch.nn.utils.rnn.pad_sequence([text["ids"] for text in texts], batch_first=True, padding_value=pad)
    hidden = student.model(input_ids=ids).last_hidden_state  # padded on the right, where no token sees it
    answers = [x[len(t["ids"]) - len(t["tokens"]) - 1 : len(t["ids"]) - 1] for x, t in zip(hidden, texts, strict=True)]
    log_probs = student.lm_head(torch.cat(answers)).log_softmax(dim=-1)
    wanted = torch.cat([text["log_probs"] for text in texts])
    wanted = wanted - wanted.logsumexp(dim=-1, keepdim=True)
    at = log_probs.gather(1, torch.cat([text["tokens"] for text in texts]).long())
    return (wanted.exp() * (wanted - at)).sum(dim=-1).mean()


def shallow_folder() -> Path:
    """Returns the folder of the reward model, which need not exist yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_genarm"
    return Path(sized(str(cache), "outputs")) / "arm-smollm2-135m-shallow"


def make(args: argparse.Namespace) -> None:
    """Makes the reward model, and what it is made from where that is missing."""
    path = demo_model()
    parts, distilled = args.output / "parts", args.output / DISTILLED
    parts.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if not (parts / "texts.pt").exists():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        texts = sample(model, tokenizer, args)
        torch.save(texts, parts / "texts.partial")
        (parts / "texts.partial").rename(parts / "texts.pt")
    texts = torch.load(parts / "texts.pt")
    if not (distilled / "nats.json").exists():
        set_seed(args.seed)
        student = first_layers(args.layers)
        nats = distil(student, texts, tokenizer.pad_token_id, args)
        student.save_pretrained(distilled)
        tokenizer.save_pretrained(distilled)
        (distilled / "nats.json").write_text(json.dumps(nats), encoding="utf-8")
    pairs = training_pairs(args.pairs)
    settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "num_train_epochs": 1}
    trainer = train(str(distilled), tokenizer, parts / "adapter", pairs, **settings)
    info = trainer.reward_info
    info.objective, info.base_model, info.base_weights = "positive sentiment", DEMO_MODEL_ID, None
    AutoregressiveRewardModel(trainer.model.merge_and_unload(), tokenizer, info).save_pretrained(str(args.output))
    facts = {
        "base": DEMO_MODEL_ID,
        "n_layers": args.layers,
        "n_all_layers": AutoConfig.from_pretrained(path).num_hidden_layers,
        "n_epochs": args.epochs,
        "n_texts": len(texts),
        "nats": json.loads((distilled / "nats.json").read_text(encoding="utf-8")),
        "n_pairs": len(pairs),
    }
    (args.output / "README.md").write_text(CARD.format(**facts), encoding="utf-8")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=sized(6, 1), help="how many layers it keeps")
    parser.add_argument("--prompts", type=int, default=sized(180, 4))
    parser.add_argument("--answers", type=int, default=sized(8, 2), help="to each prompt")
    parser.add_argument("--new-tokens", type=int, default=sized(48, 6), help="of an answer, at most")
    parser.add_argument("--sampling-batch", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=1, help="of distillation")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--pairs", type=int, default=128, help="that the reward model is trained on")
    parser.add_argument("--output", type=output_folder, default=str(shallow_folder()))
    parser.add_argument("--seed", type=int, default=0)
    return parser


def shallow_reward_model() -> Path:
    """Returns the folder of the reward model, made if it is missing. Its distilled starting point is in `DISTILLED`."""
    folder = shallow_folder()
    if not (folder / "model.safetensors").exists():
        print(f"Making the shallow reward model in {folder} (once, about 35 minutes)", flush=True)
        make(argument_parser().parse_args([]))
    return folder


def main() -> None:
    args = argument_parser().parse_args()
    make(args)
    print(f"The shallow reward model is in {args.output}")


if __name__ == "__main__":
    main()
