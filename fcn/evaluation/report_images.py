"""The images of report.html: image | label | prediction | errors, as WebP inside the page.

    lowest, middle, highest = choose_images(scores, 12)
    image = describe_image({"": result}, data, index=lowest[0])
    photo = encode("i0-photo", *image["pictures"]["photo"], side=480, quality=82)

A page holds each picture once. Where one is shown again, under the errors or over the image, the
script of the page copies it. Where a prediction lies over its image, a class whose colour is black,
as that of VOC's background is, must be transparent.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from fcn.datasets import SegmentationDataset
from fcn.evaluation.result import Result
from fcn.figures.legend import LONGEST_NAME, Entry, legend_entries, one_line
from fcn.figures.masks import VOID_COLOUR, labels_in

ERRORS = (("wrong", (229, 62, 48)),)
ERRORS_OF_TWO = (
    ("only A wrong", (236, 150, 20)),
    ("only B wrong", (44, 132, 236)),
    ("both wrong", (200, 50, 190)),
)
IGNORED = (128, 128, 128, 150)  # RGBA of void pixels among the errors
LARGEST_CLASSES = 5  # how many classes the text for readers who cannot see a picture names


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


def describe_image(
    results: Mapping[str, Result], data: SegmentationDataset, index: int
) -> dict[str, Any]:
    """What the macro `figure` of macros.html shows of one image, with pictures in full size.

    Args:
        results: one under "", or two under "A" and "B", with predictions.
        data: the images that were scored.
        index: the place of the image in `data`.

    Returns:
        A dict with these entries:
        name: the image's id.
        scores: (letter, pixel accuracy, mean IoU) for each result.
        pictures: "photo", "label", "prediction" or "predictionA" and "predictionB", and "errors".
            Each is a text for readers who cannot see it, and its pixels: (H, W, 3) RGB for the
            photograph, (H, W, 4) RGBA for the others.
        legend: the classes that occur, and the kinds of errors with their share of the pixels.
    """
    sample, name = data[index], data.ids[index]
    mask = sample["mask"].numpy()  # (H, W)
    classes = [one_line(text, LONGEST_NAME) for text in data.classes]
    colours = np.zeros((256, 4), np.uint8)  # RGBA; black is transparent
    colours[: len(data.palette)] = [(*colour, 255 * any(colour)) for colour in data.palette]
    colours[data.void] = (*VOID_COLOUR, 255)

    def picture(title: str, labels: np.ndarray) -> tuple[str, np.ndarray]:
        """A label or a prediction (H, W) in the colours of its classes (H, W, 4)."""
        largest = _largest(labels[labels != data.void], classes)
        return f"{title} of {name}: {largest}", colours[labels]

    photo = sample["image"].permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
    pictures = {"photo": (f"photograph {name}", photo), "label": picture("label", mask)}
    predictions, scores = [], []
    for letter, result in results.items():
        prediction = result.images.prediction(index)  # (H, W)
        pictures[f"prediction{letter}"] = picture(f"prediction {letter}".strip(), prediction)
        predictions.append(prediction)
        scores.append((letter, *result.images.rows[index][1:]))
    errors, kinds = _errors(mask, predictions, data.void)
    pictures["errors"] = (f"errors in {name}: {', '.join(text for text, _ in kinds)}", errors)
    found = labels_in(*map(torch.from_numpy, (mask, *predictions)))
    return {
        "name": name,
        "scores": scores,
        "pictures": pictures,
        "legend": [*legend_entries(found, classes, data.palette, data.void), *kinds],
    }


def _largest(labels: np.ndarray, classes: Sequence[str]) -> str:
    """The classes with the most pixels among labels (n,), and their shares, as a text."""
    counts = np.bincount(labels, minlength=len(classes))
    largest = [k for k in counts.argsort()[::-1][:LARGEST_CLASSES].tolist() if counts[k]]
    parts = [f"{classes[k]} {100 * counts[k] / counts.sum():.0f} %" for k in largest]
    return ", ".join(parts) or "void"


def _errors(
    mask: np.ndarray, predictions: Sequence[np.ndarray], void: int
) -> tuple[np.ndarray, list[Entry]]:
    """Where predictions are wrong, (H, W, 4) RGBA, and each kind of error with its share."""
    kinds = ERRORS_OF_TWO if len(predictions) > 1 else ERRORS
    # For each pixel: 0 if all are right, 1 if only the first is wrong, 2: the second, 3: both.
    wrong = sum((p != mask).astype(np.uint8) << i for i, p in enumerate(predictions))
    wrong = np.where(mask == void, 4, wrong)  # (H, W)
    colours = np.zeros((5, 4), np.uint8)
    colours[1 : 1 + len(kinds)] = [(*colour, 255) for _, colour in kinds]
    colours[4] = IGNORED
    counts = np.bincount(wrong.ravel(), minlength=5)[:4]  # without void
    shares = 100 * counts / max(1, counts.sum())
    legend: list[Entry] = [
        (f"{name} {share:.1f} %", colour)
        for share, (name, colour) in zip(shares[1:], kinds, strict=False)
    ]
    return colours[wrong], legend


def encode(ident: str, alt: str, pixels: np.ndarray, side: int, quality: int) -> dict[str, Any]:
    """A picture as the macro `picture` of macros.html wants it, at most `side` pixels long.

    Args:
        ident: the picture's id in the page.
        alt: the text for readers who cannot see it.
        pixels: (H, W, 3) of a photograph, or (H, W, 4) of classes, which are stored without loss.
        side: the longest side in pixels.
        quality: the WebP quality, 0 to 100, of a photograph.
    """
    picture = Image.fromarray(pixels)
    options = {"quality": quality, "method": 4}
    resample = Image.Resampling.BILINEAR
    if picture.mode == "RGBA":
        options = {"lossless": True, "quality": 50, "method": 3}
        resample = Image.Resampling.NEAREST  # so that no colours of classes are mixed
    picture.thumbnail((side, side), resample, reducing_gap=None)
    file = BytesIO()
    picture.save(file, "WEBP", **options)
    code = base64.b64encode(file.getvalue()).decode()
    size = {"width": picture.width, "height": picture.height}
    return {"id": ident, "alt": alt, "base64": code, **size}
