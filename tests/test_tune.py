"""The recommended setting: how it is found, written, reported and used."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run_command
from huggingface_hub import ModelCard
from pairs import PROMPTS, conversational, message
from tiny import save_adapter, save_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo, cli
from hf_genarm.functional import kl_divergence
from hf_genarm.hub.recommendation import recommendation, with_recommendation
from hf_genarm.scripts.judge import Judge
from hf_genarm.scripts.plots import plot_settings
from hf_genarm.scripts.sweep import Answers, Setting, Sweep
from hf_genarm.scripts.tune import choose, statistics

SETTING = {"alpha": 0.6, "reference": "base", "temperature": 0.7, "measured": {}}
SCORER = """
def rising(prompts, completions, **_):
    assert [x[-1]["role"] for x in prompts] == ["user"] * 3
    assert [x[-1]["role"] for x in completions] == ["assistant"] * 3
    rising.n = getattr(rising, "n", 0) + 1
    return [rising.n, rising.n + 1, rising.n + 2]
def worse(prompts, completions, **_):
    worse.n = getattr(worse, "n", 0) + 1
    return [-worse.n] * len(completions)
def unclear(prompts, completions, **_):
    unclear.n = getattr(unclear, "n", 0) + 1
    return [3.0, -1.0, -1.0] if unclear.n > 1 else [0.0] * 3
def few(prompts, completions, **_):
    return [1.0]
