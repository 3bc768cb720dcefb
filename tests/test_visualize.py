"""Pictures, pixel by pixel where that tells, and curves from rows as metrics.csv has them."""

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT
from matplotlib.figure import Figure
from PIL import Image

import fcn.visualize
from fcn.csv_logger import Columns, read_numbers
from fcn.datasets.voc2012 import VOC2012
from fcn.visualize import (
    RIGHT,
    UNJUDGED,
    VOID_COLOUR,
    WRONG,
    colourise,
    draw_curves,
    error_map,
    fit,
    image_iou,
    main,
    overlay,
    panel,
    run_names,
)

PALETTE = [(0, 0, 0), (255, 0, 0), (0, 128, 64)]
NAMES = ["background", "aeroplane", "potted plant"]


def test_colourise() -> None:
    mask = torch.tensor([[0, 1, 2], [255, 2, 1]], dtype=torch.uint8)
    colours = colourise(mask, PALETTE)
    assert colours.dtype == torch.uint8
    assert colours.shape == (3, 2, 3)
    assert colours.permute(1, 2, 0).tolist() == [
        [list(PALETTE[0]), list(PALETTE[1]), list(PALETTE[2])],
        [list(VOID_COLOUR), list(PALETTE[2]), list(PALETTE[1])],
    ]
    assert colourise(mask.long(), PALETTE, void=2)[:, 0, 2].tolist() == list(VOID_COLOUR)


def test_colourise_takes_voc_in_full() -> None:
    every = torch.arange(21).view(3, 7)
    colours = colourise(every, VOC2012.palette).flatten(1).T.tolist()
    assert colours == [list(colour) for colour in VOC2012.palette]


def test_overlay() -> None:
    image = torch.full((3, 1, 3), 100, dtype=torch.uint8)
    mask = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    result = overlay(image, mask, PALETTE, alpha=0.6)
    assert result.dtype == torch.uint8
    assert result[:, 0, 0].tolist() == [100, 100, 100]  # background stays clear
    assert result[:, 0, 1].tolist() == [0.4 * 100 + 0.6 * 255, 40, 40]
    assert result[:, 0, 2].tolist() == [round(40 + 0.6 * c) for c in VOID_COLOUR]
    assert overlay(image, mask, PALETTE, alpha=0).equal(image)
    assert image.eq(100).all()  # untouched


def test_error_map() -> None:
    label = torch.tensor([[0, 1, 255], [2, 255, 1]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 2, 0], [2, 1, 0]])
    colours = error_map(label, prediction).permute(1, 2, 0).tolist()
    right, wrong, void = map(list, (RIGHT, WRONG, UNJUDGED))
    assert colours == [[right, wrong, void], [right, void, wrong]]
    red, green, blue = wrong
    assert red > 2 * max(green, blue)
    assert len(set(void)) == len(set(right)) == 1  # greys


def test_iou_of_one_image() -> None:
    label = torch.tensor([[1, 1, 2, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[1, 2, 2, 0]], dtype=torch.uint8)
    assert image_iou(label, prediction, 21) == pytest.approx(1 / 2)  # 1: 1/2, 2: 1/2, no 0
    assert math.isnan(image_iou(torch.full((2, 2), 255), torch.zeros(2, 2, dtype=torch.uint8), 21))


def test_fit() -> None:
    mask = torch.tensor([[0, 7], [255, 3]], dtype=torch.uint8)
    assert fit(mask, 4, 9).tolist() == mask.repeat_interleave(2, 0).repeat_interleave(2, 1).tolist()
    assert fit(torch.zeros(3, 10, 1000, dtype=torch.uint8), 50, 50).shape == (3, 1, 50)
    assert fit(torch.zeros(1000, 10, dtype=torch.uint8), 50, 50).shape == (50, 1)


IMAGE = (70, 80, 200)  # no grey, which text has too


def row(
    height: int, width: int, label: int, prediction: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image = torch.tensor(IMAGE, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, width)
    masks = [torch.full((height, width), k, dtype=torch.uint8) for k in (label, prediction)]
    return image, masks[0], masks[1]


def colours_in(picture: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(picture).reshape(-1, 3).tolist()))


def test_panel_holds_every_picture_in_its_place() -> None:
    rows = [row(30, 60, 1, 2), row(80, 40, 255, 0), row(1, 1, 2, 2)]
    picture = panel(rows, class_names=NAMES, palette=PALETTE, title="step 5", width=100)
    pixels = np.asarray(picture).astype(int)
    heights = 50 + 150 + 100  # at width 100, shapes kept; the second is limited to height 150
    assert 400 < picture.width < 460
    assert heights < picture.height < heights + 250
    tall = 75 * 150
    for colour, area in (
        (IMAGE, 100 * 50 + tall + 100 * 100),  # every image
        (PALETTE[1], 100 * 50),  # the first label
        (PALETTE[2], 100 * (50 + 100 + 100)),  # a prediction, and both of the last row
        (WRONG, 100 * 50),
        (UNJUDGED, tall),
        (RIGHT, 100 * 100),
    ):
        found = (pixels == colour).all(-1).sum()
        assert area <= found <= area + 300, colour  # and its entry in the legend
    for colour, column in ((IMAGE, 0), (PALETTE[1], 1), (WRONG, 3)):
        xs = np.nonzero((pixels == colour).all(-1).sum(0) > 40)[0]  # higher than a legend's entry
        assert xs.max() - xs.min() == 99
        assert 110 * column < xs.min() < 110 * column + 50


def test_panel_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    draw = fcn.visualize.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        fcn.visualize.ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, *args, **kw: (texts.append(text), draw(self, at, text, *args, **kw)),
    )
    rows = [row(20, 40, 1, 1), row(20, 40, 1, 2), row(4, 4, 255, 2)]
    rows[0][2][:, :10] = 0  # a quarter is wrong: IoU 3/4 and 0
    ids = ["one", "two\n" + "w" * 500, "three"]
    panel(rows, class_names=NAMES, palette=PALETTE, ids=ids, title="step 7, val mIoU 0.1")
    assert {"step 7, val mIoU 0.1", "image", "label", "prediction", "one", "three"} <= set(texts)
    assert {"IoU 0.375", "IoU 0.000", "all void"} <= set(texts)
    assert {"25.0 % wrong", "100.0 % wrong", "0.0 % wrong"} <= set(texts)
    assert {"background", "aeroplane", "potted plant", "void"} <= set(texts)
    (cut,) = (text for text in texts if text.startswith("two"))
    assert cut.endswith("…")
    assert "\n" not in cut


