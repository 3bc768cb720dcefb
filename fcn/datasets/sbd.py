"""SBD, the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011): VOC's classes, more masks.

    python train.py data=voc2012_aug     # VOC2012 train and all of SBD, without VOC2012 val: 10,582
    python train.py data=sbd             # the FCN paper's: SBD train (8,498), judged on seg11valid

On disk, below `root`, as the official archive unpacks, beside VOCdevkit/VOC2012 (voc2012.py):

    benchmark_RELEASE/dataset/{train,val}.txt    one id a line; not VOC's splits
    benchmark_RELEASE/dataset/img/<id>.jpg       VOC's own photographs
    benchmark_RELEASE/dataset/cls/<id>.mat       GTcls.Segmentation: (H, W) uint8, 0-20, no void
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
from torch.utils.data import Dataset

from fcn.datasets import VOID, Sample
from fcn.datasets.download import Archive
from fcn.datasets.reading import check_exist, make_sample, read_ids, read_image, read_mask, to_mask
from fcn.datasets.voc2012 import ARCHIVE as VOC_ARCHIVE
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import DataError, reason

FOLDER = "Research/Projects/CS/vision/grouping/semantic_contours"
ARCHIVE = Archive(
    data="SBD",
    file="benchmark.tgz",
    size="1.4 GB",
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    urls=(
        f"https://www2.eecs.berkeley.edu/{FOLDER}/benchmark.tgz",  # torchvision's since 2024
        f"http://www.eecs.berkeley.edu/{FOLDER}/benchmark.tgz",  # and before
    ),
    tree="benchmark_RELEASE/dataset",
)


class SBD(Dataset[Sample]):
    """SBD to train on, VOC2012 with its official masks to evaluate on.

    `train` is SBD's own training list and `val` is `seg11valid`, the ids of VOC2011 val that are
    not in it. With `with_voc`, `train` is VOC2012 train with VOC's masks and all that SBD has
    beside it, minus VOC2012 val, and `val` is VOC2012 val. SBD's lists overlap VOC's: nearly any
    other pairing of lists trains on what it is judged on.

    With `download`, both archives are fetched whatever the split, since training needs both.
    Raises DataError as VOC2012 does, and where scipy, which reads .mat, is not installed.
    """

    classes: ClassVar[tuple[str, ...]] = VOC2012.classes
    palette: ClassVar[tuple[tuple[int, int, int], ...]] = VOC2012.palette
    void: ClassVar[int] = VOID
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "seg11valid")

    def __init__(
        self,
        *,
        split: str = "train",
        root: str | Path | None = None,
        download: bool = False,
        with_voc: bool = False,
    ) -> None:
        if split not in self.splits:
            raise DataError(f"SBD has no split '{split}': choose from {', '.join(self.splits)}")
        if download:
            VOC_ARCHIVE.find(root, download)
        if download or split == "train":
            folder = ARCHIVE.find(root, download)
        self._files: dict[str, tuple[Path, Path]] = {}  # id: image and mask
        if split == "train":
            lists = ("train", "val") if with_voc else ("train",)
            for name in (name for part in lists for name in read_ids(folder / f"{part}.txt")):
                self._files[name] = folder / "img" / f"{name}.jpg", folder / "cls" / f"{name}.mat"
        if split != "train" or with_voc:
            voc = VOC2012(split=split if with_voc else "seg11valid", root=root)
            self._files |= {name: (voc.image_path(name), voc.mask_path(name)) for name in voc.ids}
        if split == "train" and with_voc:
            for name in read_ids(voc.folder / "ImageSets" / "Segmentation" / "val.txt"):
                self._files.pop(name, None)  # seg11valid is a part of it
        self.ids = sorted(self._files)
        check_exist((image for image, _ in self._files.values()), what="images")
        check_exist((mask for _, mask in self._files.values()), what="masks")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Sample:
        name = self.ids[index]
        image, path = self._files[name]
        read = _read_mat if path.suffix == ".mat" else read_mask
        return make_sample(name, read_image(image), read(path, len(self.classes)), path)


def _read_mat(path: Path, num_classes: int) -> np.ndarray:
    """(H, W) uint8: GTcls.Segmentation."""
    try:
        from scipy.io import loadmat
    except ImportError as e:
        raise DataError("SBD's masks are .mat files, which scipy reads: pip install scipy") from e
    try:
        labels = np.asarray(loadmat(path, variable_names=["GTcls"])["GTcls"]["Segmentation"].item())
        if labels.ndim != 2 or labels.dtype.kind not in "ui":
            raise ValueError(f"GTcls.Segmentation is {labels.dtype} of shape {labels.shape}")
    except Exception as e:  # a damaged file raises nearly anything
        raise DataError(f"{path}: cannot read this mask: {reason(e)}") from e
    return to_mask(labels, num_classes, void=VOID, path=path)
