"""Class scores of a large image, computed in overlapping tiles that fade into each other.

    for band in scores_in_bands(network, image, 768):    # from the top of the image down
        mask = band.argmax(1)                            # (N, K, h, W) -> (N, h, W)

The activations of a VGG for a photograph of 20 million pixels take gigabytes. With tiles, the
network sees one part of the image at a time, and only the scores of one row of tiles are in memory.
predict.py and evaluate.py do this for the setting `tile`.

At the border of a tile a convolution sees zeros where the image goes on, and its scores are wrong
there. So tiles overlap by a third of their side, and each pixel is taken from tiles in which it
lies well inside: the outermost eighth of a tile has weight 0, and over the next twelfth its weight
rises from 0 to 1 while that of its neighbour falls. In tiles of 768, every pixel is seen with at
least 96 more around it. The receptive field of conv6 on a VGG-19 is 460 pixels wide, but most of
its weight lies in the middle: of the pixels of a photograph of 1680 x 1260, a trained FCN-8s gave
99.99 % the same class in such tiles as without them.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ScoreFunction = Callable[[Tensor], Tensor]  # images (N, 3, H, W) uint8 -> scores (N, K, H, W)
# The stride of VGG's last pool, in pixels. Tiles begin at multiples of it, so that each value of a
# pool is computed from the same pixels as without tiles.
CELL = 32


class Span(NamedTuple):
    """Where one tile lies along one side of the image."""

    start: int
    stop: int
    weights: Tensor  # (stop - start,), for each pixel


def tile_spans(length: int, tile: int) -> list[Span]:
    """Cover one side of an image with tiles; the weights of each pixel sum to 1.

    Args:
        length: the length of that side of the image, in pixels.
        tile: the side of a tile in pixels, a multiple of 32.
    """
    padded = -(-length // CELL) * CELL  # rounded up, as the network pads an image
    overlap = max(CELL, tile // 3 // CELL * CELL)
    gaps = max(0, math.ceil((padded - tile) / (tile - overlap)))  # one less than there are tiles
    starts = [(padded - tile) * i // max(1, gaps) // CELL * CELL for i in range(gaps + 1)]
    # Distance of each pixel's centre from the nearer end of each tile: (tiles, padded). Where a
    # tile ends with the image itself there is nothing to fade into, as if its end were far away.
    centre, margin = torch.arange(padded) + 0.5, overlap * 3 // 8
    first = torch.tensor([-math.inf, *starts[1:]])[:, None]
    last = torch.tensor([*(start + tile for start in starts[:-1]), math.inf])[:, None]
    inside = torch.minimum(centre - first, last - centre)
    weights = ((inside - margin) / (overlap - 2 * margin)).clamp(0, 1)
    weights /= weights.sum(0)
    stops = [min(start + tile, length) for start in starts]
    tiles = zip(starts, stops, weights, strict=True)
    return [Span(start, stop, weight[start:stop]) for start, stop, weight in tiles]


def scores_in_bands(network: ScoreFunction, image: Tensor, tile: int) -> Iterator[Tensor]:
    """The scores of images, in bands of rows from the top down.

    Args:
        network: images (N, 3, H, W) -> scores (N, K, H, W).
        image: (N, 3, H, W).
        tile: side of the square tiles in pixels, a multiple of 32.

    Yields:
        Scores (N, K, h, W) float32. The heights h are at most `tile`, and sum to H.
    """
    height, width = image.shape[-2:]
    rows, columns = tile_spans(height, tile), tile_spans(width, tile)
    ends = [*(row.start for row in rows[1:]), height]  # where the next row of tiles begins
    band = None  # (N, K, h, W): sums of weighted scores from the top of this row of tiles down
    for row, end in zip(rows, ends, strict=True):
        for column in columns:
            part = image[..., row.start : row.stop, column.start : column.stop]
            scores = network(part).float()  # (N, K, tile height, tile width)
            if band is None:
                band = scores.new_zeros(*scores.shape[:2], 0, width)
            if column.start == 0:  # the row of tiles reaches further down than the one before
                band = F.pad(band, (0, 0, 0, row.stop - row.start - band.shape[2]))
            weights = torch.outer(row.weights, column.weights).to(scores)
            band[..., column.start : column.stop] += scores * weights
        assert band is not None
        finished = end - row.start
        yield band[:, :, :finished]
        band = band[:, :, finished:]
