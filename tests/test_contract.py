"""What users and their scripts rely on, and no change of the code may change.

The numbers in tests/contract/ are those of commit 33324f3: the first 20 losses of two small runs in
float32, and the resolved values of every recipe, under the names that settings had then.
"""

import json
import math
import multiprocessing
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_config, train_tiny
from omegaconf import OmegaConf
from test_runs_resume import assert_same, stopped

from evaluate import evaluate
from fcn.checkpoint import last_checkpoint
from fcn.cli import RENAMED
from fcn.datasets.shapes import Shapes
from fcn.datasets.voc2012 import VOC2012
from fcn.module import SegmentationModule
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import read_summary, resumed_config
from train import train

FOLDER = Path(__file__).parent / "contract"
RECIPES: dict[str, dict[str, Any]] = json.loads((FOLDER / "recipes.json").read_text("utf-8"))
LOSSES: dict[str, list[float]] = json.loads((FOLDER / "losses.json").read_text("utf-8"))
LENGTH = ("trainer.max_steps=20", "trainer.val_check_interval=10", "trainer.log_every_n_steps=5")
FCN8S = ("model=fcn8s", "scheduler=poly", "optimizer.lr=1e-2", *LENGTH)
FCN16S = ["model=fcn16s", "optimizer=adamw", "optimizer.lr=1e-3", "data.jitter=0.2", *LENGTH]
FCN16S += ["data.scale=[0.5,1.5]", "trainer.accumulate_grad_batches=2", "callbacks=ema"]
TRAINING = {"loss", "loss_smooth", "loss_mean", "loss_std", "grad_norm", "lr", "images_per_second"}
VALIDATION = {"loss", "miou", "pixel_acc", "mean_acc", "fwiou"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps (do not write there)."""
    folder = tmp_path_factory.mktemp("contract") / "run"
    train_tiny(folder, *FCN8S, curves=True)
    return folder


def losses(run: Path) -> list[float]:
    steps, losses = read_column(read_metrics(run / "metrics.csv"), "train/loss")
    assert steps == list(range(1, 21))
    return losses


@pytest.mark.slow
def test_a_run(run: Path, tmp_path: Path) -> None:
    """Its losses, files, names and scores, which evaluate.py gives again to the last digit."""
    assert losses(run) == pytest.approx(LOSSES["fcn8s"], abs=1e-5)
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert files == {
        *("config.yaml", "overrides.yaml", "metrics.csv", "curves.png", "summary.json"),
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt"),
        *("panels/step_0000010.png", "panels/step_0000020.png"),
    }
    names = {f"val/{name}" for name in VALIDATION} | {f"val/iou/{name}" for name in Shapes.classes}
    columns = {"step"} | names | {f"train/{name}" for name in TRAINING}
    assert set(read_metrics(run / "metrics.csv")[0]) == columns
    summary = read_summary(run)
    assert names <= set(summary)

    arguments = [f"ckpt={last_checkpoint(run)}", "accelerator=cpu", f"output={tmp_path}"]
    metrics = evaluate(compose_config("evaluate", *arguments))
    for name in VALIDATION:
        assert metrics[name] == summary[f"val/{name}"], name
        assert name == "loss" or 0 <= metrics[name] <= 1
    for name, iou in metrics["iou"].items():
        trained = summary[f"val/iou/{name}"]
        assert iou == trained or (math.isnan(iou) and trained is None), name

    module = SegmentationModule.load_from_checkpoint(last_checkpoint(run)).eval()
    image = torch.zeros(1, 3, 37, 50, dtype=torch.uint8)
    assert module(image).shape == (1, len(Shapes.classes), 37, 50)
    assert module.class_names == list(Shapes.classes)
    assert len(VOC2012.classes) == 21


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM between processes")
def test_resumed_bit_by_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that two signals stop ends as one that nobody disturbed.

    For one that is killed, tests/test_kills.py has this.
    """
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    others = set(multiprocessing.active_children())
    train_tiny(undisturbed, *FCN16S)
    assert losses(undisturbed) == pytest.approx(LOSSES["fcn16s adamw dropout"], abs=1e-5)

    with stopped(10, signal.SIGTERM):  # a validation is due after this step
        train_tiny(run, *FCN16S, "data.num_workers=1")
    assert set(multiprocessing.active_children()) <= others  # the loader's process has ended
    assert f"go on with: python train.py resume={run}" in capsys.readouterr().out
    assert torch.load(last_checkpoint(run), weights_only=True)["global_step"] == 10
    with stopped(13, signal.SIGINT):
        train(resumed_config(run, ["data.num_workers=0"]), run, ["data.num_workers=0"])
    train(resumed_config(run, []), run)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("name", RECIPES)
def test_values_of_recipes(name: str) -> None:
    recipe = [] if name == "default" else [f"experiment={name}"]
    cfg = compose_config("train", *recipe)
    expected = RECIPES["default"] | RECIPES[name]
    for key in expected.pop("(without)", ()):
        del expected[key]
    for key, value in expected.items():
        found = OmegaConf.select(cfg, RENAMED.get(key, key), default="there is no such setting")
        found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
        assert found == value, key


@pytest.mark.parametrize(
    "command",
    [
        "train experiment=quickstart data=camvid resume=runs/fcn8s/2026-01-31_12-00-00",
        "train model=fcn8s data=voc2012 data.batch_size=2 logger=wandb callbacks=early_stopping",
        "train model=fcn32s data=voc2012_aug optimizer.lr=1e-5 scheduler=poly callbacks=ema",
        "train model=fcn16s data=sbd optimizer=sgd optimizer.momentum=0.99 logger=tensorboard",
        "train data=ade20k optimizer=adamw scheduler=cosine trainer.precision=16-mixed",
        "train data=folder trainer=ddp logger=none data.batch_size=1",
        "evaluate ckpt=runs/x/checkpoints/best.ckpt split=seg11valid output=seg11 data.root=/data",
        "evaluate ckpt=x data=voc2012 data.limit=4 tta.flip=true tta.scales=[0.75,1] tile=768",
        "evaluate compare=[runs/a,runs/b] report.images=60",
        "predict ckpt=x input=photo.jpg output=masks tta.flip=true tile=768",
        "predict ckpt=x format=voc data.root=/data",
        "export ckpt=x format=torch output=model.pt2 argmax=true",
    ],
)
def test_command_lines(command: str) -> None:
    script, *arguments = command.split()
    cfg = compose_config(script, *arguments)
    OmegaConf.to_container(cfg, throw_on_missing=script == "train")
    given = OmegaConf.from_dotlist(arguments)
    groups = ("experiment", "model", "data", "optimizer", "scheduler", "trainer", "logger")
    for key in (argument.partition("=")[0] for argument in arguments):
        if key not in (*groups, "callbacks"):  # which choose a file each
            assert OmegaConf.select(cfg, key) == OmegaConf.select(given, key), key
