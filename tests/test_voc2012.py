"""VOC2012: the reader, on a tiny tree in the true layout, on damaged ones, and on real pairs."""

from pathlib import Path

import pytest
import torch
from conftest import TINY_VOC
from torchvision import tv_tensors

from fcn.datasets import SegmentationDataset
from fcn.datasets.voc2012 import VOC2012, voc_palette
from fcn.errors import DataError

FIRST = "2007_000032"


def test_palette_and_classes() -> None:
    # Colours as in the development kit's documentation.
    known = {0: (0, 0, 0), 1: (128, 0, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    palette = voc_palette()
    assert {k: palette[k] for k in known} == known
    assert palette[255] == (224, 224, 192)
    assert len(set(palette)) == 256
    assert len(VOC2012.classes) == len(VOC2012.palette) == 21
    assert VOC2012.classes[15] == "person"


def test_sample(tiny_voc: Path) -> None:
    data: SegmentationDataset = VOC2012(root=tiny_voc, split="train")
    assert len(data) == len(data.ids) == 6
    for i, (name, (width, height, label, is_grey)) in enumerate(list(TINY_VOC.items())[:6]):
        sample = data[i]
        image, mask = sample["image"], sample["mask"]
        assert sample["id"] == name
        assert isinstance(image, tv_tensors.Image)
        assert isinstance(mask, tv_tensors.Mask)
        assert image.dtype == mask.dtype == torch.uint8
        assert image.shape == (3, height, width)
        assert mask.shape == (height, width)
        # Indices, not the palette's colours.
        assert mask.unique().tolist() == [0, label, 255]
        red, green, blue = image
        assert (torch.equal(red, green) and torch.equal(red, blue)) == is_grey
    red, green, blue = (c[data[0]["mask"] == 1].float().mean() for c in data[0]["image"])
    assert red > max(green, blue) + 50  # an aeroplane is painted reddish: red comes first


def test_splits(tiny_voc: Path) -> None:
    train, val, both = (VOC2012(root=tiny_voc, split=s).ids for s in ("train", "val", "trainval"))
    assert not set(train) & set(val)
    assert sorted(train + val) == both
    with pytest.raises(DataError, match=r"'test'.*train, val, trainval, seg11valid"):
        VOC2012(root=tiny_voc, split="test")
    with pytest.raises(DataError, match="732 of 736 images missing"):  # val has 4 of them
        VOC2012(root=tiny_voc, split="seg11valid")


def test_bad_list(own_voc: Path) -> None:
    path = own_voc / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
    for text, message in (
        ("\n \n", "empty"),
        ("../../secret\n", "secret"),
        ("a/b\n", "a/b"),
        ("..\n", "'..'"),
        (f"{FIRST}\n2007_000039\n{FIRST}\n", f"'{FIRST}' is in this list more than once"),
        (None, "No such file"),
    ):
        path.unlink()
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=rf"train\.txt.*{message}"):
            VOC2012(root=own_voc, split="train")


def test_own_lists(real_voc_root: Path) -> None:
    """Anybody with VOC2012 can repeat the scores that were measured on these parts of it."""
    splits = ("mini_train335", "mini_train", "mini_val")
    small, train, val = (set(VOC2012(root=real_voc_root, split=split).ids) for split in splits)
    assert (len(small), len(train), len(val)) == (335, 681, 175)
    assert small < train
    assert not train & val
    for ids, split in ((train, "train"), (val, "val")):
        assert ids <= set(VOC2012(root=real_voc_root, split=split).ids)
        official = real_voc_root / "lists" / f"{split}.txt"
        if official.is_file():
            assert ids <= set(official.read_text(encoding="utf-8").split())


def test_real_pairs(real_voc_root: Path) -> None:
    data = VOC2012(root=real_voc_root, split="val")
    labels: set[int] = set()
    for i in range(0, len(data), 10):
        sample = data[i]
        assert sample["image"].shape[1:] == sample["mask"].shape
        labels |= set(sample["mask"].unique().tolist())
    assert labels > {0, 15, 255}
    assert labels <= {*range(21), 255}
