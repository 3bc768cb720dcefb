"""metrics.csv: one row for each optimizer step that logged something, whatever else is logged.

Lightning's CSVLogger starts a file anew when a run is resumed; this one goes on with it.
"""

import csv
import math
import os
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from fcn.runs import atomic_write, writing

Row = dict[str, str]


class MetricsCSV(Logger):
    """Writes `path`, row by row; the values of one step share a row.

    Args:
        path: the file. Rows that are there already are kept up to `resume_step`.
        resume_step: the optimizer step that the run goes on from.
    """

    def __init__(self, path: str | Path, *, resume_step: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        rows = read_metrics(self.path) if self.path.exists() and resume_step > 0 else []
        self.columns = ["step"] + [c for c in (rows[0] if rows else {}) if c != "step"]
        rows = [row for row in rows if int(row["step"]) <= resume_step]
        self.last: Row = rows[-1] if rows else {}  # may still grow: its step's validation
        self._rewrite(rows)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of `step`."""
        values = {k: repr(float(v)) for k, v in metrics.items() if k not in ("epoch", "step")}
        new_columns = [name for name in values if name not in self.columns]
        if new_columns or self.last.get("step") == str(step):
            self.columns += new_columns
            with writing(self.path):
                rows = read_metrics(self.path)
            if self.last.get("step") == str(step):
                rows.pop()
                values = self.last | values
            self.last = {"step": str(step)} | values
            self._rewrite([*rows, self.last])  # at once: a kill must not take the row with it
            return
        self.last = {"step": str(step)} | values
        with (
            writing(self.path),
            self.path.open("r+", newline="", encoding="utf-8") as file,
        ):  # never a new file
            file.seek(0, os.SEEK_END)
            csv.DictWriter(file, self.columns, restval="").writerow(self.last)

    def _rewrite(self, rows: list[Row]) -> None:
        with atomic_write(self.path) as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a metrics.csv as text; a last line that a kill cut short is left out."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        text = file.read()
    return list(csv.DictReader(StringIO(text[: text.rfind("\n") + 1], newline="")))


def read_column(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged and is a number."""
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    points = [(step, value) for step, value in points if not math.isnan(value)]
    return [step for step, _ in points], [value for _, value in points]
