"""train.py: what it writes and what it refuses."""

import csv
import importlib
import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from conftest import FINISHED, PROJECT, TINY, compose_config, train_tiny
from omegaconf import OmegaConf

from fcn.checkpoint import last_checkpoint
from fcn.module import SegmentationModule
from fcn.runs import process
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import resumed_config
from fcn.training.fit import fit
from fcn.training.interruption import Interruption
from train import train

SCORES = ("loss", "miou", "pixel_acc", "mean_acc", "fwiou")


def begin(*arguments: str) -> int:
    """train.py as a script, in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            runpy.run_path(str(PROJECT / "train.py"), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_what_a_run_writes(finished_run: Path) -> None:
    """The names of files and scores: test_contract."""
    rows = read_metrics(finished_run / "metrics.csv")
    assert all(speed > 0 for speed in read_column(rows, "train/images_per_second")[1])
    steps, losses = read_column(rows, "train/loss")
    assert steps == [1, 2, 3, 4]  # of two batches each
    assert losses[0] == pytest.approx(np.log(8), rel=1e-5)  # as all scores are zero
    assert read_column(rows, "val/miou")[0] == [2, 4]
    summary = json.loads((finished_run / "summary.json").read_text())
    for name in SCORES:
        assert summary[f"val/{name}"] == read_column(rows, f"val/{name}")[1][-1]
    assert summary["best/val/miou"] == max(read_column(rows, "val/miou")[1])
    assert summary["best/step"] in (2, 4)
    assert (summary["status"], summary["steps"]) == ("finished", 4)
    for name, least in (("seconds", 0), ("images_per_second", 0), ("peak_memory_bytes", 10**7)):
        assert summary[name] > least
    assert summary["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "git_revision" in summary
    panels = [path.name for path in sorted((finished_run / "panels").iterdir())]
    assert panels == ["step_0000002.png", "step_0000004.png"]
    config = OmegaConf.load(finished_run / "config.yaml")  # resolved
    assert (config.data.seed, config.scheduler._target_) == (0, "fcn.schedules.poly")
    assert list(OmegaConf.load(finished_run / "overrides.yaml")) == list(FINISHED)
    assert not [path for path in finished_run.rglob(".*") if path.is_file()]  # no temporary file


@pytest.mark.slow
def test_seed_decides_a_run(tmp_path: Path, finished_run: Path) -> None:
    """The other half, that the same seed gives the same run: test_sanity_check_leaves_no_trace."""
    train_tiny(tmp_path / "other", *FINISHED, "seed=1", "trainer.max_steps=2")
    rows, other = (read_metrics(r / "metrics.csv") for r in (finished_run, tmp_path / "other"))
    assert other[1]["train/loss"] != rows[1]["train/loss"]


WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
SMALL = "model.backbone=vgg_tiny model.head_width=8 data.root=no data.download=false"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("optimizer=sdg", "Available: adamw, sgd"),
        ("data=shapes hydra.run.dir=chosen optimizer.lr=-1", "optimizer.lr=-1"),
        (f"{SMALL} model.weights=null", "quickstart"),
        (f"{SMALL} model.weights=v.pth", "model.weights=v.pth: no such file"),  # before the data
        pytest.param("data=shapes trainer.accelerator=gpu", "error: trainer: ", marks=WITHOUT_GPU),
    ],
)
def test_errors_are_short_and_leave_nothing(
    tmp_path: Path,
    arguments: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert begin(*arguments.split()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
    assert len(err.splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


def table(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "sweep.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_sweep_over_groups_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on after a job that fails. More about sweeps: test_runs_sweep."""
    monkeypatch.chdir(tmp_path)
    tiny = [o for o in TINY if not o.startswith(("name=", "model=", "optimizer.", "trainer.max_"))]
    sweep = ["-m", "model=fcn32s,fcn8s", "optimizer.lr=-1,1e-2", "hydra.sweep.dir=sweep"]
    assert begin(*sweep, *tiny, "trainer.max_steps=1", "callbacks.curves=null") == 1
    err = capsys.readouterr().err
    assert err.count("error: optimizer.lr=-1: must be") == 2
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    configs = sorted((tmp_path / "sweep").glob("*/config.yaml"))  # those that failed have none
    strides = {path.parent.name: OmegaConf.load(path).model.stride for path in configs}
    assert strides == {"1": 32, "3": 8}
    rows = table(tmp_path / "sweep")
    assert [row["model"] for row in rows] == ["fcn32s", "fcn32s", "fcn8s", "fcn8s"]
    assert [float(row["optimizer.lr"]) for row in rows] == [-1, 1e-2] * 2
    assert [row["status"] for row in rows] == ["crashed", "finished"] * 2
    assert all(0 <= float(row["val/miou"]) <= 1 for row in rows if row["status"] == "finished")


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
    sweep += ["hydra.sweep.dir=sweep", "optimizer.lr=choice(1e-2,-1)", "trainer.max_steps=1"]
    assert begin(*sweep, *tiny, "callbacks.curves=null") == 1  # a job has crashed
    if find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        assert "Available: basic" in capsys.readouterr().err
        return
    rows = table(tmp_path / "sweep")
    assert {row["status"] for row in rows} == {"finished", "crashed"}
    results = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert results.best_params == {"optimizer.lr": 1e-2}
    scores = [float(row["best/val/miou"]) for row in rows if row["status"] == "finished"]
    assert results.best_value == max(scores)


