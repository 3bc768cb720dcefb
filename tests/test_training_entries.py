"""Callbacks and loggers are entries of the configuration: any class, none of our code."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import TINY, compose_config, train_tiny
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

import fcn.module
from fcn.checkpoint import last_checkpoint, read_checkpoint
from fcn.errors import ConfigError
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import resumed_config
from train import build_loggers, train


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


class OwnLogger(Logger):
    """A user's logger, with the arguments that TensorBoardLogger has."""

    def __init__(self, save_dir: str, name: str, version: str) -> None:
        super().__init__()
        self.folder, self.rows = Path(save_dir) / name / version, dict[int, dict[str, float]]()
        self.settings: Any = None

    @property
    def name(self) -> str:
        return "own"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.settings = params

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(metrics)


@pytest.fixture(autouse=True)
def own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's code can be imported as `mine`."""
    module = ModuleType("mine")
    module.Own, module.OwnLogger = Own, OwnLogger  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)


def scores(monkeypatch: pytest.MonkeyPatch, *mious: float) -> None:
    """Each validation gets the next mean IoU."""
    remaining, real = iter(mious), fcn.module.segmentation_scores
    monkeypatch.setattr(
        fcn.module, "segmentation_scores", lambda c: real(c) | {"miou": next(remaining)}
    )


def validated(run: Path) -> list[int]:
    return read_column(read_metrics(run / "metrics.csv"), "val/miou")[0]


LONG = ("trainer.max_steps=100", "trainer.val_check_interval=1", "trainer.log_every_n_steps=1")


