"""Settings that change when a run is resumed: each is applied to what the checkpoint restores."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import train_tiny
from omegaconf import OmegaConf

from fcn.checkpoint import last_checkpoint, read_checkpoint
from fcn.errors import ConfigError
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import resumed_config
from train import train

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


def test_schedule_warm_up_and_length(begun: Path, tmp_path: Path) -> None:
    changes = ["scheduler=poly", "scheduler.power=2", "scheduler.warmup_steps=3"]
    run = go_on(begun, tmp_path, "trainer.max_steps=5", *changes)
    expected = [1e-2, 1e-2, 1e-2 * 3 / 4, 1e-2, 1e-2 * (1 - 1 / 2) ** 2]
    assert rates(run) == pytest.approx(expected)
    assert OmegaConf.load(run / "config.yaml").scheduler._target_ == "fcn.schedules.poly"


def test_a_finished_schedule_is_extended(tmp_path: Path) -> None:
    """No step is spent at the rate of 0, which the checkpoint holds."""
    train_tiny(tmp_path / "first", "scheduler=poly", "trainer.max_steps=2", EACH)
    assert {group["lr"] for group in groups(tmp_path / "first")} == {0.0}
    run = go_on(tmp_path / "first", tmp_path, "trainer.max_steps=4")
    shares = [0, 1 / 2, 2 / 4, 3 / 4]
    assert rates(run) == pytest.approx([1e-3 * (1 - share) ** 0.9 for share in shares])


@pytest.mark.slow
def test_adamw(tmp_path: Path) -> None:
    train_tiny(tmp_path / "first", "optimizer=adamw", "trainer.max_steps=1", EACH)
    run = go_on(tmp_path / "first", tmp_path, "trainer.max_steps=2", "optimizer.betas=[0.8,0.9]")
    assert {tuple(group["betas"]) for group in groups(run)} == {(0.8, 0.9)}


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
    ],
)
def test_what_must_not_change(begun: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        go_on(begun, tmp_path, "trainer.max_steps=4", change)
    assert len(str(error.value).splitlines()) == 1
    for name in ("config.yaml", "metrics.csv", "overrides.yaml"):  # all is as it was
        assert (tmp_path / "run" / name).read_text() == (begun / name).read_text()
