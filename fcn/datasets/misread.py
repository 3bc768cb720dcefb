"""Picture files that Pillow 13.0 opens without an error but misreads. They are refused.

fcn/datasets/pictures.py, the one reader of pictures, calls these functions on an open file. Only
`check_values` needs its pixels. Each says what is wrong, and in which form the file can be read.
"""

import os
import re
from pathlib import Path

import numpy as np
from PIL import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

# Formats that change the values of pixels, so that they cannot hold masks. Most WEBP files do too.
LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF", "HEIF")
# A key in the `info` of a picture, whose value says what Pillow has stretched to 8 bits.
STRETCHED = "stretched"
L24 = re.compile("L;[24]")  # Pillow's decoders of grey in 2 and 4 bits
# Tags of TIFF.
BITS, COLOURS, BANDS, PLANES, SAMPLE_FORMAT = 258, 262, 277, 284, 339


def check_tiff(picture: TiffImageFile, found: str) -> None:
    """Refuse a TIFF of which Pillow would drop bands or bits, or misread the values.

    Args:
        picture: an open file.
        found: the type of its values, a key of `fcn.datasets.value_range.FULL_RANGE`.

    Raises:
        ValueError: it is such a file.
    """
    tags = picture.tag_v2
    bits = tags.get(BITS, (1,))
    bands = max(tags.get(BANDS, 1), len(bits))
    if bands != len(picture.getbands()):
        raise ValueError(
            f"it has {bands} bands, and images have 1, 3 or 4 (RGBA); save the 3 that the network "
            "shall see as RGB"
        )
    if max(bits) > 8 and found == "8-bit":
        raise ValueError(f"Pillow reads only 8 of its {max(bits)} bits; save it in 8 bits")
    if max(bits) == 8 and 2 in tags.get(SAMPLE_FORMAT, (1,)):
        raise ValueError("its values are signed; save them in 16 bits")
    swapped = any(raw_mode(tile.args).endswith(("BS", "BF")) for tile in picture.tile)
    if swapped and picture.tile[0].codec_name == "libtiff":  # Pillow 13.0 swaps the bytes twice
        raise ValueError("it is compressed, with big-endian numbers; save it without compression")
    if found != "8-bit" and tags.get(COLOURS) == 0:
        raise ValueError("its value 0 is white (WhiteIsZero); save it with 0 for black")
    if found != "8-bit" and bands > 1 and tags.get(PLANES) == 2:  # Pillow takes one byte for both
        raise ValueError("its bands lie one after the other; save it with INTERLEAVE=PIXEL")


def check_others(picture: ImageFile.ImageFile) -> None:
    """Refuse files of other formats that Pillow 13.0 misreads.

    Raises:
        ValueError: it is such a file.
    """
    if picture.format == "BMP" and picture.mode == "1":
        row = (picture.width + 31) // 32 * 4  # bytes in a row of single bits
        if not all(tile.codec_name == "raw" and row in (tile.args or ()) for tile in picture.tile):
            raise ValueError("it has black and white in more than 1 bit; save it as PNG")
    if picture.mode == "RGB" and _highest_value(picture) > 255:
        raise ValueError("Pillow reads only 8 of its bits; save it as 16-bit PNG")
    if picture.format == "JPEG2000" and picture.mode != "I;16":
        content = Path(os.fsdecode(picture.filename)).read_bytes()
        start = content.find(b"\xff\x4f\xff\x51")  # where the code stream begins
        if start >= 0 and content[start + 42] & 127 >= 8:  # bits of the first band, less 1
            raise ValueError("in more than 8 bits, its white becomes black; save it in 8 bits")


def check_values(picture: ImageFile.ImageFile) -> None:
    """Refuse a decoded TIFF whose values have become negative, as Pillow's numbers have a sign.

    Raises:
        ValueError: it is such a file.
    """
    if isinstance(picture, TiffImageFile) and picture.mode == "I":
        unsigned = picture.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 1
        if unsigned and np.asarray(picture).min() < 0:
            raise ValueError("it has values above 2147483647; save it in 16 bits")


def check_mask(picture: ImageFile.ImageFile) -> None:
    """Refuse a mask in a format that changes values, and note whether its values are stretched.

    Raises:
        ValueError: it is in such a format.
    """
    kind = "JPEG" if picture.format == "MPO" else picture.format
    if picture.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):  # of a TIFF
        kind = "JPEG"
    lossy_webp = kind == "WEBP" and not _is_lossless_webp(Path(os.fsdecode(picture.filename)))
    if kind in LOSSY or lossy_webp:
        changes = "may change" if kind == "JPEG2000" else "changes"
        raise ValueError(f"{kind} {changes} the values of pixels, so save masks as PNG")
    bits = [raw_mode(tile.args)[2] for tile in picture.tile if L24.match(raw_mode(tile.args))]
    if bits:
        picture.info[STRETCHED] = f"{bits[0]} bits"
    highest = _highest_value(picture)
    if highest not in (0, 255, 65535):
        picture.info[STRETCHED] = f"values up to {highest}"


def _is_lossless_webp(path: Path) -> bool:
    """Whether the first chunk of pixels in a WebP file is a lossless one."""
    content, at = path.read_bytes(), 12  # behind "RIFF", a size and "WEBP"
    while content[at : at + 4] not in (b"VP8L", b"VP8 ", b""):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return content[at : at + 4] == b"VP8L"


def _highest_value(picture: ImageFile.ImageFile) -> int:
    """The value that is white in a PPM or PGM, which Pillow makes 255 or 65535; 0 for others."""
    plain = (t.args for t in picture.tile if t.codec_name in ("ppm", "ppm_plain"))
    return next((int(args[1]) for args in plain if isinstance(args, tuple)), 0)


def raw_mode(args: object) -> str:
    """What Pillow's decoder makes of the bytes, such as "RGB;16B"."""
    return str(args[0] if isinstance(args, tuple) else args)
