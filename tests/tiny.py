"""Tiny models and a tiny tokenizer, built in memory, whose distributions are far from uniform and from each other."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 48
PAD, BOS, EOS = 0, 1, 2

CORPUS = [
    "What is the weather like today? It is a fine day and the sun is warm.",
    "How was the train ride? The train was late, the seat was hard, the view was fine.",
    "Tell me about the food. The food was cold, but the people were warm and kind.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    # Large weights: with the usual ones, a tiny model is uniform, and a wrong reward would go unnoticed.
    "initializer_range": 0.4,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def tiny_llama(seed: int = 0, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    own = {"num_key_value_heads": 1, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**SIZES | own | config)).eval()


def tiny_model(model_type: str, **config) -> PreTrainedModel:
    """A tiny causal LM of a type that goes by this name in transformers."""
    torch.manual_seed(0)
    own = {"num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | own | config)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 64, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_llama(folder: str | Path, seed: int = 0, **config) -> str:
    """Writes a tiny model and its tokenizer into a folder."""
    tokenizer = tiny_tokenizer()
    tiny_llama(seed, vocab_size=len(tokenizer), **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_prompts(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """Prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)


def left_padded(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of prompts of the given lengths, padded on the left, with its mask."""
    width = max(lengths)
    input_ids = random_prompts(len(lengths), width, seed)
    mask = (torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": input_ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def save_adapter(base: str, folder: str, seed: int = 0, **config) -> str:
    """Writes a LoRA adapter whose product is far from zero onto the model in the folder `base`."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**{**settings, **config}))
    for parameter in model.parameters():
        if parameter.requires_grad:  # also biases, magnitudes, copies of modules
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


def own_prompts(inputs, seed, longest=13):
    """A prompt of another length for each request, left-padded."""
    n_requests = len(inputs["input_ids"])
    return left_padded([(longest, 3, 7, 5)[index % 4] for index in range(n_requests)], seed=20 + seed)