def test_panel_legend_names_the_classes_that_occur() -> None:
    legend = panel([row(20, 20, 0, 1)], class_names=NAMES, palette=PALETTE)
    assert {PALETTE[1], VOID_COLOUR} <= colours_in(legend)
    assert PALETTE[2] not in colours_in(legend)


def test_panel_of_all_classes() -> None:
    k = len(VOC2012.classes)
    label = torch.arange(k, dtype=torch.uint8).repeat(4, 1)
    rows = [(torch.zeros(3, 4, k, dtype=torch.uint8), label, torch.full_like(label, 3))]
    full = panel(rows, class_names=VOC2012.classes, palette=VOC2012.palette)
    assert set(VOC2012.palette) <= colours_in(full)
    few = panel([row(4, k, 1, 1)], class_names=NAMES, palette=PALETTE)
    assert few.width == full.width
    assert full.height > few.height + 40  # the legend takes more lines


def test_panel_void_is_no_class() -> None:
    picture = panel([row(20, 20, 20, 1)], class_names=NAMES, palette=PALETTE, void=20)
    assert VOID_COLOUR in colours_in(picture)


@pytest.fixture
def rows() -> list[dict[str, str]]:
    result: list[dict[str, str]] = []
    for step in range(1, 41):
        loss = 3 * math.exp(-step / 20)
        values = {"step": str(step), "train/loss": str(loss * (1 + step % 3))}
        values |= {"train/loss_smooth": str(loss), "train/loss_mean": str(loss)}
        values |= {"train/loss_std": "0.1", "val/loss": "", "val/miou": "", "val/pixel_acc": ""}
        if step % 20 == 0:
            values |= {"val/loss": str(loss), "val/miou": "0.4", "val/pixel_acc": "0.7"}
        result.append(values)
    return result


