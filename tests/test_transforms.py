"""Transforms: image and mask stay together, padding is where and what it must be."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from fcn.datasets import Sample
from fcn.transforms import FILL, collate, eval_transform, train_transform


def make(image: Tensor, mask: Tensor) -> Sample:
    return {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask(mask), "id": "a"}


def ramp(height: int, width: int, *, down: bool = False) -> Sample:
    """A sample whose labels are the column's (or row's) number, as is its image."""
    line = torch.arange(height if down else width, dtype=torch.uint8)
    mask = (line[:, None] if down else line).expand(height, width).clone()
    return make(mask.expand(3, -1, -1).clone(), mask)


def coded(height: int, width: int) -> Sample:
    """A sample each of whose pixels has a colour of its own: its row, column, and their sum."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8).expand(height, width)
    return make(torch.stack([rows, columns, rows + columns]), rows ^ columns)


@pytest.mark.parametrize("down", [False, True], ids=["across", "down"])
@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("factor", [1 / 3, 0.62, 1.0, 1.7, 3.0])
def test_image_and_mask_stay_aligned(factor: float, flip: float, down: bool) -> None:
    transform = train_transform(crop_size=(41, 47), scale=(factor, factor), flip=flip)
    for seed in range(10):
        torch.manual_seed(seed)
        out = transform(ramp(200, 180, down=down))
        assert out["image"].shape == (3, 41, 47)
        assert out["mask"].shape == (41, 47)
        assert (out["mask"] != 255).all()
        difference = out["image"][0].float() - out["mask"].float()
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


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.9])
def test_same_as_scaling_the_whole_image(factor: float) -> None:
    ys, xs = np.mgrid[:75, :100]
    wave = 127 + 120 * np.sin(ys / 9) * np.cos(xs / 7)
    image = torch.from_numpy(wave.astype(np.uint8)).expand(3, -1, -1)
    whole = F.resize_image(image, [round(75 * factor), round(100 * factor)]).float()
    torch.manual_seed(1)
    out = train_transform(crop_size=32, scale=(factor, factor), flip=0)(make(image, image[0]))
    crop = out["image"].as_subclass(Tensor).float()
    windows = whole[0].unfold(0, 32, 1).unfold(1, 32, 1)  # every place of a 32 × 32 window
    assert (windows - crop[0]).abs().mean((-2, -1)).min() < 4  # of about 60 at other places


def test_padding() -> None:
    mask = torch.full((40, 30), 3, dtype=torch.uint8)
    sample = make(torch.full((3, 40, 30), 9, dtype=torch.uint8), mask)
    out = train_transform(crop_size=[50, 24], scale=[0.5, 0.5], flip=0)(sample)
    assert (out["mask"][:20, :15] == 3).all()
    assert (out["image"][:, :20, :15] == 9).all()
    rest = torch.ones(50, 24, dtype=torch.bool)
    rest[:20, :15] = False
    assert (out["mask"][rest] == 255).all()
    assert (out["image"][:, rest] == torch.tensor(FILL)[:, None]).all()
    assert isinstance(out["image"], tv_tensors.Image)  # so that a later step knows which is which
    assert isinstance(out["mask"], tv_tensors.Mask)


def test_whole_images() -> None:
    sample = coded(20, 30)
    out = train_transform(crop_size=None, scale=None, flip=0)(sample)
    assert torch.equal(out["image"], sample["image"])
    assert torch.equal(out["mask"], sample["mask"])
    shapes = set()
    transform = train_transform(crop_size=None, scale=(0.5, 2))
    for _ in range(30):
        out = transform(sample)
        assert out["image"].shape[1:] == out["mask"].shape
        shapes.add(tuple(out["mask"].shape))
    assert len(shapes) > 10
    assert all(10 <= h <= 40 and 15 <= w <= 60 for h, w in shapes)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1)])
@pytest.mark.parametrize("crop", [None, 1, 33])
def test_sides_never_vanish(size: tuple[int, int], crop: int | None) -> None:
    for factor in (0.01, 1.0, 2.5):
        out = train_transform(crop_size=crop, scale=(factor, factor))(ramp(*size))
        assert min(out["mask"].shape) >= 1
        assert (out["mask"] != 255).any()


def test_flip() -> None:
    sample = coded(20, 30)
    out = train_transform(crop_size=None, scale=None, flip=1)(sample)
    assert torch.equal(out["image"], sample["image"].flip(-1))
    assert torch.equal(out["mask"], sample["mask"].flip(-1))


def test_randomness_is_torchs() -> None:
    transform = train_transform(crop_size=24, scale=(0.5, 2), jitter=0.4)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out = transform(coded(60, 70))
        return torch.cat([out["image"].as_subclass(Tensor), out["mask"][None]])

    first = run(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002  # the legacy generator is what must not matter
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)


