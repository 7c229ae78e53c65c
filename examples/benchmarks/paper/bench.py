"""What the experiments share: the base, folders of adapters, cached answers, and steps that leave a file when done."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from settings import Size
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, PreTrainedModel, set_seed

from hf_genarm.decoding.meter import Meter, answer_lengths
from hf_genarm.demo import demo_model

EXAMPLES = Path(__file__).parent.parent.parent
sys.path += [str(EXAMPLES), str(EXAMPLES / "data"), str(EXAMPLES.parent / "model_cards")]


Answers = list[list[dict]]

_ROWS_AT_ONCE = 48


@dataclass
class Step:
    """
    A piece of work that is done when `path` is there. `run` writes somewhere else, and what it has written moves to
    `path` when it is complete; what is left of a run that was stopped is given to it again.
    """

    path: Path
    cost: float  # rough, in seconds on 2 cores; what the time left is estimated by
    run: Callable[[Path], None]

    @property
    def is_done(self) -> bool:
        return self.path.exists()

    def __call__(self) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        self.run(partial)
        os.replace(partial, self.path)


class Bench:
    def __init__(self, size: Size, output: Path, report: Path):
        self.size, self.output, self.figures = size, output, report / "figures"
        self.model_path = demo_model()
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path, padding_side="left")

    @cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32)

    @property
    def n_layers(self) -> int:
        return self.model.config.num_hidden_layers

    def adapter(self, name: str) -> Path:
        return self.output / "adapters" / name

    def training(self, name: str, cost: float, train: Callable[[Path], None]) -> Step:
        def run(partial: Path) -> None:
            shutil.rmtree(partial, ignore_errors=True)
            train(partial)

        return Step(self.adapter(name), cost, run)

    def measuring(self, name: str, cost: float, measure: Callable[[], object]) -> Step:
        path = self.output / "measured" / f"{name}.json"
        return Step(path, cost, lambda partial: partial.write_text(json.dumps(measure(), indent=1), encoding="utf-8"))

    def measured(self, name: str):
        return json.loads((self.output / "measured" / f"{name}.json").read_text(encoding="utf-8"))

    def sampling(
        self,
        cell: str,
        prompts: list[str],
        method: Callable[[], tuple[list[LogitsProcessor], dict]],
        cost: float = 1.0,
        n_samples: int | None = None,
        seed: int = 0,
    ) -> Step:
        """
        Samples answers at temperature 1, and keeps them prompt by prompt.

        Args:
            cell: names the answers.
            prompts: what is answered.
            method: gives the processors that make the method of the base, and the settings that are kept with answers.
            cost: of a token, in those of the base alone.
            n_samples: answers to each prompt, if it is not the number that the size has.
            seed: of the sampling; the same numbers for every method.
        """
        n_samples = n_samples or self.size.n_samples

        def run(partial: Path) -> None:
            n_done = len(partial.read_text(encoding="utf-8").splitlines()) if partial.exists() else 0
            processors, setting = method()
            n_prompts = max(1, _ROWS_AT_ONCE // n_samples)
            for start in range(n_done, len(prompts), n_prompts):
                batch = prompts[start : start + n_prompts]
                set_seed(len(prompts) * seed + start)
                answers = self.answer(batch, processors, n_samples)
                lines = [
                    json.dumps({"prompt": prompt, "setting": setting, "answers": row}) + "\n"
                    for prompt, row in zip(batch, answers, strict=True)
                ]
                with partial.open("a", encoding="utf-8") as file:
                    file.write("".join(lines))

        n_tokens = len(prompts) * n_samples * self.size.max_new_tokens
        return Step(self.answers_path(cell), cost * n_tokens / 150, run)

    def answers_path(self, cell: str) -> Path:
        return self.output / "answers" / f"{cell}.jsonl"

    def answers(self, cell: str, n_prompts: int | None = None) -> Answers:
        return [
            json.loads(line)["answers"] for line in self.answers_path(cell).read_text(encoding="utf-8").splitlines()
        ][:n_prompts]

    def chats(self, prompts: list[str]):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )

    def answer(self, prompts: list[str], processors: list[LogitsProcessor], n_samples: int) -> Answers:
        inputs, meter = self.chats(prompts), Meter()
        output = self.model.generate(
            **inputs,
            logits_processor=meter.around(processors),
            do_sample=True,
            top_k=0,
            max_new_tokens=self.size.max_new_tokens,
            num_return_sequences=n_samples,
        )[:, inputs.input_ids.shape[1] :]
        lengths = answer_lengths(output, [self.tokenizer.eos_token_id])
        kl, log_prob = meter.read(output, lengths)
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        rows = [
            {"text": text, "n_tokens": n, "kl": round(k, 4), "base_log_prob": round(p, 4)}
            for text, n, k, p in zip(texts, lengths.tolist(), kl.tolist(), log_prob.tolist(), strict=True)
        ]
        return [rows[start : start + n_samples] for start in range(0, len(rows), n_samples)]


def first_layers(model: PreTrainedModel, n_layers: int) -> PreTrainedModel:
    """The model without its upper layers."""
    model.model.layers = model.model.layers[:n_layers]
    model.config.num_hidden_layers = n_layers
    model.config.layer_types = None
    return model
