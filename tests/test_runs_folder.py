"""Run folders: a new one for each run, the lock on them, their settings; versions of the code."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fcn import files
from fcn.errors import ConfigError, WriteError
from fcn.runs import folder as folders
from fcn.runs import versions
from fcn.runs.folder import (
    create_run_folder,
    is_training,
    lock_run,
    name_parts,
    newest_first,
    read_overrides,
    started_with,
)
from fcn.runs.versions import git_revision


def test_order_of_runs(tmp_path: Path) -> None:
    jobs = ["0", "0_2", "1", "2", "10"]  # of a sweep
    for name in reversed(jobs):
        (tmp_path / name).mkdir()
    assert [path.name for path in sorted(tmp_path.glob("*"), key=name_parts)] == jobs
    assert [path.name for path in newest_first(tmp_path)] == jobs[::-1]


def test_folders_of_two_runs_differ(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "fcn8s" / "now"
    assert create_run_folder(wanted) == wanted
    assert create_run_folder(wanted) == wanted.with_name("now_2")  # the first has no files yet
    (tmp_path / "file").touch()
    assert create_run_folder(tmp_path / "file") == tmp_path / "file_2"
    (tmp_path / "0").mkdir()  # as Hydra does
    assert create_run_folder(tmp_path / "0") == tmp_path / "0"
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "summary.json").touch()
    assert create_run_folder(tmp_path / "1") == tmp_path / "1_2"


def test_two_runs_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen the folder empty before either has put anything there."""
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))
    made = [create_run_folder(tmp_path / "run") for _ in range(3)]
    assert [folder.name for folder in made] == ["run", "run_2", "run_3"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("create", [create_run_folder, folders.create_sweep_folder])
def test_folder_that_cannot_be_made(tmp_path: Path, create: Callable[[Path], Path]) -> None:
    """Below a file, or below a link to a disk that is not mounted."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for folder in (tmp_path / "file" / "now", tmp_path / "link" / "fcn8s" / "now"):
        with pytest.raises(WriteError, match=r"now cannot be written: .*; there is no folder"):
            create(folder)


def test_one_process_trains_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock_run(tmp_path):
        monkeypatch.setattr(files, "PATIENCE", 0.05)
        assert is_training(tmp_path)
        message = f"being trained by process {os.getpid()} on .*;"
        with pytest.raises(folders.RunLockedError, match=message) as error, lock_run(tmp_path):
            pass
    assert isinstance(error.value, ConfigError)
    assert not is_training(tmp_path)
    assert list(tmp_path.iterdir()) == []


def can_lock(run: Path) -> bool:
    with lock_run(run):
        return True


@pytest.mark.parametrize("is_free", [can_lock, lambda run: not is_training(run)])
def test_lock_that_loaders_still_hold(tmp_path: Path, is_free: Callable[[Path], bool]) -> None:
    """For a short while, those of a killed run do, which is waited for.

    The next process removes what that run had half written.
    """
    (tmp_path / "checkpoints").mkdir()
    for left in (".summary.json.1.part", "checkpoints/.last.ckpt.part", ".lock_holder"):
        (tmp_path / left).touch()
    begun = threading.Event()

    def hold() -> None:
        with files.lock(tmp_path / ".lock"):
            begun.set()
            time.sleep(0.2)

    threading.Thread(target=hold).start()
    begun.wait()
    assert is_free(tmp_path)
    if is_free is can_lock:
        assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]


def test_settings_of_a_run(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"a": 1, "resume": str(tmp_path)})
    assert not started_with(tmp_path, [])  # it is not a run yet
    given = ["a='x: ${y}'", "callbacks.panel_images=3", "data.root=a (b)", "resume=auto"]
    folders.write_settings(tmp_path, cfg, given)
    (tmp_path / "error.txt").touch()  # it has crashed, and goes on
    folders.write_settings(tmp_path, cfg, ["b=2"])
    assert OmegaConf.load(tmp_path / "config.yaml") == {"a": 1, "resume": None}
    # By today's names, and with the quotes that a path has had since then.
    first = ["a='x: ${y}'", "callbacks.panels.images=3", "data.root='a (b)'"]
    assert read_overrides(tmp_path) == (first, ["b=2"])
    assert not (tmp_path / "error.txt").exists()
    for changes in (["+c=1", "b=3"], [], ["c=2", "a=0"], ["c=2", "a=0"]):  # it is resumed again
        folders.write_settings(tmp_path, cfg, [f"resume={tmp_path}", *changes])
    assert read_overrides(tmp_path) == (first, ["b=3", "c=2", "a=0"])
    settings = {"a": "0", "callbacks.panels.images": "3", "data.root": "'a (b)'", "b": "3"}
    assert folders.read_changes(tmp_path) == settings | {"c": "2"}
    assert started_with(tmp_path, [*first, "resume=auto"])
    assert not started_with(tmp_path, first[:1])
    assert not started_with(tmp_path, [*first, "b=3"])


def test_settings_of_a_run_without_overrides(tmp_path: Path) -> None:
    for changes in ([], ["a=2"]):
        folders.write_settings(tmp_path, OmegaConf.create({"a": 1, "resume": None}), changes)
    assert started_with(tmp_path, [])
    assert read_overrides(tmp_path) == ([], ["a=2"])


def test_folder_of_results(tmp_path: Path) -> None:
    ours = tmp_path / "run" / "checkpoints" / "best.ckpt"
    assert folders.output_folder(ours, "evaluation") == tmp_path / "run" / "evaluation"
    assert folders.output_folder(tmp_path / "x.ckpt", "evaluation") == tmp_path / "evaluation"


def test_git_revision() -> None:
    revision = git_revision()
    if revision is None:
        pytest.skip("no git checkout")
    assert len(revision.removesuffix("-dirty")) == 40


def test_a_result_without_wandb_has_the_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "PACKAGES", ("torch", "a_package_that_is_not_there"))
    found = versions.versions()
    assert list(found) == ["python", "torch"]
