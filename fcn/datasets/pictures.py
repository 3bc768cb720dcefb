"""The one reader of picture files: training, the check, evaluation and prediction all use it.

    pixels = read_image(Path("x.tif"), (0, 4095))      # (H, W, 3) uint8, upright, whatever the mode
    facts = image_facts(Path("x.tif"))                 # ("16-bit", 200, 4000)

Whatever is wrong with a file, the error is a DataError that begins with the file's path.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path, PurePath
from sys import byteorder
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from torch.utils.data import get_worker_info

from fcn.datasets import misread
from fcn.datasets.value_range import (
    FULL_RANGE,
    Facts,
    Range,
    RangeError,
    measure,
    misfit,
    mixed_types,
)
from fcn.errors import DataError, reason

log = logging.getLogger(__name__)

with suppress(ImportError):  # requirements/heic.txt
    import_module("pillow_heif").register_heif_opener()
# The formats that Pillow decodes with its own code or with plain libraries. Its other formats start
# programs (EPS is PostScript, which Ghostscript would execute), or are not for photographs.
Image.init()
KNOWN = "JPEG PNG WEBP TIFF BMP GIF PPM MPO JPEG2000 AVIF TGA HEIF"
FORMATS = tuple(name for name in KNOWN.split() if name in Image.OPEN)
# In files of these formats the first picture is the photograph. The others are its thumbnail, its
# depth, or what a second lens saw.
FIRST_PICTURE = ("MPO", "HEIF")
# `open_picture` has a limit of its own, which a setting can raise. Pillow's is off, because it is
# one number for the whole process, which threads would share.
Image.MAX_IMAGE_PIXELS = None
MAX_PIXELS = 178_956_970  # the number at which Pillow would refuse an image

# Pillow's modes of one band of whole numbers above 255; "I" has 32 bits and is used for 16 as well.
WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
# Tags of TIFF; the first of them is EXIF's too.
ORIENTATION, KIND_OF_PAGE, WIDTH, COMPRESSION = 274, 254, 256, 259
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

COLOUR_MODES = ("1", "L", "P", "RGB", "YCbCr")
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
DEEP_MODES = re.compile("(RGBA?|RGBa|LA);16[BLN]")  # of Pillow's decoders: 16 bits for each colour


def is_picture(path: PurePath) -> bool:
    """Whether a file has the ending of one of FORMATS. Its content decides how it is decoded."""
    return Image.registered_extensions().get(path.suffix.lower()) in FORMATS


def why_no_picture(path: PurePath) -> str | None:
    """Why a file is no picture that this project reads, by its ending; None: it is one."""
    if is_picture(path):
        return None
    if path.suffix.lower() in (".heic", ".heif", ".hif"):
        return "HEIC needs pip install -r requirements/heic.txt"
    if path.suffix.lower() in (".dcm", ".dicom"):
        return "DICOM is not read: save its pixels as 16-bit PNG or TIFF"
    return "its name does not end like that of a picture that can be read, such as .jpg or .png"


def others_of_stem(missing: Path) -> str:
    """The end of a message on a missing picture: files of its name that are not read, and why."""
    others = sorted(path for path in missing.parent.glob("*") if path.stem == missing.stem)
    reasons = ((path.name, why_no_picture(path)) for path in others)
    return "".join(f"; {name}: {why}" for name, why in reasons if why)


@contextmanager
def open_picture(
    path: Path, what: str = "image", *, max_pixels: int = MAX_PIXELS
) -> Iterator[ImageFile.ImageFile]:
    """Open a picture without decoding it. An error in the `with` block is about this picture, too.

    Args:
        path: the file.
        what: what it is, such as "mask", for the message.
        max_pixels: the largest number of pixels.

    Raises:
        DataError: the file is missing or damaged, is no picture, or is too large.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # at a pipe, Pillow would wait for ever
        raise DataError(f"{path}: cannot read this {what}: it is a folder, a pipe or a device")
    try:
        picture = Image.open(path, formats=FORMATS)
    except Exception as e:  # a damaged file makes Pillow raise errors of nearly any type
        raise DataError(f"{path}: cannot read this {what}: {_why_not_opened(path, e)}") from e
    with picture:
        pixels = picture.width * picture.height
        if pixels > max_pixels:
            raise DataError(
                f"{path}: cannot read this {what}: it has {picture.width}×{picture.height} pixels, "
                f"{pixels / 1e6:,.1f} million, and the limit is {max_pixels / 1e6:,.1f} million; "
                f"data.dataset.max_pixels={pixels} allows it, in predict.py max_pixels={pixels} "
                "tile=1024"
            )
        try:
            yield picture
        except Exception as e:  # as above
            first_line = reason(e).splitlines()[0]
            raise DataError(f"{path}: cannot read this {what}: {first_line}") from e


