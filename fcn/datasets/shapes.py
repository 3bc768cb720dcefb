"""Shapes: generated pictures with exact masks, for runs that need no download.

    python train.py experiment=quickstart

Each picture has a textured background and two to five objects, which may cover each other. Masks
are like VOC's: class indices, and 255 on a thin border around each object.

The differences between FCN-32s, FCN-16s and FCN-8s on photographs also show on these pictures.
The walls of rings, the arms of crosses and the rungs of ladders are only 4 to 5 pixels thick at
size 96. Colour alone does not give the class away: `disc` and `ring` have the same colours and
textures, and so have `square`, `cross` and `ladder`; one object in five has a random colour.
"""

import colorsys
import math
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fcn.datasets import VOID, Sample, reading
from fcn.datasets.voc2012 import voc_palette
from fcn.errors import check_whole

Array = np.ndarray

# Signed distances to the outlines of shapes around the origin, negative inside. All shapes have a
# radius of 1 (corners reach 1.15). u and v: coordinates (h, w), v downwards; t: half the thickness
# of thin parts. The values must be true distances only near the outline.


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
    # By symmetry, every point has an equivalent one next to a single edge: the one from a tip at
    # (1, 0) to the notch beside it.
    sector = math.tau / 5
    angle = np.abs(np.mod(np.arctan2(v, u) + sector / 2, sector) - sector / 2)
    radius = np.hypot(u, v)
    notch_u, notch_v = 0.42 * math.cos(sector / 2), 0.42 * math.sin(sector / 2)
    nu, nv = notch_v, 1 - notch_u  # the normal of the edge
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    return ((u - 1) * nu + v * nv) / math.hypot(nu, nv)


def _ladder(u: Array, v: Array, t: float) -> Array:
    u, v = np.abs(u), np.abs(v)
    rails = np.maximum(np.abs(u - 0.45) - t, v - 1)
    rungs = np.maximum(np.abs(np.abs(v - 0.35) - 0.35) - t, u - 0.45)  # at v = -0.7, 0 and 0.7
    return np.minimum(rails, rungs)


