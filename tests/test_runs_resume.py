"""Resumed runs: which one is found; their settings, also old ones and those of somebody else.

tests/test_contract.py resumes runs that were stopped, and compares them with `assert_same`.
"""

import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import compose_config
from omegaconf import OmegaConf

from fcn import files
from fcn.checkpoint import last_checkpoint, read_checkpoint
from fcn.errors import ConfigError, Stopped
from fcn.module import SegmentationModule
from fcn.runs.folder import lock_run, write_overrides
from fcn.runs.metrics import read_metrics
from fcn.runs.resume import find_run, resumed_config


def assert_same(run: Path, undisturbed: Path) -> None:
    """Two runs have equal weights at the end, bit by bit, and equal rows of metrics.csv."""
    weights, expected = (
        read_checkpoint(last_checkpoint(folder))["state_dict"] for folder in (run, undisturbed)
    )
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    rows, expected_rows = (read_metrics(folder / "metrics.csv") for folder in (run, undisturbed))
    for row in (*rows, *expected_rows):
        del row["train/images_per_second"]  # the one column that depends on time
    assert rows == expected_rows


@contextmanager
def stopped(step: int, number: signal.Signals) -> Iterator[None]:
    """A signal that comes in the first batch of a training step; the run ends after that step."""
    training_step, sent = SegmentationModule.training_step, []

    def sending(self: SegmentationModule, *arguments: Any) -> Any:
        if self.trainer.global_step == step - 1 and not sent:
            sent.append(number)
            signal.raise_signal(number)
        return training_step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationModule, "training_step", sending)
        with pytest.raises(Stopped, match=f"{number.name} at step {step}$") as stop:
            yield
    assert stop.value.exit_code == 128 + number


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    cfg = compose_config("train", "name=x", "data=shapes", "logger=none")
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


@pytest.fixture
def run(tmp_path: Path, settings: dict[str, Any]) -> Path:
    """A folder with the settings of a run, and nothing else of it."""
    return write_run(tmp_path / "handed", settings)


def write_run(run: Path, settings: dict[str, Any]) -> Path:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return run


