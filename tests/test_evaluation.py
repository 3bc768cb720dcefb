"""Bands around boundaries against slow counting, padded batches, tables that spreadsheets open."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fcn.checkpoint import last_checkpoint
from fcn.evaluation.boundaries import WIDTHS, band_confusions
from fcn.evaluation.folder import write_confusion, write_images
from fcn.evaluation.scores import ImageScores
from fcn.module import SegmentationModule


def within(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels in the band of a width, by looking at all pairs of pixels."""
    height, across = mask.shape
    edges = [
        (y, x)
        for y in range(height)
        for x in range(across)
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
        if 0 <= y + dy < height and 0 <= x + dx < across and mask[y, x] != mask[y + dy, x + dx]
    ]
    inside = np.zeros(mask.shape, bool)
    for y, x in np.ndindex(mask.shape):
        inside[y, x] = any((y - v) ** 2 + (x - u) ** 2 <= (width - 1) ** 2 for v, u in edges)
    return inside


@pytest.mark.parametrize("seed", [0, 3])
def test_bands_against_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((17, 60), np.uint8)
    for _ in range(2 + seed):
        y, x = rng.integers(0, 17), rng.integers(0, 60)
        mask[y : y + rng.integers(1, 7), x : x + rng.integers(1, 7)] = rng.choice([1, 2, 255])
    prediction = rng.integers(0, 3, mask.shape).astype(np.uint8)
    bands = band_confusions(mask, prediction, 3, 255)
    for i, width in enumerate(WIDTHS):
        judged = within(mask, width) & (mask != 255)
        expected = np.zeros((3, 3), np.int64)
        np.add.at(expected, (mask[judged], prediction[judged]), 1)
        assert np.array_equal(bands[: i + 1].sum(0), expected), width
    whole = multiclass_confusion_matrix(
        torch.from_numpy(prediction), torch.from_numpy(mask), num_classes=3, ignore_index=255
    )
    assert np.array_equal(bands.sum(0), whole)


@pytest.mark.parametrize(
    ("labels", "expected"),  # pixels in the bands of width 1, 2, 3, 5, 10, 20, 40
    [
        ("00001111", (2, 4, 6, 8, 8, 8, 8)),
        ("000vv1111", (2, 4, 6, 7, 7, 7, 7)),  # bands start at the edge of the void line
        ("000000", (0, 0, 0, 0, 0, 0, 0)),
        ("0" * 50 + "1", (2, 3, 4, 6, 11, 21, 41)),
    ],
)
def test_width_of_bands(labels: str, expected: tuple[int, ...]) -> None:
    row = [255 if c == "v" else int(c) for c in labels]
    mask = np.array([row], np.uint8)
    bands = band_confusions(mask, np.zeros_like(mask), 2, 255)
    assert tuple(bands.cumsum(0)[:-1].sum((1, 2)).tolist()) == expected


def test_padding_is_no_boundary(finished_run: Path) -> None:
    """Images of a batch get the scores that they get alone."""
    module: Any = SegmentationModule.load_from_checkpoint(last_checkpoint(finished_run))
    rng = np.random.default_rng(0)
    masks = [torch.from_numpy(rng.integers(0, 3, shape) // 2) for shape in ((9, 14), (12, 8))]
    masks[0][6:] = 255  # a bar that belongs to the image
    padded = torch.full((2, 12, 14), 255, dtype=torch.uint8)
    for slot, mask in zip(padded, masks, strict=True):
        slot[: mask.shape[0], : mask.shape[1]] = mask

    def scored(*batches: tuple[torch.Tensor, list[torch.Size], list[str]]) -> ImageScores:
        scores = ImageScores(keep=True)
        for mask, size, name in batches:
            batch, outputs = {"mask": mask, "size": size, "id": name}, {"prediction": mask * 0}
            scores.on_validation_batch_end(Any, module, outputs, batch, 0)  # type: ignore[arg-type]
        scores.on_validation_end()
        return scores

    together = scored((padded, [mask.shape for mask in masks], ["a", "b"]))
    alone = scored(*((m[None].byte(), [m.shape], [n]) for m, n in zip(masks, "ab", strict=True)))
    assert np.array_equal(alone.bands, together.bands)
    assert alone.rows == together.rows
    assert together.prediction(0).flags.writeable  # else torch warns of it in every report
    assert together.prediction(0).shape == (9, 14)


def test_tables_hold_no_formula(tmp_path: Path) -> None:
    """OWASP's "CSV injection": names come from folders and lists of anybody."""
    names = ["=1+1", "+x", "-x", "@x", "a,b", "Straße \udcff"]
    write_confusion(tmp_path / "confusion.csv", torch.arange(36).reshape(6, 6), names)
    write_images(tmp_path / "images.csv", [("=1+1", 0.5, 0.25), ("all void", math.nan, math.nan)])
    with (tmp_path / "confusion.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    expected = ["'=1+1", "'+x", "'-x", "'@x", "a,b", "Straße \\udcff"]
    assert head == ["label", *expected]
    assert [row[0] for row in rows] == expected
    assert [int(n) for row in rows for n in row[1:]] == list(range(36))
    text = (tmp_path / "images.csv").read_bytes().decode()
    assert text == "id,pixel_acc,miou\r\n'=1+1,0.5,0.25\r\nall void,,\r\n"
