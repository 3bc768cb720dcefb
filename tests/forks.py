"""Runs in a forked copy of the test's process, which has imported everything: no slow start."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def fork(work: Callable[[], Any], log: Path) -> int:
    """Start `work` in a child, with its output in `log`; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))  # not pytest's
        work()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, most: float = 200) -> int:
    """Its exit code, negative for the signal that ended it, as subprocess has it.

    Args:
        most: seconds; a fork of a process with threads may wait for one that it does not have.
    """
    end = time.monotonic() + most
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"the fork hangs, or needs more than {most} s")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


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
        patch: undoes it; a child that ends needs none.
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


def kill_self(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
