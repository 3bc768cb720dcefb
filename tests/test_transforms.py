"""Transforms: image and mask stay together, padding is where and what it must be.

That all randomness is torch's, and which arguments are refused, is in test_datamodule.py.
"""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from fcn.datasets import Sample
from fcn.transforms import FILL, Transform, collate, eval_transform, train_transform


def make(image: Tensor, mask: Tensor) -> Sample:
    return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask), "id": "a"}


def coded(height: int, width: int) -> Sample:
    """A sample each of whose pixels has a colour of its own: its row, column, and their sum."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8).expand(height, width)
    return make(torch.stack([rows, columns, rows + columns]), rows ^ columns)


def whole_images(**options: Any) -> Transform:
    """Only what the options say."""
    return train_transform(**{"crop_size": None, "scale": None, "flip": 0} | options)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("factor", [1 / 3, 1.0, 1.7])
def test_image_and_mask_stay_aligned(factor: float, flip: float) -> None:
    transform = train_transform(crop_size=(41, 47), scale=(factor, factor), flip=flip)
    for channel in (0, 1):  # labels that are the row's number, or the column's
        sample = coded(200, 180)
        sample["mask"] = tv_tensors.Mask(sample["image"][channel])
        for seed in range(5):
            torch.manual_seed(seed)
            out = transform(sample)
            assert out["image"].shape == (3, 41, 47)
            assert (out["mask"] != 255).all()
            difference = out["image"][channel].float() - out["mask"].float()
            assert difference.abs().max() <= 1 + 0.5 / factor
            # Sampled at the same points: no shift, not even by half a pixel.
            assert difference.mean().abs() < 0.15


def test_crop_is_a_window() -> None:
    sample = coded(60, 70)
    transform = train_transform(crop_size=(55, 62), scale=None, flip=0)
    tops, lefts = set(), set()
    for seed in range(80):
        torch.manual_seed(seed)
        out = transform(sample)
        top, left = out["image"][:2, 0, 0].tolist()
        for key in ("image", "mask"):
            assert torch.equal(out[key], sample[key][..., top : top + 55, left : left + 62])
        tops.add(top)
        lefts.add(left)
    assert tops == set(range(6))  # every place, both ends included
    assert lefts == set(range(9))


def test_same_as_scaling_the_whole_image() -> None:
    ys, xs = np.mgrid[:75, :100]
    wave = 127 + 120 * np.sin(ys / 9) * np.cos(xs / 7)
    image = torch.from_numpy(wave.astype(np.uint8)).expand(3, -1, -1)
    for factor in (0.5, 1.9):
        whole = F.resize_image(image, [round(75 * factor), round(100 * factor)])[0].float()
        out = train_transform(crop_size=32, scale=(factor, factor), flip=0)(make(image, image[0]))
        windows = whole.unfold(0, 32, 1).unfold(1, 32, 1)  # every place of a 32 × 32 window
        crop = out["image"].as_subclass(Tensor)[0].float()
        assert (windows - crop).abs().mean((-2, -1)).min() < 4  # of about 60 at other places


def test_padding() -> None:
    mask = torch.full((40, 30), 3, dtype=torch.uint8)
    sample = make(torch.full((3, 40, 30), 9, dtype=torch.uint8), mask)
    out = train_transform(crop_size=[50, 24], scale=[0.5, 0.5], flip=0)(sample)
    rest = torch.ones(50, 24, dtype=torch.bool)
    rest[:20, :15] = False
    assert (out["mask"] == torch.where(rest, 255, 3)).all()
    fill = torch.tensor(FILL)[:, None, None]
    assert (out["image"] == torch.where(rest, fill, 9)).all()
    assert isinstance(out["image"], tv_tensors.Image)  # so that a later step knows which is which
    assert isinstance(out["mask"], tv_tensors.Mask)


def test_whole_images() -> None:
    sample = coded(20, 30)
    for transform in (eval_transform(), whole_images()):
        out = transform(sample)
        assert torch.equal(out["image"], sample["image"])
        assert torch.equal(out["mask"], sample["mask"])
    out = whole_images(flip=1)(sample)
    assert torch.equal(out["image"], sample["image"].flip(-1))
    assert torch.equal(out["mask"], sample["mask"].flip(-1))
    out = whole_images(jitter=0.5)(sample)
    assert out["image"].dtype == torch.uint8
    assert not torch.equal(out["image"], sample["image"])
    assert torch.equal(out["mask"], sample["mask"])
    shapes = set()
    for _ in range(30):
        out = whole_images(scale=(0.5, 2))(sample)
        assert out["image"].shape[1:] == out["mask"].shape
        shapes.add(tuple(out["mask"].shape))
    assert len(shapes) > 10
    assert all(10 <= h <= 40 and 15 <= w <= 60 for h, w in shapes)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1)])
def test_sides_never_vanish(size: tuple[int, int]) -> None:
    for crop, factor in product((None, 1, 33), (0.01, 2.5)):
        out = train_transform(crop_size=crop, scale=(factor, factor))(coded(*size))
        assert min(out["mask"].shape) >= 1
        assert (out["mask"] != 255).any()


def test_rotation() -> None:
    """A coloured triangle far from the border: image and mask turn together, without new labels."""
    mask = torch.zeros(90, 120, dtype=torch.uint8)
    mask[35:55, 40:80] = torch.ones(20, 40, dtype=torch.uint8).tril() * 7
    image = torch.full((3, 90, 120), 50, dtype=torch.uint8)
    image[:, mask > 0] = 200
    angles = set()
    for seed in range(6):
        torch.manual_seed(seed)
        out = whole_images(rotate=40)(make(image, mask))
        turned, labels = out["image"].as_subclass(Tensor).float(), out["mask"].as_subclass(Tensor)
        assert (turned.shape, labels.shape) == ((3, 90, 120), (90, 120))
        assert {0, 7} <= set(labels.unique().tolist()) <= {0, 7, 255}
        assert turned[0][labels == 7].mean() > 190  # bilinear at the edges alone
        assert turned[0][labels == 0].mean() < 53
        outside = (labels == 255).sum().item()
        if outside > 1000:
            filled = turned[:, labels == 255].mean(1)
            assert (filled - torch.tensor(FILL)).abs().max() < 5  # FILL, but for the border
        angles.add(outside)
    assert len(angles) > 3
    assert max(angles) > 1000


def test_blur() -> None:
    sample = make(torch.zeros(3, 40, 40, dtype=torch.uint8), torch.zeros(40, 40, dtype=torch.uint8))
    sample["image"][:, 20, 20] = 255
    peaks = set()
    for seed in range(8):
        torch.manual_seed(seed)
        out = whole_images(blur=3)(sample)
        assert torch.equal(out["mask"], sample["mask"])
        assert out["image"].dtype == torch.uint8
        peaks.add(int(out["image"].max()))
    assert min(peaks) < 20  # 255 / (2 pi 3^2) is 4.5
    assert max(peaks) > 2 * min(peaks)

    # Images that are smaller than its kernel: it reflects no more of them than there is.
    for size in ((20, 300), (1, 90)):
        image = torch.zeros(3, *size, dtype=torch.uint8)
        image[:, :, ::2] = 255
        out = whole_images(blur=22)(make(image, torch.zeros(size, dtype=torch.uint8)))
        assert out["image"].shape == image.shape
        assert 100 < out["image"][..., 8:-8].min() <= out["image"][..., 8:-8].max() < 155


def test_collate() -> None:
    small, large = coded(20, 50), coded(40, 30)
    small["id"], large["id"] = "small", "large"
    batch = collate([small, large])
    assert type(batch["image"]) is type(batch["mask"]) is Tensor
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    assert batch["id"] == ["small", "large"]
    assert batch["size"] == [(20, 50), (40, 30)]
    for n, sample in enumerate((small, large)):
        h, w = sample["mask"].shape
        image, mask = torch.empty(3, 40, 50), torch.full((40, 50), 255)
        image[:] = torch.tensor(FILL)[:, None, None]
        image[:, :h, :w], mask[:h, :w] = sample["image"], sample["mask"]
        assert torch.equal(batch["image"][n], image.byte())
        assert torch.equal(batch["mask"][n], mask.byte())
    assert collate([small])["mask"].shape == (1, 20, 50)
