"""Old names, until train.py has moved."""

from typing import Any

from fcn.runs import sweep
from fcn.runs.sweep import find_sweep, several_processes, write_results  # noqa: F401


def run_job(folder: Any, *args: Any, mendable: Any) -> None:
    sweep.run_job(*args)
