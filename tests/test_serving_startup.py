"""What is wrong with a server is one readable line before any weights are loaded."""

import json
import shutil

import pytest
import torch
from tiny import save_adapter, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_genarm.hub.base_weights import weights_fingerprint
from hf_genarm.hub.info import RewardInfo
from hf_genarm.vllm import __main__ as launcher
from hf_genarm.vllm.server_config import ENVIRONMENT, ServerConfig
from hf_genarm.vllm.startup_checks import _model_of_files, check_reward_models


def saved(path, tokenizer, **config):
    tiny_llama(vocab_size=len(tokenizer), **config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def base(tmp_path, tokenizer):
    return saved(tmp_path / "tiny", tokenizer)


@pytest.fixture
def adapter(tmp_path, base):
    return save_adapter(base, str(tmp_path / "adapter"))


def checked(base, names, max_model_len=128, **config):
    return check_reward_models(ServerConfig(reward_models=names, **config), base, None, max_model_len)


def test_what_is_right_is_resolved(base, adapter):
    config = checked(base, [adapter])
    assert (config.alpha, config.reference) == ([1.0], None)
    RewardInfo(recommended={"alpha": 0.5, "reference": "base", "temperature": 1.0, "measured": {}}).save(adapter)
    config = checked(base, [adapter])
    assert (config.alpha, config.reference) == ([0.5], "base")


def test_a_served_model_that_only_vllm_can_read_is_left_to_it(base, adapter, tmp_path):
    served = tmp_path / "tiny.gguf"
    served.touch()
    assert checked(str(served), [adapter], max_model_len=None).alpha == [1.0]


def without_weights(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def damaged(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 100)


def no_config(folder):
    (folder / "adapter_config.json").unlink()


def checkpoints(folder):
    (folder / "checkpoint-5").mkdir()
    (folder / "adapter_config.json").rename(folder / "checkpoint-5" / "adapter_config.json")


def not_json(folder):
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")


def wrong_info(folder):
    (folder / "genarm_config.json").write_text('{"beta": -1}', encoding="utf-8")


def another_base(folder):
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "/models/other"
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "`.*adapter` is no folder here, and can't be loaded from the Hub"),
        (without_weights, "has no weights in safetensors"),
        (damaged, "is damaged"),
        (no_config, "has no `adapter_config.json` and no `config.json`, so it is no reward model. Check"),
        (checkpoints, "Name one of its folders: checkpoint-5"),
        (not_json, "adapter_config.json` is no configuration"),
        (wrong_info, "`beta` is -1"),
        (another_base, "was trained on `/models/other`, which is not the served model `.*tiny`, no folder here"),
    ],
)
def test_files_that_are_wrong(base, adapter, tmp_path, change, message):
    change(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        checked(base, [adapter])


def test_a_reward_model_that_does_not_fit(base, adapter, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="up to 256 tokens, but the server takes up to 512"):
        checked(base, [adapter], 512)
    larger = tiny_tokenizer()
    larger.add_tokens(["<more>"])
    served = saved(tmp_path / "larger", larger)
    with pytest.raises(ValueError, match=r"lacks tokens of the served model, such as \['<more>'\]"):
        checked(served, [base])


def test_rewards_that_are_contrasts_belong_to_the_served_weights(base, adapter, tmp_path, tokenizer):
    info = RewardInfo(
        loss={"reference": "base"}, base_weights=weights_fingerprint(tiny_llama(vocab_size=len(tokenizer)))
    )
    info.save(adapter)
    assert checked(base, [adapter]).reference == "base"
    other = tmp_path / "elsewhere" / "tiny"  # the same name, and other weights
    saved(other, tokenizer)
    with torch.no_grad():
        trained = AutoModelForCausalLM.from_pretrained(other)
        trained.model.layers[0].mlp.up_proj.weight.add_(0.1)
    trained.save_pretrained(other)
    with pytest.raises(ValueError, match="contrasts with the model that it was trained from, which is not the served"):
        checked(str(other), [adapter])
    assert checked(str(other), [adapter], reference=None).reference is None


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["plain", "tied"])
def test_the_fingerprint_of_files_is_that_of_the_model(tmp_path, tokenizer, options):
    folder = saved(tmp_path / "model", tokenizer, **options)
    model = _model_of_files(folder, False)
    assert weights_fingerprint(model) == weights_fingerprint(AutoModelForCausalLM.from_pretrained(folder))


# --- `python -m hf_genarm.vllm` ---


def started(monkeypatch, *arguments):
    """The command that the launcher becomes."""
    commands = []
    monkeypatch.setattr(launcher.os, "execv", lambda _, command: commands.append(command))
    monkeypatch.setattr(launcher, "find_spec", lambda _: True)
    monkeypatch.setattr(launcher, "_device", lambda: "cpu")
    for name in (ENVIRONMENT, "PROMETHEUS_MULTIPROC_DIR"):
        monkeypatch.setenv(name, "old")
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
    launcher.main(list(arguments))
    return commands[0][1:]


