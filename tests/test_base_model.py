"""The base that a command steers: the one that the reward models name, and which one that is, is printed."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_adapter, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_genarm import GenARMLogitsProcessor, RewardInfo, cli
from hf_genarm.hub.base_model import load_base, named_base

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two bases, an adapter on each, and a full reward model."""
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    for seed, name in enumerate(("one", "two", "full")):
        model = tiny_llama(seed, vocab_size=len(tokenizer), max_position_embeddings=512)
        model.to(torch.bfloat16 if name == "two" else torch.float32).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name in ("one", "two"):
        save_adapter(str(root / name), str(root / f"arm-{name}"))
    return root


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """The folder that commands run in, with all that they read."""
    for name in ("prompts", "pairs"):
        rows = ({"prompt": f"{n}, how was it?", "chosen": "Fine.", "rejected": "The train was late."} for n in range(3))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scorer = "def length(prompts, completions, **_):\n    return [float(len(x)) for x in completions]\n"
    (tmp_path / "lengths.py").write_text(scorer, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield models
    sys.modules.pop("lengths", None)


GENERATE = ["generate", "--prompts", "prompts.jsonl", "--output", "answers.jsonl", "--max_new_tokens", "4"]
TUNE = ["tune", "--prompts", "prompts.jsonl", "--scorer", "lengths:length", "--alpha", "1", "--max_kl", "1e9"]
TUNE += ["--max_new_tokens", "4", "--reference", "none"]
COMMANDS = {
    "generate": (GENERATE, "--arm"),
    "show": (["show", "--prompt", "How was it?", "--max_new_tokens", "4"], "--arm"),
    "env": (["env"], "--arm"),
    "tune": (TUNE, "--arm"),
    "evaluate": (["evaluate", "--dataset", "pairs.jsonl"], "--model"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_steers_the_base_that_is_named(folder, tmp_path, capsys, command):
    arm = shutil.copytree(folder / "arm-two", tmp_path / "arm-two")  # which `tune` writes into
    call, option = COMMANDS[command]
    assert cli.main([*call, option, str(arm)]) == 0, capsys.readouterr().err
    shown = "two" if command == "env" else str(folder / "two")
    assert f"ase: `{shown}` on cpu in bfloat16\n" in capsys.readouterr().out
    Path("answers.jsonl").unlink(missing_ok=True)
    assert cli.main([*call, option, str(arm), "--base", str(folder / "two"), "--dtype", "float32"]) == 0
    assert f"ase: `{shown}` on cpu in float32\n" in capsys.readouterr().out


def test_the_answers_are_those_of_that_base(folder, capsys):
    answers = []
    for base in ([], ["--base", str(folder / "two")], ["--base", str(folder / "one")]):
        assert cli.main([*GENERATE, "--arm", str(folder / "arm-two"), *base]) == 0
        answers.append(Path("answers.jsonl").read_text(encoding="utf-8"))
        Path("answers.jsonl").unlink()
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_characters(folder, monkeypatch, encoding):
    """A title has an alpha, and the prompt or an answer any character."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    call = ["show", "--prompt", "α → 模型", "--max_new_tokens", "4", "--arm", str(folder / "arm-one")]
    assert cli.main(call) == 0
    stream.flush()
    assert "guided, alpha 1" in stream.buffer.getvalue().decode(encoding)


def test_the_page_steers_the_base_that_is_named(folder, monkeypatch, capsys):
    gradio = pytest.importorskip("gradio")
    pages = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **_: pages.append(page))
    assert cli.main(["demo", "--arm", str(folder / "arm-two"), "--device", "cpu"]) == 0
    assert f"Base: `{folder / 'two'}` on cpu in bfloat16\n" in capsys.readouterr().out
    assert len(pages) == 1


@pytest.mark.slow
def test_the_harness_steers_the_base_that_is_named(folder, capsys):
    pytest.importorskip("lm_eval")
    from hf_genarm.lm_eval import GuidedHFLM

    lm = GuidedHFLM(arm=str(folder / "arm-two"), device="cpu")
    assert f"Base: `{folder / 'two'}` on cpu in bfloat16\n" in capsys.readouterr().out
    assert lm._processor.engine == "fused"
    assert all(x.device == lm.model.device for arm in lm._arms for x in arm.parameters())


def test_a_full_reward_model_that_records_its_base(models, tmp_path):
    full = str(models / "full")
    with pytest.raises(ValueError, match=r"`.*full` is not an adapter.*names no `base_model`.*`--base`"):
        load_base(None, [full])
    recorded = shutil.copytree(full, tmp_path / "recorded")
    RewardInfo(base_model=str(models / "one")).save(recorded)
    assert load_base(None, [str(recorded)]).name == str(models / "one")
    assert load_base(str(models / "two"), [full]).name == str(models / "two")


def test_reward_models_of_different_bases(models, capsys):
    arms = [str(models / "arm-one"), str(models / "arm-two")]
    with pytest.raises(ValueError, match=r"name different bases \(`.*one` by `.*`, `.*two` by `.*`\).*`--base`"):
        named_base(arms)
    assert cli.main(["show", "--arm", *arms, "--prompt", "How?"]) == 1
    assert "name different bases" in capsys.readouterr().err


def renamed(models, folder, base, **info):
    """A copy of an adapter that names another base."""
    copy = shutil.copytree(models / "arm-one", folder)
    config = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}), encoding="utf-8")
    RewardInfo(**info).save(copy)
    return str(copy)


def test_a_base_that_is_not_found_is_named(models, tmp_path, capsys):
    arm = renamed(models, tmp_path / "arm", "no/base")
    for call in (["show", "--arm", arm, "--prompt", "How?"], ["env", "--arm", arm]):
        assert cli.main(call) == 1
        said = capsys.readouterr().err
        assert "`no/base`, the base that `" in said
        assert "can't be loaded. Name the Hub id or folder of a causal LM: `--base`." in said
    # With another base, it is the adapter's own that can't be loaded.
    with pytest.raises(ValueError, match=r"arm` was trained on `no/base`, which can't be loaded.*base_model"):
        GenARMLogitsProcessor.from_pretrained(arm, base_model=load_base(str(models / "two")).model)


def test_the_recorded_revision_is_used(models, tmp_path):
    arm = renamed(models, tmp_path / "arm", "me/base", base_model="me/base", base_model_revision="f" * 40)
    assert named_base([arm]) == ("me/base", "f" * 40)
    other = renamed(models, tmp_path / "other", "me/other", base_model="me/base", base_model_revision="f" * 40)
    assert named_base([other]) == ("me/other", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "`device` is 'gpu', which can't be used here.*leave it out"),
        ({"device": "cpu", "device_map": "auto"}, "`device` is 'cpu' and `device_map` is 'auto'.*Leave the other"),
    ],
)
def test_wrong_places(models, options, message):
    with pytest.raises(ValueError, match=message):
        load_base(str(models / "one"), **options)


def test_a_device_map(models):
    base = load_base(str(models / "one"), device_map="cpu", dtype="bfloat16")
    assert str(base) == f"`{models / 'one'}` on cpu in bfloat16"
    assert not base.model.training
    assert base.tokenizer.padding_side == "left"


# --- the tokenizer of the base ---


@pytest.mark.parametrize("is_given", [False, True])
def test_a_tokenizer_is_looked_up_once_and_never_if_it_is_given(models, monkeypatch, is_given):
    """Without a network each look-up of one that is not cached takes a minute."""
    looked_up, look_up = [], AutoTokenizer.from_pretrained

    def counting(name, **kwargs):
        looked_up.append(str(name))
        return look_up(name, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counting)
    base = AutoModelForCausalLM.from_pretrained(models / "one")
    base.name_or_path = "far/one"
    tokenizer = tiny_tokenizer() if is_given else None
    arm = models / "arm-one"  # has no tokenizer of its own
    processor = GenARMLogitsProcessor.from_pretrained(arm, base_model=base, tokenizer=tokenizer)
    assert processor.engine == "fused"
    assert looked_up.count("far/one") == (0 if is_given else 1)


def test_paths_are_names(models):
    base = load_base(str(models / "one")).model
    arm = models / "arm-one"
    assert GenARMLogitsProcessor.from_pretrained(arm, base_model=base).engine == "fused"
    assert GenARMLogitsProcessor.from_pretrained([arm, arm], base_model=base).engine == "fused"
    for wrong, error in ((None, TypeError), ([], ValueError), ([base], TypeError)):
        with pytest.raises(error, match="`pretrained_model_name_or_path`"):
            GenARMLogitsProcessor.from_pretrained(wrong, base_model=base)
    with pytest.raises(TypeError, match="A model is 'one', which is no language model"):
        GenARMLogitsProcessor.from_pretrained(arm, base_model="one")
