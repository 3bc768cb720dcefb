"""The one way to write a file, and the one lock.

    with atomic_write(run / "summary.json") as part:     # part: where to write for the moment
        part.write_text(text, encoding="utf-8")

    with lock(run / ".lock"):                             # one process at a time
        ...

Both work on Linux, Windows and macOS, and neither needs to be cleaned up after a kill: a lock ends
with its process, and `remove_parts` removes what a killed process had half written.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fcn.errors import WriteError, reason

SUFFIX = ".part"
# Seconds to wait for a lock. Loader processes hold the lock of a killed run for up to 5 seconds,
# until they notice that it is gone.
PATIENCE = 10.0


class LockedError(Exception):
    """Another process holds the lock."""


@contextmanager
def atomic_write(path: Path, *, size: int | None = None) -> Iterator[Path]:
    """Write a file so that it is whole or not there, whenever the process is killed.

    Args:
        path: the file. An older one of that name is replaced at the end, in one step.
        size: bytes that the file needs, for the message of the error, if that is known.

    Yields:
        A hidden path in the same folder, to be written in whatever way is at hand.

    Raises:
        WriteError: there is no room, no folder, or no permission.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
    with writing(path, size):
        try:
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # a power cut must not leave an empty file under the name
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)  # makes room for others, on a full disk
            raise


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, with the line ends that are in `text`.

    Of file names that are not UTF-8, the odd bytes come out as `\\udcff` and the like.
    """
    with (
        atomic_write(path) as part,
        part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable JSON. NaN and Inf, which JSON does not have, become null."""
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove_parts(folder: Path) -> None:
    """Remove what a killed process had not finished writing, in a folder and all below it."""
    for part in folder.rglob(f".*{SUFFIX}"):
        part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Say which file cannot be written, why, and how much room there is.

    Raises:
        WriteError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        message = f"{path} cannot be written: {reason(error)}"
        if not path.parent.is_dir():
            message += f"; there is no folder {path.parent}"
        else:
            need = f"it needs {size / 1e6:,.1f} MB, " if size else ""
            free = shutil.disk_usage(path.parent).free
            message += f"; {need}{free / 1e6:,.1f} MB are free there"
        raise WriteError(message) from error


@contextmanager
def lock(path: Path, *, timeout: float = PATIENCE) -> Iterator[None]:
    """Hold a lock. It ends with the process, however that ends.

    Args:
        path: the lock's own file. It is removed again.
        timeout: seconds to wait for another process; -1: for as long as it takes.

    Raises:
        LockedError: another process still holds the lock.
    """
    guard = FileLock(path)
    try:
        guard.acquire(timeout=timeout)
    except Timeout as error:
        raise LockedError(str(path)) from error
    try:
        yield
    finally:
        # Removed while it is held: a process that waits for it then notices, and makes a new one.
        # Windows does not let go of an open file; there it is removed after the release.
        with suppress(OSError):
            path.unlink()
        guard.release()
        if os.name == "nt":
            with suppress(OSError):
                path.unlink()


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock at this moment."""
    if not path.exists():
        return False
    guard = FileLock(path)
    try:
        guard.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written: no process of ours is at work there
        return False
    guard.release()
    return False
