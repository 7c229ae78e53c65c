"""
Trains a tiny model, for tests that need processes of their own; `torchrun` runs several.

Rank 0 writes the losses of all steps and the metrics of an evaluation as JSON.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_llama, tiny_tokenizer
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer


class KillAt(TrainerCallback):
    """Ends the process in the middle of a step, without a chance to tidy up."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class CheckWorld(TrainerCallback):
    """Some launchers silently start one process."""

    def __init__(self, n_processes: int):
        self.n_processes = n_processes

    def on_train_begin(self, args, state, control, **kwargs):
        assert args.world_size == self.n_processes

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.n_processes > 1:
            assert torch.distributed.get_backend() == "gloo"


def random_pairs(n_pairs: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(n_pairs):
        prompt, chosen, rejected = (
            torch.randint(3, 60, (int(torch.randint(2, 12, (), generator=generator)),), generator=generator).tolist()
            for _ in range(3)
        )
        rows.append({"chosen_ids": [*prompt, 3, *chosen], "rejected_ids": [*prompt, 4, *rejected]})
    return Dataset.from_list(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--sft-coefficient", type=float, default=0.0)
    parser.add_argument("--reference")
    args = parser.parse_args()
    config = AutoregressiveRewardConfig(
        output_dir=str(args.output_dir),
        use_cpu=True,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=args.accumulate,
        gradient_checkpointing=args.gradient_checkpointing,
        max_steps=6,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        beta=0.3,
        sft_coefficient=args.sft_coefficient,
        reference=args.reference,
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = tiny_tokenizer()
    trainer = AutoregressiveRewardTrainer(
        model=tiny_llama(vocab_size=len(tokenizer)),
        args=config,
        train_dataset=random_pairs(40),
        eval_dataset=random_pairs(7),
        processing_class=tokenizer,
        peft_config=None if args.full else LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        callbacks=[CheckWorld(args.processes), *([KillAt(args.kill_at)] if args.kill_at is not None else [])],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    if args.processes > 1:
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
        shares = trainer._pair_log_probs._may_share
        results = {"losses": losses, "metrics": metrics, "shares": shares}
        (args.output_dir / "results.json").write_text(json.dumps(results))
    trainer.accelerator.end_training()
    # PyTorch can deadlock in destroying DDP's gloo group, whose thread waits for the GIL to let go of a tensor.
    os._exit(0)


if __name__ == "__main__":
    main()
