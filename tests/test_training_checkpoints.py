"""Checkpoints of a run: whole after a kill, of old versions, and what they may not say."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import fcn.module
from fcn.checkpoint import best_checkpoint, last_checkpoint, read_checkpoint
from fcn.errors import WriteError
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import resumed_config
from fcn.training.checkpoints import AtomicCheckpointIO, BestCheckpoint
from fcn.training.clock import Clock
from train import train


def test_limit_of_a_quota(tmp_path: Path) -> None:
    """As a full disk, on any machine: the system refuses a file of more than so many bytes."""
    resource = pytest.importorskip("resource")
    saver, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    saver.save_checkpoint({"step": 1}, path)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        values = {"a": [{"b": torch.zeros(500_000)}], "c": (torch.zeros(250_000).double(), 1)}
        why = r"last\.ckpt cannot be written: File too large.* 4\.0 MB"
        with pytest.raises(WriteError, match=why):
            saver.save_checkpoint(values, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [*tmp_path.iterdir()] == [path]


def test_a_state_that_could_not_be_read_again(tmp_path: Path) -> None:
    """A user's callback may keep anything, and no reader of checkpoints may run code."""
    saver, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    saver.save_checkpoint({"step": 1}, path)
    before = torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8)  # can be read
    for state, why in (
        ({"best": np.float64(0.5)}, r"it holds numpy\..*scalar, .*"),
        ({"a": before, "best": np.float64(0.5)}, r"it holds numpy\..*scalar, .*"),
        ({"best": bytearray(b"abc")}, "it holds a bytearray"),
    ):
        with pytest.raises(WriteError, match=f"{why}.* a callback of your own"):
            saver.save_checkpoint({"callbacks": {"Mine": state}}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [*tmp_path.iterdir()] == [path]
    saver.save_checkpoint({"callbacks": {"Mine": {"seen": torch.eye(2).to_sparse()}}}, path)
    seen = torch.load(path, weights_only=True)["callbacks"]["Mine"]["seen"]
    assert torch.equal(seen.to_dense(), torch.eye(2))


def test_a_checkpoint_does_not_say_what_to_delete(tmp_path: Path) -> None:
    """Lightning deletes the best checkpoint before, by the name that a resumed one has for it."""
    best = BestCheckpoint()
    best.dirpath = str(tmp_path / "checkpoints")  # as `setup` has it
    hostile = str(tmp_path / "checkpoints" / ".." / ".." / "thesis.tex")
    state = BestCheckpoint().state_dict() | {"best_model_score": torch.tensor(0.1)}
    names = ("best_model_path", "kth_best_model_path", "last_model_path")
    best.load_state_dict(
        state | {"best_k_models": {hostile: torch.tensor(0.1)}} | dict.fromkeys(names, hostile)
    )
    assert [*best.best_k_models] == [str(best_checkpoint(tmp_path))]
    assert hostile not in map(str, vars(best).values())


@pytest.mark.slow
def test_an_old_run_goes_on(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its best score, its statistics of the loss, and the seconds that it has trained."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for path in run.glob("checkpoints/*.ckpt"):  # in the form of commit 33324f3
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["callbacks"]["LastCheckpoint"]["seconds"] = 1000.0
        del checkpoint["callbacks"]["Timer"]  # was there only where time was limited
        torch.save(checkpoint, path)
    cfg = OmegaConf.load(run / "config.yaml")
    old = {"half_life": 50, "window": 100, "average_decay": None}
    cfg.callbacks = old | {"checkpoint_every_n_steps": 500, "panel_images": 0}
    OmegaConf.save(cfg, run / "config.yaml")

    real = fcn.module.segmentation_scores
    monkeypatch.setattr(fcn.module, "segmentation_scores", lambda c: real(c) | {"miou": 0.0})
    best, before = best_checkpoint(run).read_bytes(), read_metrics(run / "metrics.csv")
    summary = train(resumed_config(run, ["trainer.max_steps=5"]), run)
    assert summary["steps"] == 5
    assert summary["seconds"] > 1000
    assert best_checkpoint(run).read_bytes() == best  # a worse one does not replace it
    rows = read_metrics(run / "metrics.csv")
    assert rows[:3] == before[:3]
    losses = read_column(rows, "train/loss")[1]
    assert float(rows[-1]["train/loss_mean"]) == pytest.approx(sum(losses) / 5)
    state = read_checkpoint(last_checkpoint(run))["callbacks"]
    assert any(
        key.startswith("BestCheckpoint{'monitor': 'val/miou', 'mode': 'max'") for key in state
    )
    assert {"LossStatistics", "LastCheckpoint", "Timer"} <= set(state)


def test_seconds_that_are_left() -> None:
    """Of a run with a limit. Its checkpoint has seconds where earlier versions had them, too."""
    trainer: Any = SimpleNamespace()
    clock = Clock("00:00:00:09")
    clock.on_load_checkpoint(trainer, trainer, {"callbacks": {"LastCheckpoint": {"seconds": 5.0}}})
    clock.load_state_dict({"time_elapsed": {"train": 6.0}})
    assert (clock.time_elapsed(), clock.time_remaining()) == (6, 3)


def test_a_checkpoint_calls_nothing(finished_run: Path) -> None:
    """Its settings are plain values: where config.yaml has a `_target_`, there is only a name."""
    config = torch.load(last_checkpoint(finished_run), weights_only=True)["config"]
    assert "_target_" not in str(config)
    assert config["data"]["dataset"]["class"] == "fcn.datasets.shapes.Shapes"
    assert config["image_type"] is None  # as these images are no files
