"""Run folders: a new one for each run, the lock on them, their settings; versions of the code."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fcn import files
from fcn.errors import ConfigError, WriteError
from fcn.runs.folder import (
    RunLockedError,
    create_run_folder,
    create_sweep_folder,
    is_training,
    lock_run,
    output_folder,
    read_changes,
    read_overrides,
    started_with,
    write_settings,
)
from fcn.runs.versions import git_revision


def test_folders_of_two_runs_differ(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "fcn8s" / "now"
    assert create_run_folder(wanted) == wanted
    assert create_run_folder(wanted) == wanted.with_name("now_2")  # the first has no files yet
    (tmp_path / "file").touch()
    assert create_run_folder(tmp_path / "file") == tmp_path / "file_2"


def test_folder_that_hydra_has_made(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    assert create_run_folder(tmp_path / "0") == tmp_path / "0"
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "summary.json").touch()
    assert create_run_folder(tmp_path / "1") == tmp_path / "1_2"


def test_two_runs_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen the folder empty before either has put anything there."""
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))
    folders = [create_run_folder(tmp_path / "run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["run", "run_2", "run_3"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"run cannot be written: .*; there is no folder"):
        create_run_folder(tmp_path / "file" / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("create", [create_run_folder, create_sweep_folder])
def test_folder_on_a_disk_that_is_not_mounted(
    tmp_path: Path, create: Callable[[Path], Path]
) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with pytest.raises(WriteError, match=r"now cannot be written: .*; there is no folder"):
        create(tmp_path / "runs" / "fcn8s" / "now")


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A run folder that is locked for a short while, as by the loaders of a killed run."""
    (tmp_path / "held").mkdir()
    begun = threading.Event()

    def hold() -> None:
        with files.lock(tmp_path / "held" / ".lock"):
            begun.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    yield tmp_path / "held"
    thread.join()


def test_one_process_trains_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock_run(tmp_path):
        monkeypatch.setattr(files, "PATIENCE", 0.05)
        assert is_training(tmp_path)
        with (
            pytest.raises(RunLockedError, match=f"being trained by process {os.getpid()} on .*;"),
            lock_run(tmp_path),
        ):
            pass
    assert not is_training(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert issubclass(RunLockedError, ConfigError)


def test_lock_that_loaders_still_hold(held: Path) -> None:
    with lock_run(held):
        pass
    assert list(held.iterdir()) == []


def test_nobody_trains_any_more(held: Path) -> None:
    assert not is_training(held)


def test_the_next_process_removes_half_written_files(tmp_path: Path) -> None:
    (tmp_path / "panels" / "frames").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    left = [".summary.json.1.part", "checkpoints/.last.ckpt.part", ".lock_holder", ".lock"]
    kept = {"metrics.csv", "curves.png", "panels/2.png", "checkpoints/last.ckpt"}
    for name in (*left, *kept):
        (tmp_path / name).touch()
    with lock_run(tmp_path):
        pass
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert found == kept


def test_settings_of_a_run(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"a": 1, "resume": str(tmp_path)})
    assert not started_with(tmp_path, [])  # it is not a run yet
    given = ["a='x: ${y}'", "callbacks.panel_images=3", "data.root=a (b)", "resume=auto"]
    write_settings(tmp_path, cfg, given)
    (tmp_path / "error.txt").touch()  # it has crashed, and goes on
    write_settings(tmp_path, cfg, ["b=2"])
    assert OmegaConf.load(tmp_path / "config.yaml") == {"a": 1, "resume": None}
    # By today's names, and with the quotes that a path has had since then.
    first = ["a='x: ${y}'", "callbacks.panels.images=3", "data.root='a (b)'"]
    assert read_overrides(tmp_path) == (first, ["b=2"])
    assert not (tmp_path / "error.txt").exists()
    for changes in (["+c=1", "b=3"], [], ["c=2", "a=0"], ["c=2", "a=0"]):  # it is resumed again
        write_settings(tmp_path, cfg, [f"resume={tmp_path}", *changes])
    assert read_overrides(tmp_path) == (first, ["b=3", "c=2", "a=0"])
    settings = {"a": "0", "callbacks.panels.images": "3", "data.root": "'a (b)'", "b": "3"}
    assert read_changes(tmp_path) == settings | {"c": "2"}
    assert started_with(tmp_path, [*first, "resume=auto"])
    assert not started_with(tmp_path, first[:1])
    assert not started_with(tmp_path, [*first, "b=3"])


def test_settings_of_a_run_without_overrides(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"a": 1, "resume": None})
    write_settings(tmp_path, cfg, [])
    write_settings(tmp_path, cfg, ["a=2"])
    assert started_with(tmp_path, [])
    assert read_overrides(tmp_path) == ([], ["a=2"])


def test_folder_of_results(tmp_path: Path) -> None:
    ours = tmp_path / "run" / "checkpoints" / "best.ckpt"
    assert output_folder(ours, "evaluation") == tmp_path / "run" / "evaluation"
    assert output_folder(tmp_path / "x.ckpt", "evaluation") == tmp_path / "evaluation"


def test_git_revision() -> None:
    revision = git_revision()
    if revision is None:
        pytest.skip("no git checkout")
    assert len(revision.removesuffix("-dirty")) == 40
