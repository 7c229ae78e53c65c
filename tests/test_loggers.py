"""What `report_to` sends to the loggers that TRL users have, read back from them."""

import pytest
from datasets import Dataset
from helpers import from_trackio
from pairs import STANDARD

pytestmark = pytest.mark.slow


def from_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    return {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}


def from_wandb(folder):
    import wandb

    assert wandb.run is not None
    kept = dict(wandb.run.summary)
    wandb.finish()
    return kept


@pytest.mark.parametrize("read", [from_tensorboard, from_trackio, from_wandb])
def test_every_metric_reaches_the_logger(make_trainer, tmp_path, monkeypatch, read):
    folder, name = tmp_path / "logs", read.__name__.removeprefix("from_")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    pairs = Dataset.from_dict(STANDARD)
    trainer = make_trainer(eval_dataset=pairs, report_to=name, eval_strategy="epoch")
    trainer.train()
    kept = read(folder)
    measured = next(logs for logs in reversed(trainer.state.log_history) if "eval_loss" in logs)
    trained = next(logs for logs in reversed(trainer.state.log_history) if "margin" in logs)
    expected = {f"eval/{key[5:]}": value for key, value in measured.items() if key.startswith("eval_")}
    expected |= {f"train/{key}": trained[key] for key in ("loss", "accuracy", "margin", "mean_reward")}
    assert {"eval/pair_accuracy", "eval/gain_over_shorter", "eval/margin"} < expected.keys()
    assert {key: kept[key] for key in expected} == pytest.approx(expected, rel=1e-5)
