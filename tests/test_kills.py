"""kill -9 at any moment, among them the worst ones: nothing is lost beyond the last checkpoint.

One run is killed and resumed, killed and resumed, and must end as one that nobody disturbed.
`KILLS=30 python -m pytest tests/test_kills.py` kills it so often; the suite, less.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, train_tiny
from forks import at_call, fork, kill_self, wait
from PIL import Image

import fcn.module
import fcn.pictures
from fcn.checkpoints import read_checkpoint
from fcn.csv_logger import MetricsCSV, read_metrics
from fcn.metrics import segmentation_scores
from fcn.module import SegmentationModule
from fcn.resume import LEFTOVERS
from fcn.runs import last_checkpoint
from fcn.saving import AtomicCheckpointIO
from train import resumed_config, train

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", "14"))
STEPS, INTERVAL = 12, 3
SETTINGS = (
    "data.jitter=0.2",
    "scheduler=poly",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    f"callbacks.checkpoint_every_n_steps={INTERVAL}",
    "callbacks.panel_images=1",
)
assert not set(SETTINGS) & set(TINY)


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


def half_a_picture() -> None:
    def save(self: Image.Image, path: Path, *_: Any, **options: Any) -> None:
        Path(path).write_bytes(b"\x89PNG half")
        kill_self()

    Image.Image.save = save  # type: ignore[method-assign]


MOMENTS: dict[str, Callable[[], None]] = {
    "half of last.ckpt is written": half_a_checkpoint,
    "last.ckpt is written, not yet in place": partial(at_call, Path, "replace", kill_self),
    "last.ckpt is in place": partial(
        at_call, AtomicCheckpointIO, "save_checkpoint", kill_self, after=True
    ),
    "best.ckpt begins": partial(at_call, AtomicCheckpointIO, "save_checkpoint", kill_self, count=2),
    "a step": partial(at_call, SegmentationModule, "training_step", kill_self, count=2),
    "a validation": partial(at_call, SegmentationModule, "validation_step", kill_self, count=2),
    "half of a panel is written": half_a_picture,
    "an animation": partial(at_call, fcn.pictures, "animate", kill_self),
    "the curves": partial(at_call, fcn.pictures, "draw_curves", kill_self),
    "a row of metrics.csv": half_a_row,
    "metrics.csv is written anew": partial(
        at_call, os, "replace", kill_self, count=3
    ),  # after config and overrides
    "config.yaml": partial(at_call, os, "replace", kill_self, after=True, count=2),
}


@pytest.fixture(scope="module", autouse=True)
def each_validation_is_the_best() -> Iterator[None]:
    """Here and in forks: so best.ckpt is written each time."""
    step, start, real = 0, SegmentationModule.on_validation_epoch_start, segmentation_scores

    def note(self: SegmentationModule) -> None:
        nonlocal step
        step = self.trainer.global_step
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationModule, "on_validation_epoch_start", note)
        patch.setattr(fcn.module, "segmentation_scores", lambda c: real(c) | {"miou": step / 100})
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    pid = fork(lambda: train_tiny(folder / "run", *SETTINGS), folder / "log")
    assert wait(pid) == 0, (folder / "log").read_text()
    return folder / "run"


def result(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    checkpoint = read_checkpoint(last_checkpoint(run))
    rows = read_metrics(run / "metrics.csv")
    for row in rows:
        del row["train/images_per_second"]  # the one column that time decides
    return checkpoint["state_dict"], rows


def check_what_is_left(run: Path) -> None:
    steps = [int(row["step"]) for row in read_metrics(run / "metrics.csv")]
    assert steps == list(range(1, len(steps) + 1))
    checkpoints = {path.name: read_checkpoint(path) for path in run.glob("checkpoints/*.ckpt")}
    assert checkpoints["last.ckpt"]["global_step"] >= len(steps) - INTERVAL
    for path in run.rglob("*.png"):
        if not path.name.startswith("."):
            Image.open(path).load()


def test_killed_at_any_moment(tmp_path: Path, undisturbed: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    started = time.monotonic()

    def begin() -> None:
        partial(at_call, SegmentationModule, "training_step", kill_self, count=8)()
        train_tiny(run, *SETTINGS)

    assert wait(fork(begin, log)) == -signal.SIGKILL, log.read_text()
    seconds = time.monotonic() - started
    check_what_is_left(run)
    shutil.copytree(run, tmp_path / "begun")

    seed = int(os.environ.get("SEED", "0"))
    chance = random.Random(seed)
    moments = [*MOMENTS] + [None] * (KILLS - len(MOMENTS))
    chance.shuffle(moments)
    killed = []
    for moment in moments:

        def work(moment: str | None = moment) -> None:
            if moment is None:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.05, seconds))
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # as sudden as SIGKILL
            else:
                MOMENTS[moment]()
            train(resumed_config(run, []), run)

        chance.random()
        code = wait(fork(work, log))
        if code == 0:  # it was too fast
            assert_same(run, undisturbed)
            shutil.rmtree(run)
            shutil.copytree(tmp_path / "begun", run)
            if moment is not None:
                moments.append(moment)  # once more, from further back
        else:
            assert code in (-signal.SIGKILL, -signal.SIGALRM), (moment, log.read_text())
            killed.append(moment)
            check_what_is_left(run)
    pid = fork(lambda: train(resumed_config(run, []), run), log)
    assert wait(pid) == 0, log.read_text()
    assert_same(run, undisturbed)
    assert {*MOMENTS} - {*killed} == set(), "these moments did not come"
    assert [path for pattern in LEFTOVERS for path in run.glob(pattern)] == []


def assert_same(run: Path, undisturbed: Path) -> None:
    (weights, rows), (expected_weights, expected_rows) = result(run), result(undisturbed)
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        assert torch.equal(weights[name], value), name
    assert rows == expected_rows
