"""The logger that writes metrics.csv: one row for each optimizer step that logged something.

Lightning's CSVLogger overwrites the file when a run is resumed; this one continues it. train.py
adds this logger to every run, and fcn/runs/metrics.py reads the file.
"""

import csv
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from fcn.files import atomic_write, writing
from fcn.runs.metrics import Row, read_rows


class MetricsCSV(Logger):
    """Writes a CSV file row by row. All values that are logged at one step share a row.

    Args:
        path: the file. Rows that are there already are kept up to `resume_step`.
        resume_step: the optimizer step that the run goes on from.
    """

    def __init__(self, path: str | Path, *, resume_step: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        # The last row is kept, because the scores of a validation are added to the row of its step.
        self.columns, self.last = ["step"], Row()
        if resume_step == 0 or not self.path.exists():
            self._rewrite([])
            return
        for row in read_rows(self.path):
            self.columns = list(row)
            if int(row["step"]) <= resume_step:
                self.last = row
        self._rewrite(row for row in read_rows(self.path) if int(row["step"]) <= resume_step)

    @property
    def name(self) -> str:
        return ""  # a user's own ModelCheckpoint then writes to checkpoints/ in the run folder

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of `step`."""
        values = {k: repr(float(v)) for k, v in metrics.items() if k not in ("epoch", "step")}
        new_columns = [name for name in values if name not in self.columns]
        if new_columns or self.last.get("step") == str(step):
            self.columns += new_columns
            if self.last.get("step") == str(step):
                values = self.last | values
            self.last = {"step": str(step)} | values
            rows = (row for row in read_rows(self.path) if row["step"] != self.last["step"])
            # The old row is left out and the new one added in one go: a kill must not take both.
            self._rewrite(chain(rows, [self.last]))
            return
        self.last = {"step": str(step)} | values
        # The mode r+ does not create a file: if the run folder was deleted, that is an error.
        with writing(self.path), self.path.open("r+", newline="", encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            csv.DictWriter(file, self.columns, restval="").writerow(self.last)

    def _rewrite(self, rows: Iterable[Row]) -> None:
        with atomic_write(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
