"""The atomic write and the lock, also where a process is killed in the middle."""

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fcn import files
from fcn.errors import WriteError
from fcn.files import (
    SUFFIX,
    LockedError,
    atomic_write,
    create_folder,
    is_locked,
    lock,
    remove_parts,
    write_json,
    write_text,
    writing,
)

Child = tuple[multiprocessing.Process, Connection]


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- writing


def test_the_file_appears_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_write(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == tmp_path
        assert part.name.startswith(".a.json.")
        assert part.suffix == SUFFIX
        assert synced == []
    assert path.read_text() == "new"
    assert content(tmp_path) == ["a.json"]
    assert len(synced) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as part:
            part.write_text("half of the ne")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old"
    assert content(tmp_path) == ["a.json"]


def test_a_kill_leaves_the_old_file_and_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed before `os.replace` runs no more of its code."""
    path = tmp_path / "deep" / "a.json"
    path.parent.mkdir()
    path.write_text("old")
    writer = atomic_write(path)
    writer.__enter__().write_text("half of the ne")
    assert path.read_text() == "old"
    assert len(content(path.parent)) == 2
    (tmp_path / "a.part").touch()  # a user's own file, as it is not hidden
    (tmp_path / f".folder{SUFFIX}").mkdir()  # cannot be unlinked
    remove_parts(tmp_path)
    assert content(path.parent) == ["a.json"]
    assert content(tmp_path) == [f".folder{SUFFIX}", "a.part", "deep"]
    remove_parts(tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="was not written"):  # closes what is open in this test
        writer.__exit__(None, None, None)


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"  # the block of the second ended before
    assert content(tmp_path) == ["a"]


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
        with atomic_write(tmp_path / name) as part:
            part.write_text("a")
        assert (tmp_path / name).read_text() == "a"


def refusing(code: int) -> Any:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


def test_message_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refusing(errno.ENOSPC))
    path = tmp_path / "last.ckpt"
    with pytest.raises(WriteError) as caught, atomic_write(path, size=123_456_789) as part:
        part.write_text("half")
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be written: No space left on device; it needs 123.5 ")
    assert message.endswith(" MB are free there")
    assert content(tmp_path) == []  # what was written makes room for others


def test_message_of_a_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.txt"
    with pytest.raises(WriteError) as caught:
        write_text(path, "a")
    wanted = f"{path} cannot be written: No such file or directory; there is no folder "
    assert str(caught.value) == wanted + str(path.parent)


def test_message_of_a_file_that_is_open_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", refusing(errno.EACCES))
    monkeypatch.setattr(files, "PATIENCE", 0)
    with pytest.raises(WriteError, match=r"metrics\.csv .* close other programs that have it open"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert content(tmp_path) == ["metrics.csv"]
    path.unlink()
    with pytest.raises(WriteError, match=r"Permission denied; [\d,.]+ MB are free there$"):
        write_text(path, "new")


def test_a_file_that_is_open_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, results = tmp_path / "last.ckpt", iter([refusing(errno.EACCES), os.replace])
    monkeypatch.setattr(os, "replace", lambda *paths: next(results)(*paths))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    write_text(path, "new")
    assert path.read_text() == "new"


def test_writing_leaves_other_errors_alone(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writing(tmp_path / "a"):
        raise KeyError("a")


def test_a_folder_for_results(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for folder, kept in (("old", True), ("old/new", False), ("new/a", False), ("full", True)):
        with create_folder(tmp_path / folder):
            assert (tmp_path / folder).is_dir()
            if folder == "full":
                (tmp_path / folder / "x").touch()
        assert (tmp_path / folder).exists() == kept, folder
    assert not (tmp_path / "new").exists()


def test_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "Straße 東京\r\nx\n\udcff")  # at its end, a byte that is not UTF-8
    assert path.read_bytes() == "Straße 東京\r\nx\n\\udcff".encode()
    write_json(path, {"a": float("nan"), "b": [1, {"c": (float("inf"), 0.5)}], "d": None})
    assert json.loads(path.read_text()) == {"a": None, "b": [1, {"c": [None, 0.5]}], "d": None}
    assert path.read_text().endswith("}\n")


# ---- the lock


def hold(path: Path, connection: Connection, children: int) -> None:
    """What a run does: it holds the lock while its loaders, forked from it, live."""
    for _ in range(children):
        fork = multiprocessing.get_context("fork").Process(target=wait_for_parent, daemon=False)
    with lock(path):
        if children:
            fork.start()
        connection.send(fork.pid if children else None)
        connection.recv()
    connection.send("released")
    connection.recv()


def wait_for_parent() -> None:
    """As torch's loaders do: they look every now and then whether their parent is there."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.05)
    time.sleep(0.5)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Any]:
    """Starts a process that holds the lock `tmp_path/.lock` until it hears something."""
    started: list[multiprocessing.Process] = []

    def start(children: int = 0) -> Child:
        context = multiprocessing.get_context("forkserver" if os.name != "nt" else "spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(tmp_path / ".lock", theirs, children))
        process.start()
        started.append(process)  # type: ignore[arg-type]
        assert ours.poll(60)
        ours.recv()
        return process, ours  # type: ignore[return-value]

    yield start
    for process in started:
        process.kill()
        process.join()


def test_one_process_at_a_time(tmp_path: Path, holder: Any) -> None:
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
    with lock(path, timeout=0):
        assert content(tmp_path) == [".lock"]
    assert content(tmp_path) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: Any) -> None:
    process, _ = holder()
    process.kill()
    process.join()
    assert content(tmp_path) == [".lock"]  # the file stays, but nobody holds it
    assert not is_locked(tmp_path / ".lock")
    with lock(tmp_path / ".lock", timeout=0):
        pass
    assert content(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")
def test_the_loaders_of_a_killed_run_are_waited_for(tmp_path: Path, holder: Any) -> None:
    process, _ = holder(children=1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with lock(tmp_path / ".lock"):
        assert content(tmp_path) == [".lock"]


def test_waiting_for_another(tmp_path: Path, holder: Any) -> None:
    """The one that waits gets a new file, as the other removes its own while it holds the lock."""
    _, connection = holder()
    release = Thread(target=lambda: (time.sleep(0.2), connection.send("release it")))
    release.start()
    with lock(tmp_path / ".lock", timeout=-1):
        release.join()
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