@pytest.mark.slow
def test_finer_stride_starts_from_a_coarser_checkpoint(tmp_path: Path, finished_run: Path) -> None:
    coarse = tmp_path / "coarse.ckpt"
    coarse.write_bytes(last_checkpoint(finished_run).read_bytes())
    run, model = tmp_path / "fcn16s", [o for o in TINY if o.startswith("model.")]
    options = ["model=fcn16s", *model, f"model.weights={coarse}", "optimizer.lr=1e-6"]
    train_tiny(run, *options, "model.head_lr_multiplier=10", "trainer.max_steps=1")
    before = torch.load(last_checkpoint(finished_run), weights_only=True)["state_dict"]
    checkpoint = torch.load(last_checkpoint(run), weights_only=True)
    for name in ("network.stages.0.0.weight", "network.conv6.weight", "network.score.weight"):
        after = checkpoint["state_dict"][name]
        torch.testing.assert_close(after, before[name], atol=1e-4, rtol=0)
    fresh = {"skips.pool4", "upsample.to_pool4", "upsample.to_image_16"}
    assert set(checkpoint["fresh_layers"]) == fresh

    coarse.unlink()  # not needed any more: not for use, and not to go on
    module = SegmentationModule.load_from_checkpoint(last_checkpoint(run))
    assert module.network.stride == 16
    assert train(resumed_config(run, ["trainer.max_steps=2"]), run)["steps"] == 2
    groups = torch.load(last_checkpoint(run), weights_only=True)["optimizer_states"][0]
    assert sorted(len(group["params"]) for group in groups["param_groups"]) == [1, 3, 11, 11]


@pytest.mark.slow
def test_real_photographs_and_weights(tmp_path: Path, real_voc_root: Path) -> None:
    features = real_voc_root.parent / "weights" / "vgg19_features_fp16.pth"
    if not features.is_file():
        pytest.skip(f"real VGG features not found at {features}")
    options = ["name=real", "logger=none", f"data.root={real_voc_root}", "data.download=false"]
    options += ["data.limit=1", "data.crop_size=96", "data.num_workers=0", "model.head_width=8"]
    options += [f"model.weights={features}", "model.head_kernel=3", "trainer.max_steps=1"]
    options += ["trainer.accelerator=cpu"]
    options += [f"callbacks.{name}=null" for name in ("best_checkpoint", "curves", "panels")]
    options += ["callbacks.last_checkpoint=null"]
    summary = train(compose_config("train", *options), tmp_path / "run")
    assert summary["steps"] == 1
    assert 0 < summary["val/miou"] < 1


def test_no_figure_of_memory_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, there is no module `resource`; and psutil for Linux needs it."""
    for name in ("resource", "psutil"):
        monkeypatch.setitem(sys.modules, name, None)
    assert importlib.reload(process).peak_memory() is None


def test_peak_memory_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier job of a sweep, in the same process, may have had a larger network."""
    device, trainer, reset = torch.device("cuda", 1), MagicMock(), MagicMock()
    trainer.strategy.root_device, trainer.callbacks = device, [Interruption()]
    trainer.fit.side_effect = lambda *_, **__: reset.fit()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr("fcn.training.fit._write_summary", lambda *_: {})
    fit(trainer, MagicMock(), MagicMock(), None, lambda size: "")
    assert reset.mock_calls == [call(device), call.fit()]
