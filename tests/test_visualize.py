"""The command that draws runs: which runs it finds, what it calls them, and its errors."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_figures_curves import Columns, catch_figures, columns_of

from fcn import visualize
from fcn.visualize import main, run_names

Capsys, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch


def write_run(run: Path, columns: Columns, *overrides: str) -> Path:
    """The folder of a run: metrics.csv, empty where nothing was logged, and overrides.yaml."""
    run.mkdir(parents=True)
    lines = [",".join(columns)]
    for values in zip(*columns.values(), strict=True):
        lines.append(",".join("" if np.isnan(value) else str(value) for value in values))
    (run / "metrics.csv").write_text("".join(f"{text}\n" for text in lines))
    (run / "overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
    return run


def legend(figure: Figure) -> list[str]:
    return [text.get_text().replace("\\", "") for text in figure.legends[0].get_texts()]


@pytest.mark.slow
def test_several_runs_in_one_figure(tmp_path: Path, monkeypatch: Patch, capsys: Capsys) -> None:
    figures = catch_figures(monkeypatch)
    one = write_run(tmp_path / "fcn8s" / "$now_", columns_of(40), "optimizer.lr=1e-3", "seed=1")
    two = write_run(tmp_path / "fcn32s" / "$now_", columns_of(25), "seed=1", "model=fcn32s")
    monkeypatch.chdir(tmp_path)
    main([str(one), "fcn32s/$now_", str(one)])
    assert capsys.readouterr().out == "comparison.png\n"
    assert Image.open(tmp_path / "comparison.png").size[0] > 600
    (figure,) = figures
    losses, scores = figure.axes
    assert [len(x.get_xdata()) for x in losses.lines] == [40, 25]
    assert [len(x.get_xdata()) for x in scores.lines] == [2, 1]
    assert legend(figure) == [
        "fcn8s/$now_  optimizer.lr=1e-3 (best mIoU 0.400)",
        "fcn32s/$now_  model=fcn32s (best mIoU 0.400)",
    ]
    main([str(two), "--output", str(tmp_path / "one.svg")])
    assert [axes.get_title() for axes in figures[1].axes][1] == "learning rate"
    assert (tmp_path / "one.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_a_sweep_as_a_command(tmp_path: Path, monkeypatch: Patch, capsys: Capsys) -> None:
    figures = catch_figures(monkeypatch)
    sweep, output = tmp_path / "sweep", tmp_path / "sweep.png"
    for number in range(12):
        write_run(sweep / str(number), columns_of(2), f"optimizer.lr={number}")
    write_run(sweep / "12", {"step": np.array([1])})
    monkeypatch.setattr(sys, "argv", ["visualize", str(sweep), "--output", str(output)])
    runpy.run_path(visualize.__file__, run_name="__main__")
    assert output.is_file()
    labels = legend(figures[0])
    assert [label.split()[0] for label in labels] == [str(number) for number in range(12)]
    assert labels[11] == "11  optimizer.lr=11"
    assert "12 has nothing to draw yet" in capsys.readouterr().err


def test_a_picture_in_the_home_folder(tmp_path: Path, monkeypatch: Patch, capsys: Capsys) -> None:
    """A shell leaves the ~ within a word as it is."""
    for name in ("HOME", "USERPROFILE"):  # the latter on Windows
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(visualize, "draw_curves", lambda columns, path: path.touch())
    main([str(write_run(tmp_path / "run", columns_of(3))), "--output=~/x.png"])
    assert (tmp_path / "x.png").is_file()
    assert capsys.readouterr().out == f"{tmp_path / 'x.png'}\n"


def test_run_names_are_unique_and_short(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a/x", "b/x", "b/y", "c/b/x")]
    assert run_names(runs) == ["a/x", f"{tmp_path.name}/b/x", "y", "c/b/x"]
    write_run(runs[2], columns_of(1), *(f"key{n}={n}" for n in range(50)))
    (runs[2] / "overrides.yaml").open("a").write("- ]")  # damaged
    assert run_names(runs)[2] == "y"
    (runs[2] / "overrides.yaml").write_text("".join(f"- key{n}={n}\n" for n in range(50)))
    assert len(run_names(runs)[2]) < 90


GOOD = b"step,train/loss_smooth\n1,2\n"


ERRORS = [
    (None, "x.png", "error: {run}: no run folder (it has no metrics.csv)"),
    (b"", "x.png", "error: {csv}: nothing to draw"),
    (b"step,train/loss_smooth\n1,nan\n", "x.png", "error: {csv}: nothing to draw"),
    (b"a,b\n1,2\n", "x.png", "error: {csv}: nothing to draw"),
    (GOOD + b"2,high\n", "x.png", "error: {csv}: could not convert"),
    (b"\xff\xfe\x00\n\xff\n", "x.png", "error: {csv}: "),
    (GOOD, "no/such/folder.png", "error: --output: "),
    (GOOD, "picture.docx", "error: --output: "),
]


@pytest.mark.parametrize(("content", "output", "message"), ERRORS)
def test_errors_in_one_line(
    content: bytes | None, output: str, message: str, tmp_path: Path, capsys: Capsys
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "metrics.csv").write_bytes(content)
    with pytest.raises(SystemExit) as error:
        main([str(run), "--output", str(tmp_path / output)])
    assert error.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith(message.format(run=run, csv=run / "metrics.csv"))
    assert text.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
