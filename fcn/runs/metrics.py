"""Reading metrics.csv, which has one row for each optimizer step at which something was logged.

rows = read_metrics(run / "metrics.csv")
steps, scores = read_column(rows, "val/miou")
columns = read_numbers(run / "metrics.csv")       # a NumPy array for each column
"""

import csv
import math
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

Row = dict[str, str]
Columns = dict[str, np.ndarray]


def stand_in(path: Path) -> Path:
    """The file that has all rows while another program keeps metrics.csv open.

    Excel on Windows does that, for example. fcn/training/metrics_csv.py renames this file to
    metrics.csv as soon as that is possible.
    """
    return path.with_suffix(".new.csv")


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a metrics.csv as text, one at a time, since a long run has a hundred thousand.

    A last line that a kill has cut short is left out, since its last number may be wrong.
    """
    path = Path(path)
    if stand_in(path).is_file():
        path = stand_in(path)
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(line for line in file if line.endswith(("\n", "\r")))


def read_metrics(path: str | Path) -> list[Row]:
    """All rows of a metrics.csv as text."""
    return list(read_rows(path))


def read_numbers(path: str | Path) -> Columns:
    """Each column of a metrics.csv as an array of shape (rows,), with NaN where it has no value."""
    columns: dict[str, array[float]] = {}
    for row in read_rows(path):
        for name, text in row.items():
            if name:  # csv collects the fields of a row that is too long under None
                columns.setdefault(name, array("d")).append(float(text or "nan"))
    return {name: np.array(column) for name, column in columns.items()}


def read_column(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """The steps and the values of one metric, where it was logged and is a number."""
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    points = [(step, value) for step, value in points if not math.isnan(value)]
    return [step for step, _ in points], [value for _, value in points]
