"""metrics.csv: one row a step, also when columns come late and runs are killed and resumed."""

import errno
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcn.errors import WriteError
from fcn.runs.metrics import read_column, read_metrics, read_numbers
from fcn.training.metrics_csv import MetricsCSV


def test_values_of_a_step_share_a_row(tmp_path: Path) -> None:
    csv = MetricsCSV(tmp_path / "metrics.csv")
    csv.log_metrics({"train/loss": 0.1, "epoch": 0}, step=1)
    csv.log_metrics({"train/loss": 1 / 3}, step=2)
    csv.log_metrics({"val/miou": 0.5, "val/iou/a": float("nan")}, step=2)
    csv.log_metrics({"train/loss": 0.3}, step=3)
    assert csv.path.read_text().splitlines() == [
        "step,train/loss,val/miou,val/iou/a",
        "1,0.1,,",
        "2,0.3333333333333333,0.5,nan",
        "3,0.3,,",
    ]
    rows = read_metrics(csv.path)
    assert read_column(rows, "train/loss") == ([1, 2, 3], [0.1, 1 / 3, 0.3])
    assert read_column(rows, "val/miou") == ([2], [0.5])
    assert read_column(rows, "val/iou/a") == ([], [])
    assert read_column(rows, "other") == ([], [])


def test_values_of_other_callbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come before or after ours of the same steps, which are read in groups of five."""
    csv, rewrite = MetricsCSV(tmp_path / "metrics.csv"), MetricsCSV._rewrite
    rewritten: list[int] = []  # the steps at which the whole file was written

    def noted(self: MetricsCSV, *arguments: Any) -> None:
        rewritten.append(min(self.pending, default=0))
        rewrite(self, *arguments)

    monkeypatch.setattr(MetricsCSV, "_rewrite", noted)
    for last in (5, 10):
        csv.log_metrics({"lr-SGD": 0.1, "epoch": 0}, step=last - 1)
        for step in range(last - 4, last + 1):
            csv.log_metrics({"train/loss": step}, step=step)
        csv.log_metrics({"mine": last}, step=last)
        csv.log_metrics({"val/miou": last / 10}, step=last)
    # For a new column, and for what came late. The first column came before the first row.
    assert rewritten == [1, 5, 10]
    csv.log_metrics({"no step": 2})
    csv.log_metrics({"late": 1}, step=3)
    csv.finalize("success")
    rows = read_metrics(csv.path)
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 11)]
    assert read_column(rows, "train/loss") == (list(range(1, 11)), list(range(1, 11)))
    assert read_column(rows, "lr-SGD") == ([4, 9], [0.1, 0.1])
    assert read_column(rows, "mine") == ([5, 10], [5, 10])
    assert read_column(rows, "val/miou") == ([5, 10], [0.5, 1])
    assert read_column(rows, "late") == ([3], [1])
    assert read_column(rows, "no step") == ([10], [2])
    assert MetricsCSV(csv.path, resume_step=10).last == 10


def test_a_run_without_our_own_values(tmp_path: Path) -> None:
    """With callbacks.loss_statistics=null, and without a validation."""
    csv = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(1, 2501):
        csv.log_metrics({"mine": step}, step=step)
    assert len(read_metrics(csv.path)) == 2000  # after a kill
    csv.finalize("success")
    assert [row["step"] for row in read_metrics(csv.path)] == [str(s) for s in range(1, 2501)]


def test_resumed_from_an_earlier_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in range(1, 6):
        first.log_metrics({"train/loss": step}, step=step)
    with path.open("a") as file:
        file.write("6,6.2")  # killed before it wrote 6.25
    assert [row["step"] for row in read_metrics(path)] == ["1", "2", "3", "4", "5"]

    second = MetricsCSV(path, resume_step=3)
    assert [row["step"] for row in read_metrics(path)] == ["1", "2", "3"]
    second.log_metrics({"val/miou": 0.5}, step=3)  # of the step that the run goes on from
    second.log_metrics({"train/loss": 4.5}, step=4)
    assert path.read_text().splitlines() == [
        "step,train/loss,val/miou",
        "1,1.0,",
        "2,2.0,",
        "3,3.0,0.5",
        "4,4.5,",
    ]
    MetricsCSV(path)  # of a new run
    assert read_metrics(path) == []


def test_killed_while_a_row_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, rewrite = MetricsCSV(tmp_path / "metrics.csv"), MetricsCSV._rewrite
    log.log_metrics({"train/loss": 2.0}, step=8)

    def killed(self: MetricsCSV, *arguments: Any) -> None:
        rewrite(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(MetricsCSV, "_rewrite", killed)
    with pytest.raises(KeyboardInterrupt):
        log.log_metrics({"val/miou": 0.5}, step=8)
    assert read_metrics(log.path) == [{"step": "8", "train/loss": "2.0", "val/miou": "0.5"}]


@pytest.mark.slow
def test_long_files_are_not_held_in_memory(tmp_path: Path) -> None:
    path, rows = tmp_path / "metrics.csv", 10_000
    path.write_text("step,train/loss\n" + "".join(f"{step},0.5\n" for step in range(1, rows + 1)))
    tracemalloc.start()
    try:
        log = MetricsCSV(path, resume_step=rows)
        log.log_metrics({"val/miou": 0.25}, step=rows)
        log.log_metrics({"train/loss": 0.5}, step=rows + 1)
        assert tracemalloc.get_traced_memory()[1] < 1e6  # 3.5e6 with all rows as text
    finally:
        tracemalloc.stop()
    columns = read_numbers(path)
    assert columns["step"].tolist() == list(range(1, rows + 2))
    assert np.isnan(columns["val/miou"]).sum() == rows
    assert columns["val/miou"][rows - 1] == 0.25


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of files that programs on Windows have open: not to be written or replaced.

    What has been opened for writing by then can be written on.
    """
    names: set[str] = set()

    def refusing(function: Any, place: int) -> Any:
        def refuse(*arguments: Any, **options: Any) -> Any:
            mode = arguments[1] if place == 0 and len(arguments) > 1 else "w" if place else "r"
            if Path(arguments[place]).name in names and mode != "r":
                raise PermissionError(errno.EACCES, "used by another process")
            return function(*arguments, **options)

        return refuse

    monkeypatch.setattr(Path, "open", refusing(Path.open, 0))
    monkeypatch.setattr(os, "replace", refusing(os.replace, 1))
    monkeypatch.setattr("fcn.files.PATIENCE", 0)
    return names


