"""Settings that change when a run is resumed: each is applied to what the checkpoint restores."""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import check_steps_left, resumed_config, status
from fcn.training.resumed import ResumedSettings
from train import main, train

EACH = "trainer.log_every_n_steps=1"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, at a rate of 0.01 and with biases at twice that."""
    run = tmp_path_factory.mktemp("begun") / "run"
    train_tiny(run, "optimizer.lr=1e-2", "trainer.max_steps=2", EACH)
    return run


def go_on(run: Path, folder: Path, *changes: str) -> Path:
    run = Path(shutil.copytree(run, folder / "run"))
    train(resumed_config(run, changes), run, list(changes))
    return run


def rates(run: Path) -> list[float]:
    return read_column(read_metrics(run / "metrics.csv"), "train/lr")[1]


def groups(run: Path) -> list[dict[str, Any]]:
    return read_checkpoint(last_checkpoint(run))["optimizer_states"][0]["param_groups"]


@pytest.mark.slow
def test_rates_momentum_and_decay(begun: Path, tmp_path: Path) -> None:
    changes = ["optimizer.lr=1e-4", "optimizer.momentum=0.5", "optimizer.weight_decay=0.3"]
    changes += ["optimizer.nesterov=true", "model.bias_lr_multiplier=3"]
    run = go_on(begun, tmp_path, "trainer.max_steps=4", *changes)
    assert rates(run) == [1e-2, 1e-2, 1e-4, 1e-4]
    assert {group["momentum"] for group in groups(run)} == {0.5}
    assert {group["nesterov"] for group in groups(run)} == {True}
    assert {group["weight_decay"] for group in groups(run)} == {0.3, 0.0}
    assert sorted({group["lr"] for group in groups(run)}) == pytest.approx([1e-4, 3e-4])
    assert OmegaConf.load(run / "config.yaml").optimizer.lr == 1e-4


@pytest.mark.slow
def test_momentum_follows_another_layout(begun: Path, tmp_path: Path) -> None:
    """A fused optimizer pairs weights and momentum as they lie in memory."""
    changes = ["trainer.max_steps=4", "optimizer.fused=true"]
    runs = [
        go_on(begun, tmp_path / layout, *changes, f"model.channels_last={layout}")
        for layout in ("true", "false")
    ]
    one, two = (read_checkpoint(last_checkpoint(run))["state_dict"] for run in runs)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_schedule_warm_up_and_length(begun: Path, tmp_path: Path) -> None:
    changes = ["scheduler=poly", "scheduler.power=2", "scheduler.warmup_steps=3"]
    run = go_on(begun, tmp_path, "trainer.max_steps=5", *changes)
    expected = [1e-2, 1e-2, 1e-2 * 3 / 4, 1e-2, 1e-2 * (1 - 1 / 2) ** 2]
    assert rates(run) == pytest.approx(expected)
    assert OmegaConf.load(run / "config.yaml").scheduler._target_ == "fcn.schedules.poly"


@pytest.mark.slow
def test_a_finished_schedule_is_extended(tmp_path: Path) -> None:
    """No step is spent at the rate of 0, which the checkpoint holds."""
    train_tiny(tmp_path / "first", "scheduler=poly", "trainer.max_steps=2", EACH)
    assert {group["lr"] for group in groups(tmp_path / "first")} == {0.0}
    run = go_on(tmp_path / "first", tmp_path, "trainer.max_steps=4")
    shares = [0, 1 / 2, 2 / 4, 3 / 4]
    assert rates(run) == pytest.approx([1e-3 * (1 - share) ** 0.9 for share in shares])


def halved(optimizer: Optimizer, *, total_steps: float, time_used: Callable[[], float]) -> StepLR:
    """A schedule of a user's own, with the documented signature. Its state holds its rates."""
    return StepLR(optimizer, 1, 0.5)


