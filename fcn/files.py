"""The one way to write a file, and the one lock.

    with atomic_write(run / "summary.json") as part:     # `part` is a path to write to for now
        part.write_text(text, encoding="utf-8")

    with lock(run / ".lock"):                             # one process at a time
        ...

Both work on Linux, Windows and macOS, and neither needs to be cleaned up by hand after a kill: a
lock ends with its process, and `remove_parts` removes what a killed process had half written.

`expanded` reads a path as a shell does, and `sha256` tells the content of a file from any other.
"""

import csv
import hashlib
import io
import json
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from filelock import FileLock, Timeout

from fcn.errors import ConfigError, WriteError, reason

SUFFIX = ".part"
# Seconds to wait for a lock, or for another program that has a file open. The worker processes of a
# killed run may hold its lock for up to 5 seconds, until they notice that the run is gone.
PATIENCE = 10.0


class LockedError(Exception):
    """Another process holds the lock."""


def expanded(path: str | Path) -> Path:
    """A path with the home folder in place of "~" or "~user", which shells keep within a word.

    If there is no such user, the path stays as it is, as in a shell. `Path.expanduser` would raise
    an error.
    """
    return Path(os.path.expanduser(path))


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path, *, size: int | None = None, wait: bool = True) -> Iterator[Path]:
    """Write a file so that it is complete or not there, whenever the process is killed.

    Args:
        path: the file. An older one of that name is replaced at the end, in one step.
        size: bytes that the file needs, if that is known. The message of an error then says so.
        wait: for other programs that have the older file open, see `retry`.

    Yields:
        A hidden path in the same folder. Write the content there, with any function.

    Raises:
        WriteError: there is no room, no folder, or no permission.
        RuntimeError: nothing was written to the hidden path, which is a mistake of the caller.
    """
    # Of a long name only the beginning is used. A file system allows 255 bytes for a name, and the
    # random characters and the suffix are added to it.
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}{SUFFIX}")
    with writing(path, size):
        try:
            yield part
            if not part.exists():
                raise RuntimeError(f"{path} was not written: there is no {part}")
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # or a power cut could leave an empty file of this name
            if wait:
                retry(lambda: os.replace(part, path))
            else:
                os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink()  # on a full disk this makes room for others
            raise


def retry(action: Callable[[], None]) -> None:
    """Do something with a file that other programs may have open, for up to `PATIENCE` seconds.

    Windows neither replaces nor removes such a file. A virus scanner or an indexer looks at each
    new file for a moment, and evaluate.py may read a checkpoint that a run wants to write anew.

    Raises:
        OSError: it was not possible.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return action()
        except PermissionError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)


@contextmanager
def optional_file(path: Path, action: str = "written") -> Iterator[None]:
    """Warn instead of failing where a file cannot be written that a run can do without.

    Such a file is a picture, or a table that is written again later. The disk may be full, or the
    user may have the file open in another program: Windows replaces no open file. Python shows the
    same warning only once, so that a full disk is not reported at every validation.

    Args:
        path: the file, for the warning.
        action: what cannot be done with it, if it is not writing.
    """
    try:
        yield
    except (OSError, WriteError) as error:
        why = reason(error.__cause__ or error)
        message = f"{path} cannot be {action} ({why}); training goes on"
        warnings.warn(message, stacklevel=3)


@contextmanager
def create_folder(folder: Path, *names: str) -> Iterator[None]:
    """Create a folder for results, and see that they can be written, before the work is done.

    If the folder is new, and nothing was written when the work ends, it is removed again.

    Args:
        folder: the value of the setting `output`.
        names: of files that will be written there.

    Raises:
        ConfigError: the folder cannot be made or written, or one of the files cannot.
    """
    new: list[Path] = []
    try:
        try:
            new = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            why = "is a file, not a folder" if os.path.isfile(folder) else reason(error)
            raise ConfigError(f"output={folder}: {why}") from error
        for path in (folder / name for name in names):
            if path.is_dir():
                raise ConfigError(f"output={path}: there is a folder of this name")
        yield
    finally:
        for path in new:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, with the line ends that are in `text`.

    A file name in the text may hold bytes that are not UTF-8. They are written as `\\udcff`.
    """
    with atomic_write(path) as part:
        part.write_bytes(text.encode(errors="backslashreplace"))


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Rows of a CSV file, the names of the columns first."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON. NaN and infinity, which JSON does not have, become null."""
    # json.dumps writes these as NaN, Infinity and -Infinity, which only Python reads. So the text
    # is read again, with None in their place.
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_text(path, json.dumps(content, indent=2) + "\n")


def remove_parts(folder: Path) -> None:
    """Remove what killed processes had not finished writing, in a folder and all below it.

    Call it only where no other process writes at the moment, such as in a run folder that you have
    locked.
    """
    for part in folder.rglob(f".*{SUFFIX}"):
        with suppress(OSError):  # it does no harm where it cannot be removed
            part.unlink()


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Turn an error of writing into one that names the file, the reason and the room on the disk.

    Args:
        path: the file or folder that is being written.
        size: the bytes that it needs, if that is known.

    Raises:
        WriteError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        message = f"{path} cannot be written: {reason(error)}"
        refused = isinstance(error, PermissionError)
        # Unlike Path.exists and Path.is_dir, these raise no error in a folder that is not readable.
        if not os.path.isdir(path.parent):
            message += "" if refused else f"; there is no folder {path.parent}"
        elif refused and os.path.exists(path) and os.access(path.parent, os.W_OK):
            message += "; close other programs that have it open (Windows replaces no open file)"
        else:
            need = f"it needs {size / 1e6:,.1f} MB, " if size else ""
            free = shutil.disk_usage(path.parent).free
            message += f"; {need}{free / 1e6:,.1f} MB are free there"
        raise WriteError(message) from error


@contextmanager
def lock(path: Path, *, timeout: float = PATIENCE) -> Iterator[None]:
    """Hold a lock. It ends with the process, however that ends.

    Args:
        path: the lock's own file, which is removed again at the end.
        timeout: seconds to wait for another process; -1 waits for as long as it takes.

    Raises:
        LockedError: another process still holds the lock.
        WriteError: the lock's file cannot be made.
    """
    guard = FileLock(path)
    with writing(path):
        try:
            guard.acquire(timeout=timeout)
        except Timeout as error:
            raise LockedError(str(path)) from error
    try:
        yield
    finally:
        # The file is removed while the lock is still held. A process that waits for the lock then
        # notices this and creates a new file (filelock 3.21 and newer). Windows cannot remove an
        # open file; there, filelock itself removes it after the release.
        with suppress(OSError):
            path.unlink()
        guard.release()


def is_locked(path: Path, *, timeout: float = 0.0) -> bool:
    """Whether another process holds the lock, and still holds it after `timeout` seconds."""
    if not os.path.exists(path):
        return False
    try:
        with lock(path, timeout=timeout):
            return False
    except LockedError:
        return True
    except WriteError:  # no process of ours can hold a lock in a folder that cannot be written
        return False
