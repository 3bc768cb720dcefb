"""Resumed runs: the same weights and metrics.csv as without a stop; their settings, also old ones
and those of somebody else."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_config, train_tiny
from omegaconf import OmegaConf

from fcn import files
from fcn.checkpoint import last_checkpoint, read_checkpoint
from fcn.errors import ConfigError, Stopped
from fcn.module import SegmentationModule
from fcn.runs.folder import lock_run, write_overrides
from fcn.runs.metrics import read_metrics
from fcn.runs.resume import find_run, resumed_config
from train import train

SETTINGS = (
    "data.dataset.train_length=10",  # epochs end within the run
    "data.dataset.val_length=4",
    "data.scale=[0.7,1.4]",
    "data.jitter=0.2",
    "model=fcn8s",
    "optimizer=adamw",
    "scheduler=poly",
    "trainer.max_steps=12",
    "trainer.val_check_interval=4",
    "trainer.accumulate_grad_batches=2",
    "trainer.log_every_n_steps=1",
    "callbacks=ema",
    "callbacks.ema.decay=0.9",
    "callbacks.last_checkpoint.every_n_steps=3",
    "callbacks.panels.images=1",
    "callbacks.curves=null",
)


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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM between processes")
def test_asked_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tiny(tmp_path / "undisturbed", *SETTINGS)
    run = tmp_path / "run"
    with stopped(4, signal.SIGTERM):  # a validation is due after this step
        train_tiny(run, *SETTINGS, "data.num_workers=1")
    assert f"go on with: python train.py resume={run}" in capsys.readouterr().out
    assert torch.load(last_checkpoint(run), weights_only=True)["global_step"] == 4
    with stopped(10, signal.SIGINT):
        train(resumed_config(run, ["data.num_workers=0"]), run, ["data.num_workers=0"])
    train(resumed_config(run, []), run)

    assert_same(run, tmp_path / "undisturbed")
    steps = [int(row["step"]) for row in read_metrics(run / "metrics.csv")]
    assert steps == list(range(1, 13))


@pytest.fixture(scope="module")
def settings() -> str:
    cfg = compose_config("train", "name=x", "data=shapes", "logger=none")
    return OmegaConf.to_yaml(cfg, resolve=True)


@pytest.fixture
def run(tmp_path: Path, settings: str) -> Path:
    """A folder with the settings of a run, and nothing else of it."""
    folder = tmp_path / "handed"
    folder.mkdir()
    (folder / "config.yaml").write_text(settings)
    return folder


def change_settings(run: Path, change: dict[str, Any]) -> None:
    config: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    (run / "config.yaml").write_text(json.dumps(config | change))  # JSON is YAML


def test_changes_of_a_resumed_run(run: Path) -> None:
    given = ["trainer.max_steps=5", "data.root='a: b'", "+trainer.min_steps=1"]
    cfg = resumed_config(run, [*given, "resume=x"])
    assert (cfg.trainer.max_steps, cfg.trainer.min_steps) == (5, 1)
    assert (cfg.data.root, cfg.resume) == ("a: b", str(run))
    assert cfg.optimizer == resumed_config(run, []).optimizer
    without = resumed_config(run, ["callbacks.panels=null", "+callbacks.curves=null"]).callbacks
    assert (without.panels, without.curves) == (None, None)


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
        ("seed=1,2", "key=value"),
    ],
)
def test_changes_that_are_not_possible(run: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resumed_config(run, [change])


def test_a_schedule_is_chosen_before_its_settings(run: Path) -> None:
    cfg = resumed_config(run, ["scheduler.power=3", "scheduler=poly", "trainer.max_steps=8"])
    assert (cfg.scheduler.power, cfg.scheduler._target_) == (3, "fcn.schedules.poly")
    for nothing in ("null", "None", "none"):
        cfg = resumed_config(run, [f"scheduler={nothing}"])
        assert cfg.scheduler._target_ == "fcn.schedules.constant"


@pytest.mark.parametrize("content", [None, "a list", "- 1\n- 2"])
def test_no_run_folder(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "config.yaml").write_text(content)
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


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": CALL},
        {"data": {"dataset": [{"_target_": "evil.make"}]}},
        {"logger": "${oc.create:{x: {_target_: os.mkdir, _args_: [hacked]}}}"},
        {"callbacks": {"mine": CALL}},
        {"callbacks": {"mine": {"_target_": "evil.Module"}}},
        {"callbacks": {"mine": {"_target_": "torch.optim.Adam"}}},  # not a callback
        {"callbacks": {"mine": {"_target_": "pytorch_lightning.callbacks.timer.os.mkdir"}}},
        {"scheduler": {"_target_": "torch.optim.Adam"}},
        {"logger": {"csv": {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": CALL}}},
    ],
)
def test_resumed_settings_that_call_code_are_refused(
    run: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    change_settings(run, change)
    with pytest.raises(ConfigError, match=r"wants to call (.*os\.mkdir|evil\.|torch\.optim\.Adam)"):
        resumed_config(run, [f"resume={run}"])
    assert not Path("hacked").exists()


def test_own_code_is_resumed_when_it_is_named(run: Path) -> None:
    change_settings(run, {"scheduler": {"_target_": "mine.schedule", "_partial_": True}})
    named = "scheduler._target_=mine.schedule"
    with pytest.raises(ConfigError, match=f"say so: {named}$"):
        resumed_config(run, ["trainer.max_steps=5"])
    assert resumed_config(run, [named]).scheduler._target_ == "mine.schedule"


def test_callbacks_loggers_and_optimizers_of_any_kind_are_resumed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own class too, but its module is imported only if the run was started with it."""
    (run.parent / "callbacks_of_a_user.py").write_text(
        "from pytorch_lightning import Callback\nclass Mine(Callback): ...\n"
    )
    monkeypatch.syspath_prepend(run.parent)
    mine = "callbacks_of_a_user.Mine"
    added = {
        "callbacks": {
            "mine": {"_target_": mine},
            "lr": {"_target_": "pytorch_lightning.callbacks.LearningRateMonitor"},
        },
        "logger": {"csv": {"_target_": "pytorch_lightning.loggers.CSVLogger", "save_dir": "."}},
        "optimizer": {"_target_": "torch.optim.RMSprop", "_partial_": True, "lr": 1e-3},
    }
    change_settings(run, added)
    with pytest.raises(ConfigError, match=rf"say so: callbacks\.mine\._target_={mine}$"):
        resumed_config(run, [])
    assert "callbacks_of_a_user" not in sys.modules
    assert resumed_config(run, [f"callbacks.mine._target_={mine}"]).callbacks == added["callbacks"]
    assert "callbacks_of_a_user" not in sys.modules
    for more in ([], ["seed=1", f"resume={run}"]):  # at the first start, or when it was resumed
        write_overrides(run, [*more, f"+callbacks.mine._target_={mine}"])
        cfg = resumed_config(run, [])
        assert {name: cfg[name] for name in added} == added


