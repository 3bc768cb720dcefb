"""Callbacks and loggers are entries of the configuration: any class, none of our code."""

import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import TINY, compose_config, train_tiny
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

import fcn.module
from fcn.checkpoint import last_checkpoint, read_checkpoint
from fcn.errors import ConfigError
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import resumed_config
from train import train


class Own(Callback):
    """A user's callback: it counts steps, and keeps its count in checkpoints."""

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


@pytest.fixture(autouse=True)
def own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's code can be imported as `mine`."""
    module = ModuleType("mine")
    module.Own = Own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)


def scores(monkeypatch: pytest.MonkeyPatch, *mious: float) -> None:
    """Each validation gets the next mean IoU."""
    remaining, real = iter(mious), fcn.module.segmentation_scores
    monkeypatch.setattr(
        fcn.module, "segmentation_scores", lambda c: real(c) | {"miou": next(remaining)}
    )


def validated(run: Path) -> list[int]:
    return read_column(read_metrics(run / "metrics.csv"), "val/miou")[0]


@pytest.mark.slow
def test_early_stopping_and_min_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with the first step that may be its last, which is validated and saved."""
    scores(monkeypatch, 0.5, 0.4, 0.4)
    options = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1"]
    options += ["trainer.max_steps=100", "trainer.val_check_interval=2", "+trainer.min_steps=5"]
    run = tmp_path / "run"
    assert train_tiny(run, *options)["steps"] == 5
    assert validated(run) == [2, 4, 5]
    checkpoint = read_checkpoint(last_checkpoint(run))
    assert checkpoint["global_step"] == 5
    assert checkpoint["callbacks"]["LastCheckpoint"]["validation_due"]  # when it was saved


@pytest.mark.slow
def test_early_stopping_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on counting, the validation that was due counts once, and patience may grow.

    It ends a run in the middle of the endless epoch, after the third validation without a better
    score.
    """
    run, start = tmp_path / "run", fcn.module.SegmentationModule.on_validation_epoch_start
    scores(monkeypatch, 0.3, 0.5, 0.4, 0.45, 0.5, 0.5, 0.4, 0.9)  # two of the fifth step

    def killed(module: fcn.module.SegmentationModule) -> None:
        if module.trainer.global_step == 4:
            raise KeyboardInterrupt
        start(module)

    options = ["callbacks=early_stopping", "trainer.max_steps=100", "trainer.val_check_interval=1"]
    with monkeypatch.context() as patch:
        patch.setattr(fcn.module.SegmentationModule, "on_validation_epoch_start", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train_tiny(run, *options)
    assert validated(run) == [1, 2, 3]
    summary = train(resumed_config(run, []), run)
    assert (summary["status"], summary["steps"], summary["best/step"]) == ("finished", 5, 2)
    assert validated(run) == [1, 2, 3, 4, 5]
    again = resumed_config(run, ["callbacks.early_stopping.patience=4"])
    assert train(again, run)["steps"] == 6


@pytest.mark.slow
def test_callbacks_and_loggers_of_a_user(tmp_path: Path) -> None:
    """They are made, get everything, and stand beside ours, or in their place."""
    nulls = ("panels", "score_table", "wandb_scores", "progress_bar", "best_checkpoint", "curves")
    saver = "{_target_: pytorch_lightning.callbacks.ModelCheckpoint, every_n_train_steps: 2"
    options = [*TINY, "logger=[wandb,tensorboard]", "trainer.max_steps=2"]
    options += [f"callbacks.{name}=null" for name in nulls]
    options += ["+callbacks.own._target_=mine.Own", "+callbacks.own.start=5"]
    cfg, run = (
        compose_config("train", *options, f"+callbacks.saver={saver}, filename: own}}"),
        tmp_path / "run",
    )
    assert list(cfg.logger) == ["wandb", "tensorboard"]
    csv = {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": None}
    cfg.logger = {"one": {**csv, "name": "a", "version": "b"}, "two": {**csv, "name": "c"}}
    train(cfg, run)
    files = {"config.yaml", "overrides.yaml", "metrics.csv", "summary.json", "checkpoints"}
    assert {path.name for path in run.iterdir()} == files | {"a", "c"}
    for folder in (run / "a" / "b", run / "c" / "version_0"):
        assert OmegaConf.load(folder / "hparams.yaml").model.stride == 32
        ours, theirs = read_metrics(run / "metrics.csv"), read_metrics(folder / "metrics.csv")
        for name in ours[0].keys() - {"step"}:
            assert read_column(theirs, name) == read_column(ours, name)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "own.ckpt"}
    assert read_checkpoint(last_checkpoint(run))["callbacks"]["Own"]["count"] == 7

    changes = ["trainer.max_steps=3", "callbacks.own._target_=mine.Own", "logger.one=null"]
    train(resumed_config(run, [*changes, "logger.two=null"]), run)
    assert read_checkpoint(last_checkpoint(run))["callbacks"]["Own"]["count"] == 8


@pytest.fixture(scope="module")
def early_stopping() -> DictConfig:
    return compose_config("train", *TINY, "callbacks=[ema,early_stopping]")


EARLY = "callbacks.early_stopping"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("callbacks.x", {"_target_": "builtins.dict"}, r"callbacks\.x: builtins\.dict makes a "),
        ("callbacks.x", {"_target_": "mine.Own", "end": 3}, r"callbacks\.x\.end: Own has no"),
        ("logger.x", {"_target_": "builtins.dict"}, r"logger\.x: builtins\.dict makes a "),
        (
            "callbacks.x",
            {"_target_": "pytorch_lightning.callbacks.Timer"},
            r"callbacks\.x: each run has a timer already; set trainer\.max_time",
        ),
        ("callbacks.ema.decay", 1, r"callbacks\.ema\.decay=1: must be"),
        (
            f"{EARLY}.monitor",
            "val_miou",
            rf"{EARLY}.monitor=val_miou: must be val/loss, val/miou, ",
        ),
        (f"{EARLY}.monitor", "val/iou/cat", rf"{EARLY}.monitor=val/iou/cat: must be"),
        (f"{EARLY}.patience", "two", rf"{EARLY}.patience=two: must be a whole number"),
    ],
)
def test_entries_that_cannot_be(
    key: str, value: Any, message: str, early_stopping: DictConfig, tmp_path: Path
) -> None:
    cfg = early_stopping.copy()
    OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        train(cfg, tmp_path / "run")
    assert len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    """Where its package is missing, one line says what to install."""
    missing = find_spec("tensorboard") is None
    message = r"^logger\.tensorboard: .*pip install[^\n]*$"
    with pytest.raises(ConfigError, match=message) if missing else nullcontext():
        train_tiny(tmp_path / "run", "logger=tensorboard", "trainer.max_steps=1")
    assert bool(list(tmp_path.glob("run/tensorboard/events.*"))) != missing
    assert bool(list(tmp_path.iterdir())) != missing