def test_settings_that_another_user_keeps_private(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = PermissionError(13, "Permission denied", str(run / "config.yaml"))
    monkeypatch.setattr(OmegaConf, "load", MagicMock(side_effect=private))
    with pytest.raises(ConfigError) as error:
        resumed_config(run, [])
    assert str(error.value) == f"resume={run}: its config.yaml cannot be read: Permission denied"


def test_changes_of_a_resumed_run(run: Path) -> None:
    given = ["trainer.max_steps=5", "data.root='a: b'", "+trainer.min_steps=1"]
    cfg = resumed_config(run, [*given, "resume=x"])
    assert (cfg.trainer.max_steps, cfg.trainer.min_steps) == (5, 1)
    assert (cfg.data.root, cfg.resume) == ("a: b", str(run))
    assert cfg.optimizer == resumed_config(run, []).optimizer
    without = resumed_config(run, ["callbacks.panels=null", "+callbacks.curves=null"]).callbacks
    assert (without.panels, without.curves) == (None, None)
    # A schedule is chosen before its settings are changed.
    cfg = resumed_config(run, ["scheduler.power=3", "scheduler=poly", "trainer.max_steps=8"])
    assert (cfg.scheduler.power, cfg.scheduler._target_) == (3, "fcn.schedules.poly")
    for nothing in ("null", "None"):
        cfg = resumed_config(run, [f"scheduler={nothing}"])
        assert cfg.scheduler._target_ == "fcn.schedules.constant"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer=adamw", "a resumed run keeps its groups"),
        ("experiment=quickstart", "a resumed run keeps its groups"),
        ("callbacks=null", "a resumed run keeps its groups"),
        ("model.stride=null,8", "key=value"),
        ("callbacks.panel_images=3", "has a new name: callbacks.panels.images"),
        ("~trainer.max_steps", "key=value"),
        ("scheduler.power=1", "scheduler has no such setting, only warmup_steps;"),
        ("data.seed=1", "data.seed=1: a resumed run keeps"),
        ("data.limit=3", "data.limit=3: a resumed run keeps"),
        ("data.batch_size=1", "data.batch_size=1: a resumed run keeps"),
        ("data.val_split=train", "data.val_split=train: a resumed run keeps"),
        ("trainer.limit_val_batches=1", "trainer.limit_val_batches=1: a resumed run keeps"),
        ("model.deep_skips=true", r"model\.deep_skips=true: .*, which was false\."),
        ("data.limit=3", r", which was null\."),
        # A run with larger kernels could not begin with these weights.
        (
            "model.skip_kernel=3",
            r"a new run\. If its layers have the same sh.*: model\.weights=",
        ),
    ],
)
def test_changes_that_are_not_possible(run: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resumed_config(run, [change])


def test_no_run_folder(tmp_path: Path) -> None:
    contents = [b"a list", b"- 1\n- 2", b"trainer: [", b"name: \xe9"]  # the last is Latin-1
    for name, content in (("other", b""), *(("config", content) for content in contents)):
        (tmp_path / f"{name}.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=re.escape(f"resume={tmp_path}: ")):
            resumed_config(tmp_path, [])


def test_which_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.05)

    def make(name: str, overrides: list[str], status: str | None = None) -> Path:
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        last_checkpoint(run).touch()
        (run / "overrides.yaml").write_text(json.dumps(overrides))
        if status:
            (run / "summary.json").write_text(json.dumps({"status": status}))
        return run

    def found(command: list[str], *, named: str = "", main: bool = True) -> Path | None:
        new = tmp_path / (named or "2027")
        return find_run(new, [*command, "resume=auto"], named=bool(named), main=main)

    assert found(["a=1"]) is None
    stopped = make("2026-01", ["a=1"], "stopped")
    killed = make("2026-02", ["a=1"])
    assert found(["a=1"]) == killed
    assert found(["a=1"], named="2026-01") == stopped
    assert found(["a=1"], named="2026") is None
    with lock_run(killed):
        assert found(["a=1"]) == stopped
        assert found(["a=1"], main=False) == killed  # another process of the same run
    last_checkpoint(killed).unlink()  # killed before there was a checkpoint
    assert found(["a=1"]) == stopped
    assert found(["a=2"]) is None
    finished = make("2026-03", ["a=1"], "finished")
    assert found(["a=1"]) == stopped
    shutil.rmtree(stopped)
    assert found(["a=1"]) == finished
    make("own", ["b=1"])
    tenth = [make(f"own_{number}", ["b=1"]) for number in range(2, 11)][-1]
    assert found(["b=1"], named="own") == tenth  # and not own_9


CALL = {"_target_": "os.mkdir", "_args_": ["hacked"]}
CSV = {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": "."}


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": CALL},
        {"data": {"dataset": [{"_target_": "evil.make"}]}},
        {"logger": "${oc.create:{x: {_target_: os.mkdir, _args_: [hacked]}}}"},
        {"callbacks": {"mine": {"_target_": "evil.Module"}}},
        {"callbacks": {"mine": {"_target_": "torch.optim.Adam"}}},  # not a callback
        {"callbacks": {"mine": {"_target_": "pytorch_lightning.callbacks.timer.os.mkdir"}}},
        {"scheduler": {"_target_": "torch.optim.Adam"}},
        {"logger": {"csv": CSV | {"save_dir": CALL}}},
    ],
)
def test_resumed_settings_that_call_code_are_refused(
    run: Path, settings: dict[str, Any], change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    write_run(run, settings | change)
    with pytest.raises(ConfigError, match=r"wants to call (.*os\.mkdir|evil\.|torch\.optim\.Adam)"):
        resumed_config(run, [f"resume={run}"])
    assert not Path("hacked").exists()


def test_callbacks_loggers_and_optimizers_of_any_kind_are_resumed(
    run: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own class too, but its module is imported only if the run was started with it."""
    (run.parent / "callbacks_of_a_user.py").write_text(
        "from pytorch_lightning import Callback\nclass Mine(Callback): ...\n"
    )
    monkeypatch.syspath_prepend(run.parent)
    mine, monitor = "callbacks_of_a_user.Mine", "pytorch_lightning.callbacks.LearningRateMonitor"
    added = {
        "callbacks": {"mine": {"_target_": mine}, "lr": {"_target_": monitor}},
        "logger": {"csv": CSV},
        "optimizer": {"_target_": "torch.optim.RMSprop", "_partial_": True, "lr": 1e-3},
    }
    write_run(run, settings | added)
    with pytest.raises(ConfigError, match=rf"say so: callbacks\.mine\._target_={mine}$"):
        resumed_config(run, [])
    assert resumed_config(run, [f"callbacks.mine._target_={mine}"]).callbacks == added["callbacks"]
    assert "callbacks_of_a_user" not in sys.modules
    for more in ([], ["seed=1", f"resume={run}"]):  # at the first start, or when it was resumed
        write_overrides(run, [*more, f"+callbacks.mine._target_={mine}"])
        cfg = resumed_config(run, [])
        assert {name: cfg[name] for name in added} == added


# Callbacks and the logger of a run of commit 33324f3
OLD_CALLBACKS = {"half_life": 7, "window": 90, "checkpoint_every_n_steps": 2, "panel_images": 3}
OLD_LOGGER = {"project": "fcn", "name": "tiny", "group": None, "tags": ["a"], "id": "912eec79"}


def test_settings_of_an_old_run(run: Path, settings: dict[str, Any]) -> None:
    callbacks = OLD_CALLBACKS | {"average_decay": 0.9}
    logger = OLD_LOGGER | {"_target_": "pytorch_lightning.loggers.WandbLogger", "notes": None}
    write_run(run, settings | {"callbacks": callbacks, "logger": logger})
    cfg = resumed_config(run, ["callbacks.panels.images=1", "logger.wandb.notes=old"])
    new = compose_config("train", "name=x", "callbacks=ema", "logger=wandb")
    assert cfg.callbacks.keys() == new.callbacks.keys()
    assert cfg.callbacks.ema == {**new.callbacks.ema, "decay": 0.9}
    assert cfg.callbacks.loss_statistics.half_life == 7
    assert cfg.callbacks.loss_statistics.window == 90
    assert cfg.callbacks.last_checkpoint.every_n_steps == 2
    assert cfg.callbacks.panels.images == 1
    assert cfg.logger.wandb == {**new.logger.wandb, **OLD_LOGGER, "notes": "old"}

    write_run(run, settings | {"callbacks": callbacks | {"average_decay": None}, "logger": {}})
    cfg = resumed_config(run, [])
    assert "ema" not in cfg.callbacks
    assert cfg.logger == {}
