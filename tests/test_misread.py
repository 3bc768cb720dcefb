"""Pictures and masks that are refused by name, with what to do; above all those that Pillow opens
but misreads, and masks in formats that change values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_bad_images import encoded, png
from test_pictures import deep_png, tiff

from fcn.datasets import pictures
from fcn.datasets.folder import Folder
from fcn.datasets.pictures import read_image
from fcn.errors import DataError

LABELS = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
GREY = Image.fromarray(LABELS * 20)
RGB = GREY.convert("RGB")
STACK: dict[str, Any] = {"save_all": True, "append_images": [RGB.rotate(90), RGB.rotate(180)]}
PAGES = "it has 3 pages; save each page as a file of its own"


class Masks(Folder):
    """Reads single masks of labels, without a data set on disk."""

    def __init__(self, classes: int, void: int | None = 255) -> None:
        self.classes, self.mask_void = tuple(map(str, range(classes))), void
        self.max_pixels, self._colours = pictures.MAX_PIXELS, {}


def read_mask(path: Path) -> np.ndarray:
    return Masks(4).read_mask(path)


def saved(values: np.ndarray, kind: str = "PNG") -> bytes:
    return encoded(Image.fromarray(values), kind)


def noise(bands: int, kind: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 99, (8, 8, bands)).astype(kind)


def black_and_white() -> Image.Image:
    picture = Image.fromarray(LABELS.repeat(2, 1) % 2)
    picture.putpalette([0, 0, 0, 255, 255, 255])
    return picture


def deep_jpeg2000() -> bytes:
    """Pillow writes 8 bits for each of three bands; this says that there are 12."""
    content = bytearray(encoded(RGB, "JPEG2000", no_jp2=True))
    for band in range(3):
        content[42 + 3 * band] = 12 - 1  # Ssiz of the standard's marker SIZ
    return bytes(content)


IMAGES: dict[str, tuple[bytes, str]] = {
    "stack.tif": (encoded(RGB, "TIFF", **STACK), PAGES),
    "stack.gif": (encoded(RGB, "GIF", **STACK), PAGES),
    "stack.png": (encoded(RGB, "PNG", **STACK), PAGES),
    "cmyk.jpg": (encoded(GREY.convert("CMYK"), "JPEG"), "mode CMYK is not read; save it as RGB"),
    "lab.tif": (encoded(Image.new("LAB", (8, 8)), "TIFF"), "mode LAB is not read; save it as RGB"),
    "five.tif": (tiff(noise(5), tags={338: [0, 0]}), "it has 5 bands, and images have 1, 3 or 4"),
    "four.tif": (tiff(noise(4), tags={262: 1, 338: [0] * 3}), "a TIFF of 4 bands of 8 bits"),
    "signed.tif": (tiff(noise(1, "int8")), "its values are signed"),
    "float colours.tif": (tiff(noise(3, "float32")), "it is a TIFF of 3 bands of 32 bits"),
    "big.tif": (tiff(noise(3, "float32"), big=True), "it is a TIFF of 3 bands of 32 bits"),
    "negative.tif": (tiff(noise(1, "uint16"), tags={262: 0}), "its value 0 is white"),
    "alpha.png": (deep_png(noise(2, "uint16")), "Pillow reads only 8 of its 16 bits"),
    "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(200), "HEIC needs pip install -r requirements/"),
    "scan.dcm": (bytes(300), "DICOM is not read"),
    "8 bits.bmp": (encoded(black_and_white(), "BMP"), "black and white in more than 1 bit"),
    "12 bits.jp2": (deep_jpeg2000(), "white becomes black"),
    "12 bits.ppm": (b"P6 8 8 4095\n" + noise(3, ">u2").tobytes(), "only 8 of its bits"),
    "12 bits of text.ppm": (b"P3 1 1 4095\n1 2 4000\n", "only 8 of its bits"),
    "planar.tif": (tiff(noise(3, "uint16"), planar=True), "bands lie one after the other"),
    "large.tif": (tiff(np.full((4, 4, 1), 2**31 + 7, np.uint32)), "values above 2147483647"),
}


def test_refused_images(tmp_path: Path) -> None:
    for name, (content, message) in IMAGES.items():
        if name.endswith("heic") and "HEIF" in pictures.FORMATS:
            continue
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            read_image(path)
        assert str(error.value).startswith(f"{path}: cannot read this image: ")
        assert message in str(error.value)


def test_images_that_are_read(tmp_path: Path) -> None:
    """They are like some of those above, and Pillow reads them rightly."""
    colours = noise(3, "uint16")
    for name, content in {
        "a.bmp": encoded(Image.fromarray(LABELS > 1), "BMP"),
        "b.jp2": encoded(RGB, "JPEG2000"),
        "c.ppm": b"P6 1 1 255\n" + bytes([1, 2, 250]),
        "d.tif": tiff(colours, tags={284: (1,)}),
        "e.tif": tiff(np.full((4, 4, 1), 2**16 - 1, np.uint32)),
        "f.pbm": b"P1 2 1\n0 1\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read_image(tmp_path / name).dtype == np.uint8


def bits_png(bits: int) -> bytes:
    """A PNG of LABELS in 2 or 4 bits of grey."""
    places = np.arange(bits)[::-1]
    packed = np.packbits(LABELS[..., None] >> places & 1, axis=None).reshape(8, bits)
    return png(8, 8, bits, 0, b"".join(b"\0" + row.tobytes() for row in packed))


CHANGES, STRETCHED = r"\w+ (changes|may change) the values of pix", "which are stretched"
FROM_1 = np.arange(64, dtype=np.uint8).reshape(8, 8) % 5
TRANSPARENT = Image.merge("LA", [Image.fromarray(LABELS), Image.fromarray(LABELS)])
MASKS: dict[str, tuple[bytes, str]] = {
    "a JPEG by its content.png": (encoded(GREY, "JPEG", quality=100), CHANGES),
    "x.webp": (encoded(RGB, "WEBP", quality=100), CHANGES),
    "with exif.webp": (encoded(RGB, "WEBP", quality=100, exif=b"Exif"), CHANGES),
    "x.tif": (encoded(GREY, "TIFF", compression="jpeg"), CHANGES),
    "x.jp2": (encoded(GREY, "JPEG2000", irreversible=True), CHANGES),
    "2 bits.png": (bits_png(2), f"this mask has 2 bits, {STRETCHED}"),
    "4 bits.png": (bits_png(4), f"this mask has 4 bits, {STRETCHED}"),
    "text.pgm": (b"P2 2 1 7\n0 3\n", f"this mask has values up to 7, {STRETCHED}"),
    "x.pgm": (b"P5 8 8 5\n" + LABELS.tobytes(), f"this mask has values up to 5, {STRETCHED}"),
    "numbered anew.gif": (saved(LABELS // 3 * 252 + LABELS, "GIF"), r"numbers \[0, 1, 2, 3\] for"),
    "two values.gif": (saved(LABELS % 2 * 2, "GIF"), r"numbers \[0, 1\] for .* \[0, 2\]"),
    "one value.gif": (saved(0 * LABELS + 2, "GIF"), r"numbers \[0\] for the grey values \[2\]"),
    "1 and void.gif": (saved(LABELS % 2 * 254 + 1, "GIF"), r"numbers \[0, 1\] for .* \[1, 255\]"),
    "only void.gif": (saved(0 * LABELS + 255, "GIF"), r"numbers \[0\] for the grey values \[255\]"),
    "transparent.png": (encoded(TRANSPARENT, "PNG"), "has transparent pixels; save it without alp"),
    "half.tif": (saved(LABELS * np.float32(0.5), "TIFF"), "holds fractions"),
    "deep.png": (deep_png(np.ones((8, 8, 3), np.uint16)), "colours in 16 bits is not read"),
    "large.png": (saved(LABELS.astype(np.uint16) * 256), "found 256, 512, 768$"),
    # Labels that begin with 1, with void pixels and without.
    "from 1.png": (saved(FROM_1), r"found 4; .* 0 is void, set data\.dataset\.void=0"),
    "no void.png": (saved(FROM_1.clip(1)), r"found 4; .* set data\.dataset\.void=0"),
}


@pytest.mark.parametrize("name", MASKS)
def test_refused_masks(name: str, tmp_path: Path) -> None:
    content, message = MASKS[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_mask(path)
    assert str(error.value).startswith(f"{path}: ")
    if STRETCHED in message:
        read_image(path)  # for an image, stretching is right


def test_masks_that_are_read(tmp_path: Path) -> None:
    rgb = Image.fromarray(LABELS).convert("RGB")
    for name, content in {
        "a.pgm": b"P5 8 8 255\n" + LABELS.tobytes(),
        "b.pgm": b"P5 8 8 65535\n" + LABELS.astype(">u2").tobytes(),
        "c.png": saved(LABELS),
        "d.gif": saved(LABELS, "GIF"),
        "e.webp": encoded(rgb, "WEBP", lossless=True),
        "f.webp": encoded(rgb, "WEBP", lossless=True, exif=b"Exif"),
    }.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_mask(tmp_path / name), LABELS)
    path = tmp_path / "x.pbm"
    path.write_bytes(b"P1 2 1\n0 1\n")
    assert read_mask(path).tolist() == [[1, 0]]  # in its text, 1 is black
    # A GIF with a table of two colours, and pixels of the values 0 to 3.
    table = b"\xf0\0\0" + bytes(3) + b"\xff" * 3
    pixels = bytes([0x2C, *[0] * 4, 4, 0, 1, 0, 0, 2, 3, 0x44, 0x34, 0x05, 0])
    path.write_bytes(b"GIF89a\4\0\1\0" + table + pixels + b"\x3b")
    assert read_mask(path).tolist() == [[0, 1, 2, 3]]
    # The same table, and pixels of one value, which it may lack.
    for value in range(4):
        codes = (4 | value << 3 | 5 << 6).to_bytes(2, "little")  # start, value, end: 3 bits each
        pixels = bytes([0x2C, *[0] * 4, 1, 0, 1, 0, 0, 2, 2, *codes, 0])
        path.write_bytes(b"GIF89a\1\0\1\0" + table + pixels + b"\x3b")
        assert read_mask(path).tolist() == [[value]]
    for white in (1, 255):
        path.write_bytes(saved(LABELS % 2 * np.uint8(white), "GIF"))
        np.testing.assert_array_equal(read_mask(path), LABELS % 2)
    path.write_bytes(saved(np.array([[0, 1, 2]], np.uint8)))
    assert Masks(2, void=0).read_mask(path).tolist() == [[255, 0, 1]]
