"""The model class of the Language Model Evaluation Harness, against the formula written out, and against `hf`."""

import json

import pytest
import torch
import yaml
from oracle import Recompute, guided, next_token_log_probs
from tiny import save_adapter, save_llama, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_genarm import AutoregressiveRewardModel, cli

pytest.importorskip("lm_eval", reason="needs the harness, of the extra `eval`")
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from hf_genarm.lm_eval import GuidedHFLM

pytestmark = pytest.mark.slow

# Contexts of several lengths, one of them empty, with continuations of one and of several tokens
PAIRS = [
    ("The train was", " late"),
    ("The train was", " warm and kind"),
    ("Tell me about the food. The food was cold,", " but"),
    ("", "It is a fine day"),
    ("How was the", " view?"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, two adapters, and a model of other weights whose tokens have other ids."""
    folder = tmp_path_factory.mktemp("models")
    base = save_llama(folder / "base")
    arms = [save_adapter(base, str(folder / name), seed) for seed, name in enumerate(("warm", "brief"))]
    return base, arms, reordered(str(folder / "reordered"))


def reordered(folder):
    """A reward model with the same tokens in another order."""
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, n_special = state["model"]["vocab"], len(tokenizer.all_special_ids)
    n_regular = len(vocab) - n_special
    state["model"]["vocab"] = {
        token: index if index < n_special else n_special + (index - n_special + 7) % n_regular
        for token, index in vocab.items()
    }
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(state)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )
    tiny_llama(seed=5, vocab_size=len(other)).save_pretrained(folder)
    other.save_pretrained(folder)
    return folder


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=x, idx=0) for x in arguments]


class Oracle:
    """One token at a time, from scratch, in float64."""

    def __init__(self, lm, alphas, reference):
        self.lm, self.alphas, self.is_contrasted = lm, alphas, reference is not None

    def next(self, ids):
        base = next_token_log_probs(self.lm.model, ids)
        rewards = [self.reward(arm, ids) for arm in self.lm._arms]
        return guided(base, [x - base if self.is_contrasted else x for x in rewards], self.alphas)

    def reward(self, arm, ids):
        return next_token_log_probs(arm, ids)

    def log_likelihood(self, context, continuation):
        """As the harness has it: the sum over the continuation, and whether it is the greedy one."""
        total, is_greedy = 0.0, True
        for at, token in enumerate(continuation):
            log_probs = self.next(torch.tensor([*context, *continuation[:at]]))
            total += float(log_probs[token])
            is_greedy &= int(log_probs.argmax()) == token
        return total, is_greedy


class Reordered(Oracle):
    """The tokens of the other tokenizer, by their strings."""

    def __init__(self, lm, alphas, reference, folder):
        super().__init__(lm, alphas, reference)
        theirs = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
        ours = lm.tokenizer.get_vocab()
        self.ids = torch.tensor([theirs[token] for token in sorted(ours, key=ours.get)])

    def reward(self, arm, ids):
        return next_token_log_probs(arm, self.ids[ids])[self.ids]


SENTENCE = "It is a warm day."


def with_sentence(lm, ids):
    """A text after the sentence, which comes after the token that begins all texts, if there is one."""
    prefix = lm.tokenizer.encode(f"{SENTENCE}\n\n", add_special_tokens=False)
    assert prefix
    ids = ids.tolist()
    n_first = int(ids[0] == lm.prefix_token_id)
    return torch.tensor([*ids[:n_first], *prefix, *ids[n_first:]])


class WithSentence(Oracle):
    """The last reward model is the base, which reads the sentence first."""

    def reward(self, arm, ids):
        is_sentence = arm is self.lm._arms[-1]
        return (
            next_token_log_probs(self.lm.model, with_sentence(self.lm, ids))
            if is_sentence
            else super().reward(arm, ids)
        )


def test_log_likelihoods_and_texts_with_a_sentence(folders):
    base, arms, _ = folders
    lm = GuidedHFLM(base, arms[0], [1.0, 2.0], "base", sentence=SENTENCE, batch_size=3, device="cpu")
    without = GuidedHFLM(base, arms[0], 1.0, "base", batch_size=3, device="cpu")
    oracle = WithSentence(lm, [1.0, 2.0], "base")
    scored, others = (x.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for x in (lm, without))
    assert scored != others
    for (context, continuation), (score, is_greedy) in zip(PAIRS, scored, strict=True):
        before = lm.tok_encode(context) if context else [lm.prefix_token_id]
        expected = oracle.log_likelihood(before, lm.tok_encode(context + continuation)[len(lm.tok_encode(context)) :])
        assert score == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]
    contexts = [context for context, _ in PAIRS if context]
    arguments = [(context, {"until": ["<eos>"], "max_gen_toks": 6, "do_sample": False}) for context in contexts]
    written, unlike = (
        x.generate_until(requests("generate_until", arguments), disable_tqdm=True) for x in (lm, without)
    )
    assert written != unlike
    for context, text in zip(contexts, written, strict=True):
        ids = lm.tok_encode(context)
        n_before = len(ids)
        while len(ids) < n_before + 6 and ids[-1] != lm.tokenizer.eos_token_id:
            ids.append(int(oracle.next(torch.tensor(ids)).argmax()))
        assert lm.tokenizer.decode(ids[n_before:], skip_special_tokens=True) == text
    assert lm.max_length == without.max_length - len(with_sentence(lm, torch.tensor([5]))) + 1
    with pytest.raises(ValueError, match="Leave out `--apply_chat_template`, or the sentence"):
        lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    with pytest.raises(ValueError, match="or `sentence`"):
        GuidedHFLM(base)


CASES = {
    "one": (1, [1.0], None),
    "two": (2, [1.5, 0.5], None),
    "away": (1, [-0.5], None),
    "reference": (2, [1.0, 2.0], "base"),
    "other ids": (0, [1.0], None),
}


@pytest.mark.parametrize("case", CASES)
def test_log_likelihoods_are_those_of_the_product(folders, case):
    base, arms, other = folders
    n_arms, alphas, reference = CASES[case]
    names = arms[:n_arms] or [other]
    lm = GuidedHFLM(base, names, alphas, reference, batch_size=3, device="cpu")
    oracle = Oracle(lm, alphas, reference) if n_arms else Reordered(lm, alphas, reference, other)
    unguided = HFLM(base, batch_size=3, device="cpu")

    scored = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert scored != unguided.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (score, is_greedy) in zip(PAIRS, scored, strict=True):
        before = lm.tok_encode(context) if context else [lm.prefix_token_id]
        expected = oracle.log_likelihood(before, lm.tok_encode(context + continuation)[len(lm.tok_encode(context)) :])
        assert score == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]

    texts = [(context + continuation,) for context, continuation in PAIRS]
    rolled = lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    for (text,), score in zip(texts, rolled, strict=True):
        assert score == pytest.approx(oracle.log_likelihood([lm.prefix_token_id], lm.tok_encode(text))[0], abs=1e-4)


def test_windows_of_a_text_longer_than_the_model_reads(folders):
    base, arms, _ = folders
    lm = GuidedHFLM(base, arms[0], 1.0, batch_size=2, max_length=8, device="cpu")
    text = "The train was late, the seat was hard, the view was fine."
    ids = lm.tok_encode(text)
    assert len(ids) > 2 * 8
    (rolled,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    oracle, expected = Oracle(lm, [1.0], None), 0.0
    whole = [lm.prefix_token_id, *ids]
    for at in range(1, len(whole)):
        # Windows of 8 tokens are scored; the last one reaches back to be as long as the others.
        first = (at - 1) // 8 * 8
        first = min(first, len(whole) - 1 - 8)
        expected += float(oracle.next(torch.tensor(whole[first:at]))[whole[at]])
    assert rolled == pytest.approx(expected, abs=1e-4)


def test_at_strength_zero_it_equals_hf(folders):
    base, arms, _ = folders
    ours = GuidedHFLM(base, arms, 0.0, batch_size=3, device="cpu")
    theirs = HFLM(base, batch_size=3, device="cpu")
    texts = [(context + continuation,) for context, continuation in PAIRS]
    until = [(context, {"until": ["."], "max_gen_toks": 8, "do_sample": False}) for context, _ in PAIRS if context]
    for kind, arguments in (("loglikelihood", PAIRS), ("loglikelihood_rolling", texts), ("generate_until", until)):
        found, expected = (getattr(lm, kind)(requests(kind, arguments), disable_tqdm=True) for lm in (ours, theirs))
        assert found == expected


def test_texts_are_guided(folders):
    base, arms, _ = folders
    alphas = [1.5, 0.5]
    lm = GuidedHFLM(base, arms, alphas, batch_size=4, device="cpu")
    contexts = [context for context, _ in PAIRS if context]
    arguments = [(context, {"until": ["<eos>"], "max_gen_toks": 8, "do_sample": False}) for context in contexts]
    model = AutoModelForCausalLM.from_pretrained(base)
    rewards = [AutoregressiveRewardModel.from_pretrained(arm).model for arm in arms]
    texts = []
    for processors in ([], [Recompute(rewards, alphas)]):
        outputs = []
        for context in contexts:
            ids = torch.tensor([lm.tok_encode(context)])
            options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
            output = model.generate(ids, logits_processor=processors, **options)[0, ids.shape[1] :]
            outputs.append(lm.tokenizer.decode(output, skip_special_tokens=True))
        texts.append(outputs)
    assert texts[0] != texts[1]
    assert lm.generate_until(requests("generate_until", arguments), disable_tqdm=True) == texts[1]


def test_the_command_is_that_of_the_harness(folders, tmp_path, monkeypatch, capsys):
    base, arms, _ = folders
    rows = [{"question": "The train was", "choices": [" late", " warm", " hard"], "answer": n % 3} for n in range(6)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["hf-genarm"])  # and put back
    listed = ",".join(json.dumps(arm) for arm in arms)
    call = ["lm-eval", "--model", "hf-genarm", "--tasks", "tiny", "--include_path", str(tmp_path), "--device", "cpu"]
    call += ["--model_args", f"pretrained={base},arm=[{listed}],alpha=[1,0.5]", "--output_path", str(tmp_path / "out")]
    assert cli.main(call) == 0
    (report,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(report.read_text(encoding="utf-8"))
    assert results["config"]["model"] == "hf-genarm"
    assert results["config"]["model_args"]["alpha"] == [1, 0.5]
    assert results["results"]["tiny"]["acc,none"] == pytest.approx(1 / 3)
    assert get_model("hf-genarm") is GuidedHFLM


def test_invalid_references(folders):
    with pytest.raises(ValueError, match="`reference` is 'arm', but must be 'auto', 'base' or None"):
        GuidedHFLM(folders[0], folders[1][0], reference="arm")
