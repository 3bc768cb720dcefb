"""Whether a label stands for the same class in all masks of a data set, judged by its colours.

contradiction({path: data.appearance(path) for path in masks})      # data: a Folder of folder.py
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fcn.datasets.pictures import palette_of
from fcn.datasets.reading import labels_of

Colour = tuple[int, int, int]


class Appearance(NamedTuple):
    """How the file of a mask shows its labels."""

    is_grey: bool  # the values of a grey picture are the labels
    colours: dict[int, Colour]  # the colour of each label in it, R, G, B


def appearance(picture: Image.Image, path: Path) -> Appearance:
    """How a picture of labels shows those that are in it.

    Args:
        picture: the mask, as `read_mask_picture` has read it.
        path: its file, for the message.

    Raises:
        DataError: the picture holds colours, transparent pixels or fractions.
    """
    values = np.unique(labels_of(picture, path)).astype(int).tolist()
    colours = {value: (value, value, value) for value in values}
    if picture.mode == "1":
        colours = {value: (255 * value, 255 * value, 255 * value) for value in values}
    elif picture.mode in ("P", "PA"):
        table = palette_of(picture)
        colours = {value: tuple(table[value].tolist()) for value in values}
    is_grey = all(colour == (value, value, value) for value, colour in colours.items())
    return Appearance(is_grey, colours)


def contradiction(appearances: Mapping[Path, Appearance]) -> str | None:
    """Why a label cannot stand for the same class in all masks; None: it can.

    Args:
        appearances: how the file of each mask shows its labels.
    """
    colour_of: dict[int, tuple[Colour, Path]] = {}  # for each label, its colour and a mask with it
    label_of: dict[Colour, tuple[int, Path]] = {}
    coloured = [path for path, look in appearances.items() if not look.is_grey]
    for path in coloured:
        colours = appearances[path].colours
        repeated = {colour for colour, n in Counter(colours.values()).items() if n > 1}
        for label, colour in colours.items():
            if colour in repeated:
                continue
            other, first = colour_of.setdefault(label, (colour, path))
            if other != colour:
                return _palettes_differ(path, f"label {label} is {colour}", first, str(other))
            number, first = label_of.setdefault(colour, (label, path))
            if number != label:
                return _palettes_differ(path, f"{colour} is label {label}", first, str(number))
    # A grey copy of a coloured mask holds the brightness of each colour, which is no label.
    brightness: defaultdict[int, set[int]] = defaultdict(set)
    for (r, g, b), (label, _) in label_of.items():
        brightness[(r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16].add(label)  # as Pillow has it
    grey = [path for path, look in appearances.items() if look.is_grey]
    for path in grey if coloured else []:
        values = sorted(appearances[path].colours)
        if brightness.keys() >= set(values) and any(v not in brightness[v] for v in values):
            few, many = ("grey", "coloured") if len(grey) <= len(coloured) else ("coloured", "grey")
            odd, usual = (path, coloured[0]) if few == "grey" else (coloured[0], path)
            return (
                f"{odd}: this mask is {few}, but {usual} is {many}: the values "
                f"{', '.join(map(str, values))} of the grey one can be labels, or the brightness "
                "of the colours. Save all masks in one way"
            )
    # A coloured mask may have been a grey one. Programs that make PNG files smaller replace its
    # grey values by 0, 1, 2, ... and a palette. And a file of 1 bit shows its label 1 as 255.
    labels = {value for path in grey for value in appearances[path].colours}
    for path in coloured:
        colours = appearances[path].colours
        shades = {r for r, g, b in colours.values() if r == g == b}
        if len(shades) == len(colours) and shades <= labels:
            return (
                f"{path}: this mask shows its labels {', '.join(map(str, sorted(colours)))} as the "
                f"grey values {', '.join(map(str, sorted(shades)))}, by a palette, or because it "
                f"has 1 bit, and these are labels in {grey[0]} or another grey mask. Save all "
                "masks in one way"
            )
    return None


def _palettes_differ(path: Path, here: str, other: Path, there: str) -> str:
    return (
        f"{path}: the palettes of the masks contradict each other: {here} in this one, and {there} "
        f"in {other}. If the colours are right, set data.dataset.palette to the colour of each "
        "class; else save all masks with one palette"
    )
