"""The trainer: its loss against a closed form and TRL's own, every dataset format, what it changes and saves."""

import copy
import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import LORA, log_prob, loss_of, model_for, pairs_of
from huggingface_hub import ModelCard
from pairs import CHOSEN, PROMPTS, REJECTED, STANDARD, conversational, implicit
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, EvalPrediction, HfArgumentParser
from transformers.utils import is_torch_bf16_gpu_available
from trl import RewardConfig
from trl.experimental.cpo import CPOConfig, CPOTrainer

from hf_genarm import AutoregressiveRewardConfig, AutoregressiveRewardTrainer, GenARMLogitsProcessor, RewardInfo
from hf_genarm.bootstrap import mean_with_interval
from hf_genarm.hub.info import tokenizer_fingerprint
from hf_genarm.training.metrics import calibration_error, preference_metrics


def naive_loss(model, pairs, beta, margins=None):
    """Eq. 5, pair by pair, over the whole texts: what a pair shares cancels."""
    losses = []
    for index, (chosen, rejected) in enumerate(pairs):
        difference = beta * (log_prob(model, chosen, 1) - log_prob(model, rejected, 1))
        losses.append(-torch.nn.functional.logsigmoid(difference - (margins[index] if margins else 0)))
    return torch.stack(losses).mean()


# --- the loss ---


def test_loss_closed_form(make_trainer, tokenizer):
    """
    A uniform model gives every token the probability 1/V. The chosen response has 3 tokens more than the rejected one,
    so the loss is log(1 + V^(3β)).
    """
    model = model_for(tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)
    data = {"chosen_ids": [[5, 6, 7, 8, 9, 10]], "rejected_ids": [[5, 6, 11]]}
    trainer = make_trainer(data, model, beta=0.1)
    expected = math.log1p(len(tokenizer) ** (3 * 0.1))
    torch.testing.assert_close(loss_of(trainer).item(), expected, atol=1e-5, rtol=0)
    assert trainer._metrics["eval"]["accuracy"] == [0.0]
    torch.testing.assert_close(trainer._metrics["eval"]["margin"][0], -3 * 0.1 * math.log(len(tokenizer)))
    torch.testing.assert_close(trainer._metrics["eval"]["max_reward"][0], -0.1 * math.log(len(tokenizer)))


