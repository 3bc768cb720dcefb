"""ADE20K: value 0 is void or a class, on a tiny tree in the true layout."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_folder import write

from fcn.datasets import SegmentationDataset, download
from fcn.datasets.ade20k import ADE20K
from fcn.errors import DataError

VALUES = [0, 1, 3, 150]  # other, wall, sky, flag


def folder(root: Path) -> Path:
    return root / "ADEChallengeData2016"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, name, number in (("training", "train", 3), ("validation", "val", 2)):
        for i in range(1, number + 1):
            stem = f"ADE_{name}_{i:08d}"
            mode = "L" if i == 2 else "RGB"  # a few photographs of ADE20K are grey
            write(folder(tmp_path) / "images" / part, stem, Image.new(mode, (20, 12)), "jpg")
            mask = np.repeat(np.array(VALUES, np.uint8), 60).reshape(12, 20)
            write(folder(tmp_path) / "annotations" / part, stem, mask)
    (folder(tmp_path) / "images" / "training" / "._ADE_train_00000001.jpg").touch()
    return tmp_path


def test_classes() -> None:
    classes, palette = ADE20K.labels()
    assert len(classes) == len(set(classes)) == len(palette) == len(set(palette)) == 150
    assert (classes[0], classes[12], classes[149]) == ("wall", "person", "flag")
    more, colours = ADE20K.labels(other=True)
    assert more == ("other", *classes)
    assert colours[1:] == palette


@pytest.mark.parametrize(
    ("other", "labels", "first"), [(False, [0, 2, 149, 255], 255), (True, VALUES, 0)]
)
def test_sample(root: Path, other: bool, labels: list[int], first: int) -> None:
    data: SegmentationDataset = ADE20K(root=root, split="train", other=other)
    assert data.ids == [f"ADE_train_{i:08d}" for i in (1, 2, 3)]
    assert len(data.classes) == len(data.palette) == 150 + other
    for i in range(3):
        sample = data[i]
        assert sample["image"].shape == (3, 12, 20)
        assert sample["mask"].unique().tolist() == labels
        assert sample["mask"][0, 0] == first
    assert ADE20K(root=root, split="val").ids == ["ADE_val_00000001", "ADE_val_00000002"]


def test_errors(root: Path) -> None:
    with pytest.raises(DataError, match=r"'test'.*train, val"):
        ADE20K(root=root, split="test")
    path = folder(root) / "annotations" / "training" / "ADE_train_00000001.png"
    Image.new("L", (20, 12), 151).save(path)
    with pytest.raises(
        DataError, match=rf"{path.name}.*1 to 150 or 0 \(void\), found 151; .* data=folder$"
    ):
        ADE20K(root=root)[0]


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(download, "fetch", lambda urls, md5, dest: fetched.append(dest.name))
    with pytest.raises(DataError, match=r"ADEChallengeData2016\.zip: cannot unpack"):
        ADE20K(root=tmp_path, download=True)  # nothing has come
    assert fetched == ["ADEChallengeData2016.zip"]
