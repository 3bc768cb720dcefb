"""Shapes: the same everywhere, balanced, with masks like VOC's, and classes known by shape only."""

import hashlib
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors

from fcn.datasets import Sample, SegmentationDataset
from fcn.datasets.shapes import Shapes
from fcn.errors import DataError

SOLID, THIN = ("disc", "square", "triangle", "star"), ("ring", "cross", "ladder")


def digest(sample: Sample) -> str:
    content = bytes(sample["image"].numpy()) + bytes(sample["mask"].numpy())
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor]:
    """The first pictures (P, 3, 96, 96) to train on, and their masks (P, 96, 96)."""
    data = Shapes(split="train")
    samples = [data[i] for i in range(150)]
    images = torch.stack([sample["image"].as_subclass(Tensor) for sample in samples])
    return images, torch.stack([sample["mask"].as_subclass(Tensor) for sample in samples])


@pytest.fixture(scope="module")
def masks(pictures: tuple[Tensor, Tensor]) -> Tensor:
    return pictures[1]


def test_sample() -> None:
    data: SegmentationDataset = Shapes(split="val", root="nowhere", download=True, size=64)
    assert len(data) == len(data.ids) == len(set(data.ids)) == 200
    assert len(data.classes) == len(data.palette) == 8
    sample = data[3]
    assert sample["id"] == data.ids[3] == data[3 - 200]["id"]
    assert isinstance(sample["mask"], tv_tensors.Mask)
    assert sample["image"].dtype == sample["mask"].dtype == torch.uint8
    assert sample["image"].shape[1:] == sample["mask"].shape == (64, 64)
    assert digest(sample) == digest(data[3 - 200])
    with pytest.raises(IndexError):
        data[200]
    assert len(Shapes(split="train", train_length=7, val_length=3)) == 7


def test_same_everywhere() -> None:
    """On every machine, in any order, and whatever the state of global random numbers."""
    digests = {11: "896ea33ca57ae446", 0: "fecc8611ae392f76"}
    for seed, order in ((5, (11, 0)), (6, (3, 0, 7, 11))):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        data = Shapes(split="val", seed=9, val_length=50 * seed)
        seen = {index: digest(data[index]) for index in order}
        assert {index: seen[index] for index in digests} == digests


def test_samples_differ() -> None:
    """Splits, indices and seeds each make a difference."""
    choices = (("train", 0), ("val", 0), ("train", 1))
    sets = [Shapes(split=split, seed=seed, size=48) for split, seed in choices]
    digests = {digest(data[i]) for data in sets for i in range(20)}
    assert len(digests) == 60


def test_classes_are_balanced(masks: Tensor) -> None:
    assert masks.unique().tolist() == [*range(8), 255]
    for k in range(1, 8):
        assert 0.3 < (masks == k).any(-1).any(-1).float().mean() < 0.5  # of the pictures
        assert (masks == k).float().mean() > 0.01  # of the pixels


def test_void_lies_between_labels(masks: Tensor) -> None:
    for a, b in ((masks[:, 1:], masks[:, :-1]), (masks[:, :, 1:], masks[:, :, :-1])):
        assert not ((a != b) & (a != 255) & (b != 255)).any()
    assert 0.03 < (masks == 255).float().mean() < 0.12  # thin


def test_thin_parts(masks: Tensor) -> None:
    for name in (*SOLID, *THIN):
        labels = (masks == Shapes.classes.index(name)).float()  # (P, 96, 96)
        core = 1 - F.max_pool2d(1 - labels, 7, stride=1)  # where 7 × 7 pixels have the label
        share = core.sum() / labels.sum()
        assert share < 0.01 if name in THIN else share > 0.2


def test_colour_does_not_give_the_class_away(pictures: tuple[Tensor, Tensor]) -> None:
    images, masks = pictures
    mean = {}
    for k, name in enumerate(Shapes.classes):
        inside = (masks == k).float()[:, None]  # (P, 1, 96, 96)
        counts = inside.sum((2, 3))  # (P, 1)
        colours = (images * inside).sum((2, 3)) / counts  # (P, 3)
        mean[name] = colours[counts[:, 0] > 0].mean(0)

    def apart(a: str, b: str) -> float:
        return (mean[a] - mean[b]).norm().item()

    for pair in (("disc", "ring"), ("square", "cross"), ("square", "ladder")):
        assert apart(*pair) < 20, pair
    for pair in (("disc", "square"), ("ring", "triangle"), ("star", "cross")):
        assert apart(*pair) > 60, pair


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match=r"'test'.*train, val"):
        Shapes(split="test")
    wrong: list[Any] = [{"size": 20}, {"train_length": 0}, {"val_length": -1}, {"seed": -1}]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"must"):
            Shapes(split="train", **arguments)
