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

MOST_HELD = 1000  # rows in memory that wait for ours, which there may be none of


class MetricsCSV(Logger):
    """Writes a CSV file row by row. All values that are logged at one step share a row.

    Our own values of a step come some steps later, as losses are read from the device in groups.
    So values of other callbacks are kept in memory until the next of ours are written, to be in
    the same rows and in order.

    While another program has the file open, Windows may let nobody write it. All rows then go to a
    second file, `stand_in(path)`, which takes its place as soon as that is possible. If that is
    open too, rows are kept in memory until the next one.

    Args:
        path: the file. Rows that are there already are kept up to `resume_step`.
        resume_step: the optimizer step that the run goes on from.
    """

    def __init__(self, path: str | Path, *, resume_step: int = 0) -> None:
        super().__init__()
        self.path = self.file = Path(path)  # `file` is where the rows are at the moment
        self.columns, self.header = ["step"], 0  # all columns, and how many of them the file has
        self.last = 0  # the last step that has a row in the file
        self.unwritten: dict[int, Row] = {}  # for a step, what could not be written yet
        self.held: dict[int, Row] = {}  # for a step, what waits for our own values

        def kept() -> Iterator[Row]:
            if self.path.exists():
                yield from (row for row in read_rows(self.path) if int(row["step"]) <= resume_step)

        for row in kept():
            self.columns, self.last = list(row), int(row["step"])
        self._write(kept)
        if self.file == self.path:  # the other one was of an earlier process, and was read above
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
        step = max([self.last, *self.unwritten, *self.held]) if step is None else step
        self.held.setdefault(step, {"step": str(step)}).update(values)
        own = any(name == "train/loss" or name.startswith("val/") for name in values)
        if not own and len(self.held) < MOST_HELD:
            return
        self._release(step)
        append = self.header == len(self.columns) and min(self.unwritten) > self.last
        if self.file != self.path:
            append = append and self.file.exists()  # else metrics.csv may lack columns
            with suppress(PermissionError):
                self._take_its_place()
        self._write(self._all_rows, append=append)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """At the end of a run, give the other program some seconds to close the file."""
        try:
            retry(self._settle)
        except PermissionError:
            lost = f", but for the last {len(self.unwritten)}" if self.unwritten else ""
            message = f"{self.path} is still open in another program: its rows are in {self.file}"
            warnings.warn(message + lost, stacklevel=2)

    def _settle(self) -> None:
        """Have all rows in the file itself; otherwise raise a PermissionError."""
        self._release(max(self.held, default=0))
        if self.file != self.path:
            self._take_its_place()
        if self.unwritten:
            self._write(self._all_rows)
        if self.unwritten or self.file != self.path:
            raise PermissionError

    def _release(self, last: int) -> None:
        """Let what is held be written, up to a step. Later rows would have to be written twice."""
        for step in sorted(step for step in self.held if step <= last):
            self.unwritten.setdefault(step, Row()).update(self.held.pop(step))

    def _take_its_place(self) -> None:
        if self.file.exists():  # the user may have removed it
            os.replace(self.file, self.path)
        self.file = self.path

    def _all_rows(self) -> Iterator[Row]:
        """The rows of the file, with what is in no file yet, in the order of their steps."""
        new = dict(sorted(self.unwritten.items()))
        for row in read_rows(self.path):
            while new and min(new) < int(row["step"]):
                yield new.pop(min(new))
            yield row | new.pop(int(row["step"]), Row())
        yield from new.values()

    def _write(self, rows: Callable[[], Iterable[Row]], *, append: bool = False) -> None:
        """Write what is in no file yet: at the end, or with all other `rows` anew."""
        refused = None
        for file in dict.fromkeys((self.file, stand_in(self.path))):
            try:
                if append and file == self.file:
                    self._append()
                else:
                    # All rows are written in one go: a kill must not take an old one and a new one.
                    self._rewrite(rows(), file)
            except WriteError as error:
                if not isinstance(error.__cause__, PermissionError):
                    raise
                refused = error
                until = "rows are kept until it is closed"
                warnings.warn(f"{self.path} is open in another program; {until}", stacklevel=3)
            else:
                self.file = file
                self.last = max(self.last, *self.unwritten, 0)
                self.unwritten.clear()
                return
        if refused and not self.unwritten:  # nothing is lost yet
            raise refused

    def _append(self) -> None:
        # The mode r+ does not create a file: if the run folder was deleted, that is an error.
        with writing(self.file), self.file.open("r+", newline="", encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            rows = (row for _, row in sorted(self.unwritten.items()))
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
