"""PASCAL VOC2012 semantic segmentation (Everingham et al., IJCV 2015): 20 classes and background.

    python train.py data=voc2012 data.root=data                # downloads 2 GB on first use
    python evaluate.py ckpt=... split=seg11valid               # the split the FCN paper reports on
    python train.py data.train_split=mini_train335 data.val_split=mini_val    # a small part of it

On disk, below `root`, as the official archive unpacks:

    VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval}.txt   one id on each line
    VOCdevkit/VOC2012/JPEGImages/<id>.jpg
    VOCdevkit/VOC2012/SegmentationClass/<id>.png                        palette PNG, 0 to 20 and 255
"""

from pathlib import Path

from fcn.datasets import reading
from fcn.datasets.download import Archive

FILE = "VOCtrainval_11-May-2012.tar"
ARCHIVE = Archive(
    data="VOC2012",
    file=FILE,
    size="2 GB",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    urls=(
        f"https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/{FILE}",  # the official host since 2025
        f"https://d2l-data.s3-accelerate.amazonaws.com/{FILE}",  # mirror of d2l.ai, the same file
        f"https://data.pjreddie.com/files/{FILE}",
    ),
    tree="VOCdevkit/VOC2012",
)
LISTS = Path(__file__).parent / "lists"  # lists that the archives do not contain
OWN_SPLITS = ("seg11valid", "mini_train335", "mini_train", "mini_val")  # the names of these lists


def voc_palette(n: int = 256) -> tuple[tuple[int, int, int], ...]:
    """The first n (at most 256) colours of VOC's label map, as its development kit computes them.

    The bits of a label, from the lowest up, go in turn to red, green and blue, where they fill the
    highest bits first. The colours of neighbouring labels therefore differ strongly: 0 is black, 1
    is (128, 0, 0), ..., 255 is (224, 224, 192).
    """

    def channel(label: int, first: int) -> int:
        """Every third bit of a label, from `first` up, as the highest bits of a byte."""
        return sum((label >> 3 * bit + first & 1) << 7 - bit for bit in range(3))

    return tuple((channel(k, 0), channel(k, 1), channel(k, 2)) for k in range(n))


def list_path(folder: Path, split: str) -> Path:
    """The file with the ids of a split, which comes with this project or with VOC2012.

    Args:
        folder: VOCdevkit/VOC2012.
        split: the name of the list.
    """
    lists = LISTS if split in OWN_SPLITS else folder / "ImageSets" / "Segmentation"
    return lists / f"{split}.txt"


class VOC2012(reading.Pairs):
    """Photographs of about 500 × 375 pixels, each with its class mask.

    Args:
        split: `train`, `val` and `trainval` are the archive's own lists. Others come with this
            project: `seg11valid` is 736 ids of `val` that are not in SBD's training list.
            The networks of docs/results.md were trained on `mini_train` (681 ids of `train`) or on
            `mini_train335` (335 of these), and scored on `mini_val` (175 ids of `val`).
        root: the folder that holds or receives `VOCdevkit/VOC2012/`.
        download: whether to download that folder if it is missing. The archive (2 GB) stays in
            `root`, so that it can be unpacked again without a network.

    Raises:
        DataError: the split is unknown, or a folder, list, image or mask is missing (the
            constructor looks for all of them). While reading: a file is damaged, or its labels
            are not VOC's.
    """

    classes: tuple[str, ...] = (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
        *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
        *("sheep", "sofa", "train", "tvmonitor"),
    )
    palette: tuple[tuple[int, int, int], ...] = voc_palette(21)
    licence = "photographs from flickr, under its terms of use; none is stated for the masks"
    splits: tuple[str, ...] = ("train", "val", "trainval", *OWN_SPLITS)

    def __init__(
        self, *, split: str = "train", root: str | Path | None = None, download: bool = False
    ) -> None:
        reading.check_split("VOC2012", split, self.splits)
        folder = ARCHIVE.find(root, download)
        images, masks = folder / "JPEGImages", folder / "SegmentationClass"
        ids = reading.read_ids(list_path(folder, split))
        super().__init__({name: (images / f"{name}.jpg", masks / f"{name}.png") for name in ids})
