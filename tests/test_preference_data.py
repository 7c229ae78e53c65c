"""Pairs of tokens: where responses begin and end, what is left out, and that it is counted."""

import warnings

import pytest
import torch
from datasets import Dataset, IterableDataset
from pairs import CHOSEN, PROMPTS, REJECTED, STANDARD, conversational, implicit, message
from peft import PromptTuningConfig
from tiny import EOS, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from hf_genarm.hub.scoring import end_token_ids, length_to_end
from hf_genarm.training.preference_data import PairCounts, truncate


def texts_of(trainer, row):
    """Prompt, chosen and rejected of a prepared pair, decoded."""
    start = row["genarm_prompt_length"]
    parts = (row["chosen_ids"][:start], row["chosen_ids"][start:], row["rejected_ids"][start:])
    return [trainer.processing_class.decode(ids) for ids in parts]


# --- where a response begins ---


def test_the_prompt_of_text(make_trainer):
    trainer = make_trainer()
    for row, *texts in zip(trainer.train_dataset, PROMPTS, CHOSEN, REJECTED, strict=True):
        prompt, chosen, rejected = texts
        # The tokenizer puts a space before a word into its token.
        assert texts_of(trainer, row) == [prompt.rstrip(), f" {chosen}<eos>", f" {rejected}<eos>"]


def test_a_token_across_the_boundary_belongs_to_the_response(make_trainer, tokenizer):
    """`warm` is one token; a prompt that ends in `wa` shares only what is before it with both texts."""
    whole = tokenizer("It is warm")["input_ids"]
    alone = tokenizer("It is wa")["input_ids"]
    merged = next(at for at, (one, other) in enumerate(zip(whole, alone, strict=False)) if one != other)
    assert merged < len(alone)
    trainer = make_trainer({"prompt": ["It is wa"], "chosen": ["rm"], "rejected": ["rm and kind"]})
    row = trainer.train_dataset[0]
    assert row["genarm_prompt_length"] == merged
    assert texts_of(trainer, row)[1].strip() == "warm<eos>"


@pytest.mark.parametrize("explicit", [True, False])
def test_the_prompt_of_a_chat_has_the_generation_prompt(make_trainer, explicit):
    trainer = make_trainer(conversational(explicit))
    prompt, chosen, rejected = texts_of(trainer, trainer.train_dataset[0])
    assert prompt == f"<bos>user: {PROMPTS[0].strip()}<eos><bos>assistant:"
    assert (chosen, rejected) == (f" {CHOSEN[0]}<eos>", f" {REJECTED[0]}<eos>")


def test_responses_that_begin_alike_are_responses_from_there_on(make_trainer):
    """The prompt is known, so that what both responses begin with is not taken for it."""
    data = {"prompt": [PROMPTS[0]], "chosen": ["It was fine."], "rejected": ["It was late."]}
    assert texts_of(make_trainer(), make_trainer(data).train_dataset[0])[1] == " It was fine.<eos>"


def test_without_a_prompt_it_is_what_is_shared(make_trainer):
    for row in make_trainer(implicit()).train_dataset:
        start = row["genarm_prompt_length"]
        assert row["chosen_ids"][:start] == row["rejected_ids"][:start]
        assert row["chosen_ids"][start] != row["rejected_ids"][start]


def test_lengths_in_metrics_are_those_of_responses(make_trainer):
    trainer = make_trainer(eval_dataset=Dataset.from_dict(STANDARD))
    lengths = trainer.predict(trainer.eval_dataset).label_ids[0]
    expected = [
        [len(row[f"{side}_ids"]) - row["genarm_prompt_length"] for side in ("chosen", "rejected")]
        for row in trainer.eval_dataset
    ]
    assert lengths.tolist() == expected


# --- where it ends ---


