"""The command that draws runs: which runs it finds, what it calls them, and its errors."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_figures_curves import Columns, catch_figures, columns_of

from fcn import visualize
from fcn.visualize import main, run_names


def write_run(run: Path, columns: Columns, *overrides: str) -> Path:
    """The folder of a run: metrics.csv, empty where nothing was logged, and overrides.yaml."""
    run.mkdir(parents=True)
    lines = [",".join(columns)]
    for values in zip(*columns.values(), strict=True):
        lines.append(",".join("" if np.isnan(value) else str(value) for value in values))
    (run / "metrics.csv").write_text("".join(f"{text}\n" for text in lines))
    (run / "overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
    return run


@pytest.mark.slow
def test_several_runs_in_one_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    labels = [text.get_text().replace("\\", "") for text in figure.legends[0].get_texts()]
    assert labels == [
        "fcn8s/$now_  optimizer.lr=1e-3 (best mIoU 0.400)",
        "fcn32s/$now_  model=fcn32s (best mIoU 0.400)",
    ]
    main([str(two), "--output", str(tmp_path / "one.svg")])
    assert [axes.get_title() for axes in figures[1].axes][1] == "learning rate"
    assert (tmp_path / "one.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.slow
def test_a_sweep_in_one_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = catch_figures(monkeypatch)
    for number in range(12):
        run = tmp_path / "sweep" / str(number)
        write_run(run, columns_of(2), f"optimizer.lr={number}")
    write_run(tmp_path / "sweep" / "12", {"step": np.array([1])})
    main([str(tmp_path / "sweep"), "--output", str(tmp_path / "sweep.png")])
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert [label.split()[0] for label in labels] == [str(number) for number in range(12)]
    assert labels[11] == "11  optimizer.lr=11"
    assert "12 has nothing to draw yet" in capsys.readouterr().err


def test_run_names_are_unique_and_short(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a/x", "b/x", "b/y", "c/b/x")]
    assert run_names(runs) == ["a/x", f"{tmp_path.name}/b/x", "y", "c/b/x"]
    write_run(runs[2], columns_of(1), *(f"key{n}={n}" for n in range(50)))
    (runs[2] / "overrides.yaml").open("a").write("- ]")  # damaged
    assert run_names(runs)[2] == "y"
    (runs[2] / "overrides.yaml").write_text("".join(f"- key{n}={n}\n" for n in range(50)))
    assert len(run_names(runs)[2]) < 90


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run folder (it has no metrics.csv)"),
        ("", "nothing to draw"),
        ("step,train/loss_smooth\n", "nothing to draw"),
        ("step,train/loss_smooth\n1,nan\n", "nothing to draw"),
        ("a,b\n1,2\n", "nothing to draw"),
        ("step,train/loss_smooth\n1,high\n", "metrics.csv: could not convert"),
        (b"\xff\xfe\x00\n\xff\n", "metrics.csv: "),
    ],
)
def test_errors_in_one_line(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        content = content.encode() if isinstance(content, str) else content
        (run / "metrics.csv").write_bytes(content)
    with pytest.raises(SystemExit) as error:
        main([str(run), "--output", str(tmp_path / "x.png")])
    assert error.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith(f"error: {run}")
    assert message in text
    assert text.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("output", ["no/such/folder.png", "picture.docx"])
def test_output_that_cannot_be(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", columns_of(40))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run"), "--output", str(tmp_path / output)])
    text = capsys.readouterr().err
    assert text.startswith("error: --output")
    assert text.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [str(write_run(tmp_path / name, columns_of(3))) for name in ("a", "b")]
    both = tmp_path / "both.png"
    monkeypatch.setattr(sys, "argv", ["visualize", *runs, "--output", str(both)])
    runpy.run_path(visualize.__file__, run_name="__main__")
    assert both.is_file()
