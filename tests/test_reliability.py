"""What can happen to a run, beside a kill (tests/test_kills.py): docs/reliability.md."""

import gc
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import PROJECT, TINY, train_tiny
from forks import at_call, fork, wait
from test_runs_resume import assert_same
from torch.utils.data import _utils, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import fcn.module
from fcn.checkpoint import best_checkpoint, last_checkpoint, read_checkpoint
from fcn.datamodule import SegmentationDataModule
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError, Stopped, TrainingError, WeightsError, WriteError
from fcn.files import optional_file
from fcn.module import SegmentationModule
from fcn.runs.folder import create_run_folder
from fcn.runs.metrics import read_metrics
from fcn.runs.resume import read_summary, resumed_config
from fcn.training.fit import checkpoint_to_resume
from fcn.training.metrics_csv import MetricsCSV
from train import build_data_and_module, train


def steps(run: Path) -> list[str]:
    return [row["step"] for row in read_metrics(run / "metrics.csv")]


# Damaged and foreign checkpoints


def test_a_flipped_bit_is_found_wherever_it_matters(tmp_path: Path) -> None:
    about = {"hyper_parameters": {}, "config": {}, "precision": "32-true", "global_step": 3}
    state = {"a": torch.arange(40.0), "b": torch.ones(3)}
    torch.save(about | {"state_dict": state}, tmp_path / "good.ckpt")
    good = (tmp_path / "good.ckpt").read_bytes()
    found = 0
    for place in range(0, len(good), 5):
        path = tmp_path / f"{place}.ckpt"
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        try:
            read = read_checkpoint(path)
        except WeightsError:
            found += 1
        else:  # a date, say, or the padding between tensors
            assert read["global_step"] == 3
            assert all(torch.equal(read["state_dict"][k], v) for k, v in state.items())
    assert found > 200


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def test_the_newest_whole_checkpoint(
    tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    last, best = last_checkpoint(run), best_checkpoint(run)
    datamodule, module = build_data_and_module(resumed_config(run, []))
    good = last.read_bytes()
    for damaged in (good[:-1000], b"", flip(good)):
        last.write_bytes(damaged)
        path, step = checkpoint_to_resume(run, module, datamodule)
        assert path == best
        first, second = capsys.readouterr().out.splitlines()
        assert f"{last} cannot be read: " in first
        assert second == f"going on from {best}, step {step}"

    last.write_bytes(good)
    assert datamodule.train_data is not None
    assert datamodule.val_data is not None
    datamodule.train_data.ids[-1] = "caf\udce9"  # a name that is not UTF-8
    checkpoint_to_resume(run, module, datamodule)
    assert "the images to train on have changed" in capsys.readouterr().out
    datamodule.val_data.ids.reverse()
    with pytest.raises(ConfigError, match="images to validate on are not those of before"):
        checkpoint_to_resume(run, module, datamodule)

    best.unlink()
    last.write_bytes(b"")
    with pytest.raises(ConfigError, match=f"^resume={run}: {last} cannot be read") as error:
        checkpoint_to_resume(run, module, datamodule)
    assert len(str(error.value).splitlines()) == 1


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


def test_foreign_and_hostile_checkpoints(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    content = torch.load(last_checkpoint(run), weights_only=True)
    best_checkpoint(run).unlink()
    weights = content["state_dict"]
    for wrong, why in (
        (
            content | {"state_dict": weights | {"network.conv6.bias": torch.ones(3)}},
            "weights of other names",
        ),
        ({k: v for k, v in content.items() if k != "optimizer_states"}, "no optimizer_states"),
        ({"model": weights}, "no checkpoint of this codebase"),
        (content | {"global_step": Bomb()}, "could run code"),
    ):
        torch.save(wrong, last_checkpoint(run))
        with pytest.raises(ConfigError, match=why):
            train(resumed_config(run, []), run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_going_on_from_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """last.ckpt is damaged: best.ckpt of step 2 leads to the same end."""
    real, scores = fcn.module.segmentation_scores, iter([0.5, 0.4, 0.4])
    monkeypatch.setattr(
        fcn.module, "segmentation_scores", lambda c: real(c) | {"miou": next(scores)}
    )
    run = tmp_path / "run"
    train_tiny(run, "trainer.log_every_n_steps=1")
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    last_checkpoint(run).write_bytes(flip(last_checkpoint(run).read_bytes()))
    train(resumed_config(run, []), run)
    assert_same(run, whole)
    assert steps(run) == ["1", "2", "3", "4"]


# Preemption, and the same command line again


def begin(*arguments: str) -> None:
    """train.py as a script, in this process."""
    sys.argv = ["train.py", *TINY, "trainer.log_every_n_steps=1", *arguments]
    runpy.run_path(str(PROJECT / "train.py"), run_name="__main__")


def begin_and_get(number: int) -> None:
    """The process gets a signal in its first step."""
    at_call(SegmentationModule, "training_step", partial(os.kill, os.getpid(), number))
    begin("resume=auto")


@pytest.mark.slow
def test_a_requeued_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    slurm = {"JOB_ID": "123456", "JOB_NAME": "fcn", "NTASKS": "1"}
    for name, value in (slurm | dict.fromkeys(("PROCID", "LOCALID", "NODEID"), "0")).items():
        monkeypatch.setenv(f"SLURM_{name}", value)  # Lightning would save and requeue by itself

    def start(work: Callable[[], None], code: int) -> str:
        log = tmp_path / f"{len([*tmp_path.iterdir()])}.log"
        assert wait(fork(work, log)) == code, log.read_text()
        return log.read_text()

    for number, expected in ((signal.SIGUSR1, ["1"]), (signal.SIGTERM, ["1", "2"])):
        log = start(partial(begin_and_get, number), 128 + number)
        (run,) = Path("runs/tiny").iterdir()
        assert steps(run) == expected
        assert f"go on with: python train.py resume={run}" in log
    assert not list(tmp_path.rglob("hpc_ckpt*"))

    again = partial(begin, "resume=auto")
    start(again, 0)
    assert steps(run) == ["1", "2", "3", "4"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    finished = f"{run} is finished: nothing to do. Without resume=auto, a new run starts\n"
    assert start(again, 0) == finished
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert [*Path("runs/tiny").iterdir()] == [run]


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, which a test can fill."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_full_disk(small_disk: Path, finished_run: Path) -> None:
    """There is room for one checkpoint, not for two."""
    run, size = small_disk / "run", last_checkpoint(finished_run).stat().st_size
    (small_disk / "full").write_bytes(bytes(shutil.disk_usage(small_disk).free - size * 3 // 2))
    with pytest.raises(WriteError) as error:
        train_tiny(run, "callbacks.last_checkpoint.every_n_steps=1")
    why = f"{last_checkpoint(run)} cannot be written: No space left on device; it needs 2"
    first, second = str(error.value).splitlines()
    assert why in first
    assert second.endswith(f"go on with: python train.py resume={run}")
    assert read_checkpoint(last_checkpoint(run))["global_step"] == 1
    assert [path.name for path in last_checkpoint(run).parent.iterdir()] == ["last.ckpt"]

    moved = Path(shutil.move(run, small_disk.parent / "moved"))  # where there is room
    train(resumed_config(moved, []), moved)
    assert steps(moved) == ["1", "2", "3", "4"]


def test_full_disk_for_rows_and_pictures(small_disk: Path) -> None:
    csv = MetricsCSV(small_disk / "metrics.csv")
    csv.log_metrics({"train/loss": 1}, step=1)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "full").write_bytes(bytes(free))

    def log_on() -> None:
        for step in range(2, 1000):
            csv.log_metrics({"train/loss": 1}, step=step)

    why = r"metrics\.csv cannot be written: No space.* 0\.0 MB are free"
    with pytest.raises(WriteError, match=why):
        log_on()
    rows = read_metrics(csv.path)
    assert [row["step"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    why = r"panels cannot be written \(No space.*training goes on"
    with pytest.warns(UserWarning, match=why), optional_file(small_disk / "panels"):
        (small_disk / "picture.png").write_bytes(bytes(1 << 20))


def test_read_only_folder(small_disk: Path, finished_run: Path) -> None:
    run = Path(shutil.copytree(finished_run, small_disk / "run", ignore=lambda *_: ["best.ckpt"]))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(WriteError, match=r"run/\.lock cannot be written: Read-only file system"):
        train(resumed_config(run, []), run)
    with pytest.raises(WriteError, match="new/run cannot be written: Read-only file system"):
        create_run_folder(small_disk / "new" / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not delete it")
@pytest.mark.parametrize("every", [1, 100])
def test_folder_deleted_under_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Noticed at the next row or checkpoint; nothing is made anew in its place."""
    run = tmp_path / "run"
    at_call(SegmentationModule, "training_step", lambda: shutil.rmtree(run), patch=monkeypatch)
    with pytest.raises(WriteError, match=f"{run}/.* cannot be written: .*there is no folder {run}"):
        train_tiny(
            run, f"callbacks.last_checkpoint.every_n_steps={every}", "trainer.log_every_n_steps=2"
        )
    assert not run.exists()


# Loader processes


@pytest.mark.slow
def test_loader_killed_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would tell in the middle of the step; the step is finished and saved first."""

    def kill_loader() -> None:
        loader = multiprocessing.active_children()[0]
        assert loader.pid
        os.kill(loader.pid, signal.SIGKILL)
        loader.join()

    at_call(SegmentationModule, "training_step", kill_loader, count=3, patch=monkeypatch)
    monkeypatch.setattr(_utils.signal_handling, "_SIGCHLD_handler_set", False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # as in a process that had no loaders yet
    check_loader_error(tmp_path / "run", monkeypatch, saved=3)
    # torch installs this only once, and later jobs of a sweep need it too.
    assert callable(signal.getsignal(signal.SIGCHLD))


@pytest.mark.slow
def test_loader_killed_while_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system kills a process that takes too much memory."""
    run = tmp_path / "run"

    def die() -> None:
        if get_worker_info():
            while len(read_metrics(run / "metrics.csv")) < 2:  # one batch is fetched ahead
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    at_call(Shapes, "__getitem__", die, count=7, patch=monkeypatch)
    check_loader_error(run, monkeypatch, "trainer.val_check_interval=4", saved=2)


def check_loader_error(run: Path, patch: pytest.MonkeyPatch, *options: str, saved: int) -> None:
    """The steps before are saved, and the run goes on when nothing kills its loaders any more."""
    get_data = _MultiProcessingDataLoaderIter._try_get_data
    patch.setattr(get_data, "__defaults__", (0.5,))  # torch asks more often
    with pytest.raises(TrainingError, match=r"data\.num_workers=1 needs less, 0 none") as error:
        train_tiny(run, "data.num_workers=1", "trainer.log_every_n_steps=1", *options)
    assert f"resume={run} data.num_workers=0" in str(error.value)
    # On a busy machine, word of the death may come a step later.
    assert read_checkpoint(last_checkpoint(run))["global_step"] in (saved, saved + 1)
    patch.undo()
    train(resumed_config(run, ["data.num_workers=0"]), run)
    assert steps(run) == ["1", "2", "3", "4"]


def killed_by_ctrl_c(*_: Any) -> None:
    """As of a spawned process, which cannot ignore the signal until it has begun."""
    signal.raise_signal(signal.SIGINT)
    raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")


def test_ctrl_c_kills_a_loader_that_has_just_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was stopped; no memory was short."""
    run = tmp_path / "run"
    monkeypatch.setattr(SegmentationModule, "validation_step", killed_by_ctrl_c)
    with pytest.raises(Stopped, match="SIGINT at step 2"):
        train_tiny(run)
    assert read_summary(run)["status"] == "stopped"
    assert read_checkpoint(last_checkpoint(run))["global_step"] == 2


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (SegmentationModule, "training_step"),
        # Loaders are spawned before the run's own signal handlers are there, which takes seconds.
        (SegmentationDataModule, "train_dataloader"),
    ],
)
def test_ctrl_c_before_the_end_of_the_first_step(
    owner: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, killed_by_ctrl_c)
    with pytest.raises(KeyboardInterrupt):  # which ends train.py with code 130
        train_tiny(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Lightning ignores it


# Long runs


def grow(folder: Path) -> None:
    """A run that measures itself at each validation: memory, open files, objects."""
    measured: list[tuple[int, int, int]] = []
    start = SegmentationModule.on_validation_epoch_start

    def measure(self: SegmentationModule) -> None:
        memory = psutil.Process().memory_info().rss
        measured.append((memory, len(os.listdir("/proc/self/fd")), len(gc.get_objects())))
        start(self)

    SegmentationModule.on_validation_epoch_start = measure  # type: ignore[method-assign]
    options = ["trainer.max_steps=7", "trainer.val_check_interval=1", "data.batch_size=1"]
    train_tiny(folder / "run", *options, "callbacks.panels.images=1", curves=True)
    (folder / "measured.json").write_text(json.dumps(measured))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_does_not_grow(tmp_path: Path) -> None:
    """Resident memory and open files over 7 validations and their pictures."""
    log = tmp_path / "log"
    assert wait(fork(partial(grow, tmp_path), log)) == 0, log.read_text()
    memory, files, objects = zip(*json.loads((tmp_path / "measured.json").read_text()), strict=True)
    assert len(memory) == 7
    assert max(memory[5:]) - max(memory[3:5]) < 20e6, memory
    assert max(files[2:]) == files[2], files
    assert max(objects) < 2e5, objects  # of 5e5 at the start, which Python need not look at again
