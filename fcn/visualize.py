"""Draw the curves of runs that have ended, or are still going on.

    python -m fcn.visualize runs/fcn32s/2026-01-31_12-00-00 runs/fcn8s/2026-02-01_12-00-00
    python -m fcn.visualize runs/sweep/2026-01-31_12-00-00 --output sweep.png

For one run this draws loss, learning rate and validation scores, like the curves.png in its folder.
For several runs, or all runs of a sweep, it draws the smoothed loss and the validation mean IoU of
all of them on the same axes. The picture is comparison.png in the current folder, unless --output
names another file.
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fcn.cli import short_messages
from fcn.errors import ConfigError, WriteError, reason
from fcn.figures.comparison import compare_runs
from fcn.figures.curves import DRAWN, Columns, draw_curves, series
from fcn.figures.legend import one_line
from fcn.files import expanded
from fcn.runs.folder import name_parts, read_changes
from fcn.runs.metrics import read_numbers

LONGEST_CHANGES = 80  # characters of a run's settings in the legend


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the runs named on the command line, and print where the picture is."""
    parser = argparse.ArgumentParser(
        prog="python -m fcn.visualize",
        description="Loss and mean IoU of several runs in one figure; of one run, all its curves.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=expanded,
        metavar="RUN_DIR",
        help="the folder of a run, or of a sweep",
    )
    parser.add_argument(
        "--output",
        type=expanded,  # shells leave the ~ of --output=~/x.png as it is
        default=Path("comparison.png"),
        metavar="FILE",
        help=".png, .pdf or .svg (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    with short_messages():
        runs = read_runs(options.runs)
        try:
            if len(runs) == 1:
                draw_curves(next(iter(runs.values())), options.output)
            else:
                names = run_names(list(runs))
                compare_runs(dict(zip(names, runs.values(), strict=True)), options.output)
        except (WriteError, ValueError) as error:  # ValueError: matplotlib has no such format
            raise ConfigError(f"--output: {reason(error)}") from error
        print(options.output)


def read_runs(folders: Sequence[Path]) -> dict[Path, Columns]:
    """The columns of metrics.csv of each run; of a sweep's folder, those of all its runs.

    A run of a sweep that has logged nothing yet is left out, with a line on stderr.

    Returns:
        For each run's folder, as an absolute path, its columns.

    Raises:
        ConfigError: a folder is not that of a run or a sweep, or there is nothing to draw in it.
    """
    runs: dict[Path, Columns] = {}
    for folder in folders:
        is_run = (folder / "metrics.csv").is_file()
        jobs = [path.parent for path in folder.glob("*/metrics.csv")]
        found = [folder] if is_run else sorted(jobs, key=name_parts)
        if not found:
            raise ConfigError(f"{folder}: no run folder (it has no metrics.csv)")
        for run in found:
            columns = _read(run)
            if columns is not None:
                runs[run.resolve()] = columns
            elif is_run:
                raise ConfigError(f"{run / 'metrics.csv'}: nothing to draw in it yet")
            else:
                print(f"left out: {run} has nothing to draw yet", file=sys.stderr)
    if not runs:
        raise ConfigError(f"{folders[0]}: none of its runs has anything to draw yet")
    return runs


def _read(run: Path) -> Columns | None:
    """The columns of one run's metrics.csv, or None if it has no number that is drawn."""
    path = run / "metrics.csv"
    try:
        columns = read_numbers(path)
        drawn = [series(columns, name) for name in DRAWN]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path}: {reason(error)}") from error
    return columns if any(len(steps) for steps, _ in drawn) else None


def run_names(runs: Sequence[Path]) -> list[str]:
    """A short name for each run, for the legend.

    It is the folder's name, with as many of its parents as it takes to be unique, and the settings
    in which the runs differ.
    """
    ends = Counter(run.parts[-n:] for run in runs for n in range(1, len(run.parts) + 1))
    changes = [_changes(run) for run in runs]
    keys = dict.fromkeys(key for change in changes for key in change)  # a set that keeps its order
    varied = [key for key in keys if len({change.get(key) for change in changes}) > 1]
    names = []
    for run, change in zip(runs, changes, strict=True):
        tails = (run.parts[-n:] for n in range(1, len(run.parts) + 1))
        name = "/".join(next(tail for tail in tails if ends[tail] == 1))
        text = " ".join(f"{key}={change[key]}" for key in varied if key in change)
        names.append(f"{name}  {one_line(text, LONGEST_CHANGES)}".strip())
    return names


def _changes(run: Path) -> dict[str, str]:
    """The settings that were given on a run's command line, from its overrides.yaml.

    They are only for the legend. If that file is missing or damaged, they are left out.
    """
    try:
        return read_changes(run)
    except Exception:
        return {}


if __name__ == "__main__":
    main()