def _why_not_opened(path: Path, error: Exception) -> str:
    """Why Pillow cannot open a file, in words; for a TIFF, which bands and type it has."""
    with suppress(Exception), path.open("rb") as file:
        head = file.read(8)
        if 43 in head[2:4]:  # a BigTIFF, whose header is longer
            head += file.read(8)
        directory = ImageFileDirectory_v2(head)
        file.seek(directory.next)
        directory.load(file)
        if COMPRESSION not in directory:  # every TIFF has this tag
            return "this TIFF is damaged or cut off"
        bands, bits = directory.get(misread.BANDS, 1), directory.get(misread.BITS, (1,))[0]
        compression = directory[COMPRESSION]
        return (
            f"it is a TIFF of {bands} bands of {bits} bits in compression {compression}, which "
            "Pillow does not read; save 1, 3 or 4 (RGBA) bands of 8 bits, or 1 band of 16 bits or "
            "32-bit float, in compression 1 (none), 5 (LZW) or 8 (deflate)"
        )
    first_line = reason(error).splitlines()[0]
    if path.exists():
        return why_no_picture(path) or first_line
    return first_line + others_of_stem(path)


def read_mask_picture(path: Path, max_pixels: int) -> Image.Image:
    """Open and decode the picture of a mask, and turn it upright as its EXIF orientation says.

    Args:
        path, max_pixels: as for `open_picture`.

    Raises:
        DataError: the file is missing or damaged, is no picture, is too large, has several pages,
            or has bands or bits that Pillow would drop.
    """
    picture, found = _decode(path, "mask", max_pixels)
    if found == "16-bit" and picture.mode not in WIDE_MODES:
        raise DataError(f"{path}: a mask of colours in 16 bits is not read: save it in 8 bits")
    return picture


def _decode(
    path: Path, what: str, max_pixels: int, *, low_bytes: bool = False
) -> tuple[Image.Image, str]:
    """The upright picture, and the type of its values.

    Of colours in 16 bits, Pillow decodes the upper 8 only; with `low_bytes` it is the lower 8.
    """
    with open_picture(path, what, max_pixels=max_pixels) as picture:
        found = _check_picture(picture)
        if what == "mask":
            misread.check_mask(picture)
        if isinstance(picture, TiffImageFile):
            # Without a name, Pillow does not map the file into memory. It would map a TIFF that is
            # to be turned by 90 degrees with width and height exchanged (Pillow 13.0).
            picture.filename = ""
        if low_bytes:
            picture.tile = [tile._replace(args=_low_bytes(tile.args)) for tile in picture.tile]
        picture.load()  # Pillow itself may turn a TIFF here; it then forgets the orientation
        misread.check_values(picture)
        turn = TURNS.get(_orientation(picture))
        return (picture if turn is None else picture.transpose(turn)), found