# Ours, and what CPOTrainer calls the same
OBJECTIVES = {
    "Eq. 5": ({}, {}),
    "label smoothing": ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "hinge": ({"loss_type": "hinge"}, {"loss_type": "hinge"}),
    "SimPO": ({"length_normalized": True, "target_margin": 0.4}, {"loss_type": "simpo", "simpo_gamma": 0.4}),
    "SFT term": ({"sft_coefficient": 0.7}, {"cpo_alpha": 0.7}),
    "all": (
        {"length_normalized": True, "target_margin": 0.4, "sft_coefficient": 0.7, "label_smoothing": 0.2},
        {"loss_type": "simpo", "simpo_gamma": 0.4, "cpo_alpha": 0.7, "label_smoothing": 0.2},
    ),
}


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_equal_those_of_cpo(make_trainer, tokenizer, tmp_path, objective, shares):
    """With the sigmoid loss and without its SFT term, CPO is Eq. 5; from TRL's own hands."""
    ours, theirs = OBJECTIVES[objective]
    options = {"loss_type": "sigmoid", "cpo_alpha": 0.0, "beta": 0.3, **theirs}
    oracle = CPOTrainer(
        model=model_for(tokenizer),
        args=CPOConfig(
            output_dir=str(tmp_path / "cpo"),
            bf16=False,
            report_to="none",
            remove_unused_columns=False,
            gradient_checkpointing=False,
            **options,
        ),
        train_dataset=Dataset.from_dict(STANDARD),
        processing_class=copy.deepcopy(tokenizer),
    )
    batch = oracle.data_collator(list(oracle.train_dataset))
    expected, _ = oracle.get_batch_loss_metrics(oracle.model, batch)
    expected.backward()

    rows = []
    for row in oracle.train_dataset:
        ids = {f"{side}_ids": row[f"{side}_input_ids"] for side in ("chosen", "rejected")}
        rows.append({**ids, "genarm_prompt_length": row["chosen_labels"].count(-100)})
    trainer = make_trainer(Dataset.from_list(rows), beta=0.3, **ours)
    trainer._pair_log_probs._may_share = shares
    loss = loss_of(trainer)
    loss.backward()
    plain = naive_loss(trainer.model, pairs_of(trainer.train_dataset), 0.3)
    assert (abs(loss - plain) < 1e-4) == (not ours)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = dict(oracle.model.named_parameters())
    assert max(parameter.grad.abs().max() for parameter in gradients.values()) > 1e-2
    for name, parameter in trainer.model.named_parameters():
        largest = float(gradients[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5 * largest)


def test_a_response_that_begins_the_other_one(make_trainer, tokenizer):
    """The longer response ends in the pad token, as it does where pad is eos: text in one row, padding in the other."""
    eos = tokenizer.pad_token_id
    pairs = [([5, 6, 7, eos], [5, 6, 7]), ([5, 9], [8, 6, 7])]
    rows = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in pairs]
    trainer = make_trainer(Dataset.from_list(rows), beta=0.5)
    expected = naive_loss(trainer.model, pairs, 0.5)
    torch.testing.assert_close(loss_of(trainer).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", [{}, {"sft_coefficient": 1.0}, {"length_normalized": True, "beta": 2.0}])
def test_gradient_accumulation_equals_one_large_batch(make_trainer, objective):
    """In gradients, which an optimiser without momentum adds to the weights; responses are of unequal lengths."""
    pairs, steps = {name: column[::2] for name, column in STANDARD.items()}, []
    for size, accumulate in ((2, 1), (1, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, **objective}
        trainer = make_trainer(pairs, max_steps=1, optim="sgd", max_grad_norm=0.0, learning_rate=1.0, **options)
        batch = trainer.data_collator(list(trainer.train_dataset))
        n_tokens = batch["attention_mask"].sum(dim=1)[:2] - batch["genarm_prompt_length"]
        assert n_tokens[0] > 1.5 * n_tokens[1]
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        after = trainer.model.state_dict()
        steps.append({name: after[name] - value for name, value in before.items()})
        loss = trainer.state.log_history[0]["loss"]
        assert loss == pytest.approx(loss_of(make_trainer(pairs, **objective)).item(), rel=1e-4)
    for name, value in steps[0].items():
        assert value.abs().max() > 1e-3
        torch.testing.assert_close(value, steps[1][name], atol=1e-5, rtol=1e-4)


# --- data ---


@pytest.mark.parametrize(
    "data",
    [STANDARD, implicit(), conversational(True), conversational(False)],
    ids=["standard", "standard, implicit prompt", "conversational", "conversational, implicit prompt"],
)
def test_dataset_formats(make_trainer, tokenizer, data):
    trainer = make_trainer(data, beta=0.2)
    text = tokenizer.decode(trainer.train_dataset[0]["chosen_ids"])
    assert PROMPTS[0].strip() in text
    assert CHOSEN[0] in text
    torch.testing.assert_close(
        loss_of(trainer).double(), naive_loss(trainer.model, pairs_of(trainer.train_dataset), 0.2), atol=1e-4, rtol=0
    )


def test_margin(make_trainer):
    margins = [0.5, 0.0, -1.0]
    trainer = make_trainer(STANDARD | {"margin": margins}, beta=0.2)
    pairs = pairs_of(trainer.train_dataset)
    expected = naive_loss(trainer.model, pairs, 0.2, margins)
    assert abs(expected - naive_loss(trainer.model, pairs, 0.2)) > 1e-2
    torch.testing.assert_close(loss_of(trainer).double(), expected, atol=1e-4, rtol=0)


def test_streaming(make_trainer):
    rows = [dict(zip(STANDARD, values, strict=True)) for values in zip(*STANDARD.values(), strict=True)]
    same = {"prompt": "How? ", "chosen": "Fine.", "rejected": "Fine."}
    trainer = make_trainer(IterableDataset.from_generator(lambda: iter([*rows, same])), max_steps=2)
    with pytest.warns(UserWarning, match="identical chosen and rejected"):
        assert len(list(trainer.train_dataset)) == 3
    with pytest.warns(UserWarning, match="identical chosen and rejected"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_several_evaluation_sets(make_trainer):
    dataset = Dataset.from_dict(STANDARD)
    trainer = make_trainer(eval_dataset={"one": dataset, "two": dataset.select([0])}, beta=0.2)
    metrics = trainer.evaluate()
    for name, part in (("one", [0, 1, 2]), ("two", [0])):
        pairs = [pairs_of(trainer.train_dataset)[index] for index in part]
        torch.testing.assert_close(
            metrics[f"eval_{name}_loss"], naive_loss(trainer.model, pairs, 0.2).item(), atol=1e-4, rtol=0
        )
    for metric in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens"):
        assert any(f"eval_{metric}" in logs for logs in trainer.state.log_history)


def test_predict_returns_the_rewards_of_each_pair(make_trainer):
    trainer = make_trainer(beta=0.2, per_device_eval_batch_size=2)
    rewards = torch.tensor(trainer.predict(trainer.train_dataset).predictions)
    pairs = pairs_of(trainer.train_dataset)
    starts = [next(at for at, (a, b) in enumerate(zip(*pair, strict=False)) if a != b) for pair in pairs]
    expected = [
        [0.2 * log_prob(trainer.model, ids, start) for ids in pair] for pair, start in zip(pairs, starts, strict=True)
    ]
    torch.testing.assert_close(rewards.double(), torch.tensor(expected).double(), atol=1e-4, rtol=0)


# --- what is trained, saved and resumed ---


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_full_training_changes_every_parameter(make_trainer, tokenizer):
    trainer = make_trainer(num_train_epochs=2)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert changed(before, trainer.model) == {name for name, _ in trainer.model.named_parameters()}


@pytest.mark.parametrize("given_as", ["peft_config", "PeftModel"])
def test_lora_training_changes_the_adapter_only(make_trainer, tokenizer, given_as):
    config = LoraConfig(**LORA)
    if given_as == "peft_config":
        trainer = make_trainer(peft_config=config, num_train_epochs=2)
        assert config.task_type is None  # the user's object is left as it is
        assert trainer.model.peft_config["default"].task_type == "CAUSAL_LM"
    else:
        trainer = make_trainer(model=get_peft_model(model_for(tokenizer), config), num_train_epochs=2)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    adapter = {name for name in before if "lora_" in name}
    assert len(adapter) == 8
    assert changed(before, trainer.model) == adapter


def test_a_trained_reward_model_prefers_what_was_chosen(make_trainer, tokenizer):
    trainer = make_trainer(conversational(True), num_train_epochs=20)
    before = trainer.evaluate(trainer.train_dataset)
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert trainer.state.log_history[-1]["eval_accuracy"] == 1.0


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)], ids=["full", "LoRA"])
def test_saved_and_loaded_the_log_probs_are_the_same_bit_for_bit(make_trainer, tokenizer, tmp_path, peft_config):
    model = model_for(tokenizer)
    model.save_pretrained(tmp_path / "base")
    trainer = make_trainer(model=str(tmp_path / "base"), peft_config=peft_config, num_train_epochs=2)
    trainer.train()
    trainer.save_model()
    processor = GenARMLogitsProcessor.from_pretrained(trainer.args.output_dir)
    ids, scores = torch.randint(3, len(tokenizer), (2, 6)), torch.zeros(2, len(tokenizer))
    expected = GenARMLogitsProcessor(trainer.model.eval())(ids, scores)
    assert torch.equal(processor(ids, scores), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(GenARMLogitsProcessor(base)(ids, scores), expected, atol=1e-3)


def test_training_resumes_from_a_checkpoint(make_trainer, tokenizer):
    options = {"max_steps": 4, "save_steps": 2, "peft_config": LoraConfig(**LORA), "per_device_train_batch_size": 1}
    whole = make_trainer(**options)
    whole.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    losses = [[logs["loss"] for logs in trainer.state.log_history if "loss" in logs] for trainer in (whole, resumed)]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_the_config_of_the_model_is_left_as_it_was(make_trainer, tokenizer):
    model = model_for(tokenizer)
    before = model.config.num_labels, model.config.id2label
    trainer = make_trainer(model=model)
    assert (trainer.model.config.num_labels, trainer.model.config.id2label) == before
    assert trainer.args.model_init_kwargs is None


def test_a_model_id_is_loaded_as_a_causal_lm(make_trainer, tokenizer, tmp_path):
    model_for(tokenizer).save_pretrained(tmp_path / "base")
    init_kwargs = {"attn_implementation": "eager"}
    trainer = make_trainer(model=str(tmp_path / "base"), model_init_kwargs=init_kwargs)
    assert type(trainer.model).__name__ == "LlamaForCausalLM"
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.model.dtype == torch.float32
    assert trainer.args.model_init_kwargs == init_kwargs


def test_the_saved_folder_describes_the_training(make_trainer, tokenizer):
    words = {"objective": "warm weather", "description": "It likes the sun.", "dataset_name": "me/my-pairs"}
    trainer = make_trainer(peft_config=LoraConfig(**LORA), eval_dataset=Dataset.from_dict(STANDARD), **words)
    metrics = trainer.evaluate()
    trainer.save_model()
    folder = trainer.args.output_dir
    info = RewardInfo.load(Path(folder, "genarm_config.json"))
    assert info == trainer.reward_info
    assert (info.beta, info.objective, info.dataset) == (0.05, "warm weather", "me/my-pairs")
    assert info.n_pairs == len(trainer.train_dataset)
    assert info.tokenizer == tokenizer_fingerprint(tokenizer)
    assert info.chat_template is None
    assert info.metrics["pair_accuracy"] == metrics["eval_pair_accuracy"]
    assert info.reward_scale == pytest.approx(metrics["eval_rms_margin"] / 0.05)
    assert info.versions["trl"] == version("trl")

    card = ModelCard.load(Path(folder, "README.md"))
    assert card.data.library_name == "peft"
    assert {"genarm", "autoregressive-reward-model", "reward-model", "trl"} <= set(card.data.tags)
    assert "conversational" not in card.data.tags
    assert "pipeline_tag" not in card.data.to_dict()
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["pair_accuracy"] == pytest.approx(metrics["eval_pair_accuracy"], abs=1e-4)
    for part in ("warm weather", "It likes the sun.", "length-only baseline", "β = 0.05", "not a chat", "me/my-pairs"):
        assert part in card.text

    trainer.create_model_card(model_name="my-arm", dataset_name="me/other-pairs", tags="polite")
    card = ModelCard.load(Path(folder, "README.md"))
    assert "polite" in card.data.tags
    assert card.data.datasets == "me/other-pairs"


def test_metrics_of_held_out_pairs(make_trainer):
    """Against the arithmetic on what `predict` returns, and lengths counted in tokens."""
    trainer = make_trainer(eval_dataset=Dataset.from_dict(STANDARD))
    metrics = trainer.evaluate()
    chosen, rejected = trainer.predict(trainer.eval_dataset).predictions.T
    pairs = pairs_of(trainer.eval_dataset)
    shorter = [(len(one) < len(other)) + 0.5 * (len(one) == len(other)) for one, other in pairs]
    assert metrics["eval_n_pairs"] == len(pairs)
    assert metrics["eval_pair_accuracy"] == pytest.approx((chosen > rejected).mean())
    assert metrics["eval_pair_accuracy_low"] <= metrics["eval_pair_accuracy"] <= metrics["eval_pair_accuracy_high"]
    assert metrics["eval_shorter_accuracy"] == pytest.approx(np.mean(shorter))
    assert metrics["eval_mean_margin"] == pytest.approx((chosen - rejected).mean(), abs=1e-6)
    longer = np.array([len(one) - len(other) for one, other in pairs])
    correlation = np.corrcoef(chosen - rejected, longer)[0, 1]
    assert metrics["eval_margin_length_correlation"] == pytest.approx(correlation, abs=1e-5)


def test_contrast_with_the_base(make_trainer, tokenizer):
    """What an adapter has learned: nothing before training; then the difference to the model without it."""
    base = model_for(tokenizer)
    trainer = make_trainer(
        model=copy.deepcopy(base), peft_config=LoraConfig(**LORA), eval_dataset=Dataset.from_dict(STANDARD), beta=0.2
    )
    assert trainer.evaluate()["eval_contrast_accuracy"] == 0.5
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    rewards, (lengths, base_rewards), metrics = trainer.predict(trainer.eval_dataset)
    pairs = [(row["genarm_prompt_length"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.eval_dataset]
    for index, (start, *texts) in enumerate(pairs):
        chosen, rejected = (0.2 * log_prob(base, ids, start) for ids in texts)
        assert base_rewards[index, 0] - base_rewards[index, 1] == pytest.approx(float(chosen - rejected), abs=1e-4)
        assert lengths[index].tolist() == [len(ids) - start for ids in texts]
    contrast = (rewards - base_rewards)[:, 0] - (rewards - base_rewards)[:, 1]
    assert abs(contrast).min() > 1e-3
    assert metrics["test_contrast_accuracy"] == pytest.approx((contrast > 0).mean())
    assert "eval_contrast_accuracy" not in make_trainer(eval_dataset=Dataset.from_dict(STANDARD)).evaluate()


def prediction(margins, lengths, base=None):
    """Rewards and lengths of rejected are 0 and 10."""
    rewards = np.array([[margin, 0.0] for margin in margins])
    labels = (np.array([[length, 10] for length in lengths]), *([] if base is None else [np.array(base)]))
    return EvalPrediction(predictions=rewards, label_ids=labels)


def test_accuracy_on_pairs_of_similar_lengths():
    metrics = preference_metrics(prediction([1, -1, 1, 1], [10, 11, 20, 5]))
    assert metrics["n_length_matched"] == 2  # 10 and 10, 11 and 10
    assert metrics["length_matched_accuracy"] == 0.5
    assert metrics["pair_accuracy"] == 0.75
    assert "length_matched_accuracy" not in preference_metrics(prediction([1], [30]))


def test_calibration_error():
    """In closed form: half of the pairs at confidence 0.75 are right, and all of those at 0.9."""
    logit = {0.75: math.log(3), 0.9: math.log(9)}
    margins = [logit[0.75], -logit[0.75], logit[0.9], logit[0.9]]
    assert preference_metrics(prediction(margins, [10] * 4))["calibration_error"] == pytest.approx((0.25 + 0.1) / 2)
    rng = np.random.default_rng(0)
    margin = rng.normal(size=20_000)
    margin *= np.where(rng.random(20_000) < 1 / (1 + np.exp(-abs(margin))), 1, -1) * np.sign(margin)
    assert calibration_error(margin, margin > 0) < 0.02


def test_the_interval_of_an_accuracy():
    """Against the normal approximation, and with ties."""
    is_right = np.array([1.0] * 600 + [0.5] * 100 + [0.0] * 300)
    half = 1.96 * is_right.std() / math.sqrt(len(is_right))
    assert mean_with_interval(is_right) == pytest.approx((0.65, 0.65 - half, 0.65 + half), abs=0.002)
    assert mean_with_interval(np.ones(5)) == (1.0, 1.0, 1.0)


def test_gain_over_the_length_rule_is_paired():
    # Chosen against rejected by reward 1, 1, 0, tie; the length rule says 1, 0, 0, tie: 0.625 - 0.375
    metrics = preference_metrics(prediction([1.0, 2.0, -1.0, 0.0], [8, 12, 14, 10]))
    assert (metrics["pair_accuracy"], metrics["shorter_accuracy"]) == (0.625, 0.375)
    assert metrics["gain_over_shorter"] == 0.25
    # One pair in four differs, by 1: the mean of four draws is 0 with probability 0.75^4 = 0.32, and 1 with 0.004.
    assert (metrics["gain_over_shorter_low"], metrics["gain_over_shorter_high"]) == (0.0, 0.75)
    same = preference_metrics(prediction([2.0, -4.0], [8, 14]))
    assert (same["gain_over_shorter_low"], same["gain_over_shorter_high"]) == (0.0, 0.0)


def test_custom_generate(make_trainer, tokenizer, tmp_path):
    """No import of ours in the user's code: the folder brings it."""
    trainer = make_trainer(custom_generate=True)
    trainer.save_model()
    folder = trainer.args.output_dir
    tiny_llama(5, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    ids = {"input_ids": tokenizer("The train was", return_tensors="pt").input_ids, "pad_token_id": 0}
    options = {"max_new_tokens": 8, "trust_remote_code": True, "custom_generate": folder}
    guided = base.generate(**ids, **options, alpha=1.5)
    assert torch.equal(base.generate(**ids, **options, alpha=0.0), base.generate(**ids, max_new_tokens=8))
    processor = GenARMLogitsProcessor(trainer.model.eval(), 1.5)
    assert torch.equal(guided, base.generate(**ids, max_new_tokens=8, logits_processor=[processor]))
    assert not torch.equal(guided, base.generate(**ids, max_new_tokens=8))
    with pytest.raises(ValueError, match="trust_remote_code"):
        base.generate(**ids, max_new_tokens=8, custom_generate=folder, trust_remote_code=False)


@pytest.mark.parametrize("explicit", [True, False])
def test_the_card_says_if_the_data_were_chats(make_trainer, explicit):
    trainer = make_trainer(conversational(explicit))
    trainer.create_model_card()
    assert "- conversational" in Path(trainer.args.output_dir, "README.md").read_text()


def test_an_adapter_on_the_lm_head_is_trained_like_any_other(make_trainer, tokenizer):
    trainer = make_trainer(peft_config=LoraConfig(r=4, target_modules=["lm_head"]), beta=0.2)
    torch.testing.assert_close(
        loss_of(trainer).double(), naive_loss(trainer.model, pairs_of(trainer.train_dataset), 0.2), atol=1e-4, rtol=0
    )
    loss_of(trainer).backward()
    assert trainer.model.base_model.model.lm_head.lora_B["default"].weight.grad.abs().max() > 0


PROMPTS_OF_PEFT = {
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=3),
}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # the name that PEFT uses
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", PROMPTS_OF_PEFT)
def test_adapters_before_the_text(make_trainer, tokenizer, kind, checkpointing):
    """What they put before a text is neither scored nor cut."""
    options = {"peft_config": PROMPTS_OF_PEFT[kind], "gradient_checkpointing": checkpointing, "beta": 0.2}
    if kind == "prefix tuning" and checkpointing:
        with pytest.raises(ValueError, match=r"`PREFIX_TUNING`.*Set `gradient_checkpointing=False`"):
            make_trainer(**options)
        return
    trainer = make_trainer(**options)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert changed(before, trainer.model) == {name for name in before if "prompt_encoder" in name}
    trainer.model.eval()

    def reward(ids):
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits
        log_probs = logits[0, -len(ids) : -1].double().log_softmax(-1)
        return 0.2 * log_probs.gather(1, torch.tensor(ids)[1:, None]).sum()

    margins = torch.stack([reward(chosen) - reward(rejected) for chosen, rejected in pairs_of(trainer.train_dataset)])
    expected = -torch.nn.functional.logsigmoid(margins).mean()
    torch.testing.assert_close(loss_of(trainer).double(), expected, atol=1e-4, rtol=0)


def test_the_config_is_parsed_from_the_command_line():
    (args,) = HfArgumentParser(AutoregressiveRewardConfig).parse_args_into_dataclasses(
        ["--output_dir", "my-arm", "--beta", "0.1", "--learning_rate", "1e-3"]
    )
    assert (args.beta, args.learning_rate, args.bf16) == (0.1, 1e-3, is_torch_bf16_gpu_available())


# --- bad input ---


def test_invalid_arguments(make_trainer, tokenizer):
    with pytest.raises(ValueError, match=r"`center_rewards_coefficient` is 0.01.*never centred"):
        make_trainer(center_rewards_coefficient=0.01)
    for name, value, message in (
        ("beta", 0, "must be positive"),
        ("loss_type", "ipo", "must be one of sigmoid, hinge"),
        ("truncation_mode", "middle", "must be one of drop, keep_start, keep_end"),
        ("label_smoothing", 0.5, "below 0.5"),
        ("sft_coefficient", -1.0, "must not be negative"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is .{{0,2}}{value}.*{message}"):
            make_trainer(**{name: value})
    with pytest.raises(ValueError, match=r"`label_smoothing` is 0.1.*`loss_type` is `hinge`"):
        make_trainer(label_smoothing=0.1, loss_type="hinge")
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` is 0.1.*use `label_smoothing`"):
        make_trainer(label_smoothing_factor=0.1)
    classifier = AutoModelForSequenceClassification.from_config(model_for(tokenizer).config)
    with pytest.raises(TypeError, match=r"LlamaForSequenceClassification.*AutoModelForCausalLM"):
        make_trainer(model=classifier)
    with pytest.raises(ValueError, match=r"SEQ_CLS.*CAUSAL_LM"):
        make_trainer(peft_config=LoraConfig(**LORA, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="quantization_config"):
        make_trainer(quantization_config=object())
    with pytest.raises(TypeError, match=r"`args` is a `RewardConfig`.*`AutoregressiveRewardConfig`.*`beta`"):
        AutoregressiveRewardTrainer(
            model_for(tokenizer), RewardConfig("arm", bf16=False), train_dataset=Dataset.from_dict(STANDARD)
        )
    for model in (None, Path("my-model")):
        with pytest.raises(TypeError, match=rf"`model` is a `{type(model).__name__}`.*`str`.*no `model_init`"):
            AutoregressiveRewardTrainer(model, model_init=lambda: model_for(tokenizer))


@pytest.mark.parametrize("kind", [Dataset.from_list, lambda rows: IterableDataset.from_generator(lambda: iter(rows))])
def test_an_empty_dataset(make_trainer, kind):
    with pytest.raises(ValueError, match="The train dataset is empty"):
        make_trainer(kind([]), max_steps=1)


def test_missing_columns(make_trainer):
    with pytest.raises(ValueError, match=r"columns \['better', 'worse'\].*`chosen` and `rejected`"):
        make_trainer({"better": CHOSEN, "worse": REJECTED})
    with pytest.raises(ValueError, match="eval dataset has the columns"):
        make_trainer(eval_dataset=Dataset.from_dict({"chosen": CHOSEN}))


def test_peft_loads_what_is_saved(make_trainer, tokenizer):
    trainer = make_trainer(peft_config=LoraConfig(**LORA), num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(model_for(tokenizer), trainer.args.output_dir)
    ids = torch.randint(3, len(tokenizer), (1, 5))
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5, rtol=0)
