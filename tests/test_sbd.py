"""SBD and the augmented VOC2012: which ids, which file each comes from, and that none overlap."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_VOC
from PIL import Image
from test_folder import write

from fcn.datasets import SegmentationDataset, download
from fcn.datasets.reading import check_disjoint, missing_allowed, read_ids
from fcn.datasets.sbd import SBD
from fcn.datasets.voc2012 import LISTS, VOC2012
from fcn.errors import DataError

savemat = pytest.importorskip("scipy.io").savemat

VOC_TRAIN, VOC_VAL = list(TINY_VOC)[:6], list(TINY_VOC)[6:]
TRAIN = ["2008_000002", VOC_TRAIN[0], VOC_VAL[0]]
VAL = ["2008_000005", VOC_TRAIN[1], VOC_VAL[1]]
SIZE = (20, 30)  # height and width; no VOC photograph of ours has it


def folder(root: Path) -> Path:
    return root / "benchmark_RELEASE" / "dataset"


def write_mat(path: Path, mask: np.ndarray) -> None:
    struct = {"Boundaries": np.zeros((20, 1)), "Segmentation": mask, "CategoriesPresent": [5]}
    savemat(path, {"GTcls": struct}, do_compression=True)


@pytest.fixture
def root(own_voc: Path) -> Path:
    """A tiny VOC2012 with a tiny SBD beside it, as the archive unpacks."""
    for part in ("cls", "inst"):
        (folder(own_voc) / part).mkdir(parents=True)
    mask = np.zeros(SIZE, np.uint8)
    mask[:5] = 5
    for name in TRAIN + VAL:
        write(folder(own_voc) / "img", name, Image.new("RGB", SIZE[::-1], "teal"), "jpg")
        write_mat(folder(own_voc) / "cls" / f"{name}.mat", mask)
    for split, ids in (("train", TRAIN), ("val", VAL)):
        (folder(own_voc) / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    return own_voc


def test_augmented(root: Path) -> None:
    train: SegmentationDataset = SBD(root=root, split="train", with_voc=True)
    val = SBD(root=root, split="val", with_voc=True)
    assert set(train.ids) == {*VOC_TRAIN, "2008_000002", "2008_000005"}
    assert len(train) == len(train.ids) == 8
    assert val.ids == VOC_VAL
    check_disjoint(train.ids, val.ids)
    for index, name in enumerate(train.ids):
        sample = train[index]
        assert sample["id"] == name
        assert sample["image"].shape[1:] == sample["mask"].shape
        if name in VOC_TRAIN:  # VOC's mask, with its void
            assert sample["mask"].unique().tolist() == [0, TINY_VOC[name][2], 255]
        else:
            assert sample["mask"].shape == SIZE
            assert sample["mask"].unique().tolist() == [0, 5]
            assert (sample["mask"][:5] == 5).all()
    assert val[0]["mask"].equal(VOC2012(root=root, split="val")[0]["mask"])


def test_paper(root: Path) -> None:
    train = SBD(root=root, split="train")
    assert train.ids == sorted(TRAIN)
    assert all(train[i]["mask"].shape == SIZE for i in range(3))  # SBD's masks for all
    with pytest.raises(DataError, match=r"images missing"):
        SBD(root=root, split="seg11valid")
    with missing_allowed():
        val = SBD(root=root, split="seg11valid")
        assert val.ids == SBD(root=root, split="val").ids
    assert val.ids == sorted(read_ids(LISTS / "seg11valid.txt"))
    assert len(val) == 736
    voc, name = root / "VOCdevkit" / "VOC2012", val.ids[700]
    files = (voc / "JPEGImages" / f"{name}.jpg", voc / "SegmentationClass" / f"{name}.png")
    assert val.pairs[name] == files
    with pytest.raises(DataError, match=rf"1 of 736 .*trained on too: {VOC_VAL[0]}\."):
        check_disjoint(train.ids, val.ids)  # our train has an id that SBD's own has not


def test_evaluation_needs_no_sbd(root: Path) -> None:
    shutil.rmtree(root / "benchmark_RELEASE")
    assert SBD(root=root, split="val", with_voc=True).ids == VOC_VAL
    with pytest.raises(DataError, match=r"SBD not found.*benchmark_RELEASE.dataset"):
        SBD(root=root, split="train")


def test_download(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(urls: tuple[str, ...], md5: str, dest: Path) -> None:
        fetched.append((dest.name, md5, len(urls)))
        tree = "benchmark_RELEASE" if dest.suffix == ".tgz" else "VOCdevkit"
        with tarfile.open(dest, "w:gz" if dest.suffix == ".tgz" else "w") as tar:
            tar.add(root / tree, tree)

    new = tmp_path / "new"
    new.mkdir()
    monkeypatch.setattr(download, "fetch", fetch)
    SBD(root=new, split="val", with_voc=True, download=True)  # as the data module begins
    assert ("benchmark.tgz", "82b4d87ceb2ed10f6038a1cba92111cb", 2) in fetched
    assert len(fetched) == 2
    monkeypatch.setattr(download, "fetch", None)  # a second start fetches nothing
    assert len(SBD(root=new, split="train", with_voc=True, download=True)) == 8
    assert len(SBD(root=new, split="train", download=True)) == 3


def test_broken(root: Path) -> None:
    path = folder(root) / "cls" / f"{TRAIN[0]}.mat"
    data = SBD(root=root, split="train")

    def fails(message: str) -> None:
        with pytest.raises(DataError, match=rf"{path.name}.*{message}"):
            data[data.ids.index(TRAIN[0])]

    write_mat(path, np.full(SIZE, 21, np.uint8))
    fails("found 21; .* data=folder")
    write_mat(path, np.zeros(SIZE))
    fails("float64")
    savemat(path, {"other": 1})
    fails("GTcls")
    path.write_bytes(path.read_bytes()[:40])
    fails("cannot read this mask")
    with pytest.raises(DataError, match=r"'test'.*train, val, seg11valid"):
        SBD(root=root, split="test")
