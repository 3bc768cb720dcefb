"""Stands in for Windows on Linux: each Python process with this folder on PYTHONPATH runs it first.

- Modules that only POSIX has cannot be imported.
- For this project's code, signals and functions of `os` that only POSIX has do not exist. Linux's
  own half of the standard library, of torch and of psutil cannot work without some of them.
- Processes are spawned; they cannot be forked.
- A file that any process of the test has open, or mapped into memory, can be neither removed,
  replaced nor renamed.
- Text that this project reads or writes without saying that it is UTF-8 is an error, if
  PYTHONWARNDEFAULTENCODING=1 is set too.
"""

import builtins
import multiprocessing
import multiprocessing.context
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECT = str(HERE.parents[1])
LIBRARY = os.path.dirname(os.__file__) + os.sep
NO_MODULES = {"fcntl", "grp", "pwd", "resource", "syslog", "termios"}
NO_FUNCTIONS = """chown fork forkpty getegid geteuid getgid getloadavg getpgid getuid killpg mkfifo
nice pread sched_getaffinity sched_setaffinity setsid statvfs sync sysconf uname wait wait3"""
SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}  # that Windows has
GONE = {
    "os": set(NO_FUNCTIONS.split()),
    "signal": {n for n in dir(signal) if re.fullmatch("SIG[A-Z]+[0-9]?", n)} - SIGNALS
    | {"alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"},
}


def without(module: ModuleType) -> ModuleType:
    """A module that lacks some names."""
    copy = ModuleType(module.__name__)
    gone = GONE[module.__name__]
    copy.__dict__.update({name: value for name, value in vars(module).items() if name not in gone})
    return copy


real_import = builtins.__import__
stand_ins = {"os": without(os), "signal": without(signal)}


def import_as_on_windows(name: str, place: Any = None, *arguments: Any, **options: Any) -> Any:
    importer = (place or {}).get("__file__") or ""
    if name in NO_MODULES and not has_linux_half(importer):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    imported = real_import(name, place, *arguments, **options)
    ours = importer.startswith(PROJECT) and not importer.startswith(str(HERE))
    return stand_ins[name.partition(".")[0]] if ours and imported in (os, signal) else imported


def has_linux_half(importer: str) -> bool:
    """Whether a file belongs to Python or psutil, which have other code for Windows."""
    library = importer.startswith(LIBRARY) and "-packages" not in importer
    return library or "/psutil/" in importer


def users(path: str) -> Iterator[str]:
    """The processes of the test that have a file open, or mapped into memory."""
    real, file = os.path.realpath(path), os.stat(path)
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if str(HERE).encode() not in Path(f"/proc/{process}/environ").read_bytes():
                continue
            if f" {real}\n" in Path(f"/proc/{process}/maps").read_text("utf-8"):
                yield f"process {process}, mapped"
            for number in os.listdir(f"/proc/{process}/fd"):
                opened = os.stat(f"/proc/{process}/fd/{number}")
                if (opened.st_dev, opened.st_ino) == (file.st_dev, file.st_ino):
                    yield f"process {process}, open"
        except OSError:  # it has ended, or has closed the file
            continue


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Python calls this before it renames or removes a file."""
    if event == "os.rename":
        paths = list(zip(arguments[:2], arguments[2:], strict=True))
    elif event == "os.remove":
        paths = [(arguments[0], arguments[1])]
    else:
        return
    # On Linux, tempfile removes a file that it has just opened. On Windows it does not.
    if sys._getframe(1).f_code.co_filename.endswith(("tempfile.py", "multiprocessing/heap.py")):
        return
    for path, folder in paths:
        full = os.fsdecode(path)
        if folder not in (None, -1):
            full = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), full)
        if os.path.isfile(full) and not os.path.islink(full):
            for user in users(full):
                raise PermissionError(13, f"used by another process ({user})", full)


builtins.__import__ = import_as_on_windows
multiprocessing.set_start_method("spawn")
multiprocessing.get_all_start_methods = lambda: ["spawn"]
for method in ("fork", "forkserver"):
    del multiprocessing.context._concrete_contexts[method]
warnings.filterwarnings("ignore", message="only soft file lock")  # filelock has one for Windows
warnings.filterwarnings("ignore", category=EncodingWarning)
warnings.filterwarnings("error", category=EncodingWarning, module=r"fcn\.|__main__|train|evaluate")
sys.addaudithook(refuse)
