"""ADE20K: value 0 is void or a class, on a tiny tree in the true layout."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcn.datasets import SegmentationDataset, download
from fcn.datasets.ade20k import ADE20K
from fcn.errors import DataError

VALUES = [0, 1, 3, 150]  # other, wall, sky, flag


def folder(root: Path) -> Path:
    return root / "ADEChallengeData2016"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, name, number in (("training", "train", 3), ("validation", "val", 2)):
        for kind in ("images", "annotations"):
            (folder(tmp_path) / kind / part).mkdir(parents=True)
        for i in range(1, number + 1):
            stem = f"ADE_{name}_{i:08d}"
            mode = "L" if i == 2 else "RGB"  # a few photographs of ADE20K are grey
            Image.new(mode, (20, 12)).save(folder(tmp_path) / "images" / part / f"{stem}.jpg")
            mask = np.repeat(np.array(VALUES, np.uint8), 60).reshape(12, 20)
            Image.fromarray(mask).save(folder(tmp_path) / "annotations" / part / f"{stem}.png")
    (folder(tmp_path) / "images" / "training" / "._ADE_train_00000001.jpg").touch()
    return tmp_path


def test_classes() -> None:
    classes, palette = ADE20K.labels()
    assert len(classes) == len(set(classes)) == len(palette) == len(set(palette)) == 150
    assert (classes[0], classes[12], classes[149]) == ("wall", "person", "flag")
    more, colours = ADE20K.labels(other=True)
    assert more == ("other", *classes)
    assert colours[1:] == palette


@pytest.mark.parametrize(("other", "labels"), [(False, [0, 2, 149, 255]), (True, VALUES)])
def test_sample(root: Path, other: bool, labels: list[int]) -> None:
    data: SegmentationDataset = ADE20K(root=root, split="train", other=other)
    assert data.ids == [f"ADE_train_{i:08d}" for i in (1, 2, 3)]
    assert len(data.classes) == len(data.palette) == 150 + other
    for i in range(3):
        sample = data[i]
        assert sample["image"].shape == (3, 12, 20)
        assert sample["mask"].dtype == torch.uint8
        assert sample["mask"].unique().tolist() == labels
    first = int(data[0]["mask"][0, 0])
    assert first == (0 if other else 255)
    assert ADE20K(root=root, split="val").ids == ["ADE_val_00000001", "ADE_val_00000002"]


def test_errors(root: Path) -> None:
    with pytest.raises(DataError, match=r"'test'.*train, val"):
        ADE20K(root=root, split="test")
    with pytest.raises(DataError, match=r"ADE20K needs data\.root"):
        ADE20K()
    masks = folder(root) / "annotations" / "training"
    path = masks / "ADE_train_00000001.png"
    Image.new("L", (20, 12), 151).save(path)
    with pytest.raises(DataError, match=rf"{path.name}.*1 to 150 or 0 \(void\), found 151"):
        ADE20K(root=root)[0]
    path.unlink()
    with pytest.raises(DataError, match=r"1 of 3 masks missing.*ADE_train_00000001"):
        ADE20K(root=root)


def test_download(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(urls: tuple[str, ...], md5: str, dest: Path) -> None:
        assert dest.name == "ADEChallengeData2016.zip"
        with zipfile.ZipFile(dest, "w") as file:
            for path in folder(root).rglob("*"):
                file.write(path, path.relative_to(root))

    new = tmp_path / "new"
    new.mkdir()
    monkeypatch.setattr(download, "fetch", fetch)
    assert len(ADE20K(root=new, split="val", download=True)) == 2
    monkeypatch.setattr(download, "fetch", None)  # a second start fetches nothing
    assert len(ADE20K(root=new, split="train", download=True)) == 3