def test_text_after_the_end_of_the_turn_is_not_trained_on(make_trainer):
    """Many chat templates write a newline after the token that ends a turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<eos> and so ")
    trainer = make_trainer(conversational(True))
    with_more = make_trainer(conversational(True), processing_class=tokenizer)
    for row, other in zip(trainer.train_dataset, with_more.train_dataset, strict=True):
        assert texts_of(with_more, other)[1:] == texts_of(trainer, row)[1:]
        assert texts_of(with_more, other)[0] != texts_of(trainer, row)[0]


def test_length_to_end(tokenizer):
    assert length_to_end([5, EOS, 6, 7, EOS, 8, 9], 2, {EOS}) == 5
    assert length_to_end([5, EOS, 6, 7], 2, {EOS}) == 4  # no end in the response
    assert length_to_end([5, EOS], 2, {EOS}) == 2


def test_end_tokens_are_those_of_model_and_tokenizer(make_trainer):
    trainer = make_trainer()
    config = trainer.model.generation_config
    config.eos_token_id = [7, 9]
    assert end_token_ids(config, trainer.processing_class) == {7, 9, EOS}
    config.eos_token_id = None
    assert end_token_ids(config, trainer.processing_class) == {EOS}


# --- what is left out, cut and counted ---


def lengths_of(trainer):
    return [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset]


def test_correct_data_are_silent(make_trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = make_trainer()
        next(iter(trainer.get_train_dataloader()))
    assert trainer.pair_counts == {"train": PairCounts(3)}


def test_pairs_that_are_too_long_are_counted(make_trainer):
    lengths = lengths_of(make_trainer())
    limit = sorted(lengths)[1]
    with pytest.warns(UserWarning, match="of 3 pairs, 1 longer than `max_length` and left out"):
        trainer = make_trainer(max_length=limit, eval_dataset=Dataset.from_dict(STANDARD))
    assert sorted(lengths_of(trainer)) == sorted(lengths)[:2]
    assert trainer.pair_counts["train"] == PairCounts(3, too_long=1)
    assert trainer.evaluate()["eval_dropped_too_long"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"`max_length=4`.*`truncation_mode='keep_end'`"):
        make_trainer(max_length=4)


def test_texts_beyond_a_table_of_positions(make_trainer, tokenizer):
    """A longer `max_length` is right as long as no text is longer than the table."""
    longest = max(lengths_of(make_trainer()))
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2}
    fitting, short = (GPT2LMHeadModel(GPT2Config(**sizes, n_positions=n)) for n in (longest, longest - 1))
    make_trainer(model=fitting).train()
    with pytest.raises(
        ValueError, match=f"has {longest} tokens, but the model has positions for {longest - 1} tokens.*1024"
    ):
        make_trainer(model=short)
    with pytest.warns(UserWarning, match="longer than `max_length` and left out"):
        make_trainer(model=short, max_length=longest - 1)
    with pytest.raises(ValueError, match=f"of the eval dataset has {longest}"):
        make_trainer({x: y[:1] for x, y in STANDARD.items()}, model=short, eval_dataset=Dataset.from_dict(STANDARD))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    with pytest.raises(ValueError, match=f"has {longest} tokens"):
        make_trainer(model=fitting, peft_config=prompt)
    rows = [dict(zip(STANDARD, values, strict=True)) for values in zip(*STANDARD.values(), strict=True)]
    with pytest.raises(ValueError, match="Texts of the train stream may be longer"):
        make_trainer(IterableDataset.from_generator(lambda: iter(rows)), model=fitting, max_steps=1)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("streaming", [False, True])
def test_truncation(make_trainer, mode, streaming):
    whole = make_trainer().train_dataset
    limit = sorted(lengths_of(make_trainer()))[1]
    rows = [dict(zip(STANDARD, values, strict=True)) for values in zip(*STANDARD.values(), strict=True)]
    data = IterableDataset.from_generator(lambda: iter(rows)) if streaming else Dataset.from_list(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = make_trainer(data, max_length=limit, truncation_mode=mode, max_steps=1)
    for row, before in zip(trainer.train_dataset, whole, strict=True):
        longest = max(len(before["chosen_ids"]), len(before["rejected_ids"]))
        cut = max(longest - limit, 0)
        for side in ("chosen_ids", "rejected_ids"):
            expected = before[side][cut:] if mode == "keep_end" else before[side][:limit]
            assert row[side] == expected
        assert row["genarm_prompt_length"] == before["genarm_prompt_length"] - (cut if mode == "keep_end" else 0)
    if not streaming:
        assert trainer.pair_counts["train"] == PairCounts(3, truncated=1)
    trainer.train()


def test_a_prompt_that_is_cut_away():
    pair = {"chosen_ids": [1, 2, 3, 4, 5], "rejected_ids": [1, 2, 9], "genarm_prompt_length": 2}
    assert truncate(pair, 4, "keep_end") == {
        "chosen_ids": [2, 3, 4, 5],
        "rejected_ids": [2, 9],
        "genarm_prompt_length": 1,
    }
    assert truncate(pair, 2, "keep_end") == {"chosen_ids": [3, 4], "rejected_ids": [9], "genarm_prompt_length": 0}
    assert truncate(pair, 1, "keep_start") == {"chosen_ids": [1], "rejected_ids": [1], "genarm_prompt_length": 1}


def test_identical_empty_and_repeated_pairs_are_counted(make_trainer):
    data = {
        "prompt": [PROMPTS[0]] * 5,
        "chosen": [CHOSEN[0], CHOSEN[0], CHOSEN[1], CHOSEN[1], CHOSEN[2]],
        "rejected": [REJECTED[0], REJECTED[0], "", CHOSEN[1], REJECTED[1]],
    }
    message = (
        "of 5 pairs, 1 with identical chosen and rejected, left out; 1 with an empty response, kept; 1 a repetition"
    )
    with pytest.warns(UserWarning, match=f"In the train dataset, {message}"):
        trainer = make_trainer(data)
    assert trainer.pair_counts["train"] == PairCounts(5, identical=1, empty=1, duplicate=1)
    assert len(trainer.train_dataset) == 4
    with pytest.raises(ValueError, match="identical in all 3 pairs"):
        make_trainer(STANDARD | {"rejected": CHOSEN})


def test_an_empty_answer_in_a_chat_is_counted(make_trainer):
    data = {
        "prompt": [message("user", "How?")],
        "chosen": [message("assistant", "Fine.")],
        "rejected": [message("assistant", "")],
    }
    with pytest.warns(UserWarning, match="1 with an empty response"):
        make_trainer(data)


def test_batches_of_similar_lengths(make_trainer):
    """`train_sampling_strategy="group_by_length"` finds the lengths of pairs, as it does those of texts."""
    lengths = torch.randint(2, 60, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        {"chosen_ids": [5] * length + [6, index], "rejected_ids": [5] * length + [7]}
        for index, length in enumerate(lengths)
    ]
    options = {"per_device_train_batch_size": 8, "max_steps": 8}
    widths = {}
    for strategy in ("random", "group_by_length"):
        trainer = make_trainer(Dataset.from_list(rows), train_sampling_strategy=strategy, **options)
        batches = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
        assert sum(map(len, batches)) == 2 * len(rows)
        widths[strategy] = sum(mask.numel() for mask in batches)
    assert widths["group_by_length"] < 0.9 * widths["random"]
