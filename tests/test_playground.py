"""The playground without its page: what it writes is what `generate` writes, settings act when they are said to."""

import importlib.util
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import RepoCard
from tiny import save_adapter, save_llama, tiny_llama, tiny_tokenizer

from hf_genarm import GenARMLogitsProcessor, cli
from hf_genarm.demo import DEMO_MODEL_ID
from hf_genarm.hub.base_model import load_base
from hf_genarm.playground.answers import Answer, Settings
from hf_genarm.playground.models import MAX_PROMPT_TOKENS, Models
from hf_genarm.playground.script import script_of
from hf_genarm.playground.space import write_space
from hf_genarm.scripts.demo import serve

pytestmark = pytest.mark.filterwarnings("ignore::hf_genarm.GuidanceWarning")

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed: pip install -e '.[demo]'"
)

PROMPT = "How was the train?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    base = str(root / "base")
    model = tiny_llama(3, vocab_size=len(tokenizer), eos_token_id=None, pad_token_id=0)
    model.generation_config.eos_token_id = [2]
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapters = [save_adapter(base, str(root / f"arm-{seed}"), seed) for seed in (1, 2)]
    return base, adapters, save_llama(root / "other", 5)


@pytest.fixture(scope="module")
def models(folders):
    base, adapters, _ = folders
    return Models(load_base(base), adapters)


def settings_of(models, *strengths, **kwargs):
    values = dict(zip(models.adapters, strengths, strict=True))
    return Settings(values, **{"max_new_tokens": 12, "seed": 3, **kwargs})


def written(models, settings, change=lambda n, answer: None):
    answer = Answer(models, PROMPT, settings)
    frames = []
    for frame in answer.frames():
        frames.append(frame)
        change(len(frames), answer)
    return answer, frames[-1]


