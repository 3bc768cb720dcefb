"""VOC2012: the reader, on a tiny tree in the true layout, on damaged ones, and on real pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_VOC, write_mask
from PIL import Image
from torchvision import tv_tensors

from fcn.datasets import SegmentationDataset
from fcn.datasets.voc2012 import VOC2012, voc_palette
from fcn.errors import DataError

FIRST = "2007_000032"


def folder(root: Path) -> Path:
    return root / "VOCdevkit" / "VOC2012"


def fails(root: Path) -> str:
    """The message with which the first sample of train cannot be read."""
    data = VOC2012(root=root, split="train")
    with pytest.raises(DataError) as error:
        data[0]
    return str(error.value)


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
    for i, (name, (width, height, label, _)) in enumerate(list(TINY_VOC.items())[:6]):
        sample = data[i]
        assert sample["id"] == name
        assert isinstance(sample["image"], tv_tensors.Image)
        assert isinstance(sample["mask"], tv_tensors.Mask)
        assert sample["image"].dtype == sample["mask"].dtype == torch.uint8
        assert sample["image"].shape == (3, height, width)
        assert sample["mask"].shape == (height, width)
        # Indices, not the palette's colours.
        assert sample["mask"].unique().tolist() == [0, label, 255]


def test_image_is_rgb(tiny_voc: Path) -> None:
    data = VOC2012(root=tiny_voc, split="train")
    grey = data[data.ids.index("2008_000068")]["image"]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    sample = data[0]  # an aeroplane is painted reddish: red comes first
    red, green, blue = (c[sample["mask"] == 1].float().mean() for c in sample["image"])
    assert red > green + 50
    assert red > blue + 50


def test_splits(tiny_voc: Path) -> None:
    train, val, both = (VOC2012(root=tiny_voc, split=s).ids for s in ("train", "val", "trainval"))
    assert not set(train) & set(val)
    assert sorted(train + val) == both
    with pytest.raises(DataError, match=r"'test'.*train, val, trainval, seg11valid"):
        VOC2012(root=tiny_voc, split="test")
    with pytest.raises(DataError, match="732 of 736 images missing"):  # val has 4 of them
        VOC2012(root=tiny_voc, split="seg11valid")


def test_tree_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        VOC2012(root=tmp_path)
    for part in (str(folder(tmp_path)), "data.download=true", "experiment=quickstart"):
        assert part in str(error.value)
    with pytest.raises(DataError, match=r"data\.root"):
        VOC2012(root=None)


def test_missing_files(own_voc: Path) -> None:
    for name in ("2007_000039", "2010_000170"):
        (folder(own_voc) / "SegmentationClass" / f"{name}.png").unlink()
    with pytest.raises(DataError, match=r"2 of 6 masks missing.*2007_000039\.png"):
        VOC2012(root=own_voc, split="train")
    (folder(own_voc) / "JPEGImages" / f"{FIRST}.jpg").unlink()
    with pytest.raises(DataError, match=rf"1 of 6 images missing.*{FIRST}\.jpg"):
        VOC2012(root=own_voc, split="train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", "empty"),
        ("../../secret\n", "secret"),
        ("a/b\n", "a/b"),
        ("..\n", "'..'"),
        (f"{FIRST}\n2007_000039\n{FIRST}\n", f"'{FIRST}' is in this list more than once"),
    ],
)
def test_bad_list(own_voc: Path, text: str, message: str) -> None:
    path = folder(own_voc) / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"train\.txt.*{message}"):
        VOC2012(root=own_voc, split="train")
    path.unlink()
    with pytest.raises(DataError, match=r"train\.txt.*No such file"):
        VOC2012(root=own_voc, split="train")


@pytest.mark.parametrize("damage", ["truncated", "empty", "no picture"])
@pytest.mark.parametrize("file", [f"JPEGImages/{FIRST}.jpg", f"SegmentationClass/{FIRST}.png"])
def test_broken_file(own_voc: Path, file: str, damage: str) -> None:
    path = folder(own_voc) / file
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b""}.get(damage, b"<html>"))
    message = fails(own_voc)
    assert str(path) in message
    assert "cannot read" in message


def test_bad_mask(own_voc: Path) -> None:
    path = folder(own_voc) / "SegmentationClass" / f"{FIRST}.png"
    write_mask(path, np.zeros((64, 95), np.uint8))
    assert f"{path}: the mask is 95×64, its image 96×64" in fails(own_voc)
    mask = np.zeros((64, 96), np.uint8)
    mask[0, :3] = 21, 254, 255
    write_mask(path, mask)
    assert str(path) in fails(own_voc)
    assert "found 21, 254" in fails(own_voc)
    Image.new("RGB", (96, 64), "red").save(path)
    assert str(path) in fails(own_voc)
    assert "mode RGB" in fails(own_voc)


def test_own_lists(real_voc_root: Path) -> None:
    """Anybody with VOC2012 can repeat the scores that were measured on these parts of it."""
    small, train, val = (
        set(VOC2012(root=real_voc_root, split=f"mini_{part}").ids)
        for part in ("train335", "train", "val")
    )
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
