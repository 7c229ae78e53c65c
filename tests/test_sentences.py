"""A sentence is a reward model: made, encoded, saved, loaded, scored, and mixed with adapters."""

import json

import pytest
import torch
from helpers import assert_same, generate, joint_passes, log_prob
from oracle import Alone
from tiny import save_adapter, save_llama, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo
from hf_genarm.hub.sentence import with_sentence

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

QUESTION = [{"role": "user", "content": "How was the food?"}]
CHATS = [
    QUESTION,
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me about the sun and the day."}],
]
# Like Gemma's
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>model: {% endif %}"
)
# Like Qwen's
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<bos>system: The day is fine.<eos>{% endif %}"
    "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    base = save_llama(folder / "base", initializer_range=0.2)
    save_adapter(base, folder / "adapter")
    return folder


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def rendered(tokenizer, prompts):
    """What a processor should read for each prompt, tokenized one by one and padded."""
    rows = [
        tokenizer(x).input_ids
        if isinstance(x, str)
        else tokenizer(
            tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True), add_special_tokens=False
        ).input_ids
        for x in prompts
    ]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def is_same(prompts, expected):
    return all(torch.equal(prompts[name], expected[name]) for name in ("input_ids", "attention_mask"))


# --- encode ---


def test_sentences_steer_a_batch_of_chats(model, tokenizer):
    processor = GenARMLogitsProcessor.from_sentences(
        ["The train was warm.", "Be kind."], base_model=model, alpha=[2, -1]
    )
    assert processor.engine == "fused"
    inputs = processor.encode(CHATS)
    assert is_same(inputs, rendered(tokenizer, CHATS))
    prompts = [
        rendered(
            tokenizer,
            [
                [{"role": "system", "content": sentence}, *CHATS[0]],
                [{"role": "system", "content": f"Be brief.\n\n{sentence}"}, *CHATS[1][1:]],
            ],
        )
        for sentence in ("The train was warm.", "Be kind.")
    ]
    assert all(map(is_same, processor.prompts, prompts))
    unguided = generate(model, [], inputs)
    output = generate(model, [processor], inputs, min_new_tokens=10)
    assert output.sequences.tolist() != unguided.sequences.tolist()
    assert joint_passes(processor) == 9
    oracle = Alone([model, model], [2.0, -1.0], inputs, prompts, model)
    assert_same(output, generate(model, [oracle], inputs, min_new_tokens=10))
    assert_same(generate(model, [processor], inputs, num_beams=3), generate(model, [oracle], inputs, num_beams=3))


def test_plain_texts(model, tokenizer):
    processor = GenARMLogitsProcessor.from_sentences("The people were warm.", model, tokenizer)
    texts = ["The food was", "How was the train"]
    inputs = processor.encode(texts)
    assert is_same(inputs, rendered(tokenizer, texts))
    asked = rendered(tokenizer, [f"The people were warm.\n\n{text}" for text in texts])
    assert is_same(processor.prompts[0], asked)
    oracle = Alone([model], [1.5], inputs, [asked], model)
    assert_same(generate(model, [processor], inputs), generate(model, [oracle], inputs))


def test_one_prompt_and_lists_of_one_are_the_same(model, tokenizer):
    processor = GenARMLogitsProcessor.from_sentences("Be kind.", model, tokenizer)
    for one in (QUESTION, "How was the food?"):
        assert is_same(processor.encode(one), processor.encode([one]))
    mixed = processor.encode([QUESTION, "The food was"])
    assert is_same(mixed, rendered(tokenizer, [QUESTION, "The food was"]))


def test_at_strength_1_a_sentence_is_a_prompt(model, tokenizer):
    processor = GenARMLogitsProcessor.from_sentences("The train was warm.", model, tokenizer, alpha=1.0)
    output = generate(model, [processor], processor.encode(CHATS))
    asked = processor.prompts[0]
    expected = generate(model, [], asked)
    n_new = len(output.scores)
    assert output.sequences[:, -n_new:].tolist() == expected.sequences[:, -n_new:].tolist()