def alone(models, settings, alpha, **kwargs):
    """Plain `generate` with a batch of one and the global random numbers."""
    arms = [models.reward_model(name) for name in models.adapters]
    processor = GenARMLogitsProcessor(arms, alpha, base_model=models.model, **kwargs)
    inputs = models.question(PROMPT)
    torch.manual_seed(settings.seed)
    output = models.model.generate(
        **inputs,
        logits_processor=[processor],
        do_sample=True,
        top_k=0,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_both_answers_are_those_of_generate_alone(models, temperature):
    settings = settings_of(models, 1.0, -0.4, temperature=temperature)
    _, frame = written(models, settings)
    assert frame.ids[0] != frame.ids[1]
    assert frame.ids == [alone(models, settings, 0.0), alone(models, settings, [1.0, -0.4])]


def test_target_kl_and_reference(models):
    settings = settings_of(models, 1.0, 0.0, target_kl=0.3, reference="base")
    _, frame = written(models, settings)
    expected = alone(models, settings, [1.0, 0.0], target_kl=0.3, reference="base")
    assert frame.ids == [alone(models, settings, 0.0), expected]
    assert expected != alone(models, settings, [1.0, 0.0])


def test_without_strength_both_are_the_same(models):
    _, frame = written(models, settings_of(models, 0.0, 0.0))
    assert frame.ids[0] == frame.ids[1]
    assert frame.table["token"] == []


def test_a_strength_that_is_moved_acts_from_then_on(models):
    still = written(models, settings_of(models, 0.5, 0.0))[1].ids

    def move(n, answer):
        if n == 4:
            answer.settings.strengths[models.adapters[0]] = -2.0

    answer, frame = written(models, settings_of(models, 0.5, 0.0), move)
    (_, first), (step, then) = answer.strengths_at
    assert (first, then) == ([0.5, 0.0], [-2.0, 0.0])
    assert 4 <= step <= 6
    assert frame.ids[0] == still[0]
    assert frame.ids[1][:step] == still[1][:step]
    assert frame.ids[1][step:] != still[1][step:]
    script = script_of(models, answer)
    assert f"processor.alpha = lambda step: [-2.0, 0.0] if step >= {step} else [0.5, 0.0]" in script


def test_a_reward_model_that_was_replaced_meanwhile_is_off(models):
    def replace(n, answer):
        if n == 4:
            answer.settings.strengths = {models.adapters[0]: 0.5, "another": 2.0}

    answer, _ = written(models, settings_of(models, 0.5, 1.0), replace)
    assert [strengths for _, strengths in answer.strengths_at] == [[0.5, 1.0], [0.5, 0.0]]


def test_the_script_writes_the_same(models, capsys):
    settings = settings_of(models, 1.0, -0.4, temperature=0.8)
    answer, frame = written(models, settings)
    script = script_of(models, answer)
    assert len(script.splitlines()) <= 12
    exec(compile(script, "script", "exec"), {})
    assert capsys.readouterr().out.rstrip("\n") == models.tokenizer.decode(frame.ids[1], skip_special_tokens=True)


def test_stop_and_a_visitor_who_leaves(models):
    def stop(n, answer):
        if n == 2:
            answer.stop()

    settings = settings_of(models, 1.0, 0.0, max_new_tokens=200)
    _, frame = written(models, settings, stop)
    assert max(map(len, frame.ids)) < 30
    n_threads = threading.active_count()
    frames = Answer(models, PROMPT, settings).frames()
    next(frames)
    frames.close()
    assert threading.active_count() == n_threads


def test_errors_of_the_thread_are_raised_where_frames_are_read(models, monkeypatch):
    answer = Answer(models, PROMPT, settings_of(models, 1.0, 0.0))
    monkeypatch.setattr(answer, "settings", settings_of(models, float("inf"), 0.0))
    with pytest.raises(ValueError, match="strengths must be finite"):
        list(answer.frames())


def test_prompts_have_limits(models):
    for prompt in ("", "  \n"):
        with pytest.raises(ValueError, match="prompt is empty"):
            Answer(models, prompt, settings_of(models, 1.0, 0.0))
    with pytest.raises(ValueError, match=f"at most {MAX_PROMPT_TOKENS} are allowed"):
        Answer(models, "train " * 2000, settings_of(models, 1.0, 0.0))


def test_scores_are_what_the_adapters_have_learned(models):
    answer, frame = written(models, settings_of(models, 2.0, 0.0))
    scores = answer.scores(frame)
    assert list(scores) == models.adapters
    unguided, guided = scores[models.adapters[0]]
    assert unguided != guided


def test_adapters_of_visitors(folders, tmp_path):
    base, adapters, other = folders
    models = Models(load_base(base), adapters[:1])
    assert models.reward_model(adapters[1]) is models.reward_model(adapters[1])
    with pytest.raises(ValueError, match="is not an adapter: it has no"):
        models.reward_model(other)
    with pytest.raises(ValueError, match=r"because it was trained on `.*other`"):
        models.reward_model(save_adapter(other, str(tmp_path / "of-another")))
    with pytest.raises(ValueError, match="neither a Hub id"):
        models.reward_model("../../etc/passwd; rm")
    pickled = Path(shutil.copytree(adapters[1], tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ValueError, match="Pickled weights"):
        models.reward_model(str(pickled))
    biased = save_adapter(base, str(tmp_path / "biased"), init_lora_weights="pissa")
    with pytest.raises(ValueError, match="because it does more than add to them"):
        models.reward_model(biased)
    closed = Models(load_base(base), adapters[:1], takes_folders=False)
    for name in (adapters[1], "/no/such/folder"):
        with pytest.raises(ValueError, match="folders of the machine"):
            closed.reward_model(name)
    for seed in range(Models.KEPT + 2):
        models.reward_model(save_adapter(base, str(tmp_path / f"guest-{seed}"), seed))
    assert len(models._guests) == Models.KEPT


def test_nothing_is_left_behind(models):
    written(models, settings_of(models, 1.0, 0.5))
    assert "prepare_inputs_for_generation" not in vars(models.model)


@needs_gradio
def test_chart():
    from hf_genarm.playground.page import chart

    assert chart([], "divergence") == ""
    drawn = chart([0.5, 0.0, float("nan"), 1.5], "<b>")
    assert drawn.count("<rect") == 4
    assert "mean 0.50, highest 1.50" in drawn
    assert "<b>" not in drawn


# --- the Space ---


@needs_gradio
def test_a_space_is_written(folders, tmp_path):
    _, adapters, _ = folders
    target = tmp_path / "space"
    write_space(str(target), DEMO_MODEL_ID, [adapters[0], "user/my-arm"])
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "adapters", "app.py", "requirements.txt"]
    called = f"serve({DEMO_MODEL_ID!r}, ['adapters/arm-1', 'user/my-arm'], host=\"0.0.0.0\")"
    assert called in (target / "app.py").read_text()
    compile((target / "app.py").read_text(), "app.py", "exec")
    assert (target / "adapters" / "arm-1" / "adapter_model.safetensors").exists()
    card = RepoCard.load(target / "README.md", repo_type="space")
    assert card.data["sdk"] == "gradio"
    assert card.data["app_file"] == "app.py"
    assert card.data["models"] == [DEMO_MODEL_ID, "user/my-arm"]
    assert (target / "requirements.txt").read_text().startswith("hf_genarm[demo] @ git+https://")


@needs_gradio
def test_a_space_that_can_not_be_written(folders, tmp_path):
    base, adapters, _ = folders
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        write_space(str(tmp_path / "full"), None, adapters)
    for given in (base, None):  # which the adapters name
        with pytest.raises(ValueError, match="is a folder, but a Space loads its base"):
            write_space(str(tmp_path / "space"), given, adapters)
    with pytest.raises(ValueError, match="have the same name"):
        write_space(
            str(tmp_path / "space"), "me/base", [adapters[0], str(shutil.copytree(adapters[0], tmp_path / "arm-1"))]
        )


# --- the command ---


@needs_gradio
def test_the_command(folders, tmp_path, monkeypatch, capsys):
    _, adapters, _ = folders
    target = str(tmp_path / "space")
    assert cli.main(["demo", "--arm", *adapters, "--base", DEMO_MODEL_ID, "--export", target]) == 0
    assert "hf upload USER/NAME" in capsys.readouterr().out
    assert "['adapters/arm-1', 'adapters/arm-2']" in Path(target, "app.py").read_text()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 1
    assert "No reward model is given" in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_genarm\[demo\]"):
        serve("base", ["arm"])


@needs_gradio
def test_the_page_is_built_for_any_reward_models(models):
    from hf_genarm.playground.page import build_page

    page = build_page(models)
    labels = [component["props"].get("label") for component in page.get_config_file()["components"]]
    assert {"arm-1", "arm-2", "temperature", "target KL", "Prompt"} <= set(labels)
