"""Reward models that are trained on what steers with `reference="base"`: training, scoring, steering, what is saved."""

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import LORA, log_prob, loss_of, model_for, pairs_of
from pairs import CHOSEN, PROMPTS, REJECTED, STANDARD, conversational
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import save_llama, tiny_llama
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo, cli
from hf_genarm.scripts.evaluate import predict
from hf_genarm.training.metrics import preference_metrics

KINDS = ["full", "LoRA"]


@pytest.fixture(params=KINDS)
def started(request, tokenizer):
    """A model, and what it was before it moved: as after some steps of training."""
    return _started(request.param, tokenizer)


def _started(kind, tokenizer):
    before = model_for(tokenizer)
    if kind == "full":
        return copy.deepcopy(before), before
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(before), LoraConfig(**LORA, init_lora_weights=False)), before


def move(model, kind):
    """As training would: of an adapter, its weights alone."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def margins_of(model, before, pairs):
    return [
        [(log_prob(model, ids, 1) - log_prob(before, ids, 1)) for ids in pair] for pair in pairs
    ]  # what a pair shares cancels


@pytest.mark.parametrize("shares", [True, False])
def test_loss_in_closed_form(make_trainer, started, shares):
    model, before = started
    trainer = make_trainer(model=model, beta=0.3, reference="base")
    trainer._pair_log_probs._may_share = shares
    move(trainer.model, None)
    pairs = pairs_of(trainer.train_dataset)
    expected = torch.stack(
        [-torch.nn.functional.logsigmoid(0.3 * (w - r)) for w, r in margins_of(trainer.model.eval(), before, pairs)]
    ).mean()
    plain = [log_prob(trainer.model, w, 1) - log_prob(trainer.model, r, 1) for w, r in pairs]
    eq_5 = -torch.nn.functional.logsigmoid(0.3 * torch.stack(plain)).mean()
    assert abs(expected - eq_5) > 1e-2
    torch.testing.assert_close(loss_of(trainer).double(), expected, atol=1e-4, rtol=0)


def test_before_the_first_step_the_loss_is_log_2(make_trainer):
    for peft_config in (None, LoraConfig(**LORA)):
        trainer = make_trainer(peft_config=peft_config, reference="base")
        assert loss_of(trainer).item() == pytest.approx(0.693147, abs=1e-5)


OBJECTIVES = {
    "DPO": ({}, {}),
    "hinge": ({"loss_type": "hinge"}, {"loss_type": ["hinge"]}),
    "length-normalised": ({"length_normalized": True}, {"loss_type": ["sigmoid_norm"]}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_equal_those_of_dpo(make_trainer, tokenizer, tmp_path, objective, kind):
    """From TRL's own hands, with a model that has moved. Its own reference of one with an adapter is a copy of both."""
    ours, theirs = OBJECTIVES[objective]
    model, before = _started(kind, tokenizer)
    pairs = {"prompt": [x.rstrip() for x in PROMPTS]}  # older TRL cuts elsewhere if a token spans the boundary
    pairs |= {"chosen": [f" {x}" for x in CHOSEN], "rejected": [f" {x}" for x in REJECTED]}
    oracle = DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=before,
        args=DPOConfig(
            output_dir=str(tmp_path / "dpo"),
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            beta=0.3,
            **theirs,
        ),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer = make_trainer(pairs, model=model, beta=0.3, reference="base", **ours)
    for module in (oracle.model, trainer.model):
        move(module, kind)
    expected = oracle.compute_loss(oracle.model, oracle.data_collator(list(oracle.train_dataset)))
    expected.backward()
    loss = loss_of(trainer)
    loss.backward()
    assert abs(float(loss.detach()) - 0.6931) > 1e-2
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    gradients = {name: x.grad for name, x in oracle.model.named_parameters() if x.grad is not None}
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is None:
            assert name not in gradients
            continue
        largest = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * largest)


