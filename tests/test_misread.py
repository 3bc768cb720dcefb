"""Files that Pillow opens but misreads, and masks in formats that change values."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_bad_images import png
from test_pictures import tiff

from fcn.datasets.pictures import read_image
from fcn.datasets.reading import read_mask
from fcn.errors import DataError

LABELS = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
GREY = Image.fromarray(LABELS * 20)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def black_and_white() -> Image.Image:
    picture = Image.fromarray(LABELS.repeat(2, 1) % 2)
    picture.putpalette([0, 0, 0, 255, 255, 255])
    return picture


def deep_jpeg2000(bits: int) -> bytes:
    """Pillow writes 8 bits for each of three bands; this says that there are more."""
    content = bytearray(encoded(GREY.convert("RGB"), "JPEG2000", no_jp2=True))
    for band in range(3):
        content[42 + 3 * band] = bits - 1  # Ssiz of the standard's marker SIZ
    return bytes(content)


def planar(values: np.ndarray) -> bytes:
    """A compressed TIFF of values (H, W, 3) uint16, whose bands lie one after the other."""
    height, width, bands = values.shape
    strips = [zlib.compress(values[..., band].astype("<u2").tobytes()) for band in range(bands)]
    tags = {256: [width], 257: [height], 258: [16] * bands, 259: [8], 262: [2], 273: [0] * bands}
    tags |= {277: [bands], 278: [height], 279: list(map(len, strips)), 284: [2]}
    start = 8 + 2 + 12 * len(tags) + 4
    at = start + sum(4 * len(numbers) for numbers in tags.values() if len(numbers) > 1)
    tags[273] = [at + sum(map(len, strips[:band])) for band in range(bands)]
    body, entries = b"", b""
    for tag, numbers in sorted(tags.items()):
        content = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            body, content = body + content, struct.pack("<I", start + len(body))
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + content
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head + body + b"".join(strips)


DEEP = np.arange(8 * 8 * 3, dtype=np.uint16).reshape(8, 8, 3)
IMAGES: dict[str, tuple[bytes, str]] = {
    "8 bits.bmp": (encoded(black_and_white(), "BMP"), "black and white in more than 1 bit"),
    "12 bits.jp2": (deep_jpeg2000(12), "white becomes black"),
    "12 bits.ppm": (b"P6 8 8 4095\n" + DEEP.astype(">u2").tobytes(), "only 8 of its bits"),
    "12 bits of text.ppm": (b"P3 1 1 4095\n1 2 4000\n", "only 8 of its bits"),
    "planar.tif": (planar(DEEP), "bands lie one after the other"),
    "large.tif": (tiff(np.full((4, 4, 1), 2**31 + 7, np.uint32)), "values above 2147483647"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, tmp_path: Path) -> None:
    content, message = IMAGES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot read this image: .*{message}"):
        read_image(tmp_path / name)


def test_images_that_are_read_as_before(tmp_path: Path) -> None:
    for name, content in {
        "a.bmp": encoded(Image.fromarray(LABELS > 1), "BMP"),
        "b.jp2": encoded(GREY.convert("RGB"), "JPEG2000"),
        "c.ppm": b"P6 1 1 255\n" + bytes([1, 2, 250]),
        "d.tif": tiff(DEEP, tags={284: (1,)}),
        "e.tif": tiff(np.full((4, 4, 1), 2**16 - 1, np.uint32)),
        "f.pbm": b"P1 2 1\n0 1\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read_image(tmp_path / name).dtype == np.uint8


def bits_png(bits: int) -> bytes:
    """A PNG of LABELS in 2 or 4 bits of grey."""
    each = 8 // bits
    rows = LABELS.reshape(8, -1, each)  # (8, bytes in a row, values in a byte)
    packed = sum(rows[..., k].astype(int) << bits * (each - 1 - k) for k in range(each))
    return png(8, 8, bits, 0, b"".join(b"\0" + bytes(row.tolist()) for row in np.array(packed)))


LOSSY: dict[str, Callable[[], bytes]] = {
    "jpg": lambda: encoded(GREY, "JPEG", quality=100),
    "png": lambda: encoded(GREY, "JPEG", quality=100),  # by its content
    "webp": lambda: encoded(GREY.convert("RGB"), "WEBP", quality=100),
    "x.webp": lambda: encoded(GREY.convert("RGB"), "WEBP", quality=100, exif=b"Exif"),
    "tif": lambda: encoded(GREY, "TIFF", compression="jpeg"),
    "jp2": lambda: encoded(GREY, "JPEG2000", irreversible=True),
}


@pytest.mark.parametrize("ending", LOSSY)
def test_masks_in_formats_that_change_values(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(LOSSY[ending]())
    with pytest.raises(DataError, match=r"this mask: \w+ (changes|may change) the values of pix"):
        read_mask(path, 100)
    for options in ({}, {"exif": b"Exif"}):
        rgb = Image.fromarray(LABELS).convert("RGB")
        path.write_bytes(encoded(rgb, "WEBP", lossless=True, **options))
        np.testing.assert_array_equal(read_mask(path, 100), LABELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bits_png(2), "this mask has 2 bits, which are stretched"),
        (bits_png(4), "this mask has 4 bits, which are stretched"),
        (b"P5 8 8 5\n" + LABELS.tobytes(), "this mask has values up to 5, which are stretched"),
        (b"P2 2 1 7\n0 3\n", "this mask has values up to 7, which are stretched"),
    ],
    ids=["2 bits", "4 bits", "PGM", "PGM of text"],
)
def test_masks_whose_values_are_stretched(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.png" if content.startswith(b"\x89") else "x.pgm")
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_mask(path, 100)
    read_image(path)  # for an image, stretching is right


def test_masks_of_other_bits_are_read(tmp_path: Path) -> None:
    for name, content in {
        "a.pgm": b"P5 8 8 255\n" + LABELS.tobytes(),
        "b.pgm": b"P5 8 8 65535\n" + LABELS.astype(">u2").tobytes(),
        "c.png": encoded(Image.fromarray(LABELS), "PNG"),
    }.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_mask(tmp_path / name, 4), LABELS)
    (tmp_path / "d.pbm").write_bytes(b"P1 2 1\n0 1\n")
    assert read_mask(tmp_path / "d.pbm", 4).max() == 1


def test_grey_values_that_a_gif_has_numbered_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    Image.fromarray(np.where(LABELS == 3, 255, LABELS).astype(np.uint8)).save(path)
    with pytest.raises(DataError, match=r"numbers \[0, 1, 2, 3\] for the grey values"):
        read_mask(path, 4)
    Image.fromarray(LABELS).save(path)
    np.testing.assert_array_equal(read_mask(path, 4), LABELS)
    # A table of two colours, and pixels of the values 0 to 3.
    table = b"\xf0\0\0" + bytes(3) + b"\xff" * 3
    pixels = bytes([0x2C, *[0] * 4, 4, 0, 1, 0, 0, 2, 3, 0x44, 0x34, 0x05, 0])
    path.write_bytes(b"GIF89a\4\0\1\0" + table + pixels + b"\x3b")
    np.testing.assert_array_equal(read_mask(path, 4), [[0, 1, 2, 3]])


def test_labels_from_1_with_void_pixels_and_without(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for labels in (LABELS, LABELS.clip(1)):
        Image.fromarray(labels).save(path)
        with pytest.raises(DataError, match=r"found 3; .* 0 is void, set data\.dataset\.void=0"):
            read_mask(path, 3)
