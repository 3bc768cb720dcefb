"""PASCAL VOC2012 semantic segmentation (Everingham et al., IJCV 2015): 20 classes and background.

    python train.py data=voc2012 data.root=data                # fetches 2 GB on first use
    python evaluate.py ckpt=... split=seg11valid               # the split the FCN paper reports on

On disk, below `root`, as the official archive unpacks:

    VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval}.txt   one id a line
    VOCdevkit/VOC2012/JPEGImages/<id>.jpg
    VOCdevkit/VOC2012/SegmentationClass/<id>.png                        palette PNG, 0-20 and 255
"""

from pathlib import Path
from typing import ClassVar

from torch.utils.data import Dataset

from fcn.datasets import VOID, Sample
from fcn.datasets.download import Archive
from fcn.datasets.reading import check_exist, make_sample, read_ids, read_image, read_mask
from fcn.errors import DataError

FILE = "VOCtrainval_11-May-2012.tar"
ARCHIVE = Archive(
    data="VOC2012",
    file=FILE,
    size="2 GB",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    urls=(
        f"https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/{FILE}",  # the official host since 2025
        f"https://d2l-data.s3-accelerate.amazonaws.com/{FILE}",  # mirror of d2l.ai, the same bytes
        f"https://data.pjreddie.com/files/{FILE}",
    ),
    tree="VOCdevkit/VOC2012",
)
LISTS = Path(__file__).parent / "lists"  # lists that the archive lacks, carried by the project


def voc_palette(n: int = 256) -> tuple[tuple[int, int, int], ...]:
    """The first n (at most 256) colours of VOC's label map, as its development kit makes them.

    The bits of the index go in turn to red, green and blue, from the highest bit down, so that
    neighbouring labels get colours far apart: 0 black, 1 (128, 0, 0), …, 255 (224, 224, 192).
    """
    return tuple(
        (
            sum((k >> 3 * bit & 1) << 7 - bit for bit in range(3)),
            sum((k >> 3 * bit + 1 & 1) << 7 - bit for bit in range(3)),
            sum((k >> 3 * bit + 2 & 1) << 7 - bit for bit in range(2)),
        )
        for k in range(n)
    )


class VOC2012(Dataset[Sample]):
    """Photographs of about 500 × 375 pixels, each with its class mask.

    Splits `train`, `val` and `trainval` are the tree's own lists; `seg11valid` (736 ids of `val`
    that no SBD training list holds) comes with the project. With `download`, a missing tree is
    fetched; the archive (2 GB) stays in `root`, so that unpacking again needs no network.

    Raises DataError for an unknown split, a missing tree, list, image or mask (all are looked for
    here, at once), and on reading, for a file that is broken or whose labels are not VOC's.
    """

    classes: ClassVar[tuple[str, ...]] = (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
        *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
        *("sheep", "sofa", "train", "tvmonitor"),
    )
    palette: ClassVar[tuple[tuple[int, int, int], ...]] = voc_palette(21)
    void: ClassVar[int] = VOID
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "trainval", "seg11valid")

    def __init__(
        self, *, split: str = "train", root: str | Path | None = None, download: bool = False
    ) -> None:
        if split not in self.splits:
            raise DataError(f"VOC2012 has no split '{split}': choose from {', '.join(self.splits)}")
        self.folder = ARCHIVE.find(root, download)
        lists = LISTS if split == "seg11valid" else self.folder / "ImageSets" / "Segmentation"
        self.ids = read_ids(lists / f"{split}.txt")
        check_exist(map(self.image_path, self.ids), what="images")
        check_exist(map(self.mask_path, self.ids), what="masks")

    def image_path(self, name: str) -> Path:
        return self.folder / "JPEGImages" / f"{name}.jpg"

    def mask_path(self, name: str) -> Path:
        return self.folder / "SegmentationClass" / f"{name}.png"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Sample:
        name = self.ids[index]
        path = self.mask_path(name)
        mask = read_mask(path, len(self.classes))
        return make_sample(name, read_image(self.image_path(name)), mask, path)
