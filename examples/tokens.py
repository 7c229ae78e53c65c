"""
Draws what guidance did to each token of an answer, in the terminal and as `examples/plots/tokens.png`.

    python -m examples.tokens --seed 1
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.small import fitting_adapter, output_file, sized
from hf_genarm import GenARMLogitsProcessor
from hf_genarm.demo import demo_model
from hf_genarm.hub.compatibility import chat_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="model_cards/arm-smollm2-135m-sentiment", help="Hub id or folder")
    parser.add_argument("--prompt", default="What did you think of the hotel? Answer in two sentences.")
    parser.add_argument("--alpha", type=float, default=1.0, help="strength of guidance")
    parser.add_argument("--seed", type=int, default=1)
    picture_file = sized("examples/plots/tokens.png", "outputs/tokens.png")
    parser.add_argument("--output", type=output_file, default=picture_file)
    args = parser.parse_args()

    path = demo_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    chat = chat_of(args.prompt)
    inputs = tokenizer.apply_chat_template(
        [chat] * 2, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    processor = GenARMLogitsProcessor.from_pretrained(fitting_adapter(args.adapter), base_model=model, reference="base")
    processor.alpha = torch.tensor([[0.0], [args.alpha]])  # one row per request
    processor.keeps_statistics = True
    torch.manual_seed(args.seed)
    output = model.generate(
        **inputs, logits_processor=[processor], do_sample=True, top_k=0, max_new_tokens=sized(64, 4)
    )

    # The base's own text and the guided one, coloured by what the reward model has learned
    picture = processor.statistics(output).by("reward_log_prob_0").beside(titles=["unguided", "guided"])
    print(picture.to_ansi())
    picture.plot().figure.savefig(args.output, dpi=150)
    print(f"The picture is in {args.output}.")


if __name__ == "__main__":
    main()
