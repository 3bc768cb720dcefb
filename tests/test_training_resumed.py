"""Settings that change when a run is resumed: each is applied to what the checkpoint restores."""

import multiprocessing
import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import PROJECT, train_tiny
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR

from fcn import cli
from fcn.checkpoint import last_checkpoint, read_checkpoint
from fcn.errors import ConfigError
from fcn.module import SegmentationModule
from fcn.runs.folder import read_overrides
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import check_steps_left, resumed_config, status
from fcn.training.resumed import ResumedSettings
from train import main, train

EACH = "trainer.log_every_n_steps=1"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, whose rate has gone from 0.01 to 0; biases have twice that."""
    run = tmp_path_factory.mktemp("begun") / "run"
    options = ("scheduler=poly", "optimizer.lr=1e-2", "optimizer.fused=false")
    train_tiny(run, *options, "trainer.max_steps=2", EACH)
    assert in_groups(run, "lr") == [0]
    return run


def go_on(run: Path, folder: Path, *changes: str) -> Path:
    run = Path(shutil.copytree(run, folder / "run"))
    train(resumed_config(run, changes), run, list(changes))
    return run


def rates(run: Path) -> list[float]:
    return read_column(read_metrics(run / "metrics.csv"), "train/lr")[1]


def in_groups(run: Path, name: str) -> list[Any]:
    """The different values of a setting of the optimizer's parameter groups."""
    groups = read_checkpoint(last_checkpoint(run))["optimizer_states"][0]["param_groups"]
    return [value for value, _ in groupby(sorted(group[name] for group in groups))]


@pytest.mark.slow
def test_rates_momentum_decay_and_another_schedule(begun: Path, tmp_path: Path) -> None:
    changes = ["optimizer.lr=1e-4", "optimizer.momentum=0.5", "optimizer.weight_decay=0.3"]
    changes += ["optimizer.nesterov=true", "model.bias_lr_multiplier=3"]
    changes += ["scheduler=none", "scheduler.warmup_steps=3"]
    run = go_on(begun, tmp_path, "trainer.max_steps=4", *changes)
    assert rates(run)[2:] == pytest.approx([1e-4 * 3 / 4, 1e-4])
    assert in_groups(run, "lr") == pytest.approx([1e-4, 3e-4])
    for name, values in (("momentum", [0.5]), ("nesterov", [True]), ("weight_decay", [0, 0.3])):
        assert in_groups(run, name) == values
    cfg = OmegaConf.load(run / "config.yaml")
    assert (cfg.optimizer.lr, cfg.scheduler._target_) == (1e-4, "fcn.schedules.constant")


@pytest.mark.slow
def test_a_finished_schedule_is_extended_in_any_layout(begun: Path, tmp_path: Path) -> None:
    """No step is spent at the rate of 0, which the checkpoint holds.

    A fused optimizer pairs weights and momentum as they lie in memory, which another layout of the
    weights changes.
    """
    changes = ["trainer.max_steps=4", "scheduler.power=2", "optimizer.fused=true"]
    runs = [
        go_on(begun, tmp_path / layout, *changes, f"model.channels_last={layout}")
        for layout in ("true", "false")
    ]
    shares = [(1 - 0 / 2) ** 0.9, (1 - 1 / 2) ** 0.9, (1 - 2 / 4) ** 2, (1 - 3 / 4) ** 2]
    assert rates(runs[0]) == rates(runs[1]) == pytest.approx([1e-2 * share for share in shares])
    one, two = (read_checkpoint(last_checkpoint(run))["state_dict"] for run in runs)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-6)


def halved(optimizer: Optimizer, *, total_steps: float, time_used: Callable[[], float]) -> StepLR:
    """A schedule of a user's own, with the documented signature. Its state holds its rates."""
    return StepLR(optimizer, 1, 0.5)


