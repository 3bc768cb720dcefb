"""SBD, the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011): more masks of VOC's classes.

    python train.py data=voc2012_aug   # VOC2012 train and all of SBD, without VOC2012 val: 10,582
    python train.py data=sbd           # as in the FCN paper: SBD train (8,498), seg11valid (736)

On disk, below `root`, as the official archive unpacks. VOCdevkit/VOC2012 must be there too, see
voc2012.py.

    benchmark_RELEASE/dataset/{train,val}.txt    one id on each line; not VOC's splits
    benchmark_RELEASE/dataset/img/<id>.jpg       VOC's own photographs
    benchmark_RELEASE/dataset/cls/<id>.mat       GTcls.Segmentation: (H, W) uint8, 0 to 20, no void
"""

from pathlib import Path

import numpy as np

from fcn.datasets import reading, voc2012
from fcn.datasets.download import Archive
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import DataError, check_flag, reason

FOLDER = "Research/Projects/CS/vision/grouping/semantic_contours"
ARCHIVE = Archive(
    data="SBD",
    file="benchmark.tgz",
    size="1.4 GB",
    md5="82b4d87ceb2ed10f6038a1cba92111cb",
    urls=(
        f"https://www2.eecs.berkeley.edu/{FOLDER}/benchmark.tgz",  # used by torchvision since 2024
        f"http://www.eecs.berkeley.edu/{FOLDER}/benchmark.tgz",  # and before that
    ),
    tree="benchmark_RELEASE/dataset",
)


class SBD(reading.Pairs):
    """SBD to train on, VOC2012 with its official masks to evaluate on.

    The lists of SBD overlap those of VOC. Nearly any other choice of lists than the two below would
    use the same images for training and for evaluation.

    Args:
        split: `train`, `val` or `seg11valid`.
        root: the folder that holds or receives `benchmark_RELEASE/dataset/` and
            `VOCdevkit/VOC2012/`.
        download: whether to download these folders if they are missing. It is both of them
            whatever the split, because training needs both.
        with_voc: False: `train` is SBD's own training list, and `val` is `seg11valid`, the ids of
            VOC2011 val that are not in that list. True: `train` is VOC2012 train with VOC's masks,
            and all other images of SBD except those of VOC2012 val; `val` is VOC2012 val.

    Raises:
        ConfigError: `with_voc` is neither true nor false.
        DataError: the split is unknown, or a folder, list, image or mask is missing. While reading:
            a file is damaged, or its labels are not VOC's.
    """

    classes: tuple[str, ...] = VOC2012.classes
    palette: tuple[tuple[int, int, int], ...] = VOC2012.palette
    licence = VOC2012.licence  # the photographs are VOC's
    splits: tuple[str, ...] = ("train", "val", "seg11valid")

    def __init__(
        self,
        *,
        split: str = "train",
        root: str | Path | None = None,
        download: bool = False,
        with_voc: bool = False,
    ) -> None:
        check_flag("data.dataset.with_voc", with_voc)
        reading.check_split("SBD", split, self.splits)
        if download:
            voc2012.ARCHIVE.find(root, download)
        if download or split == "train":
            folder = ARCHIVE.find(root, download)
        if split != "train":
            pairs = VOC2012(split=split if with_voc else "seg11valid", root=root).pairs
        else:
            lists = ("train", "val") if with_voc else ("train",)
            ids = [name for part in lists for name in reading.read_ids(folder / f"{part}.txt")]
            images, masks = folder / "img", folder / "cls"
            pairs = {name: (images / f"{name}.jpg", masks / f"{name}.mat") for name in ids}
            if with_voc:
                pairs |= VOC2012(split="train", root=root).pairs
                voc = voc2012.ARCHIVE.find(root, download)
                for name in reading.read_ids(voc2012.list_path(voc, "val")):
                    pairs.pop(name, None)  # this removes seg11valid too, which is a part of val
        super().__init__(dict(sorted(pairs.items())))

    def read_mask(self, path: Path) -> np.ndarray:
        """The labels (H, W) uint8 in a PNG of VOC's, or in GTcls.Segmentation of a .mat file."""
        if path.suffix != ".mat":
            return super().read_mask(path)
        from scipy.io import loadmat  # here, since no other data set needs it

        try:
            struct = loadmat(path, variable_names=["GTcls"])["GTcls"]
            labels = np.asarray(struct["Segmentation"].item())
            if labels.ndim != 2 or labels.dtype.kind not in "ui":
                raise ValueError(f"GTcls.Segmentation is {labels.dtype} of shape {labels.shape}")
        except Exception as e:  # a damaged file raises errors of nearly any type
            raise DataError(f"{path}: cannot read this mask: {reason(e)}") from e
        return self.to_mask(labels, path)