def _check_picture(picture: ImageFile.ImageFile) -> str:
    """Go to the one picture in an open file, and check it. No pixel is decoded.

    Returns:
        The type of its values, a key of FULL_RANGE.

    Raises:
        ValueError: it is not read, because of its pages, mode, bands or bits.
    """
    _choose_page(picture)
    found, mode = _type_of(picture), picture.mode
    if mode not in (*COLOUR_MODES, *ALPHA_MODES, *WIDE_MODES, "F"):
        raise ValueError(f"mode {mode} is not read; save it as RGB")
    if isinstance(picture, TiffImageFile):
        misread.check_tiff(picture, found)
    misread.check_others(picture)
    if found == "16-bit" and mode not in WIDE_MODES:
        for tile in picture.tile:
            _low_bytes(tile.args)  # raises a ValueError if they cannot be read
    return found


def _choose_page(picture: ImageFile.ImageFile) -> None:
    """Go to the one picture in a file.

    Raises:
        ValueError: there are several.
    """
    pages = list(range(getattr(picture, "n_frames", 1)))
    if len(pages) == 1 or picture.format in FIRST_PICTURE:
        return
    if isinstance(picture, TiffImageFile):
        kinds = {}
        for page in pages:
            picture.seek(page)
            kinds[page] = picture.tag_v2.get(KIND_OF_PAGE, 0)
        # 1 is for a smaller copy of another page, 4 for its transparency.
        pages = [page for page, kind in kinds.items() if not kind & 5]
    if len(pages) != 1:
        raise ValueError(f"it has {len(pages)} pages; save each page as a file of its own")
    picture.seek(pages[0])


def _type_of(picture: ImageFile.ImageFile) -> str:
    """The type of the values in an open file, a key of FULL_RANGE."""
    if picture.mode == "F":
        return "float"
    is_deep = any(DEEP_MODES.fullmatch(misread.raw_mode(tile.args)) for tile in picture.tile)
    return "16-bit" if is_deep or picture.mode in WIDE_MODES else "8-bit"


def _orientation(picture: Image.Image, *, header_only: bool = False) -> int:
    """EXIF's orientation, 1 to 8; 1 is upright. What cannot be read, or is no such number, is 1.

    A PNG may have it behind its pixels, so that Pillow decodes these first. With `header_only`,
    only what Pillow has read when it opened the file is used.
    """
    with suppress(Exception):
        exif = Image.Image.getexif(picture) if header_only else picture.getexif()
        found = int(exif[ORIENTATION])
        return found if found in TURNS else 1
    return 1


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[tuple[int, int], int]:
    """Height and width of the one picture in a file, upright; and its EXIF orientation, 1 to 8.

    Only the header of the file is read. A PNG may have its orientation, in EXIF or XMP, behind its
    pixels, which Pillow would decode to find it. Such an orientation is not noticed here.
    """
    with open_picture(path, max_pixels=max_pixels) as picture:
        _choose_page(picture)
        width, height = picture.size
        orientation = _orientation(picture, header_only=True)
        # Newer versions of Pillow exchange the sides of a TIFF when they open it.
        exchanged = isinstance(picture, TiffImageFile) and picture.tag_v2.get(WIDTH) != width
    swap = orientation >= 5 and not exchanged
    return ((width, height) if swap else (height, width)), orientation


def palette_of(picture: Image.Image) -> np.ndarray:
    """The colours (256, 3) of a picture of mode P. What its palette lacks is shown as black."""
    channels = (picture.getpalette() or []) + [0] * 768
    return np.reshape(channels[:768], (256, 3))


def _low_bytes(args: Any) -> Any:
    """The arguments of Pillow's decoder for the lower 8 of 16 bits: the other byte of each pair."""
    mode = misread.raw_mode(args)
    if mode.startswith(("LA", "RGBa")):
        raise ValueError(f"Pillow reads only 8 of its 16 bits ({mode}); save it as RGB")
    is_little = mode[-1] == "L" or (mode[-1] == "N" and byteorder == "little")
    low = mode[:-1] + ("B" if is_little else "L")
    return (low, *args[1:]) if isinstance(args, tuple) else low


