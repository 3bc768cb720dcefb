"""kill -9 at any moment, among them the worst ones: nothing is lost beyond the last checkpoint.

What writes files is tested by itself: test_files.py, test_training_checkpoints.py and
test_training_metrics_csv.py. Here whole runs are killed and resumed, and must end as one that
nobody disturbed: at a few moments, or at all moments and at random ones, thirty times, with
`KILLS=30 python -m pytest tests/test_kills.py`.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train_tiny
from forks import fork, kill_at_call, kill_self, wait
from PIL import Image
from test_runs_resume import assert_same

import fcn.training.curves
from fcn.checkpoint import read_checkpoint
from fcn.files import SUFFIX
from fcn.module import SegmentationModule
from fcn.runs.metrics import read_metrics
from fcn.runs.resume import resumed_config
from fcn.training.checkpoints import AtomicCheckpointIO
from fcn.training.metrics_csv import MetricsCSV
from train import train

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", "3"))
INTERVAL = 3
SETTINGS = ["data.jitter=0.2", "scheduler=poly", "callbacks.panels.images=1"]
SETTINGS += ["trainer.max_steps=12", "trainer.val_check_interval=4", "trainer.log_every_n_steps=1"]
SETTINGS += [f"callbacks.last_checkpoint.every_n_steps={INTERVAL}"]


def half_a_checkpoint() -> None:
    def save(_: object, file: Any) -> None:
        file.write(b"PK\x03\x04 half")
        file.flush()
        kill_self()

    torch.save = save


def half_a_row() -> None:
    log = MetricsCSV.log_metrics

    def half(self: MetricsCSV, metrics: Any, step: int | None = None) -> None:
        log(self, metrics, step)
        if "train/loss" in metrics:  # appended; a validation's are written with the whole file
            os.truncate(self.path, self.path.stat().st_size - 9)
            kill_self()

    MetricsCSV.log_metrics = half  # type: ignore[method-assign]


# The first three are always tested.
MOMENTS: dict[str, Callable[[], None]] = {
    "a validation": partial(kill_at_call, SegmentationModule, "validation_step", count=2),
    "half of last.ckpt is written": half_a_checkpoint,
    "a row of metrics.csv": half_a_row,
    "last.ckpt is in place": partial(
        kill_at_call, AtomicCheckpointIO, "save_checkpoint", after=True
    ),
    "the next checkpoint begins": partial(
        kill_at_call, AtomicCheckpointIO, "save_checkpoint", count=2
    ),
    "a step": partial(kill_at_call, SegmentationModule, "training_step", count=2),
    "a panel": partial(kill_at_call, Image.Image, "save"),
    "the curves": partial(kill_at_call, fcn.training.curves, "draw_curves"),
    "config.yaml": partial(kill_at_call, os, "replace", after=True, count=2),
    "metrics.csv is written anew": partial(kill_at_call, os, "replace", count=3),
}


def begin(run: Path, moment: Callable[[], None] | None = None) -> None:
    if moment is not None:
        moment()
    train_tiny(run, *SETTINGS, curves=KILLS > 3)  # the first three moments come without them


def go_on(run: Path, moment: str | None, seconds: float = 0) -> None:
    """Resume a run and be killed at a moment, or after so many seconds."""
    if moment is not None:
        MOMENTS[moment]()
    elif seconds:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # as sudden as SIGKILL
    train(resumed_config(run, []), run)


def check_what_is_left(run: Path) -> None:
    steps = [int(row["step"]) for row in read_metrics(run / "metrics.csv")]
    assert steps == list(range(1, len(steps) + 1))
    checkpoints = {path.name: read_checkpoint(path) for path in run.glob("checkpoints/*.ckpt")}
    assert checkpoints["last.ckpt"]["global_step"] >= len(steps) - INTERVAL
    for path in run.rglob("*.png"):
        if not path.name.startswith("."):
            Image.open(path).load()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    run, log, undisturbed = tmp_path / "run", tmp_path / "log", tmp_path / "undisturbed"
    started = time.monotonic()
    eighth = partial(kill_at_call, SegmentationModule, "training_step", count=8)
    other = fork(partial(begin, undisturbed), tmp_path / "other")
    assert wait(fork(partial(begin, run, eighth), log)) == -signal.SIGKILL, log.read_text()
    assert wait(other) == 0
    seconds = time.monotonic() - started
    check_what_is_left(run)
    shutil.copytree(run, tmp_path / "begun")

    chance = random.Random(int(os.environ.get("SEED", "0")))
    for number in range(KILLS):
        moment = [*MOMENTS][number] if number < len(MOMENTS) else None
        code = wait(fork(partial(go_on, run, moment, chance.uniform(0.05, seconds)), log))
        assert code == -signal.SIGKILL or number >= 3, (moment, log.read_text())
        if code == 0:  # it was too fast
            assert_same(run, undisturbed)
            shutil.rmtree(run)
            shutil.copytree(tmp_path / "begun", run)
        else:
            assert code in (-signal.SIGKILL, -signal.SIGALRM), (moment, log.read_text())
            check_what_is_left(run)
    assert wait(fork(partial(go_on, run, None), log)) == 0, log.read_text()
    assert_same(run, undisturbed)
    assert [*run.rglob(f".*{SUFFIX}")] == []
