"""The images of report.html: image | label | prediction | errors, as WebP inside the page.

    gallery = make_gallery(results, data, wanted=12, budget=19_000_000, render=figure)

A page holds each picture once. Where one is shown again, under the errors or over the image, the
script of the page copies it. Class 0 is transparent, so that a prediction can lie over its image.
"""

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from fcn.datasets import SegmentationDataset
from fcn.evaluation.result import Result
from fcn.figures.legend import LONGEST_NAME, Entry, legend_entries, one_line
from fcn.figures.masks import VOID_COLOUR, Colour, labels_in

# Longest side in pixels and WebP quality: the first of these that leaves room for all images.
SIZES = ((480, 82), (400, 76), (320, 70), (240, 60), (160, 50), (96, 35))
AROUND = 4000  # bytes for titles and texts around the images
ERRORS = (("wrong", (229, 62, 48)),)
ERRORS_OF_TWO = (
    ("only A wrong", (236, 150, 20)),
    ("only B wrong", (44, 132, 236)),
    ("both wrong", (200, 50, 190)),
)
IGNORED = (128, 128, 128, 150)  # RGBA of void pixels among the errors
LARGEST_CLASSES = 5  # that the text of a picture names, for those who do not see it


@dataclass
class Picture:
    """A WebP that is inside the page."""

    id: str
    alt: str
    width: int
    height: int
    base64: str


@dataclass
class Figure:
    """One image with its label, predictions and errors.

    Attributes:
        name: of the image.
        photo, label, errors: pictures.
        predictions: (letter, picture) of each result. The letter is empty if there is only one.
        background: colour of class 0, which is transparent in the pictures.
        scores: (letter, pixel accuracy, mean IoU) of each result.
        legend: the classes that occur, and the kinds of errors with their share.
    """

    name: str
    photo: Picture
    label: Picture
    predictions: list[tuple[str, Picture]]
    errors: Picture
    background: Colour
    scores: list[tuple[str, float, float]]
    legend: list[Entry]


def make_gallery(
    results: Sequence[Result],
    data: SegmentationDataset,
    *,
    wanted: int,
    budget: int,
    render: Callable[[Figure], str],
) -> dict[str, Any]:
    """The images that tell most: a third each of the worst, the median and the best.

    Images of a comparison are ranked by the change from A to B.

    Args:
        results: one, or A and B.
        data: the images that were scored.
        wanted: how many images.
        budget: bytes for all of them. With many images, pictures get smaller; an image that is too
            large even then is left out.
        render: HTML of a figure, in ASCII.

    Returns:
        `groups` of (title, HTML of each figure), how many were `chosen`, and how many are `shown`.
    """
    miou = np.array([[row[2] for row in result.images.rows] for result in results])  # (results, N)
    two = len(results) > 1
    groups = choose_images((miou[1] - miou[0] if two else miou[0]).tolist(), wanted)
    titles = ("B loses most", "Median", "B gains most") if two else ("Worst", "Median", "Best")
    chosen = sum(map(len, groups))
    share = (budget - AROUND) // max(1, chosen)
    shown: list[tuple[str, list[str]]] = []
    for title, group in zip(titles, groups, strict=True):
        shown.append((title, []))
        for index in group:
            source = Source(results, data, index)
            for side, quality in SIZES:
                html = render(source.figure(side, quality))
                if len(html) <= share:
                    shown[-1][1].append(html)
                    break
    return {"groups": shown, "chosen": chosen, "shown": sum(len(html) for _, html in shown)}