def test_the_server_is_started_with_guidance(base, adapter, monkeypatch):
    start = ["--model", base, "--max_model_len", "128", "--dtype=float32"]
    server = ["-m", "vllm.entrypoints.openai.api_server", "--model", base, "--max-model-len", "128", "--dtype=float32"]
    middleware = ["--middleware", "hf_genarm.vllm.middleware.KeysInBody"]
    own = ["--logits-processors", "hf_genarm.vllm:GenARM", *middleware]
    config = json.dumps({"genarm": {"reward_models": adapter, "alpha": 0.5}})
    command = started(monkeypatch, *start, "--additional-config", config)
    assert command == [*server, "--additional-config", config, *own]
    assert json.loads(launcher.os.environ[ENVIRONMENT]) == {"reward_models": adapter, "alpha": 0.5}
    dotted = ["--additional-config.genarm.reward_models", adapter, "--additional-config.genarm.alpha=0.5"]
    assert started(monkeypatch, *start, *dotted) == [*server, *dotted, *own]
    assert json.loads(launcher.os.environ[ENVIRONMENT]) == {"reward_models": adapter, "alpha": 0.5}
    assert started(monkeypatch, *start, *dotted, *own[:2]) == [*server, *dotted, *own]
    assert started(monkeypatch, *start, "--logits-processors", "a:B", *dotted)[-5:-2] == [own[0], "a:B", own[1]]


def test_presets_are_names_of_models(base, adapter, monkeypatch):
    config = {
        "reward_models": adapter,
        "presets": {"kind": {"alpha": 2}, "default": {"alpha": 1}, "more": {"alpha": 3}},
    }
    given = ["--model", base, "--additional-config", json.dumps({"genarm": config})]
    command = started(monkeypatch, *given)
    assert command[command.index("--served-model-name") :] == [
        "--served-model-name",
        base,
        f"{base}:kind",
        f"{base}:more",
    ]
    command = started(monkeypatch, *given, "--served-model-name", "a", "b")
    assert command[-5:] == ["--served-model-name", "a", "b", "a:kind", "a:more"]


def test_each_server_has_a_folder_for_metrics_and_those_that_are_gone_leave_none(base, adapter, monkeypatch, tmp_path):
    monkeypatch.setattr(launcher.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    names = ("hf_genarm-metrics-999999999-a", "hf_genarm-metrics-1-a", "hf_genarm-metrics-b")
    for name in names:
        (tmp_path / "tmp" / name).mkdir()
    (tmp_path / "tmp" / "hf_genarm-metrics-999999998-a").symlink_to(tmp_path)
    started(monkeypatch, "--model", base, "--additional-config.genarm.reward_models", adapter)
    own = launcher.os.environ["PROMETHEUS_MULTIPROC_DIR"]
    assert own.startswith(f"{tmp_path}/tmp/hf_genarm-metrics-{launcher.os.getpid()}-")
    left = {x.name for x in (tmp_path / "tmp").iterdir()}
    assert left == {names[1], names[2], "hf_genarm-metrics-999999998-a", own.rpartition("/")[2]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--additional-config.genarm.slots", "1000000000"], "`slots` .* is 1000000000: .* bytes .* are free"),
        (["--additional-config.genarm.reward_memory", "1e3"], "one text of 256 tokens take [0-9,]+ bytes"),
        (["--additional-config.genarm.presets", "{}", "--speculative-config", "{}"], "needs the second model runner"),
        (["--additional-config.genarm.presets", "nowhere.json"], "`presets` .* a file that can be read"),
    ],
)
def test_memory_and_presets_are_checked_before_the_server_is_started(base, adapter, monkeypatch, arguments, message):
    with pytest.raises(ValueError, match=message):
        started(monkeypatch, "--model", base, "--additional-config.genarm.reward_models", adapter, *arguments)


def test_a_served_model_that_is_not_there(base, adapter):
    with pytest.raises(ValueError, match=r"`--model` is `.*tiny-1`, which is no folder here"):
        checked(f"{base}-1", [adapter])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`additional_config` has no object `genarm`"),
        (["--additional-config", "{genarm"], "which is not JSON"),
        (["--additional-config.genarm.reward_model", "x"], "has the key `reward_model`"),
        (["--additional-config.genarm.reward_models", "/nowhere"], "`/nowhere` is no folder here"),
    ],
)
def test_mistakes_are_found_before_the_server_is_started(base, monkeypatch, arguments, message):
    with pytest.raises(ValueError, match=message):
        started(monkeypatch, "--model", base, *arguments)


def test_a_mistake_is_one_line(monkeypatch):
    monkeypatch.setattr(launcher.sys, "argv", ["", "--model", "x", "--additional-config.genarm.alpha", "1"])
    with pytest.raises(SystemExit) as ended:
        launcher.run()
    assert ended.value.code.startswith("hf_genarm.vllm: `reward_models` in `genarm`")
    assert "\n" not in ended.value.code
