"""Work in processes of its own, without the ten seconds that importing torch takes.

    process = fork(partial(train_tiny, run), tmp_path / "log")
    assert wait(process) == 0

A server process has imported everything and has no threads; it forks itself for each piece of work.
Windows cannot fork, and on macOS a process that has imported torch must not: there, each piece of
work begins with an empty process, and takes the ten seconds.

The work is pickled: a function of a module, or a `functools.partial` of one. What a test has
patched in its own process is not patched there.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

MODULES = [
    "conftest",
    "tiny_vgg",
    "train",
    "fcn.training.fit",
    "fcn.training.trainer",
    "fcn.training.panels",
]
MODULES += ["fcn.training.curves", "fcn.runs.launch", "fcn.runs.sweep", "fcn.datasets.shapes"]


@cache
def server() -> Any:
    """Start the server, unless another test of this process has started it."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    before = os.environ.copy()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def fork(work: Callable[[], Any], log: Path) -> BaseProcess:
    """Start `work` in a process with this one's folder and environment, and its output in `log`."""
    arguments = (work, log, Path.cwd(), dict(os.environ))
    process = server().Process(target=_run, args=arguments)
    process.start()
    return process


def _run(work: Callable[[], Any], log: Path, folder: Path, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
    code = 1
    try:
        work()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(process: BaseProcess, most: float = 200) -> int:
    """The exit code of a process, negative for the signal that ended it.

    Raises:
        TimeoutError: after `most` seconds.
    """
    process.join(most)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the process needs more than {most} s")
    return process.exitcode


def at_call(
    owner: Any,
    name: str,
    act: Callable[[], Any],
    *,
    after: bool = False,
    count: int = 1,
    patch: pytest.MonkeyPatch | None = None,
) -> None:
    """From now on, the `count`-th call of a function or method does `act` first, or `after`.

    Args:
        patch: undoes it; a process that ends needs none.
    """
    original, calls = getattr(owner, name), 0

    def acting(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            act()
        result = original(*args, **options)
        if calls == count and after:
            act()
        return result

    (patch or pytest.MonkeyPatch()).setattr(owner, name, acting)


def kill_at_call(owner: Any, name: str, **options: Any) -> None:
    """The process kills itself at a call; arguments as for `at_call`."""
    at_call(owner, name, kill_self, **options)


def kill_self(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
