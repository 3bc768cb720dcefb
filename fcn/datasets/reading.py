"""What data sets on disk share: reading and checking lists of ids, photographs and masks.

    ids = read_ids(folder / "train.txt")
    data = Pairs({name: (folder / f"{name}.jpg", folder / f"{name}.png") for name in ids})
    sample = data[0]        # for a subclass of Pairs that has the names of its classes

Whatever is wrong with a single file, the error is a DataError that begins with the file's path.
"""

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fcn.datasets import VOID, Sample
from fcn.errors import DataError, reason

# The formats that Pillow decodes with its own code or with plain libraries. Its other formats start
# programs (EPS is PostScript, which Ghostscript would execute), or are not for photographs.
Image.init()
KNOWN = "JPEG PNG WEBP TIFF BMP GIF PPM MPO JPEG2000 AVIF TGA"
FORMATS = tuple(name for name in KNOWN.split() if name in Image.OPEN)
# Pillow's modes of a picture of labels: palette, and grey with 8, 1, 16 and 32 bits.
LABEL_MODES = ("P", "L", "1", "I;16", "I")

Pair = tuple[Path, Path]  # the file of an image and the file of its mask

_missing_allowed = ContextVar("missing_allowed", default=False)


class UnknownLabelError(DataError):
    """A mask holds a value or a colour that is neither a class nor void."""


class MismatchedSizeError(DataError):
    """A mask and its image differ in size."""


