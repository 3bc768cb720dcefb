"""train.py: what it writes and what it refuses."""

import csv
import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FINISHED, PROJECT, TINY, compose_config, train_tiny
from omegaconf import OmegaConf
from PIL import Image

from evaluate import evaluate
from fcn.checkpoint import last_checkpoint
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError, DataError, WeightsError
from fcn.module import SegmentationModule
from fcn.runs.folder import read_overrides
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import resumed_config
from train import train

TRAIN_NAMES = {
    f"train/{name}" for name in ("loss", "loss_smooth", "loss_mean", "loss_std", "grad_norm", "lr")
} | {"train/images_per_second"}
VAL_NAMES = {f"val/{name}" for name in ("loss", "miou", "pixel_acc", "mean_acc", "fwiou")}
IOU_NAMES = {f"val/iou/{name}" for name in Shapes.classes}
RUN_FILES = {"config.yaml", "overrides.yaml", "metrics.csv", "curves.png", "summary.json"}
RUN_FILES |= {"checkpoints", "panels"}
SMALL = ("data=voc2012", "model.backbone=vgg_tiny", "model.head_width=8", "model.weights=null")


def begin(*arguments: str) -> int:
    """train.py as a script, in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            runpy.run_path(str(PROJECT / "train.py"), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(last_checkpoint(run), weights_only=True)["state_dict"]


def test_run_folder_is_complete(finished_run: Path) -> None:
    assert {path.name for path in finished_run.iterdir()} - {"evaluation"} == RUN_FILES
    checkpoints = {path.name for path in (finished_run / "checkpoints").iterdir()}
    assert checkpoints == {"best.ckpt", "last.ckpt"}
    assert list((finished_run / "panels").iterdir())

    rows = read_metrics(finished_run / "metrics.csv")
    assert set(rows[0]) == {"step"} | TRAIN_NAMES | VAL_NAMES | IOU_NAMES
    summary = json.loads((finished_run / "summary.json").read_text())
    assert VAL_NAMES | IOU_NAMES | {"best/val/miou", "best/step"} <= set(summary)
    for name in VAL_NAMES:
        assert summary[name] == read_column(rows, name)[1][-1]
    assert summary["best/val/miou"] == max(read_column(rows, "val/miou")[1])
    assert summary["status"] == "finished"
    assert summary["steps"] == 4
    assert summary["seconds"] > 0
    assert summary["images_per_second"] > 0
    assert summary["peak_memory_bytes"] > 10**7
    assert summary["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "git_revision" in summary


def test_config_is_resolved(finished_run: Path) -> None:
    text = (finished_run / "config.yaml").read_text()
    assert "${" not in text
    config = OmegaConf.load(finished_run / "config.yaml")
    assert config.data.seed == config.seed == 0
    assert config.name == "tiny"
    assert config.model.head_lr_multiplier == 5
    assert config.scheduler._target_ == "fcn.schedules.poly"
    assert list(OmegaConf.load(finished_run / "overrides.yaml")) == list(FINISHED)


@pytest.mark.slow
def test_seed_decides_a_run(tmp_path: Path, finished_run: Path) -> None:
    torch.manual_seed(99)
    train_tiny(tmp_path / "same", *FINISHED)
    expected = weights(finished_run)
    same = weights(tmp_path / "same")
    assert all(torch.equal(same[name], expected[name]) for name in expected)
    train_tiny(tmp_path / "other", *FINISHED, "seed=1", "trainer.max_steps=2")
    rows, other = (read_metrics(r / "metrics.csv") for r in (finished_run, tmp_path / "other"))
    assert other[1]["train/loss"] != rows[1]["train/loss"]


def test_data_that_is_not_there(tmp_path: Path) -> None:
    cfg = compose_config(
        "train", "name=x", f"data.root={tmp_path / 'no'}", "data.download=false", *SMALL
    )
    with pytest.raises(DataError, match="quickstart") as error:
        train(cfg, tmp_path / "run")
    assert len(str(error.value).splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.heads=3"], "heads"),
        (["data=shapes", "data.batch_size=-1"], "data.batch_size=-1"),
        (["optimizer=sdg"], "Available: adamw, sgd"),
        ([*TINY, "hydra.run.dir=chosen", "optimizer.lr=-1"], "optimizer.lr=-1"),
        (["callbacks.panel_images=3"], "callbacks.panel_images has a new name: callbacks.panels"),
        (["resume=none"], "resume=none: no run folder"),
    ],
)
def test_errors_are_short(
    tmp_path: Path,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert begin(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
    assert len(err.splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert begin("--help") == 0
    text = capsys.readouterr().out
    assert "data: ade20k, camvid" in text
    assert "loaders" not in text.partition("Any setting")[0]  # a part of them, which is no choice
    assert "callbacks: default, early_stopping, ema\n" in text
    assert "logger: none, tensorboard, wandb\n" in text
    assert "sweep:" not in text.partition("Any setting")[0]


@pytest.mark.slow
def test_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [o for o in TINY if not o.startswith(("name=", "model=", "optimizer.", "trainer.max_"))]
    sweep = ["-m", "model=fcn32s,fcn8s", "optimizer.lr=1e-2", "hydra.sweep.dir=sweep"]
    assert begin(*sweep, *tiny, "trainer.max_steps=1") == 0, capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    runs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [run.name for run in runs] == ["0", "1"]
    assert all({path.name for path in run.iterdir()} == RUN_FILES for run in runs)
    with (tmp_path / "sweep" / "sweep.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["fcn32s", "fcn8s"]
    assert {float(row["optimizer.lr"]) for row in rows} == {1e-2}
    assert {row["status"] for row in rows} == {"finished"}
    assert all(0 <= float(row["val/miou"]) <= 1 for row in rows)
    strides = [OmegaConf.load(run / "config.yaml").model.stride for run in runs]
    assert strides == [32, 8]


@pytest.mark.slow
def test_optuna(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trials get the best val/miou of their runs; a trial that crashes does not end the sweep.

    Where the plugin is missing, Hydra says which sweepers there are.
    """
    monkeypatch.chdir(tmp_path)
    tiny = [o for o in TINY if not o.startswith(("optimizer.", "trainer.max_"))]
    sweep = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize"]
    sweep += ["hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1"]
    sweep += ["hydra.sweep.dir=sweep", "optimizer.lr=choice(1e-2,-1)", "trainer.max_steps=2"]
    assert begin(*sweep, *tiny, "callbacks.curves=null") == 1  # a job has crashed
    if find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        assert "Available: basic" in capsys.readouterr().err
        return
    with (tmp_path / "sweep" / "sweep.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"finished", "crashed"}
    results = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert results.best_params == {"optimizer.lr": 1e-2}
    scores = [float(row["best/val/miou"]) for row in rows if row["status"] == "finished"]
    assert results.best_value == max(scores)


@pytest.mark.slow
def test_sweep_goes_on_after_a_job_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert begin("-m", "data=shapes", "data.batch_size=-1,-2", "hydra.sweep.dir=sweep") == 1
    err = capsys.readouterr().err
    for size in (-1, -2):
        assert f"error: data.batch_size={size}: must be" in err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.slow
def test_finer_stride_starts_from_a_coarser_checkpoint(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = tmp_path / "coarse.ckpt"
    coarse.write_bytes(last_checkpoint(finished_run).read_bytes())
    run = tmp_path / "fcn16s"
    options = ["model=fcn16s", f"model.weights={coarse}", "optimizer.lr=1e-6"]
    options += ["model.backbone=vgg_tiny", "model.head_width=8", "model.head_kernel=3"]
    options += ["trainer.max_steps=2"]
    options += ["model.head_lr_multiplier=10", "trainer.val_check_interval=1"]
    train_tiny(run, *options)
    before, after = weights(finished_run), weights(run)
    for name in ("network.stages.0.0.weight", "network.conv6.weight", "network.score.weight"):
        torch.testing.assert_close(after[name], before[name], atol=1e-4, rtol=0)
    checkpoint = torch.load(last_checkpoint(run), weights_only=True)
    fresh = {"skips.pool4", "upsample.to_pool4", "upsample.to_image_16"}
    assert set(checkpoint["fresh_layers"]) == fresh

    coarse.unlink()  # not needed any more: not for use, and not to go on
    module = SegmentationModule.load_from_checkpoint(last_checkpoint(run))
    assert module.network.stride == 16
    summary = train(resumed_config(run, ["trainer.max_steps=3"]), run)
    assert summary["steps"] == 3
    groups = torch.load(last_checkpoint(run), weights_only=True)["optimizer_states"][0]
    assert sorted(len(group["params"]) for group in groups["param_groups"]) == [1, 3, 11, 11]


@pytest.mark.slow
def test_real_photographs_and_weights(tmp_path: Path, real_voc_root: Path) -> None:
    features = real_voc_root.parent / "weights" / "vgg19_features_fp16.pth"
    if not features.is_file():
        pytest.skip(f"real VGG features not found at {features}")
    run = tmp_path / "run"
    options = ["name=real", "logger=none", f"data.root={real_voc_root}", "data.download=false"]
    options += ["data.limit=1", "data.crop_size=96", "data.num_workers=0", "model.head_width=8"]
    options += [f"model.weights={features}", "model.head_kernel=3", "trainer.max_steps=1"]
    options += ["callbacks.best_checkpoint=null", "callbacks.curves=null"]
    summary = train(compose_config("train", *options, "trainer.accelerator=cpu"), run)
    assert summary["steps"] == 1
    assert 0 < summary["val/miou"] < 1
    cfg = compose_config("evaluate", f"ckpt={last_checkpoint(run)}", "accelerator=cpu")
    assert evaluate(cfg)["miou"] == summary["val/miou"]


def test_mistyped_weights_are_found_before_data_is_fetched(tmp_path: Path) -> None:
    own = ["model.weights=vgg.pth", f"data.root={tmp_path}", "name=x"]
    cfg = compose_config("train", *SMALL[:-1], *own)
    with pytest.raises(WeightsError, match=r"model\.weights=vgg\.pth: no such file"):
        train(cfg, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_failed_trainer_leaves_no_folder(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=r"(?i)^trainer: .*gpu"):
        train_tiny(tmp_path / "runs" / "tiny", "trainer.accelerator=gpu")
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
def test_settings_beside_resume_are_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train_tiny(run, "trainer.max_steps=2")
    for steps in (3, 4):
        changes = [f"resume={run}", f"trainer.max_steps={steps}"]
        summary = train(resumed_config(run, changes), run, changes)
        assert summary["steps"] == steps
        assert OmegaConf.load(run / "config.yaml").trainer.max_steps == steps
        assert OmegaConf.load(run / "config.yaml").resume is None
    assert read_overrides(run) == (["trainer.max_steps=2"], ["trainer.max_steps=4"])
    assert summary["seconds"] > first["seconds"]  # of all three sessions


def test_panel_shows_validation_images(finished_run: Path) -> None:
    """The first validation image is in the panel, at its place and scale."""
    sample = Shapes(split="val", size=48, val_length=3)[0]["image"]
    with Image.open(finished_run / "panels" / "step_0000004.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert abs(pixels[60:270, 15:245].mean() - sample.float().mean()) < 12
