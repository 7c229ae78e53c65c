"""
Answers one question unguided, with a sentence and with an adapter, three times each, and keeps the answers.

    python -m examples.answers

The README shows `examples/answers.json`: the first draws of seed 0.
"""

import argparse
import json

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.small import fitting_adapter, output_file, sized
from hf_genarm import GenARMLogitsProcessor
from hf_genarm.demo import DEMO_MODEL_ID, demo_model
from hf_genarm.hub.compatibility import chat_of

QUESTION = "What is a rainy Monday like? Answer in one sentence."
SENTENCE = "You are an extremely positive, enthusiastic person who loves everything."
ADAPTER = "model_cards/arm-smollm2-135m-sentiment"
STRENGTHS = {"unguided": 0.0, "sentence": 1.5, "adapter": 0.5}
N_ANSWERS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    answers_file = sized("examples/answers.json", "outputs/answers.json")
    parser.add_argument("--output", type=output_file, default=answers_file)
    args = parser.parse_args()

    path = demo_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": sized(40, 4)}
    sentence = GenARMLogitsProcessor.from_sentences(SENTENCE, base_model=model)
    adapter = GenARMLogitsProcessor.from_pretrained(fitting_adapter(ADAPTER), base_model=model, reference="base")
    answers: dict[str, list[str]] = {}
    for name, alpha in STRENGTHS.items():
        processor = adapter if name == "adapter" else sentence
        processor.alpha = alpha
        inputs = sentence.encode([chat_of(QUESTION)] * N_ANSWERS)
        set_seed(0)
        output = model.generate(**inputs, logits_processor=[processor], **options)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers[name] = [" ".join(text.split()) for text in texts]
        print(name, *answers[name], sep="\n")
    report = {"model": DEMO_MODEL_ID, "question": QUESTION, "sentence": SENTENCE, "adapter": ADAPTER}
    report |= {"strengths": STRENGTHS, "options": options, "answers": answers}
    args.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
