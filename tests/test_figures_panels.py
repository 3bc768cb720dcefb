"""Sheets of image | label | prediction | errors: what is where, and what is written on them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_figures_masks import NAMES, PALETTE, colours_in
from torch import Tensor

from fcn.datasets.voc2012 import VOC2012
from fcn.figures.legend import load_font
from fcn.figures.masks import CORRECT, IGNORED, VOID_COLOUR, WRONG
from fcn.figures.panels import draw_panels

IMAGE = (70, 80, 200)  # not a grey, because texts are grey


def row(height: int, width: int, label: int, prediction: int) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.tensor(IMAGE, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, width)
    masks = [torch.full((height, width), k, dtype=torch.uint8) for k in (label, prediction)]
    return image, masks[0], masks[1]


def panels(rows: Sequence[tuple[Tensor, Tensor, Tensor]], **options: Any) -> Image.Image:
    """Without texts, if no others are given."""
    blank = [""] * len(rows)
    defaults = {"class_names": NAMES, "palette": PALETTE, "title": "", "ids": blank}
    return draw_panels(rows, **defaults | {"captions": blank} | options)


def test_every_picture_is_in_its_place() -> None:
    rows = [row(30, 60, 1, 2), row(80, 40, 255, 0), row(1, 1, 2, 2)]
    picture = panels(rows, title="step 5")
    pixels = np.asarray(picture).astype(int)
    heights = 120 + 360 + 240  # at width 240, shapes kept; the second is limited to height 360
    assert 960 < picture.width < 1020
    assert heights < picture.height < heights + 250
    tall = 180 * 360
    for colour, area in (
        (IMAGE, 240 * 120 + tall + 240 * 240),  # every image
        (PALETTE[1], 240 * 120),  # the first label
        (PALETTE[2], 240 * (120 + 240 + 240)),  # a prediction, and both of the last row
        (WRONG, 240 * 120),
        (IGNORED, tall),
        (CORRECT, 240 * 240),
    ):
        found = (pixels == colour).all(-1).sum()
        assert area <= found <= area + 300, colour  # and its swatch in the legend
    for colour, column in ((IMAGE, 0), (PALETTE[1], 1), (WRONG, 3)):
        xs = np.nonzero((pixels == colour).all(-1).sum(0) > 40)[0]  # higher than a swatch
        assert xs.max() - xs.min() == 239
        assert 250 * column < xs.min() < 250 * column + 50


def test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, *args, **kw: (texts.append(text), draw(self, at, text, *args, **kw)),
    )
    rows = [row(20, 40, 1, 1), row(20, 40, 1, 2), row(4, 4, 255, 2)]
    rows[0][2][:, :10] = 0  # a quarter of the first prediction is wrong
    ids = ["one", "two\n" + "w" * 500, "three"]
    captions = ["IoU 0.375", "IoU 0.000", "all void"]
    title = "step 7, val mIoU 0.1"
    panels(rows, ids=ids, captions=captions, title=title)
    assert {title, "image", "label", "prediction", "one", "three", *captions} <= set(texts)
    assert {"25.0 % wrong", "100.0 % wrong", "0.0 % wrong"} <= set(texts)
    assert {"background", "aeroplane", "potted plant", "void"} <= set(texts)
    (cut,) = (text for text in texts if text.startswith("two"))
    assert cut.endswith("…")
    assert "\n" not in cut


def test_legend_has_the_classes_that_occur_and_void() -> None:
    few = panels([row(4, 21, 0, 1)])
    assert {PALETTE[1], VOID_COLOUR} <= colours_in(few)
    assert PALETTE[2] not in colours_in(few)
    assert VOID_COLOUR in colours_in(panels([row(20, 20, 20, 1)], void=20))  # it is not a class

    label = torch.arange(21, dtype=torch.uint8).repeat(4, 1)
    rows = [(torch.zeros(3, 4, 21, dtype=torch.uint8), label, torch.full_like(label, 3))]
    full = panels(rows, class_names=VOC2012.classes, palette=VOC2012.palette)
    assert set(VOC2012.palette) <= colours_in(full)
    assert full.width == few.width
    assert full.height > few.height + 40  # the legend takes more lines


def test_names_in_letters_that_english_lacks() -> None:
    """A sign that the font lacks is drawn as a box, the same for all of them."""
    font = load_font(20)
    box = bytes(font.getmask("\uffff"))
    for letter in "éßłñкα":
        assert bytes(font.getmask(letter)) != box, letter
