"""The guided answer of the playground as a short script that runs without the playground."""

from ..demo import DEMO_MODEL_ID
from ..hub.compatibility import chat_of
from .answers import Answer
from .models import Models

_SCRIPT = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor
{imports}
tokenizer = AutoTokenizer.from_pretrained({base})
model = AutoModelForCausalLM.from_pretrained({base}, dtype={dtype!r}, device_map={device!r})
rewards = [
{rewards}]
processor = GenARMLogitsProcessor(rewards, base_model=model, tokenizer=tokenizer{options})
processor.alpha = {alpha}
inputs = processor.encode([{chat!r}])
torch.manual_seed({seed})
output = model.generate(**inputs, logits_processor=[processor], do_sample=True, top_k=0, temperature={temperature!r}, \
max_new_tokens={max_new_tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def script_of(models: Models, answer: Answer) -> str:
    """
    Writes the script of an answer, with the sentences and adapters that were on.

    Args:
        models ([`Models`]):
            The models that have answered.
        answer ([`Answer`]):
            The answer, complete.
    """
    settings, is_demo_model = answer.settings, models.base == DEMO_MODEL_ID
    rewards = [f"AutoregressiveRewardModel.from_sentence({x!r}, model, tokenizer=tokenizer)" for x in answer.sentences]
    rewards += [f"AutoregressiveRewardModel.from_pretrained({x!r}, model)" for x in answer.adapters]
    all_strengths = [strengths for _, strengths in answer.strengths_at]
    on = [index for index in range(len(rewards)) if any(strengths[index] for strengths in all_strengths)] or [0]
    script = _SCRIPT.format(
        base="demo_model()" if is_demo_model else repr(models.base),
        imports="from hf_genarm.demo import demo_model\n" if is_demo_model else "",
        dtype=str(models.model.dtype).removeprefix("torch."),
        device="auto" if len({x.device for x in models.model.parameters()}) > 1 else str(models.model.device),
        rewards="".join(f"    {rewards[index]},\n" for index in on),
        options=(', reference="base"' if settings.reference == "base" else "")
        + (f", target_kl={answer.first_target_kl!r}" if answer.first_target_kl else ""),
        alpha=_schedule([(step, [strengths[index] for index in on]) for step, strengths in answer.strengths_at]),
        chat=chat_of(answer.prompt),
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
