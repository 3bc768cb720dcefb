"""train.py: what it writes and what it refuses."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FINISHED, PROJECT, TINY, compose_config, train_tiny
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from evaluate import evaluate
from fcn.csv_logger import read_column, read_metrics
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError, DataError, FCNError, WeightsError
from fcn.module import SegmentationModule
from fcn.runs import last_checkpoint
from train import resumed_config, train

TRAIN_NAMES = {
    f"train/{name}" for name in ("loss", "loss_smooth", "loss_mean", "loss_std", "grad_norm", "lr")
} | {"train/images_per_second"}
VAL_NAMES = {f"val/{name}" for name in ("loss", "miou", "pixel_acc", "mean_acc", "fwiou")}
IOU_NAMES = {f"val/iou/{name}" for name in Shapes.classes}
RUN_FILES = {"config.yaml", "overrides.yaml", "metrics.csv", "curves.png", "summary.json"}
RUN_FILES |= {"checkpoints", "panels"}


def script(
    folder: Path, name: str, *arguments: str, python: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """One of the project's scripts, run in `folder` as a user would."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, *python, str(PROJECT / name), *arguments],
        cwd=folder,
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


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


def test_seed_decides_a_run(tmp_path: Path, finished_run: Path) -> None:
    torch.manual_seed(99)
    train_tiny(tmp_path / "same", *FINISHED)
    expected = weights(finished_run)
    same = weights(tmp_path / "same")
    assert all(torch.equal(same[name], expected[name]) for name in expected)
    train_tiny(tmp_path / "other", *FINISHED, "seed=1", "trainer.max_steps=2")
    rows, other = (read_metrics(r / "metrics.csv") for r in (finished_run, tmp_path / "other"))
    assert other[1]["train/loss"] != rows[1]["train/loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=-1", r"data\.batch_size=-1: must be"),
        ("optimizer.lr=0", r"optimizer\.lr=0: must be"),
        ("model.num_classes=21", "num_classes=21, but the data has 8"),
        ("trainer.max_steps=-1", "never end"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, override: str, message: str) -> None:
    run = tmp_path / "runs" / "tiny"
    with pytest.raises(ConfigError, match=message) as error:
        train_tiny(run, override)
    assert len(str(error.value).splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_not_there(tmp_path: Path) -> None:
    cfg = compose_config(
        "train", "name=x", "data=voc2012", f"data.root={tmp_path / 'no'}", "data.download=false"
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
    ],
)
def test_errors_are_short(tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = script(tmp_path, "train.py", *arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("train.py", ["--help"]), ("train.py", ["--cfg", "job"])],
)
def test_help_needs_no_torch(tmp_path: Path, name: str, arguments: list[str]) -> None:
    result = script(tmp_path, name, *arguments, python=("-X", "importtime"))
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "hydra" in imported  # so the report is there
    slow = {"torch", "torchvision", "pytorch_lightning", "wandb", "matplotlib", "numpy"}
    assert not imported & slow
    assert "data:" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sweep(tmp_path: Path) -> None:
    tiny = [o for o in TINY if not o.startswith(("name=", "model=", "optimizer.", "trainer.max_"))]
    sweep = ["-m", "model=fcn32s,fcn8s", "optimizer.lr=1e-2,1e-3", "hydra.sweep.dir=sweep"]
    result = script(tmp_path, "train.py", *sweep, *tiny, "trainer.max_steps=1")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    runs = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [run.name for run in runs] == ["0", "1", "2", "3"]
    assert all({path.name for path in run.iterdir()} == RUN_FILES for run in runs)
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], float(row["optimizer.lr"])) for row in rows] == [
        (model, lr) for model in ("fcn32s", "fcn8s") for lr in (1e-2, 1e-3)
    ]
    assert {row["status"] for row in rows} == {"finished"}
    assert all(0 <= float(row["val/miou"]) <= 1 for row in rows)
    strides = [OmegaConf.load(run / "config.yaml").model.stride for run in runs]
    assert strides == [32, 32, 8, 8]


def test_sweep_goes_on_after_a_job_that_fails(tmp_path: Path) -> None:
    sweep = ["-m", "data=shapes", "data.batch_size=-1,-2", "hydra.sweep.dir=sweep"]
    result = script(tmp_path, "train.py", *sweep)
    assert result.returncode == 1
    for size in (-1, -2):
        assert f"error: data.batch_size={size}: must be" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("config.yaml"))


