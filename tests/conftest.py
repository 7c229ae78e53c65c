import copy
import gc
import os
import tempfile

# Nothing in the tests needs the network, and `CI` keeps TRL from calling home.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when trackio is imported for the first time; nothing is made unless it writes.
os.environ.setdefault("TRACKIO_DIR", os.path.join(tempfile.gettempdir(), f"trackio-{os.getpid()}"))

import pytest
import torch
from datasets import Dataset
from helpers import separate
from hub_server import HubServer
from pairs import STANDARD
from tiny import save_adapter, save_llama, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def one_thread_per_worker():
    """Tests run in parallel processes; tiny models are slower with more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """`Trainer.train` collects garbage, which takes long if it looks through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """A trainer of a tiny model; what the trainer doesn't take goes into its config."""
    from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer

    def make(data=STANDARD, model=None, **kwargs):
        options = {
            "output_dir": str(tmp_path / "arm"),
            "per_device_train_batch_size": 3,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "seed": 0,
        }
        not_in_config = (
            "eval_dataset",
            "peft_config",
            "quantization_config",
            "processing_class",
            "compute_metrics",
            "data_collator",
        )
        names = [name for name in kwargs if name not in not_in_config]
        options |= {name: kwargs.pop(name) for name in names}
        return AutoregressiveRewardTrainer(
            model=tiny_llama(vocab_size=len(tokenizer)) if model is None else model,
            args=AutoregressiveRewardConfig(**options),
            train_dataset=Dataset.from_dict(data) if isinstance(data, dict) else data,
            **{"processing_class": copy.deepcopy(tokenizer), **kwargs},
        )

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folders `base`, and `first` and `second` of two adapters on it."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_llama(0).save_pretrained(folder / "base")
    save_adapter(folder / "base", folder / "first")
    save_adapter(folder / "base", folder / "second", 1, target_modules="all-linear", lora_alpha=16)
    return folder


@pytest.fixture
def base(folder):
    """The model on which the adapters are."""
    return AutoModelForCausalLM.from_pretrained(folder / "base")


@pytest.fixture
def adapters(folder):
    """The folders of both adapters."""
    return [str(folder / "first"), str(folder / "second")]


@pytest.fixture(scope="module")
def models(folder):
    """The same adapters, each on weights of its own."""
    return [separate(folder / "base", folder / "first"), separate(folder / "base", folder / "second")]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A model and its tokenizer."""
    return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture
def server():
    """A server that speaks what the client of the Hub needs."""
    server = HubServer()
    yield server
    server.shutdown()
