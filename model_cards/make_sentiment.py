"""
Trains the adapter in `model_cards/arm-smollm2-135m-sentiment`, measures it on held-out prompts and writes its card.

    python model_cards/make_sentiment.py       # about 15 minutes on 2 cores
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

from quickstart import ALPHAS, DATA, Steering, bootstrap, held_out_prompts, plot, train  # noqa: E402

from hf_genarm import GenARMLogitsProcessor  # noqa: E402
from hf_genarm.demo import DEMO_MODEL_ID, demo_model  # noqa: E402

NAME = "arm-smollm2-135m-sentiment"
SEED = 0


def interval(values: np.ndarray) -> str:
    mean, low, high = bootstrap(values, SEED)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    folder = HERE / NAME
    tokenizer = AutoTokenizer.from_pretrained(demo_model(), padding_side="left")
    output = HERE.parent / "outputs" / NAME
    trainer = train(demo_model(), tokenizer, output, n_pairs=1000, epochs=2, batch_size=8, lr=1e-3)
    folder.mkdir(exist_ok=True)
    trainer.model.save_pretrained(folder)  # the tokenizer is that of the base, unchanged

    # Held-out accuracy, beside a rule that only counts tokens.
    test = load_dataset("json", data_files=str(DATA / "test.jsonl"), split="train")
    test = trainer._prepare_dataset(test, trainer.processing_class, trainer.args, "test")
    chosen, rejected = trainer.predict(test).predictions.T
    lengths = np.array([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in test])
    accuracy = (chosen > rejected).astype(float)
    shorter = (lengths[:, 0] < lengths[:, 1]) + 0.5 * (lengths[:, 0] == lengths[:, 1])

    # Guidance on every held-out prompt, as a user would run it: from the folder that was just written.
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    processor = GenARMLogitsProcessor.from_pretrained(str(folder), base_model=model)
    steer = Steering(model, tokenizer, held_out_prompts(), max_new_tokens=48, seed=SEED)
    texts, scores = {}, {}
    for alpha in (0.0, *ALPHAS):
        processor.alpha = alpha
        texts[alpha], scores[alpha] = steer(processor)
    _, control = steer(GenARMLogitsProcessor(model))
    plot(scores, control, SEED, folder / "reward_by_alpha.png")

    card = ModelCard.from_template(
        ModelCardData(
            base_model=DEMO_MODEL_ID,
            base_model_relation="adapter",
            language="en",
            library_name="peft",
            license="apache-2.0",
            tags=["genarm", "autoregressive-reward-model", "reward-model", "trl", "conversational"],
            model_name=NAME,
            eval_results=[
                EvalResult(
                    task_type="reward-modeling",
                    task_name="Pairwise preference",
                    dataset_type="sentiment",
                    dataset_name="Sentiment pairs, test split",
                    metric_type="accuracy",
                    metric_value=round(float(accuracy.mean()), 4),
                )
            ],
        ),
        template_path=str(HERE / "sentiment_card.md"),
        name=NAME,
        base_model=DEMO_MODEL_ID,
        beta=trainer.args.beta,
        n_train=len(trainer.train_dataset),
        n_test=len(test),
        n_prompts=len(control),
        accuracy=interval(accuracy),
        shorter=interval(shorter),
        alphas=[(alpha, interval(scores[alpha]), interval(scores[alpha] - scores[0.0])) for alpha in ALPHAS],
        unguided=interval(scores[0.0]),
        control=interval(control),
        over_control=interval(scores[1.0] - control),
        example=next(
            (prompt, texts[0.0][index], texts[1.0][index])
            for index, prompt in enumerate(steer.prompts)
            if scores[0.0][index] < 0
        ),
    )
    card.save(folder / "README.md")
    shutil.rmtree(trainer.args.output_dir)
    print(card.content)


if __name__ == "__main__":
    main()
