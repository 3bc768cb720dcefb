"""What users and their scripts rely on, and no change of the code may change.

The numbers in tests/contract/ are those of commit 33324f3: the first 20 losses of two small runs in
float32, and the resolved values of every recipe, under the names that settings had then.
"""

import csv
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_config, train_tiny
from forks import fork, kill_at_call, wait
from omegaconf import OmegaConf
from test_runs_resume import assert_same

from evaluate import evaluate
from fcn.checkpoint import last_checkpoint
from fcn.cli import RENAMED
from fcn.datasets.shapes import Shapes
from fcn.datasets.voc2012 import VOC2012
from fcn.module import SegmentationModule
from fcn.runs.resume import resumed_config
from train import train

FOLDER = Path(__file__).parent / "contract"
RECIPES: dict[str, dict[str, Any]] = json.loads((FOLDER / "recipes.json").read_text("utf-8"))
LOSSES: dict[str, list[float]] = json.loads((FOLDER / "losses.json").read_text("utf-8"))
LENGTH = ("trainer.max_steps=20", "trainer.val_check_interval=10", "trainer.log_every_n_steps=5")
RUNS = {
    "fcn8s": ("model=fcn8s", "scheduler=poly", "optimizer.lr=1e-2"),
    "fcn16s adamw dropout": (
        "model=fcn16s",
        "optimizer=adamw",
        "optimizer.lr=1e-3",
        "trainer.accumulate_grad_batches=2",
        "data.jitter=0.2",
        "data.scale=[0.5,1.5]",
    ),
}
FILES = {"config.yaml", "overrides.yaml", "metrics.csv", "curves.png", "summary.json"}
FOLDERS = {"checkpoints", "panels"}
TRAINING = {"loss", "loss_smooth", "loss_mean", "loss_std", "grad_norm", "lr", "images_per_second"}
VALIDATION = {"loss", "miou", "pixel_acc", "mean_acc", "fwiou"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps (do not write there)."""
    folder = tmp_path_factory.mktemp("contract") / "run"
    train_tiny(folder, *RUNS["fcn8s"], *LENGTH, curves=True)
    return folder


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[float]:
    return [float(row["train/loss"]) for row in rows(run)]


def test_losses(run: Path) -> None:
    assert losses(run) == pytest.approx(LOSSES["fcn8s"], abs=1e-5)


@pytest.mark.slow
def test_losses_of_other_settings(tmp_path: Path) -> None:
    train_tiny(tmp_path / "run", *RUNS["fcn16s adamw dropout"], *LENGTH)
    assert losses(tmp_path / "run") == pytest.approx(LOSSES["fcn16s adamw dropout"], abs=1e-5)


def test_run_folder(run: Path) -> None:
    assert {path.name for path in run.iterdir() if path.is_file()} == FILES
    assert {path.name for path in run.iterdir() if path.is_dir()} == FOLDERS
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {path.name for path in (run / "panels").iterdir()} == {
        "step_0000010.png",
        "step_0000020.png",
    }


def test_names(run: Path) -> None:
    names = {f"train/{name}" for name in TRAINING} | {f"val/{name}" for name in VALIDATION}
    names |= {f"val/iou/{name}" for name in Shapes.classes}
    assert set(rows(run)[0]) == {"step"} | names
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert {name for name in names if name.startswith("val/")} <= set(summary)
    for name in VALIDATION - {"loss"}:
        assert 0 <= summary[f"val/{name}"] <= 1


def test_evaluation_is_validation(run: Path, tmp_path: Path) -> None:
    arguments = [f"ckpt={last_checkpoint(run)}", "accelerator=cpu", f"output={tmp_path}"]
    metrics = evaluate(compose_config("evaluate", *arguments))
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    for name in VALIDATION:
        assert metrics[name] == summary[f"val/{name}"], name  # to the last digit
    for name, iou in metrics["iou"].items():
        trained = summary[f"val/iou/{name}"]
        assert iou == trained or (math.isnan(iou) and trained is None), name


def killed_run(run: Path) -> None:
    """Begin a run, and be killed in the middle of its 13th step."""
    kill_at_call(SegmentationModule, "training_step", count=13)
    every = "callbacks.last_checkpoint.every_n_steps=5"
    train_tiny(run, *RUNS["fcn8s"], *LENGTH, every)


@pytest.mark.slow
def test_resumed_after_a_kill_bit_by_bit(run: Path, tmp_path: Path) -> None:
    killed, log = tmp_path / "killed", tmp_path / "log"
    assert wait(fork(partial(killed_run, killed), log)) == -9, log.read_text("utf-8")
    train(resumed_config(killed, []), killed)
    assert_same(killed, run)


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
    "arguments",
    [
        "experiment=quickstart",
        "model=fcn8s data.batch_size=2",
        "model=fcn32s optimizer.lr=1e-5",
        "model=fcn16s trainer.precision=16-mixed optimizer.momentum=0.99 data.batch_size=1",
        "resume=runs/fcn8s/2026-01-31_12-00-00",
        *(f"data={name}" for name in ("voc2012", "voc2012_aug", "sbd", "ade20k", "camvid")),
        *("data=folder", "data=shapes", "optimizer=adamw", "scheduler=poly", "scheduler=cosine"),
        *("trainer=ddp", "logger=none", "logger=wandb", "logger=tensorboard"),
        *("callbacks=ema", "callbacks=early_stopping"),
    ],
)
def test_command_lines_of_train(arguments: str) -> None:
    cfg = compose_config("train", *arguments.split())
    OmegaConf.to_container(cfg, throw_on_missing=True)
    given = OmegaConf.from_dotlist(arguments.split())
    for key in (argument.partition("=")[0] for argument in arguments.split()):
        if "." in key or key == "resume":  # the others choose a file of a group
            assert OmegaConf.select(cfg, key) == OmegaConf.select(given, key)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("evaluate", "ckpt=runs/x/checkpoints/best.ckpt split=seg11valid output=seg11"),
        ("evaluate", "ckpt=x data.root=/data data.limit=4 tta.flip=true tta.scales=[0.75,1]"),
        ("evaluate", "ckpt=x data=voc2012 tile=768 report.images=60"),
        ("evaluate", "compare=[runs/a,runs/b]"),
        ("predict", "ckpt=x input=photo.jpg output=masks tta.flip=true tile=768"),
        ("predict", "ckpt=x format=voc data.root=/data"),
        ("export", "ckpt=x format=torch output=model.pt2 argmax=true"),
    ],
)
def test_command_lines_of_other_scripts(script: str, arguments: str) -> None:
    cfg = compose_config(script, *arguments.split())
    for argument in arguments.split():
        assert OmegaConf.select(cfg, argument.partition("=")[0]) is not None, argument


def test_from_python(run: Path) -> None:
    module = SegmentationModule.load_from_checkpoint(last_checkpoint(run)).eval()
    image = torch.zeros(1, 3, 37, 50, dtype=torch.uint8)
    assert module(image).shape == (1, len(Shapes.classes), 37, 50)
    assert module.class_names == list(Shapes.classes)
    assert len(VOC2012.classes) == 21
