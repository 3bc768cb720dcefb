"""The atomic write and the lock, also where a process is killed in the middle."""

import errno
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from fcn import files
from fcn.errors import ConfigError, WriteError
from fcn.files import SUFFIX, LockedError, atomic_write, expanded, is_locked, lock, write_text


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- names


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):  # the latter on Windows
        monkeypatch.setenv(name, str(tmp_path))
    assert expanded("~/x") == expanded(Path("~/x")) == tmp_path / "x"
    assert expanded("a/~") == Path("a/~")
    if sys.platform != "win32":  # there, any user has a folder beside this one
        assert expanded("~no_user/x") == Path("~no_user/x")


# ---- writing


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file that is to be written anew, alone in its folder."""
    path = tmp_path / "folder" / "a.json"
    path.parent.mkdir()
    path.write_text("old")
    return path


def test_the_file_appears_at_the_end(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with atomic_write(old) as part:
        part.write_text("new")
        assert old.read_bytes() == b"old"
        assert part.parent == old.parent
        assert part.name.startswith(".a.json.")
        assert part.suffix == SUFFIX
        assert synced == []
    assert old.read_bytes() == b"new"
    assert content(old.parent) == ["a.json"]
    assert len(synced) == 1


def test_an_error_leaves_the_old_file_and_is_raised_as_it_is(old: Path) -> None:
    def interrupted() -> None:
        with atomic_write(old) as part:
            part.write_text("half of the ne")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert old.read_bytes() == b"old"
    assert content(old.parent) == ["a.json"]


def test_a_kill_leaves_the_old_file_and_a_part(old: Path, tmp_path: Path) -> None:
    """A process that is killed before `os.replace` runs no more of its code."""
    writer = atomic_write(old)
    writer.__enter__().write_text("half of the ne")
    assert old.read_bytes() == b"old"
    assert len(content(old.parent)) == 2
    (tmp_path / "a.part").touch()  # a user's own file, as it is not hidden
    (tmp_path / f".folder{SUFFIX}").mkdir()  # cannot be unlinked
    files.remove_parts(tmp_path)
    assert content(old.parent) == ["a.json"]
    assert content(tmp_path) == [f".folder{SUFFIX}", "a.part", "folder"]
    files.remove_parts(tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="was not written"):  # closes what is open in this test
        writer.__exit__(None, None, None)


def test_two_writers_do_not_disturb_each_other(old: Path) -> None:
    with atomic_write(old) as first, atomic_write(old) as second:
        first.write_text("1")
        second.write_text("2")
    assert old.read_bytes() == b"1"  # the block of the second ended before
    assert content(old.parent) == ["a.json"]


def test_nothing_written_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    message = r"a\.npy was not written: there is no .*\.part"
    with pytest.raises(RuntimeError, match=message), atomic_write(tmp_path / "a.npy") as part:
        part.with_suffix(".npy").touch()  # as numpy does, which adds its own suffix
    with atomic_write(tmp_path / "empty") as part:
        part.touch()
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.skipif(sys.platform == "win32", reason="its paths are shorter")
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("x" * 255, "東" * 85):
        write_text(tmp_path / name, "a")
        assert (tmp_path / name).read_text() == "a"


def refusing(code: int) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


FREE = r"it needs 123\.5 MB, [\d,.]+ MB are free there"


@pytest.mark.parametrize(
    ("name", "fails", "code", "message"),
    [
        ("a.json", "fsync", errno.ENOSPC, f"No space left on device; {FREE}"),
        ("a.json", "replace", errno.EACCES, r"Permission denied; close other programs .*\)"),
        ("new", "replace", errno.EACCES, f"Permission denied; {FREE}"),
        ("none/a", "access", 0, "No such file or directory; there is no folder .*folder.none"),
    ],
)
def test_message_of_a_file_that_cannot_be_written(
    old: Path, name: str, fails: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is removed, which makes room for others."""
    monkeypatch.setattr(files, "PATIENCE", 0)
    monkeypatch.setattr(os, fails, refusing(code))
    path, message = old.parent / name, f"{name} cannot be written: {message}$"
    with pytest.raises(WriteError, match=message), atomic_write(path, size=123_456_789) as part:
        part.write_text("half")
    assert old.read_bytes() == b"old"
    assert content(old.parent) == ["a.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="it has no folder that Path.exists refuses")
def test_a_folder_that_may_not_be_opened(tmp_path: Path) -> None:
    folder, user = tmp_path / "closed", os.geteuid()
    folder.mkdir(mode=0)
    os.seteuid(user or 65534)  # root may open any folder
    try:
        with pytest.raises(WriteError, match="closed/a cannot be written: Permission denied"):
            write_text(folder / "a", "x")
        with pytest.raises(WriteError, match="Permission denied"), lock(folder / ".lock"):
            pass
        assert not is_locked(folder / ".lock")
        with (
            pytest.raises(ConfigError, match=r"output=.*/closed/new: Permission denied"),
            files.create_folder(folder / "new"),
        ):
            pass
    finally:
        os.seteuid(user)


def test_a_file_that_is_open_for_a_moment(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([refusing(errno.EACCES), os.replace])
    monkeypatch.setattr(os, "replace", lambda *paths: next(results)(*paths))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    write_text(old, "new")
    assert old.read_bytes() == b"new"


def test_a_folder_for_results(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for folder, kept in (("old", True), ("old/new", False), ("new/a", False), ("full", True)):
        with files.create_folder(tmp_path / folder):
            assert (tmp_path / folder).is_dir()
            if folder == "full":
                (tmp_path / folder / "x").touch()
        assert (tmp_path / folder).exists() == kept, folder
    assert not (tmp_path / "new").exists()


def test_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "Straße 東京\r\nx\n\udcff")  # at its end, a byte that is not UTF-8
    assert path.read_bytes() == "Straße 東京\r\nx\n\\udcff".encode()
    files.write_json(path, {"a": float("nan"), "b": [1, {"c": (float("inf"), 0.5)}], "d": None})
    assert json.loads(path.read_text()) == {"a": None, "b": [1, {"c": [None, 0.5]}], "d": None}
    assert path.read_text().endswith("}\n")


# ---- the lock


def hold(path: Path, connection: Connection) -> None:
    with lock(path):
        connection.send("locked")
        connection.recv()
    connection.send("released")
    connection.recv()


Start = Callable[..., tuple[Any, Connection]]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that holds the lock `tmp_path/.lock` until it hears something."""
    started: list[Any] = []

    def start() -> tuple[Any, Connection]:
        context = multiprocessing.get_context("forkserver" if os.name != "nt" else "spawn")
        ours, theirs = context.Pipe()
        started.append(context.Process(target=hold, args=(tmp_path / ".lock", theirs)))
        started[-1].start()
        assert ours.poll(60)
        assert ours.recv() == "locked"
        return started[-1], ours

    yield start
    for process in started:
        process.kill()
        process.join()


def test_one_process_at_a_time(tmp_path: Path, holder: Start) -> None:
    path = tmp_path / ".lock"
    assert not is_locked(path)
    process, connection = holder()
    assert is_locked(path)
    with pytest.raises(LockedError, match=r"\.lock"), lock(path, timeout=0):
        pass
    assert is_locked(path)
    connection.send("release it")
    assert connection.recv() == "released"
    assert content(tmp_path) == []  # its file is gone while the process is not
    assert process.is_alive()
    assert not is_locked(path)


def test_the_lock_of_a_killed_run(tmp_path: Path, holder: Start) -> None:
    """Its file stays. test_runs_folder.py waits for loaders, which outlive it for a moment."""
    process, _ = holder()
    process.kill()
    process.join()
    assert content(tmp_path) == [".lock"]
    with lock(tmp_path / ".lock"):
        assert content(tmp_path) == [".lock"]
    assert content(tmp_path) == []


def test_waiting_for_another(tmp_path: Path, holder: Start) -> None:
    """The one that waits gets a new file, as the other removes its own while it holds the lock."""
    _, connection = holder()
    Timer(0.2, connection.send, ["release it"]).start()
    with lock(tmp_path / ".lock", timeout=-1):
        assert connection.recv() == "released"
        assert (tmp_path / ".lock").exists()
        with pytest.raises(LockedError), lock(tmp_path / ".lock", timeout=0):
            pass


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / ".lock"
    with pytest.raises(WriteError, match="cannot be written"), lock(path):
        pass
    assert not is_locked(path)
