"""What data sets on disk share: lists of ids, photographs, masks, and the checks of all three."""

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
from torchvision import tv_tensors

from fcn.datasets import VOID, Sample
from fcn.errors import DataError, reason

# Of Pillow's formats, those that its own code and plain libraries decode. The others start programs
# (EPS is PostScript, which Ghostscript would run), or are no photographs.
Image.init()
KNOWN = "JPEG PNG WEBP TIFF BMP GIF PPM MPO JPEG2000 AVIF TGA"
FORMATS = tuple(name for name in KNOWN.split() if name in Image.OPEN)
LABEL_MODES = ("P", "L", "1", "I;16", "I")  # Pillow's palette, and grey of 8, 1, 16 and 32 bits

_missing_allowed = ContextVar("missing_allowed", default=False)


class UnknownLabelError(DataError):
    """A mask holds a value or a colour that is no class and not void."""


class MismatchedSizeError(DataError):
    """A mask and its image differ in size."""


def read_lines(path: Path) -> list[str]:
    """A text list's lines without the blank ones; at least one."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot read this list of ids: {reason(e)}") from e
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path}: this list of ids is empty")
    return lines


def read_ids(path: Path, *, files: bool = False) -> list[str]:
    """A text list's ids, one a line; with `files`, each line begins with the name of its file."""
    ids = read_lines(path)
    if files:
        ids = [PurePosixPath(line.split()[0]).stem for line in ids]
    for name in ids:
        if not re.fullmatch(r"[\w.-]+", name) or ".." in name:
            raise DataError(f"{path}: '{name}' is no id: only letters, digits, '_', '-' and '.'")
    return ids


def check_exist(paths: Iterable[Path], *, what: str) -> None:
    """Refuse missing files, with one look at each folder and not one at each file."""
    wanted = list(paths)
    found: dict[Path, set[str]] = {}
    for folder in {path.parent for path in wanted}:
        found[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [path for path in wanted if path.name not in found[path.parent]]
    if missing:
        refuse(f"{len(missing)} of {len(wanted)} {what} missing, the first {missing[0]}")


def refuse(message: str) -> None:
    """Raise DataError for files that are not there, unless `missing_allowed` puts it off."""
    if not _missing_allowed.get():
        raise DataError(message)


@contextmanager
def missing_allowed() -> Iterator[None]:
    """Let data sets open although files are missing: only reading these fails.

    For `fcn.datasets.check`, which names them all and reads the rest.
    """
    token = _missing_allowed.set(True)
    try:
        yield
    finally:
        _missing_allowed.reset(token)


def check_disjoint(train: Sequence[str], val: Sequence[str]) -> None:
    """Refuse training ids that are evaluation ids too: a score on these says nothing."""
    shared = sorted(set(train) & set(val))
    if shared:
        more = ", …" if len(shared) > 3 else ""
        raise DataError(
            f"{len(shared)} of {len(set(val))} evaluation images are trained on too: "
            f"{', '.join(shared[:3])}{more}. Choose data.train_split and data.val_split, or their "
            "lists, so that they share none."
        )


# Pillow decodes, not torchvision.io: that is deprecated since 0.29, and expands palettes.
# A damaged file raises nearly anything in there (OSError, SyntaxError, struct.error, zlib.error…).


def is_picture(path: PurePath) -> bool:
    """Whether a file's ending is one of FORMATS'; what is in it decides how it is read."""
    return Image.registered_extensions().get(path.suffix.lower()) in FORMATS


def open_picture(path: Path) -> Image.Image:
    """Not decoded yet; Pillow refuses what claims more than 179 million pixels."""
    with warnings.catch_warnings(action="ignore"):  # of half as many
        return Image.open(path, formats=FORMATS)


def read_picture(path: Path, what: str) -> Image.Image:
    """Any picture, decoded; `what` is its part in the data, for the message of DataError."""
    try:
        with open_picture(path) as picture:
            picture.load()
            return picture
    except Exception as e:
        raise DataError(f"{path}: cannot read this {what}: {reason(e)}") from e


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, whatever the file holds: a grey photograph comes out as RGB too."""
    return np.array(read_picture(path, "image").convert("RGB"))


def read_mask(path: Path, num_classes: int, *, void: int | None = VOID) -> np.ndarray:
    """(H, W) uint8 from a picture of labels: a palette's indices and not its colours."""
    picture = read_picture(path, "mask")
    if picture.mode not in LABEL_MODES:
        raise DataError(f"{path}: a mask must be a palette or grey PNG, not mode {picture.mode}")
    return to_mask(np.array(picture), num_classes, void=void, path=path)


def to_mask(labels: np.ndarray, num_classes: int, *, void: int | None, path: Path) -> np.ndarray:
    """Labels (H, W) of any integer type -> uint8 with `void` turned into VOID.

    Raises UnknownLabelError if `labels` holds anything but 0 to num_classes - 1 and `void`.
    """
    strange = (labels < 0) | (labels >= num_classes)
    if void is not None:
        strange &= labels != void
    if strange.any():
        values = np.unique(labels[strange])
        found = ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")
        allowed = f"0 to {num_classes - 1}" + ("" if void is None else f" or {void} (void)")
        raise UnknownLabelError(f"{path}: labels must be {allowed}, found {found}")
    mask = labels.astype(np.uint8, copy=False)
    return mask if void in (None, VOID) else np.where(mask == void, np.uint8(VOID), mask)


def make_sample(name: str, image: np.ndarray, mask: np.ndarray, path: Path) -> Sample:
    """An image (H, W, 3) and its mask (H, W), which comes from `path`, as one sample."""
    if mask.shape != image.shape[:2]:
        (mh, mw), (h, w) = mask.shape, image.shape[:2]
        raise MismatchedSizeError(
            f"{path}: the mask is {mw}×{mh}, its image {w}×{h} (width×height)"
        )
    return {
        # (H, W, 3) -> (3, H, W), a view: resizing is fastest with the colours innermost
        "image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)),
        "mask": tv_tensors.Mask(torch.from_numpy(mask)),
        "id": name,
    }
