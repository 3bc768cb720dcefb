"""Pictures, pixel by pixel where that tells, and curves from rows as metrics.csv has them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcn.datasets.voc2012 import VOC2012
from fcn.visualize import VOID_COLOUR, colourise, draw_curves, overlay, panel

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
    tall = 50 + 200 + 100  # heights at width 100, shapes kept
    assert 300 < picture.width < 360
    assert tall < picture.height < tall + 150
    for colour, area in (
        (IMAGE, 100 * tall),  # every image
        (PALETTE[1], 100 * 50),  # the first label
        (PALETTE[2], 100 * (50 + 100 + 100)),  # a prediction, and both of the last row
    ):
        found = (pixels == colour).all(-1).sum()
        assert area <= found <= area + 300, colour  # and its entry in the legend
    for colour, column in ((IMAGE, 0), (PALETTE[1], 1)):
        xs = np.nonzero((pixels == colour).all(-1).sum(0) > 40)[0]  # higher than a legend's entry
        assert xs.max() - xs.min() == 99
        assert 100 * column < xs.min() < 100 * column + 50


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


def test_curves(rows: list[dict[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw_curves(rows, path)
    first = np.asarray(Image.open(path).convert("RGB"))
    assert min(first.shape[:2]) > 500
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 50
    for values in rows:
        if values["val/miou"]:
            values["val/miou"] = "0.9"
    draw_curves(rows, path)  # replaces
    assert (np.asarray(Image.open(path).convert("RGB")) != first).any()
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("keep", [0, 1, 25])
def test_curves_of_a_young_run(keep: int, rows: list[dict[str, str]], tmp_path: Path) -> None:
    draw_curves(rows[:keep], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").format == "PNG"


def test_curves_with_odd_numbers(rows: list[dict[str, str]], tmp_path: Path) -> None:
    """A validation without labels is NaN, an overflowing one Inf; one wild batch is no scale."""
    rows[-1] |= {"val/miou": "nan", "val/loss": "inf"}
    rows[5]["train/loss"] = "1e9"
    draw_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
