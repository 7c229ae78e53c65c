"""What several test files do: run `generate` and commands, compare what comes out, write pairs, compute losses."""

import contextlib
import gzip
import io
import json
import os
import runpy
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from oracle import Recompute
from packaging.version import Version
from peft import PeftModel
from support import ARM, BATCH, ONE
from tiny import VOCAB_SIZE, left_padded, save_adapter, tiny_llama
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from hf_genarm import cli
from hf_genarm.training.prefix_sharing import PairBatch

ROOT = Path(__file__).parent.parent

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}

FOUR = left_padded([4, 8, 6, 7])

needs_compile = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"),
    reason="torch 2.6 can't compile a forward pass of transformers that is handed a cache (NameError)",
)


# --- commands ---


def run_command(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints, given more environment variables; with both streams in the error if it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise AssertionError(
            f"`{' '.join(map(str, command))}` exits with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
    return done.stdout


def run_script(
    module: str, *arguments: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What `python -m module` does in a folder with scripts, in this process, which has imported the libraries."""

    def of_scripts():
        return [name for name in sys.modules if name.split(".")[0] in ("examples", "model_cards")]

    code: object = None
    before = {name: sys.modules.pop(name) for name in of_scripts()}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        patch.chdir(cwd)
        patch.syspath_prepend(cwd)
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        patch.setattr(sys, "dont_write_bytecode", True)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        finally:
            for name in of_scripts():
                del sys.modules[name]
            sys.modules.update(before)
    message = f"{code}\n" if isinstance(code, str) else ""
    code = 1 if message else code or 0
    return subprocess.CompletedProcess([module, *arguments], code, printed.getvalue(), said.getvalue() + message)


def run(*arguments):
    """Runs a command of `hf-genarm` in this process."""
    assert cli.main([str(x) for x in arguments]) == 0


# --- guided texts ---


def generate(base, processors, inputs=BATCH, seed=0, **options):
    """Calls `base.generate` with a list of logits processors; returns sequences and scores."""
    torch.manual_seed(seed)
    defaults = {"max_new_tokens": 10, "return_dict_in_generate": True, "output_scores": True}
    return base.generate(**(dict(inputs) | defaults | options), logits_processor=processors)


def assert_same(output, expected, atol=1e-4):
    """The same tokens, and the same scores of all tokens at every step."""
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert len(output.scores) == len(expected.scores) > 0
    for ours, theirs in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def assert_same_distributions(output, expected, atol=1e-4):
    """The same log-probabilities of all tokens at every step, whether the scores are normalised or not."""
    assert len(output.scores) == len(expected.scores) > 0
    for ours, theirs in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=atol, rtol=0)


def oracle(inputs, models=(ARM,), alphas=(1.0,)):
    """What our processor must equal on these inputs."""
    return Recompute(list(models), list(alphas), inputs.get("attention_mask"))


def row_of(inputs, index):
    """One prompt of a batch, without its padding."""
    kept = inputs["attention_mask"][index].bool()
    return {name: value[index, kept][None] for name, value in inputs.items()}


def joint_passes(processor):
    """How many forward passes the reward models had together with the base."""
    return max(getattr(model, "joint_passes", 0) for model in processor._machine.rewards.models)


def saved_with_adapter(family, folder):
    """The base of a family, which is saved in a folder, and where an adapter on it is."""
    base = family.model()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    options = {"target_modules": family.targets, "fan_in_fan_out": family.name == "GPT-2"}
    return base, save_adapter(folder / "base", folder / "arm", **options)


def ways_to_read(base):
    """Options of `generate` with prompts: padding, beams, and drafts, unless the base can't take them back."""
    yield {}, left_padded([4, 12, 7])
    yield {"num_beams": 3}, left_padded([9, 12])
    if not base._is_stateful:
        yield {"prompt_lookup_num_tokens": 3}, ONE


def separate(base_folder, adapter):
    """An adapter on weights of its own."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter).eval()


class At(StoppingCriteria):
    """Does something after the fifth new token."""

    def __init__(self, action):
        self.action = action

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == BATCH["input_ids"].shape[1] + 5:
            self.action()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def guided_until(base, processor, action, **options):
    """Calls `generate`, and `action` after the fifth new token."""
    return generate(base, [processor], stopping_criteria=StoppingCriteriaList([At(action)]), **options)


def raises(error):
    """A function that raises this error, whatever it is called with."""

    def action(*args, **kwargs):
        raise error

    return action


# --- preference pairs and their loss ---


def write(folder, suffix, columns):
    """Writes pairs into a file of the given kind."""
    path = Path(folder, f"pairs.{suffix}")
    dataset = Dataset.from_dict(columns)
    if suffix == "parquet":
        dataset.to_parquet(path)
    elif suffix in ("csv", "tsv"):
        dataset.to_csv(path, sep="," if suffix == "csv" else "\t")
    else:
        text = "\n".join(json.dumps(row) for row in dataset)
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    return str(path)


def batch(shapes, seed=0, prompt_length=None):
    """Pairs of the given numbers of tokens (shared, chosen, rejected), which part right after what they share."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    texts = ([], [])
    for shared, *lengths in shapes:
        prefix = ids(shared)
        for side, length in enumerate(lengths):
            own = ids(length)
            own[:1] = [3 + side] if own else []
            texts[side].append(prefix + own)
    texts = texts[0] + texts[1]
    width = max(map(len, texts))
    input_ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return PairBatch(input_ids, mask, prompt_length)


def model_for(tokenizer, seed=0, **config):
    """A tiny model with the vocabulary of this tokenizer."""
    return tiny_llama(seed, vocab_size=len(tokenizer), **config)


def log_prob(model, ids, start):
    """`log π(ids[start:] | ids[:start])` of one unpadded row, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logits[at - 1, ids[at]] for at in range(start, len(ids)))


def pairs_of(dataset):
    """The ids of chosen and rejected texts of a prepared dataset."""
    return [(row["chosen_ids"], row["rejected_ids"]) for row in dataset]


def loss_of(trainer):
    """The loss of a trainer over its whole training data, as one batch."""
    return trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))


def from_trackio(folder):
    """What was logged to trackio, the last value of each name."""
    database = sqlite3.connect(Path(os.environ["TRACKIO_DIR"], "huggingface.db"))
    rows = database.execute("select metrics from metrics order by id")
    return {name: value for (row,) in rows for name, value in json.loads(row).items()}


def gradients(model, log_probs):
    weights = torch.linspace(-1, 2, log_probs.numel()).view_as(log_probs)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad((log_probs * weights).sum(), parameters, allow_unused=True)
