"""Damaged, unusual and hostile pictures, through data set, check and predict.

Each of them gives a result or one error that names the file. They are read in a process of its own,
which may crash, hang or use up memory without harm to the tests.
"""

import contextlib
import io
import os
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose_config
from forks import fork, wait
from PIL import Image
from torch import Tensor

from fcn.checkpoint import last_checkpoint
from fcn.datamodule import SegmentationDataModule
from fcn.datasets.check import SHOWN, check, draw
from fcn.datasets.folder import Folder
from fcn.datasets.reading import read_image
from fcn.errors import DataError
from fcn.inference.photos import find_photos
from fcn.inference.tta import TestTime
from fcn.runs.process import peak_memory
from predict import predict

DAMAGES = ("cut off", "byte changed", "zeros", "bytes removed", "bytes repeated")
REPEATS = int(os.environ.get("REPEATS", "1"))  # of each kind of damage to each file
MEMORY = 2**30  # bytes that the process may grow by; a large picture, decoded, would take 2.7 GB
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG that claims a size, with the compressed `data` whatever the size."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def seeds() -> dict[str, bytes]:
    """Good and odd files."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).resize((40, 32))
    grey = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    more: dict[str, Any] = {"save_all": True, "append_images": [photo.rotate(90)]}
    bomb = b"\x00" * 3_000_000
    text = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(60 * 2**20)))
    return {
        "photo.jpg": encoded(photo, "JPEG"),
        "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(photo.convert("L"), "JPEG"),
        "progressive.jpg": encoded(photo, "JPEG", progressive=True, quality=30),
        "photo.png": encoded(photo, "PNG"),
        "alpha.png": encoded(photo.convert("RGBA"), "PNG"),
        "palette.png": encoded(photo.quantize(9), "PNG", transparency=3),
        "bits.png": encoded(photo.convert("1"), "PNG"),
        "sixteen.png": encoded(grey, "PNG"),
        "animated.png": encoded(photo, "PNG", **more),
        "animated.gif": encoded(photo, "GIF", **more),
        "one.png": encoded(photo.resize((1, 1)), "PNG"),
        "wide.png": encoded(photo.resize((20000, 1)), "PNG"),
        "high.jpg": encoded(photo.resize((1, 20000)), "JPEG"),
        "a_png.jpg": encoded(photo, "PNG"),
        "a_gif.jpg": encoded(photo, "GIF"),
        "text.png": b"no picture at all",
        "zeros.jpg": bytes(3000),
        "empty.png": b"",
        "postscript.jpg": POSTSCRIPT,
        "bomb.png": png(30_000, 30_000, data=bomb),
        "lines.png": png(2**31 - 1, 1, data=bomb),
        "text_bomb.png": png(40, 30)[:33] + text + png(40, 30, data=bomb)[33:],
    }


def damaged(content: bytes, damage: str, rng: np.random.Generator) -> bytes:
    """A file with one kind of damage at a random place, most likely near its start."""
    place = int(len(content) * rng.random() ** 3)
    end = place + int(rng.integers(1, 40))
    changed = int(rng.choice([0, 1, 127, 128, 255, rng.integers(256)]))
    instead = {
        "cut off": b"",
        "byte changed": bytes([changed]) + content[place + 1 :],
        "zeros": bytes(end - place) + content[end:],
        "bytes removed": content[end:],
        "bytes repeated": content[place:end] + content[place:],
    }
    return content[:place] + instead[damage]


def corpus() -> dict[str, bytes]:
    """The files of `seeds`, and damaged copies of the JPEGs and PNGs."""
    files, rng = {}, np.random.default_rng(1)
    large = ("bomb", "lines", "wide", "high")  # one of each is enough
    for name, content in seeds().items():
        stem, _, ending = name.partition(".")
        files[f"{stem}_{ending}.{ending}"] = content
        if ending in ("png", "jpg") and not name.startswith(large) and len(content) > 50:
            for number in range(REPEATS * len(DAMAGES)):
                copy = damaged(content, DAMAGES[number % len(DAMAGES)], rng)
                files[f"{stem}_{ending}_{number}.{ending}"] = copy
    return files


@pytest.mark.slow
def test_damaged_files(finished_run: Path, tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    mask = encoded(Image.new("L", (40, 32)), "PNG")
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for name, content in corpus().items():
        (root / "images" / name).write_bytes(content)
        (root / "masks" / name).with_suffix(".png").write_bytes(mask)
    child = fork(partial(read_all, tmp_path, last_checkpoint(finished_run)), log)
    assert wait(child) == 0, log.read_text()[-3000:]


def read_all(folder: Path, ckpt: Path) -> None:
    """What the process does with the files in `folder`."""
    root, printed, before = folder / "root", io.StringIO(), peak_memory() or 0
    good, failed = 0, 0
    for path in (root / "images").iterdir():
        try:
            assert read_image(path).dtype == np.uint8
            good += 1
        except DataError as error:
            failed, message = failed + 1, str(error)
            assert message.startswith(f"{path}: ")
            assert len(message.splitlines()) == 1
    assert min(good, failed) > 20  # both happen
    dataset = partial(Folder, classes=["a", "b"], val_share=0.5)
    with contextlib.redirect_stdout(printed):
        number = check(SegmentationDataModule(dataset=dataset, root=root), folder / "checked")
    assert number > SHOWN  # the check prints so many errors, and how many more
    assert printed.getvalue().count("\nerror: ") == SHOWN
    options = [f"ckpt={ckpt}", f"input={root / 'images'}", f"output={folder / 'out'}", "device=cpu"]
    with pytest.raises(DataError) as failure, contextlib.redirect_stdout(io.StringIO()):
        predict(compose_config("predict", *options))
    lines = str(failure.value).splitlines()[1:]
    assert all(str(root) in line for line in lines), lines
    assert (len(list((folder / "out").glob("*.png"))), len(lines)) == (good, failed)
    assert (peak_memory() or 0) - before < MEMORY


def test_programs_are_not_started(tmp_path: Path) -> None:
    """Pillow would hand PostScript to Ghostscript."""
    (tmp_path / "x.eps").write_bytes(POSTSCRIPT)
    (tmp_path / "x.png").write_bytes(POSTSCRIPT)
    photos, _ = find_photos(str(tmp_path), tmp_path / "out")
    assert [path.name for path in photos] == ["x.png"]
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="cannot read this image"):
            read_image(path)


@pytest.mark.slow
def test_large_photographs_are_seen_in_tiles() -> None:
    """Whole, a VGG-19 would need 20 GB for 24 million pixels."""
    seen: list[int] = []

    def network(image: Tensor) -> Tensor:
        seen.append(image.shape[-2:].numel())
        return torch.zeros(1, 1, *image.shape[-2:])

    with torch.inference_mode():
        mask = TestTime(network).masks(torch.zeros(1, 3, 4000, 6000, dtype=torch.uint8))
        assert mask.shape == (1, 4000, 6000)
        assert max(seen) <= 1024**2
        seen.clear()
        TestTime(network).masks(torch.zeros(1, 3, 2048, 2048, dtype=torch.uint8))
    assert seen == [2048**2]


def test_picture_of_the_check_is_bounded() -> None:
    """A column of 1×20000 pixels, 300 wide, would be 6 million high: 16 GB."""

    class Data:
        classes, palette, void = ("a",), ((0, 0, 0),), 255

    sample = {
        "image": torch.zeros(3, 20000, 1, dtype=torch.uint8),
        "mask": torch.zeros(20000, 1, dtype=torch.uint8),
        "id": "a\nb",
    }
    assert draw([sample], Data()).height <= 1000  # type: ignore[list-item, arg-type]
