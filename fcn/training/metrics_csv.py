"""The logger that writes metrics.csv: one row for each optimizer step that logged something.

Lightning's CSVLogger overwrites the file when a run is resumed; this one continues it. train.py
adds this logger to every run, and fcn/runs/metrics.py reads the file.
"""

import csv
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from fcn.errors import WriteError
from fcn.files import atomic_write, retry, writing
from fcn.runs.metrics import Row, read_rows, stand_in

# Rows of other callbacks wait in memory until our own values of their steps are logged. With
# callbacks.loss_statistics=null that happens only at validations. So this many rows are written
# without waiting.
MOST_HELD = 1000


class MetricsCSV(Logger):
    """Writes a CSV file row by row. All values that are logged at one step share a row.

    Our own values of a step come some steps later, as losses are read from the device in groups.
    So values of other callbacks are kept in memory until the next of ours are written, to be in
    the same rows and in order.

    While another program has the file open, Windows may let nobody write it. All rows then go to a
    second file, `stand_in(path)`, which takes its place as soon as that is possible. If that is
    open too, rows are kept in memory until the next row is written.

    Args:
        path: the file. Rows that are there already are kept up to `resume_step`.
        resume_step: the optimizer step that the run goes on from.
    """

    def __init__(self, path: str | Path, *, resume_step: int = 0) -> None:
        super().__init__()
        self.path = self.file = Path(path)  # `file` is where the rows are at the moment
        self.columns, self.header = ["step"], 0  # all columns, and how many of them the file has
        self.last = 0  # the last step that has a row in the file
        self.pending: dict[int, Row] = {}  # for a step, what is in no file yet

        def kept() -> Iterator[Row]:
            if self.path.exists():
                yield from (row for row in read_rows(self.path) if int(row["step"]) <= resume_step)

        for row in kept():
            self.columns, self.last = list(row), int(row["step"])
        self._write(resume_step, kept)
        if self.file == self.path:  # an earlier process left the second file, which was read above
            with writing(stand_in(self.path)):
                stand_in(self.path).unlink(missing_ok=True)

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
        """Add to the row of `step`, or to the last row without one."""
        values = {k: repr(float(v)) for k, v in metrics.items() if k not in ("epoch", "step")}
        self.columns += [name for name in values if name not in self.columns]
        step = max([self.last, *self.pending]) if step is None else step
        self.pending.setdefault(step, {"step": str(step)}).update(values)
        own = any(name == "train/loss" or name.startswith("val/") for name in values)
        if own or len(self.pending) >= MOST_HELD:
            with suppress(PermissionError):
                self._rename_second_file()
            self._write(step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """At the end of a run, give the other program some seconds to close the file."""
        try:
            retry(self._settle)
        except PermissionError:
            lost = f", but for the last {len(self.pending)}" if self.pending else ""
            message = f"{self.path} is still open in another program: its rows are in {self.file}"
            warnings.warn(message + lost, stacklevel=2)

    def _settle(self) -> None:
        """Have all rows in the file itself; otherwise raise a PermissionError."""
        self._rename_second_file()
        if self.pending:
            self._write(max(self.pending))
        if self.pending or self.file != self.path:
            raise PermissionError

    def _rename_second_file(self) -> None:
        """Have the second file take the place of the first, if the rows are there."""
        if self.file == self.path:
            return
        if self.file.exists():
            os.replace(self.file, self.path)
        else:  # the user has removed it, and the first one may lack columns: write it anew
            self.header = 0
        self.file = self.path

    def _write(self, last: int, old: Callable[[], Iterable[Row]] | None = None) -> None:
        """Write the pending rows up to a step. Later ones may still get further values.

        Args:
            last: the step.
            old: a function that gives the rows which the file is to keep; None: all that it has.
        """
        refused = None
        new = {step: row for step, row in sorted(self.pending.items()) if step <= last}
        append = self.header == len(self.columns) and min(new) > self.last
        for file in dict.fromkeys((self.file, stand_in(self.path))):
            try:
                if append and file == self.file:
                    self._append(new.values())
                else:
                    # All rows are written in one go: a kill must not take an old one and a new one.
                    self._rewrite(merged(old() if old else read_rows(self.path), new), file)
            except WriteError as error:
                if not isinstance(error.__cause__, PermissionError):
                    raise
                refused = error
                until = "rows are kept until it is closed"
                warnings.warn(f"{self.path} is open in another program; {until}", stacklevel=3)
            else:
                self.file = file
                self.last = max([self.last, *new])
                for step in new:
                    del self.pending[step]
                return
        if refused and not new:  # nothing is lost yet
            raise refused

    def _append(self, rows: Iterable[Row]) -> None:
        # The mode r+ does not create a file: if the run folder was deleted, that is an error.
        with writing(self.file), self.file.open("r+", newline="", encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            csv.DictWriter(file, self.columns, restval="").writerows(rows)

    def _rewrite(self, rows: Iterable[Row], path: Path) -> None:
        with (
            atomic_write(path, wait=False) as part,
            part.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        self.header = len(self.columns)


def merged(old: Iterable[Row], new: Mapping[int, Row]) -> Iterator[Row]:
    """Rows in the order of their steps: the old ones, with new values and new rows among them.

    Args:
        old: in the order of their steps.
        new: by their steps, in the same order.
    """
    left = dict(new)
    for row in old:
        while left and min(left) < int(row["step"]):
            yield left.pop(min(left))
        yield row | left.pop(int(row["step"]), Row())
    yield from left.values()
