"""Runs scripts of this project one after another in one process, with the tiny VGG of the tests.

    python tests/windows/scripts.py '[["train.py", "data=shapes"], ["-m", "fcn.stages", "seed=1"]]'

The processes that fcn.stages starts run here too, one after another: each would import torch anew.
A list ["open", FILE, ...] opens files until the end, as another program may do.
"""

import gc
import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]


class Process:
    """In place of `subprocess.Popen`: runs the script before it returns."""

    def __init__(self, command: list[str], **_: Any) -> None:
        run(command[1:])

    def wait(self) -> int:
        return 0


def run(command: list[str]) -> None:
    """Run a script, or a module after "-m", as the main program.

    Raises:
        SystemExit: if it has failed.
    """
    from hydra.core.global_hydra import GlobalHydra

    before = sys.argv
    sys.argv = command[command[0] == "-m" :]
    try:
        if command[0] == "-m":
            importlib.import_module(command[1]).main()
        else:
            runpy.run_path(str(PROJECT / command[0]), run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{command}: exit code {end.code}")
    sys.argv = before
    GlobalHydra.instance().clear()
    gc.collect()


def main(commands: list[list[str]]) -> None:
    import tiny_vgg  # noqa: F401  # registers it

    import fcn.files
    import fcn.stages

    fcn.files.PATIENCE = 0.3
    fcn.stages.subprocess = SimpleNamespace(Popen=Process)
    opened = []
    for command in commands:
        print("$", *command, flush=True)
        if command[0] == "open":
            opened += [Path(path).open("rb") for path in command[1:]]  # noqa: SIM115
        else:
            run(command)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