@pytest.mark.slow
def test_a_schedule_of_ones_own(tmp_path: Path) -> None:
    own = f"scheduler._target_={__name__}.halved"
    train_tiny(tmp_path / "first", own, "~scheduler.warmup_steps", "trainer.max_steps=1", EACH)
    for change in ("optimizer.lr=1", "optimizer.momentum=0.5", "scheduler=poly"):
        with pytest.raises(ConfigError, match=r"a resumed run keeps"):
            resumed_config(tmp_path / "first", [own, change])
    run = go_on(tmp_path / "first", tmp_path, own, "trainer.max_steps=3")
    assert rates(run) == pytest.approx([1e-3, 1e-3 / 2, 1e-3 / 4])


@pytest.mark.slow
def test_without_the_average(tmp_path: Path) -> None:
    """The run goes on from its own weights."""
    options = ["callbacks=ema", "callbacks.ema.decay=0.999", "trainer.val_check_interval=9"]
    train_tiny(tmp_path / "first", *options, "trainer.max_steps=2", "optimizer.lr=1e-2")
    before = read_checkpoint(last_checkpoint(tmp_path / "first"))
    changes = ["callbacks.ema=null", "trainer.max_steps=3", "optimizer.lr=1e-20"]
    run = go_on(tmp_path / "first", tmp_path, *changes, "optimizer.momentum=0")
    after = read_checkpoint(last_checkpoint(run))["state_dict"]
    average, live = before["state_dict"], before["current_model_state"]
    assert not all(torch.equal(average[name], live[name]) for name in live)
    for name in live:
        torch.testing.assert_close(after[name], live[name], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_adamw_fused_or_not_and_several_sessions(tmp_path: Path) -> None:
    """A run that another device has begun can go on where a fused optimizer would not clip."""
    first, second = tmp_path / "first", tmp_path / "again" / "run"
    train_tiny(first, "optimizer=adamw", "trainer.max_steps=1", EACH)
    assert in_groups(first, "fused") == [True]
    changes = ["optimizer.fused=false", "optimizer.betas=[0.8,0.9]", "trainer.max_steps=2"]
    run = go_on(first, tmp_path, f"resume={tmp_path / 'run'}", *changes)
    assert (in_groups(run, "fused"), in_groups(run, "betas")) == ([False], [(0.8, 0.9)])
    changes = ["trainer.max_steps=3", "optimizer.fused=auto"]
    go_on(run, second.parent, f"resume={second}", *changes)
    assert (in_groups(second, "fused"), in_groups(second, "betas")) == ([True], [(0.8, 0.9)])
    assert read_overrides(second)[1] == ["optimizer.betas=[0.8,0.9]", *changes]
    cfg = OmegaConf.load(second / "config.yaml")
    assert (cfg.trainer.max_steps, cfg.resume) == (3, None)


def test_no_steps_left_in_time(begun: Path, tmp_path: Path) -> None:
    """A time has ended this run, not a number of steps."""
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    cfg: Any = OmegaConf.load(run / "config.yaml")

    def check(*changes: str, step: int = 2) -> None:
        check_steps_left(run, resumed_config(run, changes), step)

    cfg.trainer.update({"max_steps": -1, "max_time": "00:00:01:00"})
    OmegaConf.save(cfg, run / "config.yaml")
    for change in ("optimizer.lr=1e-4", "trainer.max_steps=9"):
        with pytest.raises(ConfigError, match=r"has finished at step 2\. .* trainer\.max_time or"):
            check(change)
    check()
    for change in ("trainer.max_time=00:00:02:00", "callbacks.panels=null"):
        check(change, "optimizer.lr=1e-4")
    (run / "summary.json").unlink()  # it was killed
    check("optimizer.lr=1e-4")
    shutil.copy(begun / "summary.json", run)
    cfg.trainer.max_steps = 2
    OmegaConf.save(cfg, run / "config.yaml")  # steps have ended it, and last.ckpt is lost
    check("trainer.max_steps=9", step=1)
    check("data.eval_batch_size=2")  # the advice where the last validation took too much memory
    with pytest.raises(ConfigError, match=r"no steps are left: set trainer\.max_steps above 2"):
        check("data.eval_batch_size=2", "optimizer.lr=1e-4")


@pytest.mark.slow
def test_a_crash_after_a_finished_run_went_on(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without changes it ends at once. After a crash, `resume=auto` and sweeps know of it."""
    others = set(multiprocessing.active_children())
    run = go_on(begun, tmp_path, "data.num_workers=1")
    assert set(multiprocessing.active_children()) <= others  # the loader's process has ended
    assert (rates(run), status(run)) == (rates(begun), "finished")
    monkeypatch.setattr(SegmentationModule, "training_step", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        train(resumed_config(run, ["trainer.max_steps=4"]), run)
    assert status(run) == "unfinished"


def test_state_of_a_parameter_group_is_kept() -> None:
    """Schedule-free optimizers and Prodigy, for example, count steps there."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.param_groups[0] |= {"lr_multiplier": 1, "k": 0}
    trainer: Any = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[])
    settings = ResumedSettings()
    settings.on_fit_start(trainer, SimpleNamespace(make_optimizer=partial(SGD, momentum=0.5)))
    optimizer.param_groups[0] |= {"lr": 0.3, "momentum": 0.9, "k": 7}  # from the checkpoint
    settings.on_train_start(trainer, None)
    group = optimizer.param_groups[0]
    assert (group["k"], group["lr"], group["momentum"]) == (7, 0.1, 0)


@pytest.mark.slow
def test_settings_that_only_the_run_has(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra's default configuration lacks them, through which the command line goes."""
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    cfg: Any = OmegaConf.load(run / "config.yaml")
    cfg.callbacks.ema = {"_target_": "fcn.training.ema.AveragedWeights", "decay": 0.9}
    OmegaConf.save(cfg, run / "config.yaml")
    recorded = MagicMock(return_value={})

    def command(changes: str) -> tuple[Any, list[str]]:
        script = f"--config-path={PROJECT / 'conf'}"
        monkeypatch.setattr(sys, "argv", ["train.py", script, f"resume={run}", *changes.split()])
        try:
            cli.run(main)
        finally:
            HydraConfig.instance().cfg = None
        cfg, _, overrides = recorded.call_args.args
        return cfg, overrides

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.train", recorded)
    changes = "callbacks.ema.decay=0.5 scheduler.power=2 optimizer.lr=0.5 seed=0"
    cfg, overrides = command(changes)
    assert overrides == changes.split()
    assert (cfg.callbacks.ema.decay, cfg.scheduler.power, cfg.optimizer.lr) == (0.5, 2, 0.5)
    cfg, _ = command("callbacks.ema=null scheduler=cosine ++trainer.new=3")
    assert (cfg.callbacks.ema, cfg.trainer.new) == (None, 3)
    assert cfg.scheduler._target_ == "fcn.schedules.cosine"
    for wrong, message in (
        ("callbacks.ema.deca=0.5", "callbacks.ema has no such setting"),
        ("-m optimizer.lr=1,2", "a sweep cannot go on with one run"),
    ):
        with pytest.raises(SystemExit):
            command(wrong)
        assert message in capsys.readouterr().err
    assert recorded.call_count == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=1e-4", r"^no steps are left: set trainer\.max_steps above 2$"),
        ("trainer.max_steps=1", r"^trainer\.max_steps=1: the run is at step 2 already$"),
        ("optimizer._target_=torch.optim.AdamW", r"optimizer\._target_=torch\.optim\.AdamW: a res"),
        ("+optimizer.amsgrad=true", r"optimizer\.amsgrad=true: a resumed run keeps"),
        ("model.freeze_stages=2", r"model\.freeze_stages=2: .* which was 0\. .*model\.weights="),
        ("model.weights=other.pth", r"model\.weights=other\.pth: a resumed run keeps"),
        ("trainer.accumulate_grad_batches=2", r"trainer\.accumulate_grad_batches=2: .* was 1"),
        ("data.dataset.train_length=7", r"data\.dataset\.train_length=7: .* which was 10"),
    ],
)
def test_what_must_not_change(begun: Path, tmp_path: Path, change: str, message: str) -> None:
    """config.yaml does not claim what never happened."""
    with pytest.raises(ConfigError, match=message) as error:
        go_on(begun, tmp_path, change)
    assert len(str(error.value).splitlines()) == 1
    for name in ("config.yaml", "metrics.csv", "overrides.yaml"):  # all is as it was
        assert (tmp_path / "run" / name).read_text() == (begun / name).read_text()
