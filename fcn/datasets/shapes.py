"""Shapes: generated pictures with exact masks, for runs that need no download.

    python train.py experiment=quickstart

Textured grounds with two to five objects in depth order, and VOC's kind of mask: class index, and
255 on a thin border around each object. Made so that what tells FCN-32s, 16s and 8s apart on
photographs does so here: ring walls, cross arms and ladder rungs are 4 to 5 pixels thick at size
96, and colour alone does not give the class away (`disc` and `ring`, and `square`, `cross` and
`ladder`, have the same colours and textures; one object in five has any colour at all).
"""

import colorsys
import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fcn.datasets import VOID, Sample
from fcn.datasets.voc2012 import voc_palette
from fcn.errors import ConfigError, DataError

Array = np.ndarray

# Signed distances, negative inside, to shapes of radius 1 (corners reach 1.15) around the origin;
# t is half the thickness of thin parts. u, v: (h, w), v downwards. They need be true distances
# only near the outline.


def _disc(u: Array, v: Array, t: float) -> Array:
    return np.hypot(u, v) - 1


def _ring(u: Array, v: Array, t: float) -> Array:
    return np.abs(np.hypot(u, v) - (1 - t)) - t


def _square(u: Array, v: Array, t: float) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def _cross(u: Array, v: Array, t: float) -> Array:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - t, np.maximum(u, v) - 1)


def _triangle(u: Array, v: Array, t: float) -> Array:
    return np.maximum(math.sqrt(0.75) * np.abs(u) - v / 2, v) - 0.5


def _star(u: Array, v: Array, t: float) -> Array:
    # Five times mirrored about its tips: one edge, from a tip (1, 0) to a notch, is all of it.
    sector = math.tau / 5
    angle = np.abs(np.mod(np.arctan2(v, u) + sector / 2, sector) - sector / 2)
    radius = np.hypot(u, v)
    notch_u, notch_v = 0.42 * math.cos(sector / 2), 0.42 * math.sin(sector / 2)
    nu, nv = notch_v, 1 - notch_u  # normal of the edge
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    return ((u - 1) * nu + v * nv) / math.hypot(nu, nv)


def _ladder(u: Array, v: Array, t: float) -> Array:
    u, v = np.abs(u), np.abs(v)
    rails = np.maximum(np.abs(u - 0.45) - t, v - 1)
    rungs = np.maximum(np.abs(np.abs(v - 0.35) - 0.35) - t, u - 0.45)  # at v = -0.7, 0 and 0.7
    return np.minimum(rails, rungs)


# name: (distance, smallest and largest diameter as part of the picture, hue, texture)
OBJECTS: dict[str, tuple[Callable[[Array, Array, float], Array], float, float, float, str]] = {
    "disc": (_disc, 0.24, 0.46, 0.04, "plain"),
    "ring": (_ring, 0.32, 0.60, 0.04, "plain"),
    "square": (_square, 0.24, 0.50, 0.60, "stripes"),
    "cross": (_cross, 0.34, 0.60, 0.60, "stripes"),
    "ladder": (_ladder, 0.44, 0.66, 0.60, "stripes"),
    "triangle": (_triangle, 0.30, 0.60, 0.33, "shaded"),
    "star": (_star, 0.34, 0.66, 0.82, "shaded"),
}
TEXTURES = ("plain", "stripes", "shaded")


