import os

# Nothing in the tests needs the network, and `CI` keeps TRL from calling home.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def one_thread_per_worker():
    """Tests run in parallel processes; tiny models are slower with more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()
