"""
Trains a reward model on 96 preference pairs and steers SmolLM2-135M-Instruct with it, in a few minutes on 2 CPU cores.

    python -m examples.quickstart                                                       # trains, then steers
    python -m examples.quickstart --adapter model_cards/arm-smollm2-135m-sentiment      # steers with a trained one

The reward is positive sentiment, which a program (VADER) can measure, here on prompts that were never trained on.
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, set_seed

from examples.pairs import held_out_prompts, training_pairs
from examples.scorers import sentiment
from examples.small import fitting_adapter, output_folder, sized
from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer, GenARMLogitsProcessor
from hf_genarm.bootstrap import mean_with_interval
from hf_genarm.demo import demo_model
from hf_genarm.hub.compatibility import chat_of

ALPHAS = (0.5, 1.0, 2.0)


def train(model_path: str, tokenizer, output_dir: Path, pairs: Dataset, **arguments) -> AutoregressiveRewardTrainer:
    """Trains an adapter on pairs. `arguments` are fields of [`AutoregressiveRewardConfig`]."""
    settings = {
        "output_dir": str(output_dir),
        "gradient_checkpointing": False,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 6,
        "save_strategy": "no",
        "report_to": "none",
    }
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    n_layers = model.config.num_hidden_layers
    adapter = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(n_layers // 2, n_layers)),  # the upper half: the backward pass stops there
    )
    trainer = AutoregressiveRewardTrainer(
        model=model,
        args=AutoregressiveRewardConfig(**(settings | arguments)),
        train_dataset=pairs,
        processing_class=copy.deepcopy(tokenizer),
        peft_config=adapter,
    )
    trainer.train()
    trainer.save_model()
    trainer.model.eval()
    return trainer


class Steering:
    """Samples answers to the same prompts under the same seed with any processor, and scores them."""

    def __init__(self, model, tokenizer, prompts: list[str], max_new_tokens: int, seed: int):
        self.model, self.tokenizer, self.prompts, self.seed = model, tokenizer, prompts, seed
        chats = [chat_of(prompt) for prompt in prompts]
        self.inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        self.options = {"do_sample": True, "top_k": 0, "max_new_tokens": max_new_tokens}

    def sample(self, processors: list[LogitsProcessor]) -> torch.Tensor:
        """Returns the token ids of the answers."""
        set_seed(self.seed)
        output = self.model.generate(**self.inputs, logits_processor=processors, **self.options)
        return output[:, self.inputs["input_ids"].shape[1] :]

    def __call__(self, processor: GenARMLogitsProcessor) -> tuple[list[str], np.ndarray]:
        """Returns the answers and their sentiment."""
        texts = self.tokenizer.batch_decode(self.sample([processor]), skip_special_tokens=True)
        return texts, np.array(sentiment(self.prompts, texts))


def plot(scores: dict[float, np.ndarray], control: np.ndarray, seed: int, path: Path, strength: float = 1.0) -> None:
    """Plots scores against the strength, with their intervals and the control."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    alphas = sorted(scores)
    means, lows, highs = np.array([mean_with_interval(scores[alpha], seed=seed) for alpha in alphas]).T
    figure, axis = plt.subplots(figsize=(7, 4.2), dpi=160)
    axis.fill_between(alphas, lows, highs, color="#1f77b4", alpha=0.18, linewidth=0)
    axis.plot(alphas, means, "o-", color="#1f77b4", linewidth=2, label="guided by the reward model")
    mean, low, high = mean_with_interval(control, seed=seed)
    axis.errorbar(
        [strength],
        [mean],
        [[mean - low], [high - mean]],
        fmt="s",
        color="#d95f02",
        capsize=4,
        label="control: untrained",
    )
    axis.axhline(means[0], color="0.5", linestyle=":", linewidth=1.2, label="unguided")
    axis.set(
        xlabel="strength α",
        ylabel="sentiment of the answer (VADER)",
        title=f"SmolLM2-135M steered towards positive answers\n{len(control)} held-out prompts, 95 % intervals",
    )
    axis.set_xticks(alphas)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="best")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="folder or Hub id of a trained adapter; without it, one is trained")
    parser.add_argument("--n-pairs", type=int, default=96, help="preference pairs to train on (default: 96)")
    parser.add_argument("--n-prompts", type=int, help="held-out prompts (default: 36, with --adapter 24)")
    parser.add_argument("--max-new-tokens", type=int, default=sized(32, 4))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_folder, default="outputs/quickstart")
    args = parser.parse_args()
    n_prompts = args.n_prompts or (24 if args.adapter else 36)

    try:
        model_path = demo_model()
    except FileNotFoundError as error:
        sys.exit(f"quickstart: {error}")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")

    if args.adapter:
        processor = GenARMLogitsProcessor.from_pretrained(fitting_adapter(args.adapter), base_model=model)
    else:
        trainer = train(
            model_path,
            tokenizer,
            args.output / "adapter",
            training_pairs(args.n_pairs),
            per_device_train_batch_size=4,
            learning_rate=3e-3,  # high, because there are few steps
            sft_coefficient=0.5,  # the likelihood of chosen answers keeps the text fluent
        )
        print(f"The adapter is in {trainer.args.output_dir}")
        processor = GenARMLogitsProcessor(trainer.model, base_model=model)
    # The untrained reward model is the base itself. Without a reference it only sharpens, by a temperature of
    # 1 / (1 + strength), and sharpening alone may raise a score.
    (strength,) = processor.alpha  # the one that the reward model recommends, or 1
    control = GenARMLogitsProcessor(model, alpha=strength, base_model=model)

    prompts = held_out_prompts(n_prompts)
    steer = Steering(model, tokenizer, prompts, args.max_new_tokens, args.seed)
    texts, scores = {}, {}
    with tqdm(total=len(ALPHAS) + 2, desc="Generating") as progress:
        for alpha in (0.0, *(strength * x for x in ALPHAS)):
            processor.alpha = alpha
            texts[alpha], scores[alpha] = steer(processor)
            progress.update()
        _, control_scores = steer(control)
        progress.update()

    for index in range(0, len(prompts), len(prompts) // 4):
        print(f"\n{prompts[index]}\n  unguided: {texts[0.0][index]!r}\n  guided:   {texts[strength][index]!r}")

    print(f"\nMean sentiment on {len(prompts)} held-out prompts (VADER compound, 95 % bootstrap interval):")
    rows = [("unguided", scores[0.0]), (f"control: untrained, α = {strength:g}", control_scores)]
    rows += [(f"guided, α = {strength:g}", scores[strength])]
    rows += [("guided - unguided, paired", scores[strength] - scores[0.0])]
    rows += [("guided - control, paired", scores[strength] - control_scores)]
    for name, values in rows:
        mean, low, high = mean_with_interval(values, seed=args.seed)
        print(f"  {name:<27} {mean:+.2f}  [{low:+.2f}, {high:+.2f}]")

    plot(scores, control_scores, args.seed, args.output / "reward_by_alpha.png", strength)
    print(f"\nThe plot of sentiment against α is in {args.output / 'reward_by_alpha.png'}")


if __name__ == "__main__":
    main()