class Shapes(Dataset[Sample]):
    """Pictures of `size` × `size` pixels, each a pure function of (seed, split, index).

    No state and no global random numbers: any process gets the same sample, in any order, and
    `train` and `val` draw from separate streams. `root` and `download` are there because every
    data set takes them; they change nothing.

    Raises DataError for an unknown split, ValueError for a size, length or seed out of range.
    """

    classes: ClassVar[tuple[str, ...]] = ("background", *OBJECTS)
    palette: ClassVar[tuple[tuple[int, int, int], ...]] = voc_palette(len(classes))
    void: ClassVar[int] = VOID
    splits: ClassVar[tuple[str, ...]] = ("train", "val")

    def __init__(
        self,
        *,
        split: str = "train",
        root: str | Path | None = None,
        download: bool = False,
        size: int = 96,
        train_length: int = 4000,
        val_length: int = 200,
        seed: int = 0,
    ) -> None:
        if split not in self.splits:
            raise DataError(f"Shapes has no split '{split}': choose from {', '.join(self.splits)}")
        lengths = {"train_length": (train_length, 1, 10**6), "val_length": (val_length, 1, 10**6)}
        # thin parts of shapes need 48 pixels
        given = {"size": (size, 48, 4096), "seed": (seed, 0, 2**63)} | lengths
        for name, (value, low, high) in given.items():
            if not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(
                    f"data.dataset.{name}={value}: must be a whole number from {low} to {high}"
                )
        self.size, self.seed, self.stream = size, seed, self.splits.index(split)
        length = train_length if split == "train" else val_length
        self.ids = [f"{split}_{i:06d}" for i in range(length)]
        ys, xs = np.mgrid[:size, :size].astype(np.float64)
        self._ys, self._xs = ys, xs  # (S, S) each

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Sample:
        name = self.ids[index]
        entropy = [self.seed, self.stream, index % len(self)]
        rng = np.random.default_rng(np.random.SeedSequence(entropy))
        # float64, so that another machine's last bit in a sine hardly ever turns a pixel
        picture = self._ground(rng)  # (3, S, S), about 0 to 255
        mask = np.zeros((self.size, self.size), np.uint8)
        for centre in self._centres(rng, int(rng.integers(2, 6))):
            self._draw(rng, picture, mask, centre)
        picture += rng.uniform(5, 15) * (rng.random(picture.shape) * 2 - 1)  # camera noise
        return {
            "image": tv_tensors.Image(torch.from_numpy(picture.clip(0, 255).astype(np.uint8))),
            "mask": tv_tensors.Mask(torch.from_numpy(mask)),
            "id": name,
        }

    def _ground(self, rng: np.random.Generator) -> Array:
        """Two dull colours, mixed by a gradient, clouds, stripes or a checkerboard: (3, S, S)."""
        one, two = (_colour(rng.random(), 0.45 * rng.random(), rng.uniform(0.2, 0.9)) for _ in "12")
        kind = rng.integers(4)
        if kind == 0:
            mix = self._wave(rng, 0.3, 0.5)
        elif kind == 1:
            mix = (self._wave(rng, 1, 3) + self._wave(rng, 1, 3) + self._wave(rng, 2, 5)) / 3
        elif kind == 2:
            mix = (4 * self._wave(rng, 3, 9) - 1.5).clip(0, 1)
        else:
            angle, waves = rng.random() * math.tau, rng.uniform(2, 5)
            first, second = (self._wave(rng, waves, waves, angle + a) for a in (0, math.pi / 2))
            mix = (12 * (first - 0.5) * (second - 0.5) + 0.5).clip(0, 1)
        return one + mix * (two - one)  # (S, S) and (3, 1, 1) -> (3, S, S)

    def _wave(
        self, rng: np.random.Generator, low: float, high: float, angle: float | None = None
    ) -> Array:
        """A plane wave from 0 to 1, with `low` to `high` periods across the picture: (S, S)."""
        angle = rng.random() * math.tau if angle is None else angle
        frequency = rng.uniform(low, high) * math.tau / self.size
        phase = rng.random() * math.tau
        along = self._xs * (frequency * math.cos(angle)) + self._ys * (frequency * math.sin(angle))
        return 0.5 + 0.5 * np.sin(along + phase)

    def _centres(self, rng: np.random.Generator, n: int) -> list[Array]:
        """n points as parts of the picture, each the best of four tries at keeping a distance, so
        that objects overlap but seldom hide each other."""
        centres = [rng.uniform(0.15, 0.85, 2)]
        while len(centres) < n:
            tries = rng.uniform(0.15, 0.85, (4, 2))
            nearest = [min(math.hypot(*(t - c)) for c in centres) for t in tries]
            centres.append(tries[int(np.argmax(nearest))])
        return centres

    def _draw(self, rng: np.random.Generator, picture: Array, mask: Array, centre: Array) -> None:
        """Puts one object of a random class on top of `picture` (3, S, S) and `mask` (S, S)."""
        label = int(rng.integers(1, len(self.classes)))
        distance, small, large, hue, texture = OBJECTS[self.classes[label]]
        radius = rng.uniform(small, large) * self.size / 2
        thickness = max(rng.uniform(3.6, 5.4) * self.size / 96, 3.0)
        cy, cx = centre * self.size
        reach = 1.2 * radius + 2  # to the corners and the border beyond them
        top, left = (max(int(c - reach), 0) for c in (cy, cx))
        box = (slice(top, int(cy + reach) + 1), slice(left, int(cx + reach) + 1))
        ys, xs = self._ys[box] - cy, self._xs[box] - cx  # (h, w) each, cut off by the picture

        turn = rng.random() * math.tau
        u = (xs * math.cos(turn) + ys * math.sin(turn)) / radius
        v = (ys * math.cos(turn) - xs * math.sin(turn)) / radius
        pixels = radius * distance(u, v, thickness / 2 / radius)  # distance to the outline

        if rng.random() < 0.2:  # any colour, any texture
            hue, texture = rng.random(), TEXTURES[rng.integers(len(TEXTURES))]
        hue += 0.03 * rng.standard_normal()
        colour = _colour(hue, rng.uniform(0.6, 1), rng.uniform(0.55, 1))
        if texture == "plain":
            paint = colour
        elif texture == "stripes":
            paint = colour * (0.8 + 0.2 * np.sin(v * radius * (math.tau / 96 * 14)))
        else:
            paint = colour * (0.8 + 0.3 * v)
        cover = (0.5 - pixels).clip(0, 1)  # anti-aliased edge
        picture[:, *box] += cover * (paint - picture[:, *box])
        mask[box][pixels < 0.7] = VOID  # a border of a pixel or two, above what lies below
        mask[box][pixels < -0.7] = label


def _colour(hue: float, saturation: float, value: float) -> Array:
    """RGB, 0 to 255: (3, 1, 1)."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value)).reshape(3, 1, 1)
