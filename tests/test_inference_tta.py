"""fcn/inference/tta.py and tiles.py: what a network gives through flips, scales and tiles."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from test_predict import noise
from torch import Tensor
from torch.nn import functional as F

from fcn.errors import ConfigError
from fcn.inference.tiles import tile_spans
from fcn.inference.tta import TestTime


def test_weights_of_tiles_sum_to_one() -> None:
    for length, tile in product((65, 100, 224, 225, 500, 999), (64, 96, 224)):
        total = torch.zeros(length)
        for start, stop, weights in tile_spans(length, tile):
            assert start % 32 == 0
            assert 0 < stop - start <= tile
            total[start:stop] += weights
        torch.testing.assert_close(total, torch.ones(length))


def test_tiles_of_a_local_network_are_exact() -> None:
    """Where the margin is wider than the receptive field, tiles change nothing."""
    torch.manual_seed(0)
    kernel = torch.randn(5, 3, 7, 7)
    seen: list[tuple[int, ...]] = []

    def local(image: Tensor) -> Tensor:
        seen.append(tuple(image.shape))
        return F.conv2d(image.float() / 255, kernel, padding=3)

    for size in ((300, 410), (64, 500), (129, 31)):
        image = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
        expected = local(image)
        network = TestTime(local, tile=100)  # rounded down to 96
        seen.clear()
        torch.testing.assert_close(network(image), expected, atol=1e-4, rtol=0)
        assert all(height <= 96 and width <= 96 for *_, height, width in seen)
        assert network.masks(image).eq(expected.argmax(1)).float().mean() > 0.9999
        heights = [band.shape[2] for band in network.bands(image)]
        assert sum(heights) == size[0]
        assert max(heights) <= 96  # rows of scores that are held at a time


def test_flips_and_scales() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 3, 3)

    def network(image: Tensor) -> Tensor:
        return F.conv2d(image.float() / 255, kernel, padding=1)

    image = torch.from_numpy(noise(40, 52).copy()).permute(2, 0, 1)[None]
    assert torch.equal(TestTime(network)(image), network(image))
    assert torch.equal(TestTime(network, tile=64)(image), network(image))
    flipped = TestTime(network, flip=True)(image)
    mean = (network(image).softmax(1) + network(image.flip(-1)).flip(-1).softmax(1)) / 2
    torch.testing.assert_close(flipped.exp(), mean)
    torch.testing.assert_close(TestTime(network, flip=True)(image.flip(-1)).flip(-1), flipped)
    sizes: list[tuple[int, ...]] = []
    views = TestTime(lambda x: sizes.append(x.shape[-2:]) or network(x), scales=(0.75, 1, 1.25))
    torch.testing.assert_close(views(image).exp().sum(1), torch.ones(1, 40, 52))
    assert sizes == [(30, 39), (40, 52), (50, 65)]
    assert TestTime(network, flip=True, scales=[0.01])(image[..., :1]).shape == (1, 4, 40, 1)


@pytest.mark.parametrize(
    "device", ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "mps"))]
)
def test_first_of_equal_scores(device: str) -> None:
    """`masks` takes the maximum where others take argmax."""
    if not getattr(torch, device).is_available():
        pytest.skip("there is no such device")
    scores = torch.randint(3, (2, 21, 40, 50)).float()  # many are equal
    scores[0, 7, :5] = math.nan
    image = torch.zeros(2, 3, 40, 50, dtype=torch.uint8)
    first = scores.nan_to_num(9).numpy().argmax(1)  # NumPy documents that it takes the first
    layouts = (torch.contiguous_format, torch.channels_last)
    for layout, dtype in product(layouts, (torch.float32, torch.bfloat16)):
        given = scores.to(device, dtype, memory_format=layout)
        mask = TestTime(lambda _, given=given: given).masks(image)
        assert mask.numpy().tolist() == first.tolist()


def test_arguments_that_cannot_work() -> None:
    rows: list[tuple[dict[str, Any], str]] = [
        ({"scales": []}, r"tta\.scales=\[\]: must be a list"),
        ({"scales": [0]}, r"tta\.scales=\[0\]: must be"),
        ({"scales": [9]}, r"tta\.scales=\[9\]: must be"),
        ({"scales": "a/b"}, r"tta\.scales=a/b: must be"),
        ({"flip": 1}, r"tta\.flip=1: must be true or false"),
        ({"tile": 63}, "tile=63: must be null or a whole number from 64 up"),
    ]
    for options, message in rows:
        with pytest.raises(ConfigError, match=message):
            TestTime(lambda image: image, **options)