# How the objects of each class look: the distance to their outline; the smallest and the largest
# diameter, as fractions of the picture's side; hue and texture.
OBJECTS = {
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
    """Pictures that depend only on the seed, the split and the index.

    Any process gets the same samples, in any order. `train` and `val` use separate streams of
    random numbers.

    Args:
        split: `train` or `val`.
        root, download: have no effect; every data set takes them.
        size: height and width in pixels.
        train_length, val_length: how many pictures each split has.
        seed: another seed gives other pictures.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the split is unknown.
    """

    classes: tuple[str, ...] = ("background", *OBJECTS)
    palette: tuple[tuple[int, int, int], ...] = voc_palette(len(classes))
    void: int = VOID
    splits: tuple[str, ...] = ("train", "val")

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
        check_whole("data.dataset.size", size, 48, 4096)  # thin parts need 48 pixels
        check_whole("data.dataset.train_length", train_length, 1, 10**6)
        check_whole("data.dataset.val_length", val_length, 1, 10**6)
        check_whole("data.dataset.seed", seed, 0, 2**63)
        reading.check_split("Shapes", split, self.splits)
        self.size, self.seed, self.stream = size, seed, self.splits.index(split)
        length = train_length if split == "train" else val_length
        self.ids = [f"{split}_{i:06d}" for i in range(length)]
        self._ys, self._xs = np.mgrid[:size, :size].astype(np.float64)  # (S, S) each; S is `size`

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Sample:
        name = self.ids[index]
        entropy = [self.seed, self.stream, index % len(self)]
        rng = np.random.default_rng(np.random.SeedSequence(entropy))
        # In float64, so that the rounding of another machine's sine hardly ever changes a pixel.
        picture = self._background(rng)  # (3, S, S), about 0 to 255
        mask = np.zeros((self.size, self.size), np.uint8)
        for centre in self._centres(rng, int(rng.integers(2, 6))):
            self._draw(rng, picture, mask, centre)
        picture += rng.uniform(5, 15) * (rng.random(picture.shape) * 2 - 1)  # noise of a camera
        return {
            "image": tv_tensors.Image(torch.from_numpy(picture.clip(0, 255).astype(np.uint8))),
            "mask": tv_tensors.Mask(torch.from_numpy(mask)),
            "id": name,
        }

    def _background(self, rng: np.random.Generator) -> Array:
        """A background (3, S, S): two dull colours, mixed in one of four patterns."""
        one = _colour(rng.random(), 0.45 * rng.random(), rng.uniform(0.2, 0.9))  # (3, 1, 1)
        two = _colour(rng.random(), 0.45 * rng.random(), rng.uniform(0.2, 0.9))  # (3, 1, 1)
        pattern = rng.integers(4)
        if pattern == 0:  # a gradient
            mix = self._wave(rng, 0.3, 0.5)
        elif pattern == 1:  # clouds
            mix = (self._wave(rng, 1, 3) + self._wave(rng, 1, 3) + self._wave(rng, 2, 5)) / 3
        elif pattern == 2:  # stripes
            mix = (4 * self._wave(rng, 3, 9) - 1.5).clip(0, 1)
        else:  # a checkerboard
            angle, waves = rng.random() * math.tau, rng.uniform(2, 5)
            first, second = (self._wave(rng, waves, waves, angle + a) for a in (0, math.pi / 2))
            mix = (12 * (first - 0.5) * (second - 0.5) + 0.5).clip(0, 1)
        return one + mix * (two - one)  # (S, S) and (3, 1, 1) -> (3, S, S)

    def _wave(
        self, rng: np.random.Generator, low: float, high: float, angle: float | None = None
    ) -> Array:
        """A plane wave (S, S) from 0 to 1, with `low` to `high` periods across the picture."""
        angle = rng.random() * math.tau if angle is None else angle
        frequency = rng.uniform(low, high) * math.tau / self.size
        phase = rng.random() * math.tau
        along = self._xs * (frequency * math.cos(angle)) + self._ys * (frequency * math.sin(angle))
        return 0.5 + 0.5 * np.sin(along + phase)

    def _centres(self, rng: np.random.Generator, n: int) -> list[Array]:
        """The centres of n objects, (row, column) as fractions of the picture's side.

        Each is the one of four random points that is farthest from the centres before it, so that
        objects overlap but seldom hide each other.
        """
        centres = [rng.uniform(0.15, 0.85, 2)]
        while len(centres) < n:
            tries = rng.uniform(0.15, 0.85, (4, 2))
            nearest = [min(math.hypot(*(t - c)) for c in centres) for t in tries]
            centres.append(tries[int(np.argmax(nearest))])
        return centres

    def _draw(self, rng: np.random.Generator, picture: Array, mask: Array, centre: Array) -> None:
        """Draw an object of a random class over `picture` (3, S, S) and `mask` (S, S), in place."""
        label = int(rng.integers(1, len(self.classes)))
        distance, smallest, largest, hue, texture = OBJECTS[self.classes[label]]
        radius = rng.uniform(smallest, largest) * self.size / 2
        thickness = max(rng.uniform(3.6, 5.4) * self.size / 96, 3.0)
        cy, cx = centre * self.size
        reach = 1.2 * radius + 2  # far enough for the corners and the border around them
        top, left = (max(int(c - reach), 0) for c in (cy, cx))
        box = (slice(top, int(cy + reach) + 1), slice(left, int(cx + reach) + 1))
        ys, xs = self._ys[box] - cy, self._xs[box] - cx  # (h, w) each, inside the picture

        turn = rng.random() * math.tau
        u = (xs * math.cos(turn) + ys * math.sin(turn)) / radius
        v = (ys * math.cos(turn) - xs * math.sin(turn)) / radius
        pixels = radius * distance(u, v, thickness / 2 / radius)  # (h, w), to the outline

        if rng.random() < 0.2:  # a random colour and texture
            hue, texture = rng.random(), TEXTURES[rng.integers(len(TEXTURES))]
        hue += 0.03 * rng.standard_normal()
        colour = _colour(hue, rng.uniform(0.6, 1), rng.uniform(0.55, 1))
        if texture == "plain":
            paint = colour
        elif texture == "stripes":
            paint = colour * (0.8 + 0.2 * np.sin(v * radius * (math.tau / 96 * 14)))
        else:
            paint = colour * (0.8 + 0.3 * v)
        cover = (0.5 - pixels).clip(0, 1)  # (h, w), an anti-aliased edge
        picture[:, *box] += cover * (paint - picture[:, *box])  # (3, h, w)
        mask[box][pixels < 0.7] = VOID  # a border of one or two pixels, over what was there
        mask[box][pixels < -0.7] = label


def _colour(hue: float, saturation: float, value: float) -> Array:
    """A colour as RGB (3, 1, 1), 0 to 255, from hue, saturation and value, 0 to 1."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value)).reshape(3, 1, 1)
