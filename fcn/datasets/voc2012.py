"""PASCAL VOC2012 semantic segmentation (Everingham et al., IJCV 2015): 20 classes and background.

    python train.py data=voc2012 data.root=data                # fetches 2 GB on first use
    python evaluate.py ckpt=... split=seg11valid               # the split the FCN paper reports on

On disk, below `root`, as the official archive unpacks:

    VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval}.txt   one id a line
    VOCdevkit/VOC2012/JPEGImages/<id>.jpg
    VOCdevkit/VOC2012/SegmentationClass/<id>.png                        palette PNG, 0-20 and 255
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fcn.datasets import VOID, Sample
from fcn.datasets.download import HINT, fetch, unpack
from fcn.errors import DataError, reason

ARCHIVE = "VOCtrainval_11-May-2012.tar"
MD5 = "6cd6e144f989b92b3379bac3b3de84fd"
URLS = (
    f"https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/{ARCHIVE}",  # the official host since 2025
    f"https://d2l-data.s3-accelerate.amazonaws.com/{ARCHIVE}",  # mirror of d2l.ai, the same bytes
    f"https://data.pjreddie.com/files/{ARCHIVE}",
)
TREE = "VOCdevkit/VOC2012"
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
        if root is None:
            raise DataError("VOC2012 needs data.root: the folder that holds VOCdevkit/")
        root = Path(root).expanduser()
        self.folder = root / TREE
        if not self.folder.is_dir():
            if not download:
                raise DataError(
                    f"VOC2012 not found: no folder {self.folder.absolute()}\n"
                    "  data.download=true fetches it there (2 GB), or unpack the official archive "
                    f"{ARCHIVE} in {root.absolute()},\n"
                    f"  or set data.root to the folder that holds VOCdevkit/. {HINT}"
                )
            # Both lock and look again, so two runs on one root share one download.
            fetch(URLS, md5=MD5, dest=root / ARCHIVE)
            unpack(root / ARCHIVE, into=root, member_root=TREE)
        lists = LISTS if split == "seg11valid" else self.folder / "ImageSets" / "Segmentation"
        self.ids = _read_ids(lists / f"{split}.txt")
        _check_exist(map(self._image_path, self.ids), what="images")
        _check_exist(map(self._mask_path, self.ids), what="masks")

    def _image_path(self, name: str) -> Path:
        return self.folder / "JPEGImages" / f"{name}.jpg"

    def _mask_path(self, name: str) -> Path:
        return self.folder / "SegmentationClass" / f"{name}.png"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Sample:
        name = self.ids[index]
        image = _read_image(self._image_path(name))  # (H, W, 3)
        path = self._mask_path(name)
        mask = _read_mask(path)  # (H, W)
        if mask.shape != image.shape[:2]:
            (mh, mw), (h, w) = mask.shape, image.shape[:2]
            raise DataError(f"{path}: the mask is {mw}×{mh}, its image {w}×{h} (width×height)")
        return {
            # (H, W, 3) -> (3, H, W), a view: resizing is fastest with the colours innermost
            "image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)),
            "mask": tv_tensors.Mask(torch.from_numpy(mask)),
            "id": name,
        }


def _read_ids(path: Path) -> list[str]:
    try:
        ids = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot read this list of ids: {reason(e)}") from e
    if not ids:
        raise DataError(f"{path}: this list of ids is empty")
    for name in ids:
        if not re.fullmatch(r"[\w.-]+", name) or ".." in name:
            raise DataError(f"{path}: '{name}' is no id: only letters, digits, '_', '-' and '.'")
    return ids


def _check_exist(paths: Iterable[Path], *, what: str) -> None:
    wanted = list(paths)
    folder = wanted[0].parent
    found = set(os.listdir(folder)) if folder.is_dir() else set()  # one call, not one a file
    missing = [p for p in wanted if p.name not in found]
    if missing:
        raise DataError(f"{len(missing)} of {len(wanted)} {what} missing, the first {missing[0]}")


# Pillow decodes, not torchvision.io: that is deprecated since 0.29, and expands palettes.
# A damaged file raises nearly anything in there (OSError, SyntaxError, struct.error, zlib.error…).


def _read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, whatever the file holds: a grey photograph comes out as RGB too."""
    try:
        with Image.open(path) as file:
            return np.array(file.convert("RGB"))
    except Exception as e:
        raise DataError(f"{path}: cannot read this image: {reason(e)}") from e


def _read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8, the palette's indices and not its colours."""
    try:
        with Image.open(path) as file:
            mode = file.mode
            mask = np.array(file)
    except Exception as e:
        raise DataError(f"{path}: cannot read this mask: {reason(e)}") from e
    if mode not in ("P", "L"):
        raise DataError(f"{path}: a mask must be an 8-bit palette or grey PNG, not mode {mode}")
    strange = (mask >= len(VOC2012.classes)) & (mask != VOID)
    if strange.any():
        values = ", ".join(map(str, np.unique(mask[strange])))
        raise DataError(f"{path}: labels must be 0 to 20 or {VOID} (void), found {values}")
    return mask
