"""The playground without its page: what it writes is what `generate` writes, settings act when they are said to."""

import importlib.util
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import RepoCard
from tiny import save_adapter, save_llama, tiny_llama, tiny_tokenizer

from hf_genarm import AutoregressiveRewardModel, GenARMLogitsProcessor, RewardInfo, cli
from hf_genarm.demo import DEMO_MODEL_ID
from hf_genarm.hub.base_model import load_base
from hf_genarm.playground.answers import Answer, Settings
from hf_genarm.playground.models import MAX_PROMPT_TOKENS, Models, chat_of
from hf_genarm.playground.script import script_of
from hf_genarm.playground.space import write_space
from hf_genarm.scripts.demo import SENTENCE, serve

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


def alone(models, settings, alpha, sentences=(), **kwargs):
    """Plain `generate` with a batch of one and the global random numbers."""
    rewards = [*sentences, *(models.reward_model(name) for name in models.adapters)]
    processor = GenARMLogitsProcessor(rewards, alpha, base_model=models.model, tokenizer=models.tokenizer, **kwargs)
    inputs = processor.encode([chat_of(PROMPT)])
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


SENTENCES = ["", "The food was fine.", " Be kind. "]  # the first slot of the page is empty


def test_sentences_steer_together_with_adapters(models):
    """Without an adapter, the sentence alone at 1 is what the base writes with the sentence in its prompt."""
    settings = settings_of(models, 0.5, 0.0, sentences=SENTENCES, sentence_strengths=[9.0, 1.5, -0.5])
    answer, frame = written(models, settings)
    assert answer.sentences == ["The food was fine.", "Be kind."]
    assert answer.titles == ["“The food was fine.”", "“Be kind.”", "arm-1", "arm-2"]
    sentences = [AutoregressiveRewardModel.from_sentence(x, models.model, models.tokenizer) for x in answer.sentences]
    expected = alone(models, settings, [1.5, -0.5, 0.5, 0.0], sentences)
    assert frame.ids == [alone(models, settings, 0.0), expected]
    assert expected != alone(models, settings, [0.0, 0.0, 0.5, 0.0], sentences)


def test_a_sentence_at_1_is_prompting(models):
    settings = settings_of(
        models, 0.0, 0.0, sentences=["The food was fine."], sentence_strengths=[1.0], reference="base"
    )
    _, frame = written(models, settings)
    chat = [{"role": "system", "content": "The food was fine."}, *chat_of(PROMPT)]
    inputs = models.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(settings.seed)
    prompted = models.model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=settings.max_new_tokens)
    assert frame.ids[1] == prompted[0, inputs["input_ids"].shape[1] :].tolist()
    assert frame.ids[1] != frame.ids[0]


def test_a_sentence_that_is_rewritten_meanwhile_acts_from_the_next_answer_on(models):
    settings = settings_of(models, 0.0, 0.0, sentences=["The food was fine."], sentence_strengths=[1.0])
    still = written(models, settings)[1].ids

    def rewrite(n, answer):
        answer.settings.sentences = ["Be kind."]

    assert written(models, settings, rewrite)[1].ids == still
    assert written(models, settings)[1].ids[1] != still[1]


def test_nothing_to_steer_by(models):
    with pytest.raises(ValueError, match="There is no sentence and no adapter"):
        Answer(models, PROMPT, Settings(sentences=["", " "]))


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
    assert f"processor.alpha = lambda step: [-2.0] if step >= {step} else [0.5]" in script


def test_a_reward_model_that_was_replaced_meanwhile_is_off(models):
    def replace(n, answer):
        if n == 4:
            answer.settings.strengths = {models.adapters[0]: 0.5, "another": 2.0}

    answer, _ = written(models, settings_of(models, 0.5, 1.0), replace)
    assert [strengths for _, strengths in answer.strengths_at] == [[0.5, 1.0], [0.5, 0.0]]


@pytest.mark.parametrize("sentence", ["", 'It\'s "kind".'])
@pytest.mark.parametrize("strengths", [(1.0, -0.4), (0.0, 0.7)])
def test_the_script_writes_the_same(models, capsys, sentence, strengths):
    settings = settings_of(models, *strengths, temperature=0.8, sentences=[sentence], sentence_strengths=[1.5])
    answer, frame = written(models, settings)
    script = script_of(models, answer)
    assert script.count("    AutoregressiveRewardModel.") == bool(sentence) + sum(x != 0 for x in strengths)
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
    (unguided, guided), others = answer.scores(frame)
    assert unguided != guided
    assert others != [unguided, guided]


def test_adapters_of_visitors(folders, tmp_path):
    base, adapters, other = folders
    models = Models(load_base(base), adapters[:1])
    assert models.reward_model(adapters[1]) is models.reward_model(adapters[1])
    with pytest.raises(ValueError, match="is neither an adapter nor a sentence: it has no"):
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


