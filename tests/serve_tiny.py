"""
Serves the playground with a tiny model and three adapters, which write ten tokens a second on any machine.

    python tests/serve_tiny.py FOLDER
"""

import sys
import time
from pathlib import Path

from tiny import save_adapter, tiny_llama, tiny_tokenizer
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaForCausalLM

from hf_genarm.scripts.demo import SENTENCE, serve

SECONDS_PER_TOKEN = 0.1


def wait(module, arguments, output) -> None:
    if isinstance(module, LlamaForCausalLM):
        time.sleep(SECONDS_PER_TOKEN)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    tokenizer = tiny_tokenizer()
    # Long enough for prompts of 512 tokens; without an end, so that all answers have the same length
    model = tiny_llama(3, vocab_size=len(tokenizer), eos_token_id=None, max_position_embeddings=2048)
    base = str(root / "base")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapters = [save_adapter(base, str(root / f"arm-{seed}"), seed) for seed in range(3)]
    register_module_forward_hook(wait)
    serve(base, adapters, [SENTENCE])