def test_templates_without_system_messages(model, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    chat = [{"role": "user", "content": "How was the food?"}, {"role": "assistant", "content": "It was cold."}]
    chat += [{"role": "user", "content": "And the train?"}]
    assert with_sentence(chat, "Be kind.", tokenizer) == [
        {"role": "user", "content": "Be kind.\n\nHow was the food?"},
        *chat[1:],
    ]
    processor = GenARMLogitsProcessor.from_sentences("Be kind.", model, tokenizer)
    processor.encode([chat])
    assert "model:" in tokenizer.decode(processor.prompts[0]["input_ids"][0])
    with pytest.raises(ValueError, match="no message of the user"):
        with_sentence(chat[1:2], "Be kind.", tokenizer)


def test_default_system_messages_are_replaced_as_the_template_does(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DEFAULT_SYSTEM
    processor = GenARMLogitsProcessor.from_sentences("Be kind.", model, tokenizer)
    inputs = processor.encode([QUESTION])
    own, asked = (tokenizer.decode(x["input_ids"][0]) for x in (inputs, processor.prompts[0]))
    assert "The day is fine." in own
    assert "The day is fine." not in asked
    assert "system: Be kind." in asked
    processor.encode([QUESTION], chat_template=NO_SYSTEM)
    assert "user: Be kind." in tokenizer.decode(processor.prompts[0]["input_ids"][0])


def test_contents_in_parts():
    parts = [{"type": "text", "text": "How was the food?"}]
    tokenizer = tiny_tokenizer()
    chat = [{"role": "system", "content": parts}, {"role": "user", "content": "Hello"}]
    asked = with_sentence(chat, "Be kind.", tokenizer)
    assert asked[0]["content"] == [*parts, {"type": "text", "text": "Be kind."}]
    assert chat[0]["content"] == parts


def test_arguments_of_the_template(model, tokenizer):
    processor = GenARMLogitsProcessor.from_sentences("Be kind.", model, tokenizer)
    begun = [*QUESTION, {"role": "assistant", "content": "The food"}]
    inputs = processor.encode([begun], continue_final_message=True)
    for ids in (inputs["input_ids"], processor.prompts[0]["input_ids"]):
        assert tokenizer.decode(ids[0]).endswith("assistant: The food")
    with pytest.raises(TypeError, match="`return_tensors` is not for `encode`"):
        processor.encode([QUESTION], return_tensors="pt")
    with pytest.raises(ValueError, match=r"`enable_thinking` is for a chat template, but `prompts\[0\]` is plain"):
        processor.encode(["The food"], enable_thinking=False)


# --- refused ---


def test_other_prompts_than_the_encoded_ones_are_refused(model, tokenizer):
    processor = GenARMLogitsProcessor.from_sentences("Be kind.", model, tokenizer)
    inputs = processor.encode(CHATS)
    with pytest.raises(ValueError, match=r"sentence 'Be kind.'.*processor.encode"):
        generate(model, [GenARMLogitsProcessor.from_sentences("Be kind.", model, tokenizer)], inputs)
    other = rendered(tokenizer, [QUESTION, QUESTION])
    with pytest.raises(ValueError, match=r"not those that `processor.encode` was last called with.*processor.encode"):
        generate(model, [processor], other)
    generate(model, [processor], inputs, num_return_sequences=2, do_sample=True)
    processor.alpha = 0.0
    generate(model, [processor], other)
    processor.alpha, processor.prompts = 1.5, rendered(tokenizer, [QUESTION, QUESTION])  # are the user's own
    generate(model, [processor], other)
    processor.prompts = None
    with pytest.raises(ValueError, match=r"sentence 'Be kind\.'"):
        generate(model, [processor], other)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (3, TypeError, "`prompts` is 3"),
        ([], ValueError, "`prompts` is empty"),
        ([3], TypeError, r"`prompts\[0\]` is 3"),
        ([""], ValueError, r"`prompts\[0\]` is '', which has no tokens"),
        ([[]], TypeError, r"`prompts\[0\]`"),
    ],
)
def test_wrong_prompts(model, tokenizer, prompts, error, message):
    with pytest.raises(error, match=message):
        GenARMLogitsProcessor.from_sentences("Be kind.", model, tokenizer).encode(prompts)


@pytest.mark.parametrize(
    ("sentence", "error", "message"),
    [(3, TypeError, "`sentence` is 3"), (" ", ValueError, "asks for nothing"), (None, TypeError, "`sentence` is None")],
)
def test_wrong_sentences(model, tokenizer, sentence, error, message):
    with pytest.raises(error, match=message):
        AutoregressiveRewardModel.from_sentence(sentence, model, tokenizer)
    with pytest.raises(error, match=message):
        GenARMLogitsProcessor.from_sentences([sentence], model, tokenizer)
    with pytest.raises(ValueError, match="empty list"):
        GenARMLogitsProcessor.from_sentences([], model, tokenizer)


def test_without_a_tokenizer():
    base = tiny_llama(0)
    processor = GenARMLogitsProcessor.from_sentences("Be kind.", base)
    with pytest.raises(ValueError, match="has no tokenizer"):
        processor.encode(["The food"])


# --- a folder without weights ---