def numbers(rows: list[dict[str, str]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([float(row.get(name) or "nan") for row in rows]) for name in names}


def test_curves(rows: list[dict[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw_curves(numbers(rows), path)
    first = np.asarray(Image.open(path).convert("RGB"))
    assert min(first.shape[:2]) > 500
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 50
    for values in rows:
        if values["val/miou"]:
            values["val/miou"] = "0.9"
    draw_curves(numbers(rows), path)  # replaces
    assert (np.asarray(Image.open(path).convert("RGB")) != first).any()
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("keep", [0, 1, 25])
def test_curves_of_a_young_run(keep: int, rows: list[dict[str, str]], tmp_path: Path) -> None:
    draw_curves(numbers(rows[:keep]), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").format == "PNG"


def test_curves_with_odd_numbers(rows: list[dict[str, str]], tmp_path: Path) -> None:
    """A validation without labels is NaN, an overflowing one Inf; one wild batch is no scale."""
    rows[-1] |= {"val/miou": "nan", "val/loss": "inf"}
    rows[5]["train/loss"] = "1e9"
    draw_curves(numbers(rows), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn, before it is pixels."""
    drawn: list[Figure] = []
    save = fcn.visualize._save
    monkeypatch.setattr(fcn.visualize, "_save", lambda f, path: (drawn.append(f), save(f, path)))
    return drawn


def line(figure: Figure, label: str) -> np.ndarray:
    """x and y of a curve: (2, n)."""
    (found,) = (x for axes in figure.axes for x in axes.lines if x.get_label() == label)
    return np.array(found.get_data(), float)


def test_what_is_in_the_curves(
    rows: list[dict[str, str]], figures: list[Figure], tmp_path: Path
) -> None:
    rows[0]["train/lr"] = rows[39]["train/lr"] = "0.25"
    rows[10]["train/loss_smooth"] = "nan"
    draw_curves(numbers(rows), tmp_path / "curves.png")
    (figure,) = figures
    assert line(figure, "raw, each step").shape == (2, 40)
    smooth = line(figure, "smoothed")
    assert smooth.shape == (2, 39)
    (band,) = (c for axes in figure.axes for c in axes.collections)
    edges = band.get_paths()[0].vertices
    for step, value in smooth.T:  # ± one standard deviation about the smoothed loss
        ys = np.unique(edges[edges[:, 0] == step, 1].round(9))
        assert ys == pytest.approx([value - 0.1, value + 0.1])
    assert line(figure, "validation")[0].tolist() == [20, 40]
    assert line(figure, "mean IoU")[1].tolist() == [0.4, 0.4]
    assert line(figure, "pixel accuracy")[1].tolist() == [0.7, 0.7]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["loss (cross-entropy)", "learning rate", "validation scores"]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.25, 0.25]


def write_run(run: Path, rows: list[dict[str, str]], *overrides: str) -> Path:
    run.mkdir(parents=True)
    lines = [",".join(rows[0]), *(",".join(values.values()) for values in rows)]
    (run / "metrics.csv").write_text("".join(f"{text}\n" for text in lines))
    (run / "overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
    return run


def test_several_runs_in_one_figure(
    rows: list[dict[str, str]],
    figures: list[Figure],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = write_run(tmp_path / "fcn8s" / "$now_", rows, "optimizer.lr=1e-3", "seed=1")
    two = write_run(tmp_path / "fcn32s" / "$now_", rows[:25], "seed=1", "model=fcn32s")
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
    assert (tmp_path / "one.svg").read_text().startswith("<?xml")


def test_a_sweep_in_one_figure(
    rows: list[dict[str, str]],
    figures: list[Figure],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in range(12):
        write_run(tmp_path / "sweep" / str(number), rows, f"optimizer.lr={number}")
    write_run(tmp_path / "sweep" / "12", [{"step": "1"}])
    main([str(tmp_path / "sweep"), "--output", str(tmp_path / "sweep.png")])
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert [label.split()[0] for label in labels] == [str(number) for number in range(12)]
    assert labels[11].startswith("11  optimizer.lr=11 ")
    colours = {tuple(x.get_color()) for x in figures[0].axes[0].lines}
    assert len(colours) == 12
    assert "12 has nothing to draw yet" in capsys.readouterr().err


def test_run_names_are_unique_and_short(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a/x", "b/x", "b/y", "c/b/x")]
    assert run_names(runs) == ["a/x", f"{tmp_path.name}/b/x", "y", "c/b/x"]
    write_run(runs[2], [{"step": "1"}], *(f"key{n}={n}" for n in range(50)))
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
    output: str,
    rows: list[dict[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path / "run", rows)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run"), "--output", str(tmp_path / output)])
    text = capsys.readouterr().err
    assert text.startswith("error: --output")
    assert text.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_hundred_thousand_steps(tmp_path: Path, figures: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"step": str(step), "train/loss": str(loss), "train/loss_smooth": "1.0"}
        | {"train/loss_std": "0.5", "train/lr": "0.1"}
        for step, loss in enumerate(rng.exponential(size=100_000), 1)
    ]
    rows[77_777]["train/loss"] = "99"
    write_run(tmp_path / "run", rows)
    start = time.process_time()
    draw_curves(read_numbers(tmp_path / "run" / "metrics.csv"), tmp_path / "curves.png")
    assert time.process_time() - start < 15  # 2 on an idle core
    steps, losses = line(figures[0], "raw, each step")
    assert len(steps) < 5000
    assert (np.diff(steps) > 0).all()
    assert losses[steps == 77_778].tolist() == [99]  # no peak is lost
    assert steps[-1] > 99_900


def test_command_line(rows: list[dict[str, str]], tmp_path: Path) -> None:
    write_run(tmp_path / "a", rows)
    write_run(tmp_path / "b", rows)
    command = [sys.executable, "-m", "fcn.visualize", str(tmp_path / "a"), str(tmp_path / "b")]
    command += ["--output", str(tmp_path / "both.png")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "both.png").is_file()