def test_epochs_are_converted_to_steps(tmp_path: Path) -> None:
    options = ["trainer.max_epochs=2", "data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    options += ["data.dataset.train_length=3", "data.limit=2", "trainer.val_check_interval=100"]
    summary = train_tiny(tmp_path / "run", *options)
    assert summary["steps"] == 2  # of 2 images: twice the 2 that are used
    assert summary["val/miou"] > 0


def test_progress_bar(tmp_path: Path) -> None:
    options = ["trainer.enable_progress_bar=true", "trainer.max_steps=1"]
    assert train_tiny(tmp_path / "run", *options)["steps"] == 1


def test_finer_stride_starts_from_a_coarser_checkpoint(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = tmp_path / "coarse.ckpt"
    coarse.write_bytes(last_checkpoint(finished_run).read_bytes())
    run = tmp_path / "fcn16s"
    options = ["model=fcn16s", f"model.weights={coarse}", "model.backbone=vgg11"]
    options += [
        "model.head_width=8",
        "model.head_kernel=3",
        "optimizer.lr=1e-6",
        "trainer.max_steps=2",
    ]
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


def test_resume_with_settings_that_do_not_fit(finished_run: Path) -> None:
    for change in ("model=fcn8s", "experiment=quickstart"):
        with pytest.raises(ConfigError, match="keeps its groups"):
            resumed_config(finished_run, [change])
    with pytest.raises(ConfigError, match="no run folder"):
        resumed_config(finished_run / "none", [])


def wandb_runs(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "wandb").glob("offline-run-*"))


def test_real_photographs_and_weights(tmp_path: Path, real_voc_root: Path) -> None:
    features = real_voc_root.parent / "weights" / "vgg19_features_fp16.pth"
    if not features.is_file():
        pytest.skip(f"real VGG features not found at {features}")
    run = tmp_path / "run"
    options = ["name=real", "logger=none", f"data.root={real_voc_root}", "data.download=false"]
    options += ["data.limit=2", "data.crop_size=96", "data.num_workers=0", "model.head_width=8"]
    options += [f"model.weights={features}", "model.head_kernel=3", "trainer.max_steps=2"]
    summary = train(compose_config("train", *options, "trainer.accelerator=cpu"), run)
    assert summary["steps"] == 2
    assert 0 < summary["val/miou"] < 1
    cfg = compose_config("evaluate", f"ckpt={run}", "accelerator=cpu")
    assert evaluate(cfg)["miou"] == summary["val/miou"]


def test_mistyped_weights_are_found_before_data_is_fetched(tmp_path: Path) -> None:
    cfg = compose_config("train", "model.weights=vgg.pth", f"data.root={tmp_path}", "name=x")
    with pytest.raises(WeightsError, match=r"model\.weights=vgg\.pth: no such file"):
        train(cfg, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_failed_trainer_leaves_no_folder(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = [*TINY, "trainer.accelerator=gpu"]
    result = script(tmp_path, "train.py", *arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "gpu" in result.stderr.lower()
    assert not list(tmp_path.glob("runs/*/*"))


def test_settings_beside_resume_are_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train_tiny(run, "trainer.max_steps=2")
    for steps in (3, 4):
        changes = [f"resume={run}", f"trainer.max_steps={steps}"]
        summary = train(resumed_config(run, changes), run, changes)
        assert summary["steps"] == steps
        assert OmegaConf.load(run / "config.yaml").trainer.max_steps == steps
        assert OmegaConf.load(run / "config.yaml").resume is None
    assert list(OmegaConf.load(run / "overrides.yaml")) == [
        "trainer.max_steps=2",
        "trainer.max_steps=3",
        "trainer.max_steps=4",
    ]
    assert summary["seconds"] > first["seconds"]  # of all three sessions


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # it reads its environment once
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    train_tiny(run, "logger=wandb", "trainer.max_steps=1", "logger.tags=[a]")
    assert wandb.run is None  # finished: the next job of a sweep starts its own
    (first,) = wandb_runs(run)
    run_id = OmegaConf.load(run / "config.yaml").logger.id
    assert first.endswith(f"-{run_id}")
    (log,) = (run / "wandb" / first).glob("*.wandb")
    content = log.read_bytes()
    for text in (b"train/loss_smooth", b"val/iou/ring", b"val_check_interval", b"head_width"):
        assert text in content, text

    cfg: DictConfig = resumed_config(run, ["trainer.max_steps=2"])
    train(cfg, run)
    assert {name.rpartition("-")[2] for name in wandb_runs(run)} == {run_id}
    assert {path.name for path in tmp_path.iterdir()} == {"home", "run"}
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_wandb_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # it reads its environment once
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train_tiny(tmp_path / "run", "logger=wandb", "trainer.max_steps=1")
    assert not list(tmp_path.rglob("*.wandb"))
    assert (tmp_path / "run" / "summary.json").is_file()


def test_errors_of_the_user_are_one_family() -> None:
    assert all(issubclass(e, FCNError) for e in (ConfigError, DataError, WeightsError))


def test_panel_shows_validation_images(finished_run: Path) -> None:
    """The first validation image is in the panel, at its place and scale."""
    sample = Shapes(split="val", size=48, val_length=3)[0]["image"]
    with Image.open(finished_run / "panels" / "step_0000004.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert abs(pixels[60:270, 15:245].mean() - sample.float().mean()) < 12


def test_refused_settings_leave_no_folder_of_hydra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "hydra.run.dir=chosen", "optimizer.lr=-1"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(str(PROJECT / "train.py"), run_name="__main__")
    assert "optimizer.lr=-1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
