"""The guided answer of the playground as a script of a dozen lines that runs without the playground."""

from ..demo import DEMO_MODEL_ID
from .answers import Answer
from .models import Models

_SCRIPT = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_genarm import GenARMLogitsProcessor
{imports}
tokenizer = AutoTokenizer.from_pretrained({base})
model = AutoModelForCausalLM.from_pretrained({base}, dtype={dtype!r}, device_map={device!r})
inputs = tokenizer.apply_chat_template({chat!r}, add_generation_prompt=True, return_dict=True, return_tensors="pt")\
.to(model.device)
processor = GenARMLogitsProcessor.from_pretrained({names!r}, base_model=model{options})
processor.alpha = {alpha}
torch.manual_seed({seed})
output = model.generate(**inputs, logits_processor=[processor], do_sample=True, top_k=0, temperature={temperature!r}, \
max_new_tokens={max_new_tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def script_of(models: Models, answer: Answer) -> str:
    """
    Writes the script of an answer.

    Args:
        models ([`Models`]):
            The models that have answered.
        answer ([`Answer`]):
            The answer, complete.
    """
    settings, is_demo_model = answer.settings, models.base == DEMO_MODEL_ID
    options = f", target_kl={answer.first_target_kl!r}" if answer.first_target_kl else ""
    # Always given, since the reward model may recommend another one.
    options += ', reference="base"' if settings.reference == "base" else ", reference=None"
    script = _SCRIPT.format(
        base="demo_model()" if is_demo_model else repr(models.base),
        imports="from hf_genarm.demo import demo_model\n" if is_demo_model else "",
        dtype=str(models.model.dtype).removeprefix("torch."),
        device="auto" if len({x.device for x in models.model.parameters()}) > 1 else str(models.model.device),
        chat=[{"role": "user", "content": answer.prompt}],
        names=answer.names,
        options=options,
        alpha=_schedule(answer.strengths_at),
        seed=settings.seed,
        temperature=answer.first_temperature,
        max_new_tokens=settings.max_new_tokens,
    )
    if answer.changed_otherwise:
        script = (
            "# Temperature or target KL were changed while the answer was written, which this script doesn't do.\n"
            + script
        )
    return script


def _schedule(strengths_at: list[tuple[int, list[float]]]) -> str:
    """Returns code for the strengths: numbers, or if they were changed a function of the step."""
    (_, strengths), *later = strengths_at
    if not later:
        return repr(strengths)
    expression = repr(strengths)
    for step, now in later:
        expression = f"{now!r} if step >= {step} else {expression}"
    return f"lambda step: {expression}"
