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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT, TINY, train_tiny
from forks import at_call, fork, wait
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

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
from train import train


def steps(run: Path) -> list[str]:
    return [row["step"] for row in read_metrics(run / "metrics.csv")]


def assert_same_weights(run: Path, other: Path) -> None:
    one, two = (read_checkpoint(last_checkpoint(r))["state_dict"] for r in (run, other))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


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


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-1000],
    "halved": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": flip,
    "text": lambda data: b"<html>404 Not Found</html>",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_newest_whole_checkpoint(
    tmp_path: Path,
    finished_run: Path,
    damage: Callable[[bytes], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "checkpoints").mkdir()
    last, best = last_checkpoint(tmp_path), best_checkpoint(tmp_path)
    good = last_checkpoint(finished_run).read_bytes()
    last.write_bytes(damage(good))
    os.link(last_checkpoint(finished_run), best)
    # Copies: tensors that stay on disk would keep the file open, and Windows removes no open file.
    weights = {name: value.clone() for name, value in read_checkpoint(best)["state_dict"].items()}
    module: Any = SimpleNamespace(state_dict=lambda: weights)
    assert checkpoint_to_resume(tmp_path, module) == (best, 4)
    message = capsys.readouterr().out
    assert f"{last} cannot be read: " in message
    assert f"going on from {best}, step 4\n" in message
    assert len(message.splitlines()) == 2

    best.unlink()
    with pytest.raises(ConfigError, match=f"^resume={tmp_path}: {last} cannot be read") as error:
        checkpoint_to_resume(tmp_path, module)
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
    weights = content["state_dict"]
    for wrong, why in (
        (content | {"state_dict": weights | {"network.conv6.bias": torch.ones(3)}}, "another net"),
        ({k: v for k, v in content.items() if k != "optimizer_states"}, "no optimizer_states"),
        ({"model": weights}, "no checkpoint of this codebase"),
        (content | {"global_step": Bomb()}, "could run code"),
    ):
        torch.save(wrong, last_checkpoint(run))
        best_checkpoint(run).unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=why):
            train(resumed_config(run, []), run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_going_on_from_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """last.ckpt is damaged: best.ckpt of step 2 leads to the same end."""
    import fcn.module

    real, scores = fcn.module.segmentation_scores, iter([0.5, 0.4, 0.4])
    monkeypatch.setattr(
        fcn.module, "segmentation_scores", lambda c: real(c) | {"miou": next(scores)}
    )
    run = tmp_path / "run"
    train_tiny(run, "trainer.log_every_n_steps=1")
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    last_checkpoint(run).write_bytes(flip(last_checkpoint(run).read_bytes()))
    train(resumed_config(run, []), run)
    assert_same_weights(run, whole)
    assert steps(run) == steps(whole) == ["1", "2", "3", "4"]


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
    for name, value in (("JOB_ID", "123456"), ("JOB_NAME", "fcn"), ("NTASKS", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)  # Lightning would save and requeue by itself
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    for number, expected in ((signal.SIGUSR1, ["1"]), (signal.SIGTERM, ["1", "2"])):
        log = tmp_path / f"{number}.log"
        assert wait(fork(partial(begin_and_get, number), log)) == 128 + number, log.read_text()
        (run,) = (tmp_path / "runs" / "tiny").iterdir()
        assert steps(run) == expected
        assert f"go on with: python train.py resume={run.relative_to(tmp_path)}" in log.read_text()
        assert not list(tmp_path.rglob("hpc_ckpt*"))

    log = tmp_path / "log"
    assert wait(fork(partial(begin, "resume=auto"), log)) == 0, log.read_text()
    assert steps(run) == ["1", "2", "3", "4"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = tmp_path / "again"
    assert wait(fork(partial(begin, "resume=auto"), again)) == 0
    assert again.read_text() == (
        f"{run.relative_to(tmp_path)} is finished: nothing to do. "
        "Without resume=auto, a new run starts\n"
    )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert [*(tmp_path / "runs" / "tiny").iterdir()] == [run]


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
    every = "callbacks.last_checkpoint.every_n_steps=1"
    with pytest.raises(WriteError) as error:
        train_tiny(run, every)
    message = str(error.value)
    assert (
        f"{last_checkpoint(run)} cannot be written: No space left on device; it needs 2" in message
    )
    assert message.endswith(f"go on with: python train.py resume={run}")
    assert len(message.splitlines()) == 2
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

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(SegmentationModule, "training_step", kill_loader, count=3, patch=patch)
        check_loader_error(run, saved=3)
    train(resumed_config(run, []), run)
    assert steps(run) == ["1", "2", "3", "4"]


@pytest.mark.slow
def test_loader_killed_while_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system kills a process that takes too much memory."""
    run, load = tmp_path / "run", Shapes.__getitem__

    def greedy(self: Shapes, index: int) -> Any:
        worker = get_worker_info()
        greedy.images += 1  # type: ignore[attr-defined]
        if worker and greedy.images == 7:  # type: ignore[attr-defined]
            while len(read_metrics(run / "metrics.csv")) < 2:  # one batch is fetched ahead
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, index)

    greedy.images = 0  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(Shapes, "__getitem__", greedy)
        patch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))
        check_loader_error(run, "trainer.val_check_interval=4", saved=2)
    summary = train(resumed_config(run, ["data.num_workers=0"]), run)
    assert summary["steps"] == 4
    assert steps(run) == ["1", "2", "3", "4"]
    undisturbed = tmp_path / "undisturbed"
    train_tiny(undisturbed, "trainer.val_check_interval=4")
    assert_same_weights(run, undisturbed)


def check_loader_error(run: Path, *options: str, saved: int) -> None:
    start = time.monotonic()
    with pytest.raises(TrainingError, match=r"data\.num_workers=1 needs less, 0 none") as error:
        train_tiny(run, "data.num_workers=1", "trainer.log_every_n_steps=1", *options)
    assert f"resume={run} data.num_workers=0" in str(error.value)
    # On a busy machine, word of the death may come a step later.
    assert read_checkpoint(last_checkpoint(run))["global_step"] in (saved, saved + 1)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(("step", "saved"), [("validation_step", True), ("training_step", False)])
def test_ctrl_c_kills_a_loader_that_has_just_begun(
    step: str, saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spawned process cannot ignore the signal yet. The run was stopped; no memory was short."""

    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    monkeypatch.setattr(SegmentationModule, step, interrupted)
    with pytest.raises(Stopped if saved else KeyboardInterrupt) as stop:
        train_tiny(tmp_path / "run")
    if saved:
        assert str(stop.value) == "SIGINT at step 2"
        assert read_summary(tmp_path / "run")["status"] == "stopped"
        assert read_checkpoint(last_checkpoint(tmp_path / "run"))["global_step"] == 2


def test_ctrl_c_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaders are spawned before the run's own signal handlers are there, which takes seconds."""

    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SegmentationDataModule, "train_dataloader", interrupted)
    with pytest.raises(KeyboardInterrupt):  # which ends train.py with code 130
        train_tiny(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Lightning ignores it


# Long runs


def grow(folder: Path) -> None:
    """A run that measures itself at each validation."""
    measured: list[tuple[int, int, int]] = []
    start = SegmentationModule.on_validation_epoch_start

    def measure(self: SegmentationModule) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        files, young = len(os.listdir("/proc/self/fd")), len(gc.get_objects())
        measured.append((pages * os.sysconf("SC_PAGE_SIZE"), files, young))
        start(self)

    SegmentationModule.on_validation_epoch_start = measure  # type: ignore[method-assign]
    options = ["trainer.max_steps=8", "trainer.val_check_interval=1", "data.batch_size=1"]
    train_tiny(folder / "run", *options, "callbacks.panels.images=1", curves=True)
    (folder / "measured.json").write_text(json.dumps(measured))


@pytest.mark.slow
def test_a_run_does_not_grow(tmp_path: Path) -> None:
    """Resident memory and open files over 8 validations and their pictures."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads /proc")
    log = tmp_path / "log"
    assert wait(fork(partial(grow, tmp_path), log)) == 0, log.read_text()
    memory, files, objects = zip(*json.loads((tmp_path / "measured.json").read_text()), strict=True)
    assert len(memory) == 8
    assert max(memory[6:]) - max(memory[3:6]) < 20e6, memory
    assert max(files[2:]) == files[2], files
    assert max(objects) < 2e5, objects  # of 5e5 at the start, which Python need not look at again