def test_a_folder_of_a_sentence(model, folder, tmp_path):
    arm = AutoregressiveRewardModel.from_sentence("The train was warm.", model)
    arm.info.objective = "warmth"
    arm.save_pretrained(tmp_path / "warm")
    assert sorted(path.name for path in (tmp_path / "warm").iterdir()) == ["README.md", "genarm_config.json"]
    saved = json.loads((tmp_path / "warm" / "genarm_config.json").read_text(encoding="utf-8"))
    assert saved["sentence"] == "The train was warm."
    card = (tmp_path / "warm" / "README.md").read_text(encoding="utf-8")
    assert "> The train was warm." in card
    assert "for **warmth**" in card
    with pytest.raises(ValueError, match=r"is a sentence, 'The train was warm.'.*base_model=model"):
        AutoregressiveRewardModel.from_pretrained(tmp_path / "warm")
    again = AutoregressiveRewardModel.from_pretrained(tmp_path / "warm", model)
    assert again.info == arm.info
    assert again.info.reference == "base"
    assert again.tokenizer is not None

    processor = GenARMLogitsProcessor.from_pretrained(tmp_path / "warm", base_model=model)
    assert (processor.alpha, processor.reference, processor.engine) == ([1.5], "base", "fused")
    inputs = processor.encode(CHATS)
    expected = GenARMLogitsProcessor.from_sentences("The train was warm.", model)
    expected.encode(CHATS)
    assert_same(generate(model, [processor], inputs), generate(model, [expected], inputs))

    measured = {"alpha": 2.5, "reference": "base", "temperature": 1.0, "measured": {}}
    again.info.recommended = measured
    again.save_pretrained(tmp_path / "warm")
    assert GenARMLogitsProcessor.from_pretrained(tmp_path / "warm", base_model=model).alpha == [2.5]

    save_adapter(folder / "base", tmp_path / "both")
    arm.info.save(tmp_path / "both")
    with pytest.raises(ValueError, match="next to it, but a sentence is read by the base itself"):
        AutoregressiveRewardModel.from_pretrained(tmp_path / "both", model)


def test_what_is_recorded_of_adapters_has_no_sentence(tmp_path):
    """So that earlier versions, which know no sentences, read it."""
    RewardInfo().save(tmp_path)
    assert "sentence" not in json.loads((tmp_path / "genarm_config.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="`sentence` is ' '"):
        RewardInfo(sentence=" ")


def test_sentences_mix_with_adapters(model, folder, tokenizer, tmp_path):
    AutoregressiveRewardModel.from_sentence("The train was warm.", model).save_pretrained(tmp_path / "warm")
    names = [folder / "adapter", tmp_path / "warm"]
    with pytest.raises(ValueError, match="different references"):
        GenARMLogitsProcessor.from_pretrained(names, base_model=model)
    options = {"base_model": model, "reference": "base"}
    processor = GenARMLogitsProcessor.from_pretrained(names, alpha=[0.5, 2.0], **options)
    inputs = processor.encode(CHATS)
    assert processor.prompts[0] is None
    output = generate(model, [processor], inputs, min_new_tokens=10)
    assert joint_passes(processor) == 9
    alone = AutoregressiveRewardModel.from_pretrained(folder / "adapter").model
    oracle = Alone([alone, model], [0.5, 2.0], inputs, processor.prompts, model)
    assert_same(output, generate(model, [oracle], inputs, min_new_tokens=10))


def test_a_sentence_to_another_model_steers_by_its_contrast(model, tokenizer):
    """A small model reads the sentence, and the base doesn't: the reference is the small model."""
    small = tiny_llama(7, vocab_size=len(tokenizer), initializer_range=0.2)
    arm = AutoregressiveRewardModel.from_sentence("Be kind.", small, tokenizer)
    processor = GenARMLogitsProcessor(
        arm, 1.5, base_model=model, reference=AutoregressiveRewardModel(arm.reference), tokenizer=tokenizer
    )
    assert processor.engine == "separate"
    inputs = processor.encode(CHATS)
    oracle = Alone([small], [1.5], inputs, processor.prompts, small)
    assert_same(generate(model, [processor], inputs), generate(model, [oracle], inputs))


# --- scores ---


def test_scores_are_differences_of_log_probabilities(model, tokenizer):
    arm = AutoregressiveRewardModel.from_sentence("The train was warm.", model, tokenizer)
    answers = ["The people were kind.", "It was cold."]
    scores = arm.score(CHATS, answers)
    for score, chat, answer in zip(scores, CHATS, answers, strict=True):
        terms = []
        for prompt in (with_sentence(chat, arm.info.sentence, tokenizer), chat):
            before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            start = next(at for at, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(before))
            terms.append(log_prob(model, encoded.input_ids, start))
        assert float(score) == pytest.approx(float(terms[0] - terms[1]), abs=1e-3)
    texts = arm.score(["The food was"], [" fine."])
    assert texts.shape == (1,)
    assert float(texts) != 0