def test_jitter_leaves_the_mask() -> None:
    sample = coded(20, 30)
    out = train_transform(crop_size=None, scale=None, flip=0, jitter=0.5)(sample)
    assert out["image"].dtype == torch.uint8
    assert not torch.equal(out["image"], sample["image"])
    assert torch.equal(out["mask"], sample["mask"])


def test_rotation() -> None:
    """A coloured triangle far from the border: image and mask turn together, without new labels."""
    mask = torch.zeros(90, 120, dtype=torch.uint8)
    mask[35:55, 40:80] = torch.ones(20, 40, dtype=torch.uint8).tril() * 7
    image = torch.full((3, 90, 120), 50, dtype=torch.uint8)
    image[:, mask > 0] = 200
    angles = set()
    for seed in range(6):
        torch.manual_seed(seed)
        out = train_transform(crop_size=None, scale=None, flip=0, rotate=40)(make(image, mask))
        turned, labels = out["image"].as_subclass(Tensor).float(), out["mask"].as_subclass(Tensor)
        assert isinstance(out["mask"], tv_tensors.Mask)
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
    torch.manual_seed(0)
    no = train_transform(crop_size=32, scale=(0.5, 2), rotate=None, blur=None)(make(image, mask))
    torch.manual_seed(0)
    default = train_transform(crop_size=32, scale=(0.5, 2))(make(image, mask))
    assert torch.equal(no["image"], default["image"])


def test_blur() -> None:
    sample = make(torch.zeros(3, 40, 40, dtype=torch.uint8), torch.zeros(40, 40, dtype=torch.uint8))
    sample["image"][:, 20, 20] = 255
    blur = train_transform(crop_size=None, scale=None, flip=0, blur=3)
    peaks = set()
    for seed in range(8):
        torch.manual_seed(seed)
        out = blur(sample)
        assert torch.equal(out["mask"], sample["mask"])
        assert out["image"].dtype == torch.uint8
        peaks.add(int(out["image"].max()))
    assert min(peaks) < 20  # 255 / (2 pi 3^2) is 4.5
    assert max(peaks) > 2 * min(peaks)


@pytest.mark.parametrize("size", [(64, 64), (20, 300), (1, 90)])
def test_blur_of_images_smaller_than_its_kernel(size: tuple[int, int]) -> None:
    """It reflects no more of them than there is."""
    sample = make(torch.zeros(3, *size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8))
    sample["image"][:, :, ::2] = 255
    torch.manual_seed(0)
    out = train_transform(crop_size=None, scale=None, flip=0, blur=22)(sample)
    assert out["image"].shape == sample["image"].shape
    assert 100 < out["image"][..., 8:-8].min() <= out["image"][..., 8:-8].max() < 155
    assert torch.equal(out["mask"], sample["mask"])


def test_eval_changes_nothing() -> None:
    sample = coded(20, 30)
    out = eval_transform()(sample)
    assert torch.equal(out["image"], sample["image"])
    assert torch.equal(out["mask"], sample["mask"])


def test_collate() -> None:
    small, large = coded(20, 50), coded(40, 30)
    small["id"], large["id"] = "small", "large"
    batch = collate([small, large])
    assert batch["image"].shape == (2, 3, 40, 50)
    assert batch["mask"].shape == (2, 40, 50)
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    assert batch["id"] == ["small", "large"]
    assert batch["size"] == [(20, 50), (40, 30)]
    for n, sample in enumerate((small, large)):
        h, w = sample["mask"].shape
        assert torch.equal(batch["image"][n, :, :h, :w], sample["image"])
        assert torch.equal(batch["mask"][n, :h, :w], sample["mask"])
        rest = torch.ones(40, 50, dtype=torch.bool)
        rest[:h, :w] = False
        assert (batch["mask"][n, rest] == 255).all()
        assert (batch["image"][n][:, rest] == torch.tensor(FILL)[:, None]).all()
    assert type(batch["image"]) is type(batch["mask"]) is Tensor
    assert collate([small])["mask"].shape == (1, 20, 50)


BAD_SIZES = [0, (10, -1), (1, 2, 3), 2**14 + 1, True, "224", [224], [224, 1.5]]
BAD_SCALES = [(0, 1), (2, 1), (1, float("nan")), 0.5, [0.5, 1, 2], ["a", "b"]]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("crop_size", BAD_SIZES),
        ("scale", BAD_SCALES),
        ("flip", [1.5, "often", None]),
        ("jitter", [-0.1, True]),
        ("rotate", [-1, 200]),
        ("blur", [0, "soft"]),
    ],
)
def test_bad_arguments(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}=.*: must be "):
            train_transform(**{"crop_size": None, "scale": None, name: value})
