"""Runs scripts of this project one after another in one process, with the tiny VGG of the tests.

    python tests/windows/scripts.py '[["train.py", "data=shapes"], ["-m", "fcn.stages", "seed=1"]]'
    python tests/windows/scripts.py data=shapes            # as train.py, which fcn.stages starts

A list ["open", FILE, ...] opens files until the end, as another program may do.
"""

import gc
import importlib
import json
import runpy
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]


def main(commands: list[list[str]]) -> None:
    import tiny_vgg  # noqa: F401  # registers it
    from hydra.core.global_hydra import GlobalHydra

    import fcn.files

    fcn.files.PATIENCE = 0.3
    opened = []
    for command in commands:
        print("$", *command, flush=True)
        if command[0] == "open":
            opened += [Path(path).open("rb") for path in command[1:]]  # noqa: SIM115
            continue
        sys.argv = command[command[0] == "-m" :]
        try:
            if command[0] == "-m":
                module = importlib.import_module(command[1])
                module.TRAIN = Path(__file__)
                module.main()
            else:
                runpy.run_path(str(PROJECT / command[0]), run_name="__main__")
        except SystemExit as end:
            if end.code:
                sys.exit(f"{command}: exit code {end.code}")
        GlobalHydra.instance().clear()
        gc.collect()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]) if sys.argv[1][0] == "[" else [["train.py", *sys.argv[1:]]])