@pytest.mark.slow
def test_a_schedule_of_ones_own(tmp_path: Path) -> None:
    own = f"scheduler._target_={__name__}.halved"
    train_tiny(tmp_path / "first", own, "~scheduler.warmup_steps", "trainer.max_steps=2", EACH)
    for change in ("optimizer.lr=1", "optimizer.momentum=0.5", "scheduler=poly"):
        with pytest.raises(ConfigError, match=r"a resumed run keeps"):
            resumed_config(tmp_path / "first", [own, change])
    run = go_on(tmp_path / "first", tmp_path, own, "trainer.max_steps=4")
    assert rates(run) == pytest.approx([1e-3, 1e-3 / 2, 1e-3 / 4, 1e-3 / 8])


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=1e-4", r"^no steps are left: set trainer\.max_steps above 2$"),
        ("data.jitter=0.5", r"^no steps are left: set trainer\.max_steps above 2$"),
        ("trainer.max_steps=1", r"^trainer\.max_steps=1: the run is at step 2 already$"),
    ],
)
def test_no_steps_left(begun: Path, tmp_path: Path, change: str, message: str) -> None:
    """config.yaml does not claim what never happened."""
    with pytest.raises(ConfigError, match=message):
        go_on(begun, tmp_path, change)
    assert (tmp_path / "run" / "config.yaml").read_text() == (begun / "config.yaml").read_text()


def test_no_steps_left_in_time(begun: Path, tmp_path: Path) -> None:
    """A time has ended this run, not a number of steps."""
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    cfg: Any = OmegaConf.load(run / "config.yaml")
    cfg.trainer.update({"max_steps": -1, "max_time": "00:00:01:00"})
    OmegaConf.save(cfg, run / "config.yaml")
    for change in ("optimizer.lr=1e-4", "trainer.max_steps=9"):
        with pytest.raises(ConfigError, match=r"has finished at step 2\. .* trainer\.max_time or"):
            check_steps_left(run, resumed_config(run, [change]), 2)
    check_steps_left(run, resumed_config(run, []), 2)
    for change in ("trainer.max_time=00:00:02:00", "callbacks.panels=null"):
        check_steps_left(run, resumed_config(run, [change, "optimizer.lr=1e-4"]), 2)
    cfg.trainer.max_steps = 2
    OmegaConf.save(cfg, run / "config.yaml")  # steps have ended it, and last.ckpt is lost
    check_steps_left(run, resumed_config(run, ["trainer.max_steps=9"]), 1)
    cfg.trainer.max_steps = -1
    OmegaConf.save(cfg, run / "config.yaml")
    (run / "summary.json").unlink()  # it was killed
    check_steps_left(run, resumed_config(run, ["optimizer.lr=1e-4"]), 2)