def test_the_reference_stays_where_training_started(make_trainer, started):
    """Also after steps of training, with dropout in what is trained, and in evaluation."""
    model, before = started
    trainer = make_trainer(
        model=model, beta=0.3, reference="base", max_steps=3, eval_dataset=Dataset.from_dict(STANDARD)
    )
    trainer.train()
    metrics = trainer.evaluate()
    margins = torch.tensor(margins_of(trainer.model.eval(), before, pairs_of(trainer.train_dataset))) * 0.3
    assert margins.abs().max() > 0.05
    difference = margins[:, 0] - margins[:, 1]
    assert metrics["eval_mean_margin"] == pytest.approx(difference.mean().item(), abs=1e-4)
    assert metrics["eval_pair_accuracy"] == (difference > 0).double().mean().item()
    assert metrics["eval_margin"] == pytest.approx(difference.mean().item(), abs=1e-4)
    assert "eval_contrast_accuracy" not in metrics
    info = trainer.reward_info
    assert info.loss == {"reference": "base"}
    assert info.reference == "base"
    assert info.reward_scale == pytest.approx(difference.pow(2).mean().sqrt().item() / 0.3, rel=1e-3)
    predicted = torch.tensor(trainer.predict(trainer.train_dataset).predictions)
    torch.testing.assert_close((predicted[:, 0] - predicted[:, 1]).double(), difference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_that_is_resumed_has_the_same_reference(make_trainer, tokenizer, kind):
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "reference": "base", "beta": 0.5}
    trainers = [make_trainer(peft_config=LoraConfig(**LORA) if kind == "LoRA" else None, **options) for _ in range(2)]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=f"{trainers[0].args.output_dir}/checkpoint-2")
    losses = [[logs["loss"] for logs in trainer.state.log_history if "loss" in logs] for trainer in trainers]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_gradients_add_up_over_batches(make_trainer):
    pairs, steps = {name: column[:2] for name, column in STANDARD.items()}, []
    for size, accumulate in ((2, 1), (1, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "reference": "base"}
        trainer = make_trainer(pairs, max_steps=1, optim="sgd", max_grad_norm=0.0, learning_rate=1.0, **options)
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        steps.append({name: trainer.model.state_dict()[name] - value for name, value in before.items()})
    assert max(value.abs().max() for value in steps[0].values()) > 1e-3
    for name, value in steps[0].items():
        torch.testing.assert_close(value, steps[1][name], atol=1e-5, rtol=1e-4)


def test_the_reference_has_no_dropout(make_trainer, tokenizer):
    model = tiny_llama(vocab_size=len(tokenizer), attention_dropout=0.5)
    trainer = make_trainer(model=model, reference="base", disable_dropout=False)
    trainer.model.train()
    inputs = trainer.data_collator(list(trainer.train_dataset))
    assert len({float(trainer.compute_loss(trainer.model, dict(inputs)).detach()) for _ in range(4)}) > 1
    assert not any(module.training for module in trainer._starting_point._copy.modules())


def test_an_adapter_that_changes_the_base_is_refused(make_trainer):
    for name, value in (("bias", "lora_only"), ("init_lora_weights", "pissa")):
        with pytest.raises(ValueError, match=f"`reference` is 'base', but the adapter has `{name}={value!r}`"):
            make_trainer(peft_config=LoraConfig(**LORA, **{name: value}), reference="base")
    with pytest.raises(ValueError, match="`reference` is 'model', but must be 'base'"):
        make_trainer(reference="model")


# --- what is published ---


@pytest.fixture(params=KINDS)
def published(request, make_trainer, tokenizer, tmp_path):
    """A folder, the model that training started from, and what was trained."""
    trainer = make_trainer(
        conversational(True),
        model=save_llama(tmp_path / "base"),
        peft_config=LoraConfig(**LORA) if request.param == "LoRA" else None,
        reference="base",
        beta=0.3,
        max_steps=3,
        eval_dataset=Dataset.from_dict(conversational(True)),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer.args.output_dir, AutoModelForCausalLM.from_pretrained(tmp_path / "base"), trainer


def test_scores_are_margins(published):
    folder, base, trainer = published
    arm = AutoregressiveRewardModel.from_pretrained(folder, base)
    chats = [conversational(True)["prompt"], conversational(True)["chosen"]]
    texts = arm.token_rewards(*chats)
    plain, before = (AutoregressiveRewardModel(model.eval(), arm.tokenizer) for model in (trainer.model, base))
    expected = plain.score(*chats) - before.score(*chats)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(arm.score(*chats), expected, atol=1e-4, rtol=1e-4)
    for text, one, other in zip(texts, plain.token_rewards(*chats), before.token_rewards(*chats), strict=True):
        torch.testing.assert_close(text.rewards, one.rewards - other.rewards, atol=1e-4, rtol=1e-4)
    # The command evaluates the same.
    metrics = preference_metrics(predict(arm, Dataset.from_dict(conversational(True)), 2))
    for name in ("pair_accuracy", "mean_margin", "rms_margin"):
        assert metrics[name] == pytest.approx(arm.info.metrics[name], rel=1e-3), name
    assert "contrast_accuracy" not in metrics
    if not isinstance(arm.model, PeftModel):
        alone = AutoregressiveRewardModel.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"does not hold the model that training started from.*base_model=model"):
            alone.score(*chats)
        Dataset.from_dict(conversational(True)).to_json(f"{folder}/pairs.jsonl")
        call = ["evaluate", "--model", folder, "--dataset", f"{folder}/pairs.jsonl", "--output_dir", f"{folder}/report"]
        assert cli.main(call) == 1
        assert cli.main([*call, "--base", base.name_or_path]) == 0
        report = json.loads(Path(folder, "report", "evaluation.json").read_text(encoding="utf-8"))
        assert report["metrics"] == pytest.approx(metrics, rel=1e-4)


def test_it_steers_by_the_margin(published, tokenizer):
    folder, base, _ = published
    chat = conversational(True)["prompt"][0]
    ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]])
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 0}

    def sample(processors):
        torch.manual_seed(0)
        return base.generate(ids, logits_processor=processors, **options).tolist()

    processor = GenARMLogitsProcessor.from_pretrained(folder, base_model=base, alpha=3.0)
    assert sample([processor]) == sample(
        [GenARMLogitsProcessor.from_pretrained(folder, base_model=base, alpha=3.0, reference="base")]
    )
    eq_7 = GenARMLogitsProcessor.from_pretrained(folder, base_model=base, alpha=3.0, reference=None)
    logits = torch.zeros(1, len(tokenizer))
    assert not torch.allclose(processor(ids, logits), eq_7(ids, logits), atol=1e-2)


@pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")  # the prompt is not a chat
def test_on_another_base_it_is_contrasted_with_its_own(published, tokenizer):
    """As in proxy tuning: what the adapter adds to its model is added to another one."""
    folder, base, trainer = published
    other = tiny_llama(5, vocab_size=len(tokenizer))
    ids, scores = torch.tensor([[5, 6, 7, 8]]), torch.randn(1, len(tokenizer))
    if not isinstance(trainer.model, PeftModel):
        with pytest.raises(ValueError, match="does not hold the model that training started from"):
            GenARMLogitsProcessor.from_pretrained(folder, base_model=other, tokenizer=tokenizer)
        return
    for options in ({"base_model": other, "tokenizer": tokenizer}, {}):
        processor = GenARMLogitsProcessor.from_pretrained(folder, alpha=2.0, **options)
        expected = GenARMLogitsProcessor(trainer.model.eval(), 2.0, reference=base)(ids, scores)
        torch.testing.assert_close(processor(ids, scores), expected, atol=1e-4, rtol=0)


def test_the_card_says_which_loss(published):
    folder, _, _ = published
    card = Path(folder, "README.md").read_text(encoding="utf-8")
    assert "log π_r - log π_base" in card
    assert "dominated by their lengths" not in card
    assert RewardInfo.load(f"{folder}/genarm_config.json").loss == {"reference": "base"}