def read_image(
    path: Path,
    value_range: Range | None = None,
    *,
    expected: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """An image as (H, W, 3) uint8 RGB, upright as its EXIF orientation says.

    Grey is repeated for the three colours. An alpha channel is dropped, and the colours below it
    are used as they are stored.

    Args:
        path: the file.
        value_range: the values that become 0 and 255. What lies outside becomes 0 or 255. None: the
            whole range of the file's type, which is 255, 65535, or 1 for float.
        expected: the type that the file must have, which is that of the other images of its data
            set: "8-bit", "16-bit" or "float". None: any.
        max_pixels: the largest number of pixels.

    Raises:
        DataError: the file is missing, damaged or too large, is no picture, has several pages,
            other than 1, 3 or 4 (RGBA) bands, another type, or values that no range is set for.
    """
    values, found = _read_values(path, max_pixels)  # (H, W) or (H, W, 3)
    if expected not in (None, found):
        first = "the type of the training images"
        raise RangeError(f"{path}: {mixed_types(found, first, expected)}")
    facts = Facts(found, 0, 255) if found == "8-bit" else measure(values, found)
    problem = misfit(facts, value_range)
    if problem:
        advice = "" if value_range else "; fcn.datasets.check proposes a data.dataset.value_range"
        raise RangeError(f"{path}: {problem}{advice}")
    low, high = FULL_RANGE[found] if value_range is None else value_range
    if found != "8-bit" or (low, high) != (0, 255):
        wide = np.subtract(values, low, dtype=np.result_type(values.dtype, np.float32))
        mapped = np.nan_to_num(wide * (255 / (high - low)), posinf=255, neginf=0)
        values = mapped.round().clip(0, 255).astype(np.uint8)
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=2)  # (H, W) -> (H, W, 3)
    return values


def image_facts(
    path: Path, value_range: Range | None = None, *, max_pixels: int = MAX_PIXELS
) -> Facts:
    """The type of an image's values, and how they lie in their range.

    The pixels of an 8-bit image are decoded only if a range is set: all others fit.

    Args:
        path, value_range, max_pixels: as for `read_image`, which raises the same errors.
    """
    found = image_type(path, max_pixels=max_pixels)
    if found == "8-bit" and value_range is None:
        return Facts(found, 0, 255)
    return measure(*_read_values(path, max_pixels), value_range, usual=True)


def image_type(path: Path, *, max_pixels: int = MAX_PIXELS) -> str:
    """The type of an image's values: "8-bit", "16-bit" or "float". No pixel is decoded.

    Raises:
        DataError: as `read_image`, as far as the header of the file shows it.
    """
    with open_picture(path, max_pixels=max_pixels) as picture:
        found = _check_picture(picture)
        _warn_about_alpha(picture, path)
        return found


_with_alpha: list[Path] = []  # the first image with alpha; one warning is enough


def _warn_about_alpha(picture: Image.Image, path: Path) -> None:
    has_alpha = picture.mode in ALPHA_MODES or "transparency" in picture.info
    worker = get_worker_info()  # None in the main process
    if has_alpha and not _with_alpha and (worker is None or worker.id == 0):
        _with_alpha.append(path)
        log.warning(
            "%s has an alpha channel; in this and in other images it is dropped, and the colours "
            "below it are used as they are stored",
            path,
        )


def _read_values(path: Path, max_pixels: int) -> tuple[np.ndarray, str]:
    """Values as stored, (H, W) or (H, W, 3), and their type: uint8, uint16, int32 or float32."""
    picture, found = _decode(path, "image", max_pixels)
    mode = picture.mode
    if mode in WIDE_MODES or mode == "F":
        values = np.array(picture)
        return values.astype(values.dtype.newbyteorder("=")), found
    if mode in ("La", "RGBa"):  # colours that are multiplied by alpha
        picture = picture.convert(mode.upper())
    _warn_about_alpha(picture, path)
    if mode != "RGB":  # convert() would copy it
        picture = picture.convert("RGB")  # without alpha
    values = np.array(picture)
    if found == "16-bit":  # so far these are the upper 8 bits
        low, _ = _decode(path, "image", max_pixels, low_bytes=True)
        values = values.astype(np.uint16) << 8 | np.array(low)[..., :3]
    return values, found