@pytest.mark.slow
def test_a_crash_after_a_finished_run_went_on(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `resume=auto` and sweeps would take it for finished."""
    assert status(begun) == "finished"
    monkeypatch.setattr(SegmentationModule, "training_step", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        go_on(begun, tmp_path, "trainer.max_steps=4")
    assert status(tmp_path / "run") == "unfinished"


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


def test_settings_that_only_the_run_has(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hydra's default configuration lacks them, through which the command line goes."""
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    cfg: Any = OmegaConf.load(run / "config.yaml")
    cfg.callbacks.ema = {"_target_": "fcn.training.ema.AveragedWeights", "decay": 0.9}
    cfg.scheduler = OmegaConf.load(PROJECT / "conf" / "scheduler" / "poly.yaml")
    OmegaConf.save(cfg, run / "config.yaml")
    seen: list[tuple[Any, list[str]]] = []

    def record(cfg: Any, run: Path, overrides: list[str]) -> dict[str, Any]:
        seen.append((cfg, overrides))
        return {}

    def command(*arguments: str) -> None:
        script = f"--config-path={PROJECT / 'conf'}"
        monkeypatch.setattr(sys, "argv", ["train.py", script, *arguments])
        try:
            cli.run(main)
        finally:
            HydraConfig.instance().cfg = None

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.train", record)
    changes = ["callbacks.ema.decay=0.5", "scheduler.power=2", "optimizer.lr=0.5", "seed=0"]
    command(f"resume={run}", *changes)
    ((cfg, overrides),) = seen
    assert overrides == changes
    assert (cfg.callbacks.ema.decay, cfg.scheduler.power, cfg.optimizer.lr) == (0.5, 2, 0.5)
    command(f"resume={run}", "callbacks.ema=null", "scheduler=cosine", "++trainer.new=3")
    assert seen[1][0].callbacks.ema is None
    assert seen[1][0].scheduler._target_ == "fcn.schedules.cosine"
    assert seen[1][0].trainer.new == 3
    for wrong, message in (
        (["callbacks.ema.deca=0.5"], "callbacks.ema has no such setting"),
        (["-m", "optimizer.lr=1,2"], "a sweep cannot go on with one run"),
    ):
        with pytest.raises(SystemExit):
            command(f"resume={run}", *wrong)
        assert message in capsys.readouterr().err
    assert len(seen) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_finished_run_without_changes(begun: Path, tmp_path: Path) -> None:
    run = go_on(begun, tmp_path)
    train(resumed_config(run, ["data.num_workers=1"]), run)
    assert rates(run) == rates(begun)


@pytest.mark.slow
def test_adamw(tmp_path: Path) -> None:
    train_tiny(tmp_path / "first", "optimizer=adamw", "trainer.max_steps=1", EACH)
    run = go_on(tmp_path / "first", tmp_path, "trainer.max_steps=2", "optimizer.betas=[0.8,0.9]")
    assert {tuple(group["betas"]) for group in groups(run)} == {(0.8, 0.9)}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fused(optimizer: str, tmp_path: Path) -> None:
    """A run that another device has begun can go on where a fused optimizer would not clip."""
    train_tiny(tmp_path / "first", f"optimizer={optimizer}", "trainer.max_steps=1", EACH)
    assert {group["fused"] for group in groups(tmp_path / "first")} == {True}
    run = go_on(tmp_path / "first", tmp_path, "trainer.max_steps=2", "optimizer.fused=false")
    assert {group["fused"] for group in groups(run)} == {False}
    again = go_on(run, tmp_path / "again", "trainer.max_steps=3", "optimizer.fused=auto")
    assert {group["fused"] for group in groups(again)} == {True}


@pytest.mark.slow
def test_patience_of_early_stopping(tmp_path: Path) -> None:
    options = ["callbacks=early_stopping", "callbacks.early_stopping.min_delta=1"]  # never better
    options += ["callbacks.early_stopping.patience=2", "trainer.val_check_interval=1"]
    first = tmp_path / "first"
    assert train_tiny(first, *options, "trainer.max_steps=100", EACH)["steps"] == 3
    run = go_on(first, tmp_path, "callbacks.early_stopping.patience=4")
    assert len(rates(run)) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer._target_=torch.optim.AdamW", r"optimizer\._target_=torch\.optim\.AdamW: a res"),
        ("+optimizer.amsgrad=true", r"optimizer\.amsgrad=True: a resumed run keeps"),
        ("model.freeze_stages=2", r"model\.freeze_stages=2: .* which was 0\. .*model\.weights="),
        ("model.pooling=avg", r"model\.pooling=avg: a resumed run keeps"),
        ("model.weights=other.pth", r"model\.weights=other\.pth: a resumed run keeps"),
        ("trainer.accumulate_grad_batches=2", r"trainer\.accumulate_grad_batches=2: .* was 1"),
        ("seed=3", "seed=3: a resumed run keeps this setting, which was 0"),
        ("model.stride=8", r"model\.stride=8: .* which was 32"),
        ("data.dataset.train_length=7", r"data\.dataset\.train_length=7: .* which was 10"),
    ],
)
def test_what_must_not_change(begun: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        go_on(begun, tmp_path, "trainer.max_steps=4", change)
    assert len(str(error.value).splitlines()) == 1
    for name in ("config.yaml", "metrics.csv", "overrides.yaml"):  # all is as it was
        assert (tmp_path / "run" / name).read_text() == (begun / name).read_text()