# Callbacks and the logger of a run of commit 33324f3
OLD: dict[str, Any] = {
    "callbacks": {
        "half_life": 7,
        "window": 90,
        "average_decay": 0.9,
        "checkpoint_every_n_steps": 2,
        "panel_images": 3,
    },
    "logger": {
        "_target_": "pytorch_lightning.loggers.WandbLogger",
        "project": "fcn",
        "name": "tiny",
        "group": None,
        "tags": ["a"],
        "notes": None,
        "id": "912eec79",
    },
}


def test_settings_of_an_old_run(run: Path) -> None:
    change_settings(run, OLD)
    cfg = resumed_config(run, ["callbacks.panels.images=1", "logger.wandb.notes=old"])
    new = compose_config("train", "name=x", "callbacks=ema", "logger=wandb")
    assert cfg.callbacks.keys() == new.callbacks.keys()
    assert cfg.callbacks.ema == {**new.callbacks.ema, "decay": 0.9}
    assert cfg.callbacks.loss_statistics.half_life == 7
    assert cfg.callbacks.loss_statistics.window == 90
    assert cfg.callbacks.last_checkpoint.every_n_steps == 2
    assert cfg.callbacks.panels.images == 1
    given = {name: value for name, value in OLD["logger"].items() if name != "_target_"}
    assert cfg.logger.wandb == {**new.logger.wandb, **given, "notes": "old"}

    change_settings(run, {"callbacks": OLD["callbacks"] | {"average_decay": None}, "logger": {}})
    cfg = resumed_config(run, [])
    assert "ema" not in cfg.callbacks
    assert cfg.logger == {}