@pytest.mark.parametrize(
    "options",
    [
        ["callbacks=early_stopping"],
        pytest.param(
            [
                "+callbacks.early_stopping._target_=pytorch_lightning.callbacks.EarlyStopping",
                "+callbacks.early_stopping.monitor=val/miou",
                "+callbacks.early_stopping.mode=max",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_early_stopping(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the endless epoch, after the third validation without a better score."""
    scores(monkeypatch, 0.3, 0.5, 0.4, 0.45, 0.5, 0.9)
    summary = train_tiny(tmp_path / "run", *options, *LONG)
    assert summary["status"] == "finished"
    assert summary["steps"] == 5
    assert summary["best/step"] == 2
    assert validated(tmp_path / "run") == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_early_stopping_waits_for_the_least_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with the first step that may be its last, which is validated and saved."""
    scores(monkeypatch, 0.5, 0.4, 0.4)
    options = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1"]
    options += ["trainer.max_steps=100", "trainer.val_check_interval=3", "+trainer.min_steps=8"]
    run = tmp_path / "run"
    assert train_tiny(run, *options)["steps"] == 8
    assert validated(run) == [3, 6, 8]
    checkpoint = read_checkpoint(last_checkpoint(run))
    assert checkpoint["global_step"] == 8
    assert checkpoint["callbacks"]["LastCheckpoint"]["validation_due"]  # when it was saved


@pytest.mark.slow
def test_early_stopping_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on counting, and the validation that was due is counted once."""
    run, start = tmp_path / "run", fcn.module.SegmentationModule.on_validation_epoch_start
    scores(monkeypatch, 0.3, 0.5, 0.4, 0.45, 0.4, 0.9)

    def killed(module: fcn.module.SegmentationModule) -> None:
        if module.trainer.global_step == 4:
            raise KeyboardInterrupt
        start(module)

    with monkeypatch.context() as patch:
        patch.setattr(fcn.module.SegmentationModule, "on_validation_epoch_start", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train_tiny(run, "callbacks=early_stopping", *LONG)
    assert validated(run) == [1, 2, 3]
    assert train(resumed_config(run, []), run)["steps"] == 5
    assert validated(run) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_own_callback(tmp_path: Path) -> None:
    run, options = tmp_path / "run", ["+callbacks.own._target_=mine.Own", "+callbacks.own.start=5"]
    train_tiny(run, *options)
    assert read_checkpoint(last_checkpoint(run))["callbacks"]["Own"]["count"] == 9
    again = resumed_config(run, ["trainer.max_steps=6", "callbacks.own._target_=mine.Own"])
    train(again, run)
    assert read_checkpoint(last_checkpoint(run))["callbacks"]["Own"]["count"] == 11


@pytest.mark.slow
def test_own_checkpoints(tmp_path: Path) -> None:
    """Lightning's own ModelCheckpoint writes beside ours."""
    options = ["+callbacks.own._target_=pytorch_lightning.callbacks.ModelCheckpoint"]
    options += ["+callbacks.own.every_n_train_steps=4", "+callbacks.own.filename=own"]
    train_tiny(tmp_path / "run", *options)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "own.ckpt"}


@pytest.mark.slow
def test_null_removes_an_entry(tmp_path: Path) -> None:
    names = ("panels", "score_table", "wandb_scores", "progress_bar", "best_checkpoint")
    train_tiny(tmp_path / "run", *(f"callbacks.{name}=null" for name in names))
    assert not (tmp_path / "run" / "panels").exists()
    assert not (tmp_path / "run" / "curves.png").exists()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["+callbacks.mine.decay=3"], r"^callbacks\.mine: this needs a _target_"),
        (["+callbacks.half_life=3"], r"^callbacks\.half_life has .*: callbacks\.loss_statistics"),
        (["+callbacks.panel_images=3"], r"callbacks\.panel_images .* callbacks\.panels\.images"),
        (["+callbacks.x._target_=mine.Other"], r"^callbacks\.x: .*mine\.Other"),
        (
            ["+callbacks.x._target_=builtins.dict"],
            r"^callbacks\.x: builtins\.dict makes no",
        ),
        (
            ["+callbacks.x._target_=mine.Own", "+callbacks.x.end=3"],
            r"callbacks\.x\.end: Own has no",
        ),
        (["callbacks.panels.images=-1"], r"^callbacks\.panels\.images=-1: must be"),
        (["callbacks=ema", "callbacks.ema.decay=1"], r"^callbacks\.ema\.decay=1: must be"),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val_miou"],
            r"^callbacks\.early_stopping\.monitor=val_miou: must be val/loss, val/miou, ",
        ),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/iou/cat"],
            r"monitor=val/iou/cat: must be",
        ),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.patience=two"],
            r"^callbacks\.early_stopping\.patience=two: must be a whole number",
        ),
        (["+logger.project=x"], r"^logger\.project has a new name: logger\.wandb\.project"),
        (["+logger.own.name=x"], r"^logger\.own: this needs a _target_"),
        (["+logger.x._target_=builtins.dict"], r"^logger\.x: builtins\.dict makes no"),
    ],
)
def test_entries_that_cannot_be(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        train_tiny(tmp_path / "run", *options)
    assert len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_own_logger_gets_everything(tmp_path: Path) -> None:
    cfg = compose_config(
        "train",
        *(option for option in TINY if option != "logger=none"),
        "logger=tensorboard",
        "logger.tensorboard._target_=mine.OwnLogger",
        "callbacks.curves=null",
    )
    loggers: list[Any] = []
    real = OwnLogger.__init__

    def note(self: OwnLogger, **options: Any) -> None:
        loggers.append(self)
        real(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OwnLogger, "__init__", note)
        train(cfg, tmp_path / "run")
    (logger,) = loggers
    assert logger.folder == tmp_path / "run" / "tensorboard"
    assert logger.settings["model"]["stride"] == 32
    for row in read_metrics(tmp_path / "run" / "metrics.csv"):
        for name, value in row.items():
            if name != "step" and value:
                torch.testing.assert_close(
                    logger.rows[int(row["step"])][name], float(value), equal_nan=True
                )


def test_several_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose_config("train", "name=x", "logger=[wandb,tensorboard]")
    assert list(cfg.logger) == ["wandb", "tensorboard"]
    cfg.logger.wandb = {"_target_": "mine.OwnLogger", "save_dir": None, "name": "a", "version": "b"}
    cfg.logger.tensorboard._target_ = "mine.OwnLogger"
    csv, *others = build_loggers(cfg, tmp_path, 0)
    assert csv.path == tmp_path / "metrics.csv"  # type: ignore[attr-defined]
    folders = [logger.folder for logger in others]  # type: ignore[attr-defined]
    assert folders == [tmp_path / "a" / "b", tmp_path / "tensorboard"]


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    """Where its package is missing, one line says what to install."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"^logger\.tensorboard: .*pip install") as error:
            train_tiny(tmp_path / "run", "logger=tensorboard")
        assert len(str(error.value).splitlines()) == 1
        assert list(tmp_path.iterdir()) == []
    else:
        train_tiny(tmp_path / "run", "logger=tensorboard")
        assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