not_a_function = 5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base, an adapter on it, prompts and a scorer."""
    save_adapter(save_llama(tmp_path / "base"), str(tmp_path / "arm"))
    RewardInfo(beta=0.1, objective="length").save(tmp_path / "arm")
    rows = [{"prompt": message("user", prompt)} for prompt in [*PROMPTS, PROMPTS[0]]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bare.jsonl").write_text(json.dumps({"question": "How?"}))
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "How?"}))
    (tmp_path / "my_scorer.py").write_text(SCORER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_scorer", None)


def tune(*more):
    arguments = ["--arm", "arm", "--prompts", "prompts.jsonl", "--scorer", "my_scorer:rising", "--max_kl", "1e6"]
    arguments += ["--max_perplexity", "1e6", "--temperature", "1.0", "--reference", "base", "none"]
    return cli.main(["tune", *arguments, "--alpha", "0.5", "2", "--max_new_tokens", "5", "--batch_size", "2", *more])


def test_the_command(folder, capsys):
    assert tune("--temperature", "1.0", "0.5") == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    info = RewardInfo.load(folder / "arm" / "genarm_config.json")
    assert (info.beta, info.objective) == (0.1, "length")
    setting, measured = info.recommended, info.recommended["measured"]
    rows = measured["settings"]
    assert len(rows) == 2 + 2 * 2 * 2
    assert measured["n_prompts"] == 3
    best = max((row for row in rows if row["alpha"]), key=lambda row: row["reward"][0])
    assert {x: setting[x] for x in ("alpha", "reference", "temperature")} == {
        x: best[x] for x in ("alpha", "reference", "temperature")
    }
    assert rows[0]["kl"] == [0, 0, 0]
    assert all(row["kl"][1] <= row["kl"][0] <= row["kl"][2] for row in rows)
    card = (folder / "arm" / "README.md").read_text()
    assert card.count("## Recommended setting") == 1
    assert (folder / "arm" / "tuning.png").stat().st_size > 1000
    assert "Strength 2, no reference (Eq. 7), temperature 0.5: the highest reward" in printed
    assert "at the same temperature, paired: +8.00 [+8.00, +8.00]" in printed
    assert "`do_sample=True, top_k=0, temperature=0.5`" in printed

    # Again, with another limit: nothing is sampled, and the section of the card is replaced.
    kept = {path: path.stat().st_mtime_ns for path in (folder / "tuning" / "answers").iterdir()}
    assert len(kept) == len(rows)
    limit = min(row["kl"][0] for row in rows if row["alpha"])
    assert ModelCard.load(folder / "arm" / "README.md").data.to_dict().get("widget") is None
    capsys.readouterr()
    assert tune("--temperature", "1.0", "0.5", "--max_kl", str(limit), "--n_examples", "2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    again = RewardInfo.load(folder / "arm" / "genarm_config.json").recommended
    assert again["measured"]["max_kl"] == limit
    assert result["recommended"] == {x: again[x] for x in ("alpha", "reference", "temperature")}
    assert result["settings"] == again["measured"]["settings"]
    assert (again["alpha"], again["temperature"]) != (setting["alpha"], setting["temperature"])
    assert {path: path.stat().st_mtime_ns for path in (folder / "tuning" / "answers").iterdir()} == kept
    assert (folder / "arm" / "README.md").read_text().count("## Recommended setting") == 1
    # Two of the three prompts, evenly, and answers at the setting that is now recommended
    widget, examples = ModelCard.load(folder / "arm" / "README.md").data.widget, again["measured"]["examples"]
    prompts = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]
    assert [x["prompt"] for x in examples] == [x[-1]["content"] for x in prompts[:2]]
    assert [(x["text"], x["output"]["text"]) for x in widget] == [(x["prompt"], x["answer"]) for x in examples]
    assert f"Strength {again['alpha']:g}" in widget[0]["example_title"]
    assert examples[0]["answer"]


@pytest.mark.filterwarnings("ignore:The reward model has learned too little")
def test_a_judge_is_trained_on_other_pairs(folder, capsys):
    rows = [dict(zip(conversational(True), x, strict=True)) for x in zip(*conversational(True).values(), strict=True)]
    (folder / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--arm", "arm", "--prompts", "prompts.jsonl", "--pairs", "others.jsonl", "--max_kl", "1e6"]
    for n in (1, 2):
        options = ["--alpha", "0.5", "--max_new_tokens", "5", "--reference", "base", "--max_perplexity", "1e6"]
        assert cli.main(["tune", *arguments, *options]) == 0
        assert ("train_runtime" in capsys.readouterr().out) == (n == 1), "It is trained once."
    (judge,) = (folder / "tuning" / "judge").iterdir()
    judge = AutoregressiveRewardModel.from_pretrained(str(judge), AutoModelForCausalLM.from_pretrained("base"))
    assert judge.info.loss == {"reference": "base"}
    described = Judge("others.jsonl", "judges").described(judge)
    assert re.fullmatch(r"a judge trained on `others.jsonl`, right on [01].\d+ \[.*\] of the pairs held out", described)


def test_what_is_measured_is_what_was_sampled_from(folder):
    """KL after temperature, and the likelihood under the base, over each answer to its end, from scratch."""
    model = AutoModelForCausalLM.from_pretrained("base")
    tokenizer = tiny_tokenizer()
    prompts = [message("user", prompt) for prompt in PROMPTS]
    arm = AutoregressiveRewardModel.from_pretrained("arm", model)
    processor = GenARMLogitsProcessor(arm, base_model=model, reference="base")
    sweep = Sweep(model, tokenizer, prompts, folder / "answers", 6, 3, seed=0)
    answers = sweep(Setting(1.5, "base", 0.6), processor, "an arm", lambda _: None)
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    torch.manual_seed(0)
    output = model.generate(
        **inputs, logits_processor=[processor], temperature=0.6, do_sample=True, top_k=0, max_new_tokens=6
    )
    length = inputs["input_ids"].shape[1]
    assert tokenizer.batch_decode(output[:, length:], skip_special_tokens=True) == answers.texts
    for row, mask in enumerate(inputs["attention_mask"]):
        ids = output[row, :length][mask.bool()].tolist() + output[row, length:].tolist()
        n, start = answers.n_tokens[row], int(mask.sum())
        with torch.no_grad():
            base, tuned = (
                x(torch.tensor([ids])).logits[0, start - 1 : start - 1 + n].double().log_softmax(-1)
                for x in (model, arm.model)
            )
        guided = ((base + 1.5 * (tuned - base)).log_softmax(-1) / 0.6).log_softmax(-1)
        assert answers.kl[row] == pytest.approx(kl_divergence(guided, base).sum().item(), rel=1e-3)
        taken = sum(base[at, ids[start + at]] for at in range(n))
        assert answers.base_log_prob[row] == pytest.approx(taken.item(), rel=1e-3)


def test_the_rule_of_choice():
    def row(alpha, reward, kl, perplexity, temperature=1.0):
        measured = {"reward": [reward], "kl": [kl], "perplexity": [perplexity]}
        return {"alpha": alpha, "temperature": temperature, **measured}

    rows = [row(0, 9, 0, 5, 2.0), row(0, 9, 0, 10), row(0.5, 1, 2, 11), row(1, 3, 4, 12), row(2, 5, 9, 30)]
    assert [choose(rows, limit, 3) for limit in (3, 5, 9)] == [2, 3, 4]
    assert [choose(rows, 9, factor) for factor in (1.1, 1.2, 2.9, 3)] == [2, 3, 3, 4]
    rows.append(row(2, 4, 8, 4, 0.5))
    assert choose(rows, 9, 1.2) == 5, "a lower temperature is more fluent"
    with pytest.raises(ValueError, match=r"`max_kl` 1: the least divergence is 2.0.*smaller strengths"):
        choose(rows, 1, 3)
    with pytest.raises(ValueError, match=r"`max_perplexity` 1: .* 1.10 times that of unguided.*lower temperatures"):
        choose(rows, 5, 1)


def test_what_is_tried_by_default(folder):
    """Three temperatures, with the reference that contains Eq. 7; temperature 1 is the yardstick, and always there."""
    options = ["--arm", "arm", "--prompts", "prompts.jsonl", "--scorer", "my_scorer:rising", "--max_new_tokens", "2"]
    options += ["--max_kl", "1e6", "--max_perplexity", "1e6", "--alpha", "1"]
    assert cli.main(["tune", *options]) == 0
    rows = RewardInfo.load("arm/genarm_config.json").recommended["measured"]["settings"]
    tried = [(row["alpha"], row["reference"], row["temperature"]) for row in rows]
    assert tried == [(0, None, x) for x in (1.0, 0.7, 0.5)] + [(1, "base", x) for x in (1.0, 0.7, 0.5)]


def test_statistics_in_closed_form():
    answers = Answers(["a", "b"], [1, 3], [2.0, 4.0], [-1.0, -7.0])
    result = statistics(answers, np.array([0.0, 1.0]), seed=0)
    assert result["reward"] == [0.5, 0.0, 1.0]
    assert result["kl"] == [3.0, 2.0, 4.0]
    assert result["perplexity"] == pytest.approx([np.exp(8 / 4), np.exp(1), np.exp(7 / 3)])


def test_a_picture_of_answers_that_are_all_alike(tmp_path):
    """A mean of equal numbers can lie outside of its own interval, by rounding."""
    low, high = [0.1, np.nextafter(0.1, 1), 0.1], [0.1, 0.1, np.nextafter(0.1, 0)]
    rows = [
        {"alpha": alpha, "reference": None, "temperature": 1.0, "reward": low, "kl": high, "perplexity": low}
        for alpha in (0.0, 1.0)
    ]
    plot_settings(rows, 20.0, "reward", str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 1000


WRONG = [
    (["--scorer", "rising"], 1, "`scorer` is 'rising'.*`module:function`"),
    (["--scorer", "no_module:rising"], 1, "`scorer` is 'no_module:rising'.*can't be imported"),
    (["--scorer", "my_scorer:no"], 1, "`scorer` is 'my_scorer:no'.*can't be imported"),
    (["--scorer", "my_scorer:not_a_function"], 1, "which is a int, but must be a function"),
    (["--pairs", "prompts.jsonl"], 2, "`scorer` is 'my_scorer:rising' and `pairs` is 'prompts.jsonl', but one"),
    (["--prompts", "no.jsonl"], 1, "`no.jsonl` can't be read.*one prompt in each row"),
    (["--prompts", "one.jsonl", "--prompts_split", "test"], 1, "has only one split, `train`.*`test.jsonl`\\)\\.$"),
    (["--prompts", "bare.jsonl"], 1, r"`bare.jsonl` has the columns \['question'\], but not `prompt`"),
    (["--prompts", "one.jsonl"], 1, "`one.jsonl` has 1 prompt.*at least 2"),
    (["--base", "no/model"], 1, "`no/model` can't be loaded.*`--base`"),
    (["--arm", "no/arm"], 1, "`no/arm` can't be loaded.*Hub id or folder of a reward model"),
    (["--output_dir", "prompts.jsonl"], 1, "`prompts.jsonl` can't be the folder"),
    (["--alpha", "0"], 2, r"`alpha` is \[0.0\].*positive"),
    (["--temperature", "-1"], 2, r"`temperature` is \[-1.0\].*positive"),
    (["--reference", "other"], 2, "--reference.*'other'"),
    (["--max_kl", "0"], 2, "`max_kl` is 0.0.*positive"),
    (["--max_perplexity", "0"], 2, "`max_perplexity` is 0.0.*positive"),
    (["--batch_size", "0"], 2, "`batch_size` is 0"),
    (["--max_prompts", "1"], 2, "`max_prompts` is 1"),
]


@pytest.mark.parametrize(("call", "code", "line"), WRONG, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_wrong_calls(folder, monkeypatch, capfd, call, code, line):
    def too_late(*args, **kwargs):
        raise AssertionError("A model is loaded, though the call is wrong.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_late)
    assert tune(*call) == code
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("hf-genarm tune: ")
    assert re.search(line, said), said


@pytest.mark.parametrize(
    ("scorer", "line"),
    [
        ("few", "returned .* for 3 answers, but must return a finite number for each"),
        ("worse", "Nothing is recommended"),
        ("unclear", "Nothing is recommended"),  # +0.33 [-1, 3]
    ],
)
def test_what_is_known_late_changes_nothing(folder, capfd, scorer, line):
    assert tune("--scorer", f"my_scorer:{scorer}", "--reference", "none") == (scorer == "few")
    printed = capfd.readouterr()
    said = (printed.err if scorer == "few" else printed.out).splitlines()[-1]
    assert re.search(line, said), said
    assert RewardInfo.load("arm/genarm_config.json").recommended is None
    assert "Recommended setting" not in (folder / "arm" / "README.md").read_text()
    assert (folder / "tuning" / "tuning.png").exists() == (scorer != "few")


# --- what is recommended is used, and reported ---


@pytest.fixture
def said(monkeypatch):
    lines = []
    logger = logging.get_logger("hf_genarm.decoding.recommended")
    monkeypatch.setattr(logger, "warning", lambda message, *_: lines.append(message))
    type(logger).warning_once.cache_clear()
    return lines


def recommend(folder, **values):
    RewardInfo(recommended=SETTING | values).save(folder / "arm")


def test_a_recommended_setting_is_taken_where_no_other_is_given(folder, said):
    recommend(folder)
    base = AutoModelForCausalLM.from_pretrained("base")
    processor = GenARMLogitsProcessor.from_pretrained("arm", base_model=base)
    assert (processor.alpha, processor.reference) == (pytest.approx([0.6]), "base")
    assert said == [
        "Using `alpha=0.6` and `reference='base'`, the setting that `arm` recommends; it was measured with "
        "`do_sample=True, top_k=0, temperature=0.7` in `generate`."
    ]
    GenARMLogitsProcessor.from_pretrained("arm", base_model=base)
    assert len(said) == 1  # once
    given = GenARMLogitsProcessor.from_pretrained("arm", base_model=base, alpha=2.0)
    assert (given.alpha, given.reference) == ([2.0], "base")
    assert said[1].startswith("Using `reference='base'`, the setting")
    given = GenARMLogitsProcessor.from_pretrained("arm", base_model=base, alpha=2.0, reference=None)
    assert (given.alpha, given.reference) == ([2.0], None)
    assert len(said) == 2


def test_no_message_without_a_recommendation(folder, said):
    base = AutoModelForCausalLM.from_pretrained("base")
    processor = GenARMLogitsProcessor.from_pretrained("arm", base_model=base)
    assert (processor.alpha, processor.reference, said) == ([1.0], None, [])


def test_recommended_references_that_differ_are_refused(folder, said):
    save_adapter("base", "other", seed=1)
    base = AutoModelForCausalLM.from_pretrained("base")
    recommend(folder, alpha=0.4)
    with pytest.raises(
        ValueError, match=r"'base' for `arm`, None for `other`.*`reference=\"base\"` or `reference=None`"
    ):
        GenARMLogitsProcessor.from_pretrained(["arm", "other"], base_model=base)
    processor = GenARMLogitsProcessor.from_pretrained(["arm", "other"], base_model=base, reference="base")
    assert processor.alpha == pytest.approx([0.4, 1.0])


def test_the_section_of_a_card():
    info = RewardInfo(recommended=SETTING)
    section = recommendation(info)
    assert 'Strength 0.6, reference `"base"`, temperature 0.7' in section
    assert "an argument of `generate`: `do_sample=True, top_k=0, temperature=0.7`." in " ".join(section.split())
    card = "# arm\n\n## Quick start\n\nx\n\n## How far to trust it\n\ny\n"
    once = with_recommendation(card, section)
    assert once.index("Quick start") < once.index("Recommended setting") < once.index("How far")
    again = with_recommendation(once, recommendation(RewardInfo(recommended=SETTING | {"alpha": 0.5})))
    assert again == once.replace("Strength 0.6", "Strength 0.5")
    assert with_recommendation("# mine\n", section).count("Recommended setting") == 1
    # What the range of a card says is no longer true.
    ranged = card + "\nNo setting is recommended: α from 0.5 to 2.0 was measured.\n"
    assert "α from" not in with_recommendation(ranged, section)
    assert recommendation(RewardInfo()) == ""


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path):
    """As printed, one after the other, at the small size."""
    page = (ROOT / "docs" / "strength.md").read_text(encoding="utf-8")
    block = next(x for x in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "tune" in x)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"HF_GENARM_SMOKE": "1", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for line in block.strip().splitlines():
        command = line.replace("hf-genarm", "python -m hf_genarm").split()
        printed = run_command(sys.executable, *command[1:], cwd=tmp_path, **environment)
    assert "the highest reward at a KL of at most 20" in printed