def choose_images(scores: Sequence[float], wanted: int) -> tuple[list[int], list[int], list[int]]:
    """Indices of the lowest, the middle and the highest scores, none of them twice.

    Images without a score (NaN) are never chosen.
    """
    order = sorted((i for i, s in enumerate(scores) if not math.isnan(s)), key=lambda i: scores[i])
    wanted = min(wanted, len(order))
    low, high = (wanted + 2) // 3, (wanted + 1) // 3
    middle = wanted - low - high
    start = min(max((len(order) - middle) // 2, low), len(order) - high - middle)
    return order[:low], order[start : start + middle], order[len(order) - high :][::-1]


class Source:
    """One image of the data with its label and predictions, from which figures of any size come."""

    def __init__(self, results: Sequence[Result], data: SegmentationDataset, index: int) -> None:
        sample = data[index]
        self.index, self.palette, self.void = index, data.palette, data.void
        self.name = data.ids[index]
        self.classes = [one_line(name, LONGEST_NAME) for name in data.classes]
        self.photo = sample["image"].permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
        self.mask = sample["mask"].numpy()  # (H, W)
        self.letters = ["A", "B"] if len(results) > 1 else [""]
        self.predictions = [r.images.prediction(index, self.mask.shape) for r in results]
        rows = [result.images.rows[index] for result in results]
        self.scores = [
            (letter, accuracy, miou)
            for letter, (_, accuracy, miou) in zip(self.letters, rows, strict=True)
        ]
        self.colours = np.zeros((256, 4), np.uint8)  # RGBA; class 0 is transparent
        self.colours[1 : len(data.palette)] = [(*colour, 255) for colour in data.palette[1:]]
        self.colours[self.void] = (*VOID_COLOUR, 255)

    def figure(self, side: int, quality: int) -> Figure:
        """Its pictures at most `side` pixels long; the photograph in a WebP of this quality."""
        ident, name = f"i{self.index}", self.name
        predictions = [
            (letter, self._classes(f"prediction {letter}".strip(), prediction, f"p{letter}", side))
            for letter, prediction in zip(self.letters, self.predictions, strict=True)
        ]
        errors, error_legend = self._errors(side)
        masks = [torch.from_numpy(m) for m in (self.mask, *self.predictions)]
        legend = legend_entries(labels_in(*masks), self.classes, self.palette, self.void)
        return Figure(
            name=name,
            photo=photo_picture(self.photo, f"photograph {name}", ident, side, quality),
            label=self._classes("label", self.mask, "m", side),
            predictions=predictions,
            errors=errors,
            background=self.palette[0],
            scores=self.scores,
            legend=[*legend, *error_legend],
        )

    def _classes(self, title: str, classes: np.ndarray, key: str, side: int) -> Picture:
        """A label or a prediction (H, W) in the colours of its classes."""
        alt = f"{title} of {self.name}: {self._largest(classes)}"
        return class_picture(classes, self.colours, alt, f"i{self.index}{key}", side)

    def _largest(self, classes: np.ndarray) -> str:
        """The largest classes of a label or a prediction (H, W) in words."""
        counts = np.bincount(classes[classes != self.void], minlength=len(self.classes))
        largest = [k for k in counts.argsort()[::-1][:LARGEST_CLASSES].tolist() if counts[k]]
        parts = [f"{self.classes[k]} {100 * counts[k] / counts.sum():.0f} %" for k in largest]
        return ", ".join(parts) or "void"

    def _errors(self, side: int) -> tuple[Picture, list[Entry]]:
        """Where predictions are wrong, and the legend: each kind of error with its share."""
        kinds = ERRORS_OF_TWO if len(self.letters) > 1 else ERRORS
        # For each pixel: 0 if all are right, 1 if only the first is wrong, 2: the second, 3: both.
        wrong = sum((p != self.mask).astype(np.uint8) << i for i, p in enumerate(self.predictions))
        judged = self.mask != self.void
        wrong = np.where(judged, wrong, self.void).astype(np.uint8)  # (H, W)
        colours = np.zeros((256, 4), np.uint8)
        colours[1 : 1 + len(kinds)] = [(*colour, 255) for _, colour in kinds]
        colours[self.void] = IGNORED
        counts = np.bincount(wrong[judged], minlength=4)
        total = max(1, counts.sum())
        legend: list[Entry] = [
            (f"{name} {100 * counts[kind] / total:.1f} %", colour)
            for kind, (name, colour) in enumerate(kinds, start=1)
        ]
        alt = f"errors in {self.name}: {', '.join(text for text, _ in legend)}"
        return class_picture(wrong, colours, alt, f"i{self.index}e", side), legend


def photo_picture(pixels: np.ndarray, alt: str, ident: str, side: int, quality: int) -> Picture:
    """A photograph (H, W, 3) uint8, at most `side` pixels long."""
    picture = Image.fromarray(pixels)
    picture = picture.resize(_size(picture, side), Image.Resampling.BILINEAR)
    return _picture(picture, alt, ident, quality=quality, method=4)


def class_picture(
    classes: np.ndarray, colours: np.ndarray, alt: str, ident: str, side: int
) -> Picture:
    """Classes (H, W) uint8 in their colours (256, 4), at most `side` pixels long, without loss."""
    picture = Image.fromarray(classes)
    small = np.asarray(picture.resize(_size(picture, side), Image.Resampling.NEAREST))
    return _picture(
        Image.fromarray(colours[small]), alt, ident, lossless=True, quality=50, method=3
    )


def _size(picture: Image.Image, side: int) -> tuple[int, int]:
    scale = min(1, side / max(picture.size))
    return max(1, round(scale * picture.width)), max(1, round(scale * picture.height))


def _picture(picture: Image.Image, alt: str, ident: str, **options: int) -> Picture:
    file = BytesIO()
    picture.save(file, "WEBP", **options)
    code = base64.b64encode(file.getvalue()).decode()
    return Picture(ident, alt, picture.width, picture.height, code)