def read_lines(path: Path) -> list[str]:
    """The lines of a text list, without blank ones.

    Raises:
        DataError: the list cannot be read, or is empty.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot read this list of ids: {reason(e)}") from e
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path}: this list of ids is empty")
    return lines


def read_ids(path: Path, *, files: bool = False) -> list[str]:
    """The ids in a text list, one on each line.

    Args:
        path: the list.
        files: whether each line begins with the path of a file. Its id is then that file's name,
            without folders and ending.

    Raises:
        DataError: the list cannot be read, is empty, or holds a line that is no id.
    """
    ids = read_lines(path)
    if files:
        ids = [PurePosixPath(line.split()[0]).stem for line in ids]
    for name in ids:
        if not re.fullmatch(r"[\w.-]+", name) or ".." in name:
            raise DataError(f"{path}: '{name}' is no id: only letters, digits, '_', '-' and '.'")
    return ids


def check_split(data: str, split: str, splits: Iterable[str]) -> None:
    """Refuse a split that a data set does not have.

    Args:
        data: the data set's name, for the message.
        split: the split.
        splits: those that the data set has.

    Raises:
        DataError: there is no such split.
    """
    if split not in splits:
        raise DataError(f"{data} has no split '{split}': choose from {', '.join(splits)}")


def check_exist(paths: Iterable[Path], *, what: str) -> None:
    """Refuse missing files. This lists each folder once, which is faster than a look at each file.

    Args:
        paths: the files.
        what: what they are, in the plural, for the message.

    Raises:
        DataError: a file is missing.
    """
    wanted = list(paths)
    found: dict[Path, set[str]] = {}
    for folder in {path.parent for path in wanted}:
        found[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [path for path in wanted if path.name not in found[path.parent]]
    if missing:
        refuse_missing(f"{len(missing)} of {len(wanted)} {what} missing, the first {missing[0]}")


def refuse_missing(message: str) -> None:
    """Raise a DataError about missing files, unless this is inside `missing_allowed()`."""
    if not _missing_allowed.get():
        raise DataError(message)


@contextmanager
def missing_allowed() -> Iterator[None]:
    """Let data sets open although files are missing; an error comes only when these are read.

    This is for `fcn.datasets.check`, which reports all missing files and reads the others.
    """
    token = _missing_allowed.set(True)
    try:
        yield
    finally:
        _missing_allowed.reset(token)


def check_disjoint(train: Sequence[str], val: Sequence[str]) -> None:
    """Refuse ids that are used for training and for evaluation: their score would mean nothing.

    Raises:
        DataError: there are such ids.
    """
    shared = sorted(set(train) & set(val))
    if shared:
        more = ", …" if len(shared) > 3 else ""
        raise DataError(
            f"{len(shared)} of {len(set(val))} evaluation images are trained on too: "
            f"{', '.join(shared[:3])}{more}. Choose data.train_split and data.val_split, or their "
            "lists, so that they share none."
        )


# Pictures are decoded with Pillow: torchvision.io is deprecated since 0.29, and turns the indices
# of a palette into colours. A damaged file makes Pillow raise errors of nearly any type (OSError,
# SyntaxError, struct.error, zlib.error, ...), so that all of them are caught.


def is_picture(path: PurePath) -> bool:
    """Whether a file has the ending of one of FORMATS. Its content decides how it is decoded."""
    return Image.registered_extensions().get(path.suffix.lower()) in FORMATS


def open_picture(path: Path) -> Image.Image:
    """Open a picture without decoding it. Pillow refuses more than 179 million pixels."""
    with warnings.catch_warnings(action="ignore"):  # Pillow warns at half that number
        return Image.open(path, formats=FORMATS)


def read_picture(path: Path, what: str) -> Image.Image:
    """Open and decode a picture.

    Args:
        path: the file.
        what: what it is, such as "mask", for the message.

    Raises:
        DataError: the file is missing or damaged, or is no picture.
    """
    try:
        with open_picture(path) as picture:
            picture.load()
            return picture
    except Exception as e:
        raise DataError(f"{path}: cannot read this {what}: {reason(e)}") from e


def read_image(path: Path) -> np.ndarray:
    """A photograph as (H, W, 3) uint8 RGB. One that is stored in grey is converted."""
    return np.array(read_picture(path, "image").convert("RGB"))


def read_mask(path: Path, num_classes: int, *, void: int | None = VOID) -> np.ndarray:
    """A mask (H, W) uint8 from a picture of labels. Of a palette, the indices are the labels.

    Args:
        path: the file.
        num_classes: how many labels there are, from 0 up.
        void: the label of pixels to ignore, which becomes VOID; None: there are none.

    Raises:
        DataError: the file is damaged, is no picture of labels, or holds unknown labels.
    """
    picture = read_picture(path, "mask")
    if picture.mode not in LABEL_MODES:
        raise DataError(f"{path}: a mask must be a palette or grey PNG, not mode {picture.mode}")
    return to_mask(np.array(picture), num_classes, void=void, path=path)


def to_mask(labels: np.ndarray, num_classes: int, *, void: int | None, path: Path) -> np.ndarray:
    """Labels (H, W) of any integer type -> (H, W) uint8, with `void` replaced by VOID.

    Args:
        labels: the labels.
        num_classes, void: as for `read_mask`.
        path: the file that they come from, for the message.

    Raises:
        UnknownLabelError: a label is neither one of 0 to num_classes - 1 nor `void`.
    """
    unknown = (labels < 0) | (labels >= num_classes)  # (H, W)
    if void is not None:
        unknown &= labels != void
    if unknown.any():
        values = np.unique(labels[unknown])
        found = ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")
        allowed = f"0 to {num_classes - 1}" + ("" if void is None else f" or {void} (void)")
        raise UnknownLabelError(f"{path}: labels must be {allowed}, found {found}")
    mask = labels.astype(np.uint8, copy=False)
    return mask if void in (None, VOID) else np.where(mask == void, np.uint8(VOID), mask)


def make_sample(name: str, image: Path, mask: Path, labels: np.ndarray) -> Sample:
    """Read an image, and put it together with its labels.

    Args:
        name: the sample's id.
        image: the file of the image.
        mask: the file that the labels come from, for the message.
        labels: (H, W) uint8.

    Raises:
        DataError: the image is missing or damaged.
        MismatchedSizeError: image and labels differ in height or width.
    """
    pixels = read_image(image)  # (H, W, 3) uint8
    if labels.shape != pixels.shape[:2]:
        (mh, mw), (h, w) = labels.shape, pixels.shape[:2]
        raise MismatchedSizeError(
            f"{mask}: the mask is {mw}×{mh}, its image {w}×{h} (width×height)"
        )
    return {
        # (H, W, 3) -> (3, H, W), as a view: resizing is fastest if the colours stay innermost.
        "image": tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)),
        "mask": tv_tensors.Mask(torch.from_numpy(labels)),
        "id": name,
    }


class Pairs(Dataset[Sample]):
    """A data set of files: an image and a mask for each id. Its subclasses say where these are.

    A subclass names its `classes`, and reads its masks in another way if they are no pictures of
    the labels 0, 1, 2, ... with VOID.

    Args:
        pairs: the two files of each id, in the order of the data set.

    Raises:
        DataError: a file is missing. While reading: a file is damaged, or a mask does not fit.
    """

    classes: tuple[str, ...]
    void: int = VOID

    def __init__(self, pairs: dict[str, Pair]) -> None:
        self.pairs, self.ids = pairs, list(pairs)
        images, masks = zip(*pairs.values(), strict=True)
        check_exist(images, what="images")
        check_exist(masks, what="masks")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Sample:
        name = self.ids[index]
        image, mask = self.pairs[name]
        return make_sample(name, image, mask, self.read_mask(mask))

    def read_mask(self, path: Path) -> np.ndarray:
        """The labels (H, W) uint8 in a mask's file."""
        return read_mask(path, len(self.classes))
