"""ADE20K in the version of the MIT Scene Parsing Benchmark (Zhou et al., CVPR 2017): 150 classes.

    python train.py data=ade20k                              # downloads 1 GB on first use
    python train.py data=ade20k data.dataset.other=true      # 151 classes; the first is `other`

On disk, below `root`, as the official archive unpacks:

    ADEChallengeData2016/images/{training,validation}/<id>.jpg         20,210 and 2,000 images
    ADEChallengeData2016/annotations/{training,validation}/<id>.png    0 (other), 1 to 150
"""

from pathlib import Path

from fcn.datasets import Labels, reading
from fcn.datasets.download import Archive
from fcn.datasets.voc2012 import LISTS, voc_palette
from fcn.errors import DataError, check_flag

ARCHIVE = Archive(
    data="ADE20K",
    file="ADEChallengeData2016.zip",
    size="1 GB",
    md5="7328b3957e407ddae1d3cbf487f149ef",
    urls=(
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        "https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    ),
    tree="ADEChallengeData2016",
)
# The first name of each class in the benchmark's objectInfo150.txt: line k is the mask value k.
CLASSES = tuple(reading.read_lines(LISTS / "ade20k_classes.txt"))
FOLDERS = {"train": "training", "val": "validation"}  # of each split


class ADE20K(reading.Pairs):
    """Photographs of scenes, most of 683 × 512 pixels or more, with nearly every pixel labelled.

    The colours follow VOC's scheme, not the benchmark's.

    Args:
        split: `train` or `val`.
        root: the folder that holds or receives `ADEChallengeData2016/`.
        download: whether to download that folder if it is missing.
        other: what to do with mask value 0, which is everything outside the 150 classes. False:
            these pixels are void, and the classes are 0 to 149, as in the benchmark's scores. True:
            they are a class of their own, label 0, and the others are 1 to 150.

    Raises:
        ConfigError: `other` is neither true nor false.
        DataError: the split is unknown, or a folder, image or mask is missing. While reading: a
            file is damaged, or its labels are not ADE20K's.
    """

    licence = "images for non-commercial research and education only; annotations BSD-3-Clause"
    splits: tuple[str, ...] = tuple(FOLDERS)

    @classmethod
    def labels(cls, *, other: bool = False) -> Labels:
        """150 classes, or 151 with `other`. A class has the same colour in both."""
        check_flag("data.dataset.other", other)
        colours = voc_palette(151)
        return Labels(("other", *CLASSES), colours) if other else Labels(CLASSES, colours[1:])

    def __init__(
        self,
        *,
        split: str = "train",
        root: str | Path | None = None,
        download: bool = False,
        other: bool = False,
    ) -> None:
        self.classes, self.palette = self.labels(other=other)
        reading.check_split("ADE20K", split, self.splits)
        self.mask_void = None if other else 0
        folder = ARCHIVE.find(root, download)
        images = folder / "images" / FOLDERS[split]
        masks = folder / "annotations" / FOLDERS[split]
        files = sorted(images.glob("[!.]*.jpg"))
        if not files:
            raise DataError(f"{images}: no .jpg here")
        super().__init__({file.stem: (file, masks / f"{file.stem}.png") for file in files})
