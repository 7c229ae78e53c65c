"""Real pairs: the shipped adapter on held-out pairs of HH-RLHF's harmless-base, and the same training by TRL's CPO."""

from pathlib import Path

import torch
from bench import Bench, Step
from datasets import Dataset
from report import table
from training import adapter_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardModel, AutoregressiveRewardTrainer
from hf_genarm.demo import demo_model
from hf_genarm.scripts.evaluate import measure
from hf_genarm.scripts.pairs import PairArguments, hold_out, load_pairs

HUB_ID = "Anthropic/hh-rlhf"
ADAPTER = Path(__file__).parent.parent.parent.parent / "model_cards" / "arm-smollm2-135m-harmless"
N_HELD_OUT = 400  # as `model_cards/make_harmless.py` holds out
MAX_LENGTH = 128


def steps(bench: Bench, dataset: str) -> list[Step]:
    size = bench.size
    return [
        bench.measuring("hh", 1.2 * size.n_hh_pairs, lambda: held_out(bench, dataset)),
        bench.measuring("hh-cpo", 6.0 * size.n_cpo_pairs, lambda: compare(bench, dataset)),
    ]


def _source(dataset: str) -> PairArguments:
    is_hub = dataset == HUB_ID
    return PairArguments(
        dataset, dataset_data_dir="harmless-base" if is_hub else None, dataset_test_split="test" if is_hub else "train"
    )


def held_out(bench: Bench, dataset: str) -> dict[str, float]:
    """What `hf-genarm evaluate` says about the pairs that the shipped adapter was not trained on."""
    source = _source(dataset)
    _, pairs = hold_out(load_pairs(source, str(source.dataset_test_split)), N_HELD_OUT)
    pairs = pairs.select(range(min(bench.size.n_hh_pairs, len(pairs))))
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    arm = AutoregressiveRewardModel.from_pretrained(str(ADAPTER), base_model=model)
    arm.tokenizer = AutoTokenizer.from_pretrained(demo_model())
    metrics, _, _ = measure(arm, pairs, batch_size=8)
    return metrics


def _short_texts(bench: Bench, dataset: str) -> Dataset:
    """Pairs that fit without truncation, as plain text, which the two trainers tokenize in the same way."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    source = _source(dataset)

    def as_text(pair: dict) -> dict:
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, tokenize=False)
        return {"prompt": prompt, "chosen": pair["chosen"][0]["content"], "rejected": pair["rejected"][0]["content"]}

    def fits(pair: dict) -> bool:
        return all(
            len(tokenizer(pair["prompt"] + pair[name]).input_ids) < MAX_LENGTH for name in ("chosen", "rejected")
        )

    pairs = load_pairs(source, str(source.dataset_test_split))
    return pairs.map(as_text).filter(fits).select(range(2 * bench.size.n_cpo_pairs))


def compare(bench: Bench, dataset: str) -> dict[str, float]:
    """Eq. 5 by our trainer, and by TRL's CPO, in which it is `sigmoid` without the SFT term."""
    pairs, n = _short_texts(bench, dataset), bench.size.n_cpo_pairs
    train, test = pairs.select(range(n)), pairs.select(range(n, 2 * n))
    arguments = {
        "output_dir": str(bench.output / "trainers" / "cpo"),
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "beta": 0.05,
        "gradient_checkpointing": False,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_length": 2 * MAX_LENGTH,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    result: dict[str, float] = {"n_pairs": n}
    for name, trainer_class, config in (
        ("arm", AutoregressiveRewardTrainer, AutoregressiveRewardConfig(**arguments)),
        ("cpo", CPOTrainer, CPOConfig(**arguments, loss_type="sigmoid", cpo_alpha=0.0)),
    ):
        torch.manual_seed(0)  # of the adapter
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32),
            args=config,
            train_dataset=train,
            eval_dataset=test,
            processing_class=AutoTokenizer.from_pretrained(demo_model()),
            peft_config=adapter_config(30),
        )
        trainer.train()
        measured = trainer.evaluate()
        result[f"{name}_loss"] = measured["eval_loss"]
        result[f"{name}_accuracy"] = measured["eval_accuracy" if name == "arm" else "eval_rewards/accuracies"]
    return result


def section(bench: Bench) -> str:
    metrics, cpo = bench.measured("hh"), bench.measured("hh-cpo")

    def share(name: str, form: str = "{:.3f} [{:.3f}, {:.3f}]") -> str:
        return form.format(*(metrics[name + end] for end in ("", "_low", "_high")))

    rows = [
        ["the ARM", share("pair_accuracy")],
        ["preferring the shorter", f"{metrics['shorter_accuracy']:.3f}"],
        ["the difference, paired", share("gain_over_shorter", "{:+.3f} [{:+.3f}, {:+.3f}]")],
        ["what the ARM has learned: less the base's log-probability", share("contrast_accuracy")],
    ]
    return "\n\n".join(
        [
            "## Real pairs",
            f"HH-RLHF's harmless-base, {metrics['n_pairs']} held-out pairs, the adapter that "
            "`model_cards/make_harmless.py` trains. The unit is the pair.",
            table(["", "held-out accuracy"], rows),
            f"Eq. 5 by TRL's `CPOTrainer` and by ours, {cpo['n_pairs']} pairs for one epoch in the same order, on as "
            f"many held-out pairs: loss {cpo['cpo_loss']:.4f} and {cpo['arm_loss']:.4f}, accuracy "
            f"{cpo['cpo_accuracy']:.3f} and {cpo['arm_accuracy']:.3f}.",
        ]
    )