def test_a_folder_of_a_sentence_steers_as_the_sentence_does(folders, tmp_path):
    """It is loaded as an adapter is, and its scores are those of the sentence."""
    models = Models(load_base(folders[0]), [])
    sentence = "You are kind, and happy about everything that people ask."
    models.sentence(sentence).save_pretrained(tmp_path / "kind")
    name = str(tmp_path / "kind")
    assert models.title(name) == "“You are kind, and happy about…”"
    loaded, loaded_frame = written(models, Settings({name: 1.5}, max_new_tokens=8, reference="base"))
    given = Settings(sentences=[sentence], sentence_strengths=[1.5], max_new_tokens=8, reference="base")
    typed, typed_frame = written(models, given)
    assert loaded_frame.ids == typed_frame.ids
    assert loaded_frame.ids[0] != loaded_frame.ids[1]
    assert loaded.titles == typed.titles
    (scores,) = loaded.scores(loaded_frame)
    assert [scores] == typed.scores(typed_frame)
    assert scores[0] != scores[1]
    notes = dict(loaded_frame.table.token_texts()[1].tokens[0].notes)
    assert "nats, with strength 1.50" in notes[models.title(name)]


def test_nothing_is_left_behind(models):
    written(models, settings_of(models, 1.0, 0.5))
    assert "prepare_inputs_for_generation" not in vars(models.model)


@needs_gradio
def test_chart():
    from hf_genarm.playground.drawing import chart

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
    write_space(str(target), DEMO_MODEL_ID, [adapters[0], "user/my-arm"], ["Be kind."])
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "adapters", "app.py", "requirements.txt"]
    called = f"serve({DEMO_MODEL_ID!r}, ['adapters/arm-1', 'user/my-arm'], ['Be kind.'], host=\"0.0.0.0\")"
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
    assert "['adapters/arm-1', 'adapters/arm-2'], []" in Path(target, "app.py").read_text()


@needs_gradio
@pytest.mark.parametrize("is_clone", [True, False])
@pytest.mark.parametrize("base", [None, DEMO_MODEL_ID, "user/my-model"])
def test_the_command_without_arguments_begins_with_a_sentence(tmp_path, monkeypatch, capsys, is_clone, base):
    if not is_clone:
        monkeypatch.chdir(tmp_path)
    target = str(tmp_path / "space")
    assert cli.main(["demo", *(["--base", base] if base else []), "--export", target]) == 0
    app = Path(target, "app.py").read_text()
    assert f"{SENTENCE!r}" in app
    has_adapters = is_clone and base != "user/my-model"
    assert ("adapters/arm-smollm2-135m-brevity" in app) == has_adapters
    assert ("begins without an adapter" in capsys.readouterr().out) == (not has_adapters)
    assert RepoCard.load(f"{target}/README.md", repo_type="space").data["models"] == [base or DEMO_MODEL_ID]


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_genarm\[demo\]"):
        serve("base", ["arm"])


def parts(page):
    """The properties of the components of a page, by their ids."""
    components = page.get_config_file()["components"]
    return {x["props"].get("elem_id"): x["props"] for x in components}


@needs_gradio
def test_the_page_is_built_for_any_reward_models(models, folders):
    from hf_genarm.hub.sentence import DEFAULT_STRENGTH
    from hf_genarm.playground.page import MAX_SENTENCES, build_page

    page = parts(build_page(models))
    assert [page[f"strength-{index}"]["label"] for index in (0, 1)] == ["arm-1", "arm-2"]
    assert [page[f"strength-{index}"]["value"] for index in (0, 1)] == [1.0, 0.0]
    assert page["reference"]["value"] == "none"  # as the adapters were trained
    assert f"`{folders[0]}` on cpu in float32" in page["intro"]["value"]
    page = parts(build_page(models, ["Be kind."]))
    assert page["sentence-0"]["value"] == "Be kind."
    assert page["sentence-strength-0"]["value"] == DEFAULT_STRENGTH
    assert page["strength-0"]["value"] == 0.0
    without = parts(build_page(Models(load_base(folders[0]), [])))
    assert "strength-0" not in without
    with pytest.raises(ValueError, match=rf"5 sentences, but the page has room for {MAX_SENTENCES}"):
        build_page(models, ["Be kind."] * 5)


@needs_gradio
def test_the_page_begins_with_the_setting_that_an_adapter_recommends(folders, tmp_path):
    from hf_genarm.playground.page import build_page

    base, (first, _), _ = folders
    arm = shutil.copytree(first, tmp_path / "arm")
    RewardInfo(recommended={"alpha": 0.6, "reference": "base", "temperature": 0.7, "measured": {}}).save(arm)
    page = parts(build_page(Models(load_base(base), [str(arm)])))
    assert [page[x]["value"] for x in ("strength-0", "reference", "temperature")] == [0.6, "base", 0.7]


@needs_gradio
def test_pages_that_it_links_to_exist(models):
    from hf_genarm.playground.page import DOCS, build_page

    page = str(build_page(models).get_config_file())
    linked = re.findall(rf"{re.escape(DOCS)}/([a-z_]+)/(?:#([a-z0-9-]+))?\)", page)
    assert len(linked) >= 4
    root = Path(__file__).parent.parent
    assert f"site_url: {DOCS}/" in (root / "mkdocs.yml").read_text(encoding="utf-8")
    for name, anchor in linked:
        text = (root / "docs" / f"{name}.md").read_text(encoding="utf-8")
        headings = [re.sub(r"[^\w -]", "", x.lower()) for x in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
        assert not anchor or anchor.replace("-", " ") in headings