OPEN = r"metrics\.csv is open in another program"


def test_open_in_another_program(tmp_path: Path, locked: set[str]) -> None:
    """No row is lost: not while metrics.csv is open, nor its stand-in, nor after a kill."""
    path = tmp_path / "metrics.csv"
    csv = MetricsCSV(path)
    csv.log_metrics({"train/loss": 1}, step=1)
    locked.add("metrics.csv")
    with pytest.warns(UserWarning, match=OPEN):
        csv.log_metrics({"train/loss": 2}, step=2)
    csv.log_metrics({"val/miou": 0.5}, step=2)
    assert path.read_text() == "step,train/loss\n1,1.0\n"
    assert [row["step"] for row in read_metrics(path)] == ["1", "2"]  # from the stand-in
    locked.add("metrics.new.csv")
    with pytest.warns(UserWarning, match=OPEN):
        csv.log_metrics({"train/loss": 3}, step=3)
    with pytest.warns(UserWarning, match=r"rows are in .*metrics\.new\.csv, but for the last 1"):
        csv.finalize("success")
    refused = pytest.raises(WriteError, match="close other programs")
    with pytest.warns(UserWarning, match=OPEN), refused:
        MetricsCSV(path, resume_step=3)
    locked.remove("metrics.new.csv")
    csv.log_metrics({"train/loss": 4}, step=4)
    with pytest.warns(UserWarning, match=r"rows are in .*metrics\.new\.csv$"):
        csv.finalize("success")
    locked.clear()
    csv.log_metrics({"train/loss": 5}, step=5)
    wanted = "step,train/loss,val/miou\n1,1.0,\n2,2.0,0.5\n3,3.0,\n4,4.0,\n5,5.0,\n"
    assert path.read_text() == wanted

    locked.add("metrics.csv")  # this process is killed while it is open
    with pytest.warns(UserWarning, match=OPEN):
        csv.log_metrics({"train/loss": 6}, step=6)
    with pytest.warns(UserWarning, match=OPEN):
        again = MetricsCSV(path, resume_step=6)
    locked.clear()
    again.log_metrics({"train/loss": 7}, step=7)
    again.finalize("success")
    assert path.read_text() == wanted + "6,6.0,\n7,7.0,\n"
    assert list(tmp_path.iterdir()) == [path]

    locked.add("metrics.csv")
    with pytest.warns(UserWarning, match=OPEN):
        again.log_metrics({"train/loss": 8, "late": 1}, step=8)
    again.file.unlink()  # by the user; its rows are lost, of course, but the run goes on
    locked.clear()
    again.log_metrics({"train/loss": 9}, step=9)
    header, *_, last = path.read_text().splitlines()
    assert (header, last) == ("step,train/loss,val/miou,late", "9,9.0,,")


def test_rows_of_other_lengths(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n1,0.5,7,8\n2\n3,0.25\n")
    columns = read_numbers(path)
    assert list(columns) == ["step", "train/loss"]
    assert columns["step"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(columns["train/loss"], [0.5, np.nan, 0.25])
