"""What data sets on disk share: lists of ids, masks, and pairs of an image and a mask.

    ids = read_ids(folder / "train.txt")
    data = Pairs({name: (folder / f"{name}.jpg", folder / f"{name}.png") for name in ids})
    sample = data[0]        # for a subclass of Pairs that has the names of its classes

Whatever is wrong with a single file, the error is a DataError that begins with the file's path.
"""

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fcn.datasets import VOID, Sample, SegmentationDataset
from fcn.datasets.misread import STRETCHED
from fcn.datasets.pictures import (
    MAX_PIXELS,
    image_size,
    image_type,
    others_of_stem,
    palette_of,
    read_image,
    read_mask_picture,
)
from fcn.datasets.value_range import Range, check_range
from fcn.errors import DataError, check_whole, reason

_missing_allowed = ContextVar("missing_allowed", default=False)  # set by `missing_allowed`


class UnknownLabelError(DataError):
    """A mask holds a value or a colour that is neither a class nor void."""


class MismatchedSizeError(DataError):
    """A mask and its image differ in size."""


def read_lines(path: Path) -> list[str]:
    """The lines of a text list, without blank ones and comments, which begin with "#".

    Raises:
        DataError: the list cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot read this list of ids: {reason(e)}") from e
    if "\0" in text:
        raise DataError(f"{path}: cannot read this list of ids: it is not in UTF-8; save it so")
    lines = [line for line in map(str.strip, text.splitlines()) if line and line[0] != "#"]
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
    check_once(ids, path)
    return ids


def check_once(ids: Sequence[str], path: Path) -> None:
    """Refuse a list that names an id twice: its image would be trained on and scored twice.

    Raises:
        DataError: there is such an id.
    """
    twice = [name for name, number in Counter(ids).items() if number > 1]
    if twice:
        more = f", and {len(twice) - 1} more of its ids" if len(twice) > 1 else ""
        raise DataError(f"{path}: '{twice[0]}' is in this list more than once{more}")


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
    folders = {path.parent for path in wanted}
    found = {folder: set(os.listdir(folder)) for folder in folders if folder.is_dir()}
    missing = [path for path in wanted if path.name not in found.get(path.parent, ())]
    if missing:
        message = f"{len(missing)} of {len(wanted)} {what} missing, the first {missing[0]}"
        refuse_missing(message + others_of_stem(missing[0]))


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


# How a message on unknown labels ends for a data set whose labels are fixed, such as VOC2012.
OTHER_LABELS = "; masks with other labels than the data set's own are read with data=folder"


def labels_of(picture: Image.Image, path: Path) -> np.ndarray:
    """The labels (H, W), integers, in a picture of labels. Of a palette, they are the indices.

    A picture of another mode is read too if there is only one meaning: its bands are equal, nothing
    in it is transparent, and its values are whole numbers.

    Args:
        picture: the mask, as `read_mask_picture` has read it.
        path: its file, for the message.

    Raises:
        DataError: the picture holds colours, transparent pixels or fractions.
    """
    if STRETCHED in picture.info:
        raise DataError(
            f"{path}: this mask has {picture.info[STRETCHED]}, which are stretched when they are "
            "read, so that 1 is not 1; save it in 8 bits"
        )
    labels = np.array(picture)  # (H, W) or (H, W, bands)
    if picture.format == "GIF" and picture.mode == "P":
        values = np.unique(labels).tolist()
        colours = palette_of(picture)[values]  # (values, 3)
        grey, is_grey = colours[:, 0].tolist(), (colours == colours[:, :1]).all()
        # A table of black and white belongs to the labels 0 and 1; what it lacks is black.
        black_and_white = [255 if value == 1 else 0 for value in values]
        is_certain = grey in (values, black_and_white) or len(set(grey)) < len(values)
        if is_grey and not is_certain:
            raise DataError(
                f"{path}: this GIF has numbers {values} for the grey values {grey}, and either may "
                "be the labels; save masks as PNG"
            )
    if picture.mode in ("LA", "PA", "RGBA"):
        if labels[..., -1].min() < 255:
            raise DataError(f"{path}: this mask has transparent pixels; save it without alpha")
        labels = labels[..., :-1]
    if labels.ndim == 3:
        if (labels != labels[..., :1]).any():
            found = sorted(picture.convert("RGB").getcolors() or [], reverse=True)  # None: many
            colours = ", ".join(str(colour) for _, colour in found[:4]) or "more than 256"
            raise DataError(
                f"{path}: a mask of mode {picture.mode} needs data.dataset.palette, the colour of "
                f"each class; its colours are {colours}{', …' if len(found) > 4 else ''}"
            )
        labels = labels[..., 0]
    if labels.dtype.kind == "f":
        whole = np.nan_to_num(labels, nan=0.5).round()
        if (whole != labels).any():
            raise DataError(f"{path}: this mask holds fractions; its values must be labels")
        labels = whole.clip(-(2**31), 2**31 - 1).astype(np.int64)
    return labels


def _hint(unknown: np.ndarray, num_classes: int) -> str:
    """What unknown labels, in order, most likely mean, and what to do then."""
    if unknown.tolist() == [num_classes]:
        return "; if the labels begin with 1 and 0 is void, set data.dataset.void=0"
    if unknown[-1] in range(32, 256):  # spread over all values, so that people can see them
        return (
            "; for grey values that are no labels, set data.dataset.palette to the classes' "
            "colours, such as [100,100,100] for the value 100"
        )
    return ""


class Pairs(Dataset[Sample], SegmentationDataset):
    """A data set of files: an image and a mask for each id. Its subclasses say where these are.

    A subclass names its `classes` and their colours in `palette`. It sets `mask_void` if its files
    have another label for void pixels, and reads its masks in another way if they are no pictures
    of the labels 0, 1, 2, ...

    Args:
        pairs: the files of image and mask for each id, in the order of the data set.
        value_range, max_pixels: as for `read_image`. All images must have the type of the first.

    Raises:
        ConfigError: `value_range` or `max_pixels` cannot work.
        DataError: a file is missing. While reading: a file is damaged, or a mask does not fit.
    """

    mask_void: int | None = VOID  # the label of void in the files of the masks; None: there is none

    def __init__(
        self,
        pairs: dict[str, tuple[Path, Path]],
        *,
        value_range: Range | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_range(value_range)
        check_whole("data.dataset.max_pixels", max_pixels, 1, 2**40)
        self.pairs, self.ids = pairs, list(pairs)
        self.value_range, self.max_pixels = value_range, max_pixels
        images, masks = zip(*pairs.values(), strict=True)
        check_exist(images, what="images")
        check_exist(masks, what="masks")

    @cached_property
    def image_type(self) -> str | None:
        """The type of the values in the first image that can be read."""
        for image, _ in self.pairs.values():
            with suppress(DataError):
                return image_type(image, max_pixels=self.max_pixels)
        return None

    def __getitem__(self, index: int, /) -> Sample:
        name = self.ids[index]
        image, mask = self.pairs[name]
        labels = self.read_labels(index)  # (H, W)
        pixels = read_image(
            image, self.value_range, expected=self.image_type, max_pixels=self.max_pixels
        )
        if labels.shape != pixels.shape[:2]:
            raise MismatchedSizeError(_mismatch(image, mask, pixels, labels))
        return {
            # (H, W, 3) -> (3, H, W), as a view: resizing is fastest if the colours stay innermost.
            "image": tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)),
            "mask": tv_tensors.Mask(torch.from_numpy(labels)),
            "id": name,
        }

    def read_labels(self, index: int) -> np.ndarray:
        """The mask (H, W) uint8 of a sample, without its image."""
        return self.read_mask(self.pairs[self.ids[index]][1])

    def read_mask(self, path: Path) -> np.ndarray:
        """The mask (H, W) uint8 in a file, a picture of labels.

        Raises:
            DataError: the file is damaged, is no picture of labels, or holds unknown labels.
        """
        return self.to_mask(labels_of(read_mask_picture(path, self.max_pixels), path), path)

    def to_mask(
        self, labels: np.ndarray, path: Path, hint: str | None = OTHER_LABELS
    ) -> np.ndarray:
        """Labels (H, W) of any integer type -> (H, W) uint8: class indices, and VOID.

        Args:
            labels: those of the classes are 0, 1, 2, ...; or, if `mask_void` is 0, 1, 2, 3, ...
            path: the file that they come from, for the message.
            hint: how the message ends, beginning with "; ". None: what the labels make likely.

        Raises:
            UnknownLabelError: a label is neither that of a class nor `mask_void`.
        """
        void, num_classes = self.mask_void, len(self.classes)
        first = 1 if void == 0 else 0
        unknown = (labels < first) | (labels >= first + num_classes)  # (H, W)
        if void is not None:
            unknown &= labels != void
        if unknown.any():
            values = np.unique(labels[unknown])
            found = ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")
            allowed = f"{first} to {first + num_classes - 1}"
            allowed += "" if void is None else f" or {void} (void)"
            hint = _hint(values, num_classes) if hint is None else hint
            raise UnknownLabelError(f"{path}: labels must be {allowed}, found {found}{hint}")
        mask = labels.astype(np.uint8, copy=False)
        if void == 0:
            return mask - np.uint8(1)  # 0 wraps around to 255, which is VOID
        return mask if void in (None, VOID) else np.where(mask == void, np.uint8(VOID), mask)


def _mismatch(image: Path, mask: Path, pixels: np.ndarray, labels: np.ndarray) -> str:
    """How image and mask differ in size, and whether EXIF is the cause."""
    (mh, mw), (h, w) = labels.shape, pixels.shape[:2]
    message = f"{mask}: the mask is {mw}×{mh}, its image {w}×{h} (width×height)"
    turned = []
    for path in (image, mask):
        with suppress(DataError):  # a .mat is no picture
            turned += [path.name] if image_size(path, max_pixels=2**63)[1] >= 5 else []
    if turned and (mh, mw) == (w, h):
        message += (
            f"; by its EXIF orientation {turned[0]} is turned by 90 degrees, and the other fits "
            "what is stored, not what is seen: turn that one too, or remove the EXIF orientation"
        )
    return message
