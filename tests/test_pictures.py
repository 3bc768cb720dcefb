"""One reader of pictures: training, the check, evaluation and prediction see the same pixels."""

import hashlib
import io
import logging
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from test_bad_images import encoded, png
from test_folder import write
from torch import Tensor

from fcn.datamodule import SegmentationDataModule
from fcn.datasets import pictures
from fcn.datasets.folder import Folder
from fcn.datasets.pictures import image_facts, image_size, image_type, read_image
from fcn.datasets.reading import missing_allowed
from fcn.datasets.survey import Survey
from fcn.datasets.value_range import Facts, range_problem
from fcn.errors import ConfigError, DataError
from fcn.inference.photos import find_photos
from fcn.inference.predictor import predict_files
from fcn.inference.tta import TestTime

SIZE = (7, 9)  # height and width of each upright image
# How an upright picture is stored, for each EXIF orientation: as cameras do, written down from the
# standard, so that it is independent of the reader.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    9: lambda a: a,  # no such orientation
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def save(path: Path, picture: Image.Image, orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    picture.save(path, **options, **({} if orientation == 1 else {"exif": exif}))


def tiff(
    values: np.ndarray,
    *,
    tags: dict[int, Any] | None = None,
    planar: bool = False,
    big: bool = False,
) -> bytes:
    """A TIFF of values (H, W, bands) of any type, as programs for research write it.

    Args:
        tags: further tags, or other values for these.
        planar: the bands lie one after the other, and are compressed.
        big: a BigTIFF, with 64-bit offsets.
    """
    height, width, bands = values.shape
    little = values.astype(values.dtype.newbyteorder("<"))
    strips = [little.tobytes()]
    if planar:
        strips = [zlib.compress(little[..., band].tobytes()) for band in range(bands)]
    sizes = [len(strip) for strip in strips]
    all_tags = {256: width, 257: height, 277: bands, 278: height, 284: 1 + planar}
    all_tags |= {258: [8 * values.itemsize] * bands, 259: 8 if planar else 1}
    all_tags |= {262: 2 if bands >= 3 else 1, 339: [" uif".index(values.dtype.kind)] * bands}
    all_tags |= {273: [sum(sizes[:k]) for k in range(len(sizes))], 279: sizes}  # of the strips
    head = b"II\x2b\0\x08\0\0\0" + (16).to_bytes(8, "little")  # of a BigTIFF
    directory = ImageFileDirectory_v2(head) if big else ImageFileDirectory_v2(prefix=b"II")
    file = io.BytesIO()
    for tag, value in (all_tags | (tags or {})).items():
        directory[tag] = value
    directory.save(file)
    return file.getvalue() + b"".join(strips)


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of values (H, W, 2, 3 or 4) uint16, which Pillow cannot write."""
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, {2: 4, 3: 2, 4: 6}[bands], rows)


def with_palette(indices: np.ndarray) -> Image.Image:
    picture = Image.fromarray(indices)
    colours = [(k, 255 - k, k // 2) for k in range(256)]
    picture.putpalette([channel for colour in colours for channel in colour])
    return picture


def write_images(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """Images of one type in all formats, modes and orientations; the pixels (H, W, 3) of each."""
    folder.mkdir(parents=True)
    colours = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), np.uint8)
    rgb, grey = colours[..., :3], colours[..., 0].copy()
    grey_rgb = np.stack([grey] * 3, 2)
    palette = np.stack([grey, 255 - grey, grey // 2], 2)
    bits = np.where(grey_rgb > 99, 255, 0)
    deep, floats = colours.astype(np.uint16) * 257, grey.astype(np.float32) / 255
    deep_grey = deep[..., 0]

    def twice(values: np.ndarray) -> Image.Image:
        return Image.merge("LA", [Image.fromarray(values)] * 2)

    # For each mode: the values to store, what is to be read, the writer, and endings of files.
    kinds: dict[str, dict[str, tuple[Any, np.ndarray, Callable, str]]] = {
        "8-bit": {
            "RGB": (rgb, rgb, Image.fromarray, "png tif webp bmp ppm tga jp2"),
            "RGBA": (colours, rgb, Image.fromarray, "png tif"),
            "L": (grey, grey_rgb, Image.fromarray, "png tif bmp tga jp2 gif"),
            "LA": (grey, grey_rgb, twice, "png tif"),
            "P": (grey, palette, with_palette, "png tif gif bmp"),
            "1": (grey > 99, bits, Image.fromarray, "png tif bmp"),
        },
        "16-bit": {
            "I;16": (deep_grey, grey_rgb, Image.fromarray, "png tif jp2"),
            "I;16B": (deep_grey.astype(">u2"), grey_rgb, Image.fromarray, "tif"),
            "I": (deep_grey.astype(np.int32), grey_rgb, Image.fromarray, "tif ppm"),
            "RGB": (deep[..., :3], rgb, deep_png, "png"),
            "RGBA": (deep, rgb, deep_png, "png"),
            "RGB in TIFF": (deep[..., :3], rgb, tiff, "tif"),
        },
        "float": {
            "F": (floats, grey_rgb, Image.fromarray, "tif"),
            "F by hand": (floats[..., None], grey_rgb, tiff, "tif"),
        },
    }
    expected = {}
    for mode, (values, pixels, store, endings) in kinds[kind].items():
        for ending in endings.split():
            with_exif = ending in ("png", "tif", "webp") and store not in (tiff, deep_png)
            for orientation in STORED if with_exif else (1,):
                name = f"{mode} {ending} {orientation}".replace(";", "_")
                path = folder / f"{name}.{ending}"
                stored = store(np.ascontiguousarray(STORED[orientation](values)))
                if isinstance(stored, bytes):
                    path.write_bytes(stored)
                else:
                    save(path, stored, orientation)
                expected[name] = pixels
    return expected


def write_masks(folder: Path, names: Sequence[str]) -> np.ndarray:
    """For each image a mask of another mode and orientation; all have the same labels (H, W)."""
    labels = np.random.default_rng(1).integers(0, 2, SIZE).astype(np.uint8)
    grey = Image.fromarray
    writers: list[tuple[str, Callable[[np.ndarray], Image.Image]]] = [
        ("png", grey),
        ("png", with_palette),
        ("tif", lambda a: grey(a.astype(">u2"))),
        ("png", lambda a: grey(a.astype(np.uint16))),
        ("tif", lambda a: grey(a.astype(np.int32))),
        ("tif", lambda a: grey(a.astype(np.float32))),
        ("png", lambda a: grey(a > 0)),
        ("png", lambda a: grey(a).convert("LA")),
        ("tif", lambda a: grey(a).convert("RGB")),
        ("png", lambda a: grey(a).convert("RGBA")),
    ]
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        ending, make = writers[number % len(writers)]
        orientation = list(STORED)[number % len(STORED)]
        stored = make(np.ascontiguousarray(STORED[orientation](labels)))
        save(folder / f"{name}.{ending}", stored, orientation)
    return labels


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["8-bit", "16-bit", "float"])
def test_all_four_see_the_same(kind: str, tmp_path: Path) -> None:
    """Training, the check, evaluation and prediction, for each format, mode and orientation."""
    expected = write_images(tmp_path / "images", kind)
    labels = write_masks(tmp_path / "masks", list(expected))
    settings = {"classes": ["a", "b"], "val_share": 0.5}
    dataset = partial(Folder, **settings)  # type: ignore[arg-type]
    datamodule = SegmentationDataModule(dataset=dataset, root=tmp_path, num_workers=0)
    datamodule.setup("fit")
    seen = []
    for data in (datamodule.train_data, datamodule.val_data):
        assert data is not None
        survey = Survey("x", data, images=True)
        assert not survey.errors
        for index, name in enumerate(data.ids):
            sample = data[index]
            assert np.array_equal(sample["image"].permute(1, 2, 0), expected[name]), name
            assert np.array_equal(sample["mask"], labels), name
            pixels = np.ascontiguousarray(expected[name], np.uint8)
            content = hashlib.blake2b(pixels.tobytes(), digest_size=16, salt="7×9".encode())
            assert survey.pairs[index].content == content.digest(), name
            assert image_size(data.pairs[name][0])[0] == SIZE, name
            seen.append(name)
        assert survey.pixels[:2].tolist() == (np.bincount(labels.ravel()) * len(data)).tolist()
    assert sorted(seen) == sorted(expected)

    config = {"dataset": {"class": "fcn.datasets.folder.Folder", **settings}, "num_workers": 0}
    evaluated = SegmentationDataModule.from_settings({**config, "root": str(tmp_path)})
    for batch in evaluated.eval_dataloader(evaluated.open("all")):
        (name,) = batch["id"]
        assert np.array_equal(batch["image"][0].permute(1, 2, 0), expected[name]), name
        assert np.array_equal(batch["mask"][0], labels), name

    jobs, left_out = find_photos(str(tmp_path / "images"), tmp_path / "out")
    assert not left_out
    assert len(jobs) == len(expected)
    names = {target: path.stem for path, target in jobs.items()}

    def compare(image: Tensor, mask: Tensor, target: Path) -> None:
        assert np.array_equal(image.permute(1, 2, 0), expected[names.pop(target)]), target

    network = TestTime(lambda image: torch.zeros(len(image), 2, *image.shape[-2:]))
    assert predict_files(jobs, network, compare, batch_size=5) == {}
    assert not names


def test_alpha_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pictures, "_with_alpha", [])
    for name in ("a.png", "b.png"):
        Image.new("RGBA", (3, 2), (9, 8, 7, 0)).save(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert image_type(tmp_path / "a.png") == "8-bit"
        for name in ("a.png", "b.png"):
            assert read_image(tmp_path / name)[0, 0].tolist() == [9, 8, 7]
    assert len(caplog.records) == 1
    assert "a.png has an alpha channel" in caplog.text


def test_range_of_values(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint16)
    expected = np.stack([grey] * 3, 2)
    images = {
        "twelve.png": (grey * 16, (0, 4080)),
        "thermal.tif": (grey * 10 + 29000, (29000, 31550)),
        "signed.tif": ((grey * 10).astype(np.int32) - 1000, (-1000, 1550)),
        "float.tif": (grey.astype(np.float32) * 2 - 255, (-255.0, 255.0)),
        "eight.png": (grey.astype(np.uint8), (0, 255)),
    }
    for name, (values, value_range) in images.items():
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name, value_range), expected), name
    # Values outside become black and white; NaN becomes black.
    values = np.array([[-5, 0, 0.5, 1, 7, np.nan, np.inf, -np.inf]], np.float32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    read = read_image(tmp_path / "x.tif", (0, 1))[0, :, 0]
    assert read.tolist() == [0, 0, 128, 255, 255, 0, 255, 0]
    assert image_facts(tmp_path / "x.tif") == Facts("float", -5, 7, (0, 1))
    # A few defect pixels do not hide that 12 bits fill little of 16.
    values = np.random.default_rng(0).integers(0, 4096, (80, 90)).astype(np.uint16)
    values[3, 4:8] = 65535
    Image.fromarray(values).save(tmp_path / "hot.png")
    facts = image_facts(tmp_path / "hot.png")
    assert facts.highest == 65535
    assert "value_range=[0,4095]" in str(range_problem({tmp_path / "hot.png": facts}, None))


RANGES: list[Any] = [
    ([("8-bit", 0, 9)], None, None),  # dark images in 8 bits are never refused
    ([("16-bit", 0, 25000)], None, None),
    ([("16-bit", 900, 16000)], None, r"fill only 23% .*=\[0,16383\].*\[0,65535\] leaves them"),
    ([("16-bit", 29000, 31000)], None, r"value_range=\[29000,31000\]"),
    ([("16-bit", -1024, 3071)], None, r"exceed .*0 to 65535; .*value_range=\[-1024,3071\]"),
    ([("16-bit", 0, 0)], None, r"fill only 0%.*\[0,255\]"),
    ([("float", 0, 0.9), ("float", 0.01, 0.1)], None, None),
    ([("float", 0, 0.1)], None, r"fill only 10% .*value_range=\[0,0\.1\]"),
    ([("float", -5, -5)], None, r"exceed .*value_range=\[-10,0\]"),  # it becomes grey
    ([("float", -0.005, 1.009)], None, None),  # a resized image
    ([("float", 0, 250)], None, r"exceed the range from 0 to 1; .*value_range=\[0,255\]"),
    ([("16-bit", 200, 4000)], [0, 65535], None),
    ([("16-bit", 300, 4000)], [0, 255], r"all lie outside of .*=\[0,255\]; .*=\[0,4095\]"),
    ([("8-bit", 0, 255)], [0, 4095], r"=\[0,4095\] is for images of another type.* 8-bit"),
    ([("16-bit", 0, 99)], [0, 1], r"=\[0,1\] is for images of another type.* 16-bit"),
    ([("8-bit", 0, 255)], [0, 1.5], r"=\[0,1\.5\] is for images of another type.*=null"),
    ([("16-bit", 0, 4095)] * 9 + [("16-bit", 0, 65520)], None, r"fill only 6% .*\[0,4095\]"),
    ([("float", 0, 1)] * 3 + [("float", 0, 9)] * 2, None, r"3\.png, 4\.png: float .*exceed"),
    ([("8-bit", 0, 9), ("16-bit", 0, 9)], None, r"1\.png: this image is 16-bit, but .*0\.png"),
]


@pytest.mark.parametrize(("facts", "value_range", "message"), RANGES)
def test_range_problem(facts: Any, value_range: Any, message: str | None) -> None:
    by_path = {Path(f"{number}.png"): Facts(*fact) for number, fact in enumerate(facts)}
    problem = range_problem(by_path, value_range)
    assert (problem is None) == (message is None)
    assert re.search(message or "", problem or ""), problem


def test_smaller_copies_are_no_pages(tmp_path: Path) -> None:
    """A TIFF may hold smaller copies of its picture, and an MPO what a second lens saw."""
    first, second = (Image.new("RGB", size, "red") for size in ((40, 30), (20, 15)))
    second.encoderinfo = {"tiffinfo": {254: 1}}  # type: ignore[attr-defined]
    for name in ("x.tif", "x.mpo"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert read_image(tmp_path / name).shape == (30, 40, 3), name


def test_smaller_copy_before_its_picture(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    small, large = (Image.new("RGB", size, "red") for size in ((20, 15), (40, 30)))
    large.encoderinfo = {"tiffinfo": {254: 0}}  # type: ignore[attr-defined]
    small.save(path, save_all=True, append_images=[large], tiffinfo={254: 1})
    assert read_image(path).shape == (30, 40, 3)
    assert image_size(path) == ((30, 40), 1)


@pytest.mark.parametrize("place", ["exif", "Raw profile type exif", "XML:com.adobe.xmp"])
def test_orientation_of_a_png(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in one of three places; the size is known without decoding the pixels."""
    exif, info = Image.Exif(), PngInfo()
    options: dict[str, Any] = {"pnginfo": info}
    exif[0x0112] = 6
    if place == "exif":
        options["exif"] = exif
    elif place == "XML:com.adobe.xmp":
        info.add_itxt(place, '<rdf:Description tiff:Orientation="6"/>')
    else:  # as ImageMagick writes it
        block = exif.tobytes()
        info.add_text(place, f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    upright = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(np.ascontiguousarray(STORED[6](upright))).save(path, **options)
    assert np.array_equal(read_image(path), upright)
    monkeypatch.setattr(PngImageFile, "load", lambda _: pytest.fail("the pixels are decoded"))
    assert image_size(path) == (SIZE, 6)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is missing
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_tiff_that_is_cut_off(tmp_path: Path, share: float) -> None:
    path = write(tmp_path, "x", Image.effect_noise((40, 30), 80).convert("RGB"), "tif")
    content = encoded(Image.open(path), "TIFF", compression="tiff_lzw")
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"x\.tif: cannot read this image: .* cut off"):
        read_image(path)


def opened(root: Path, **settings: Any) -> Folder:
    return Folder(split="all", root=root, classes=["a", "b"], **settings)


def test_another_type_is_refused(tmp_path: Path) -> None:
    for number, kind in enumerate((np.uint8, np.uint8, np.uint16)):
        write(tmp_path / "images", str(number), np.ones(SIZE, kind))
        write(tmp_path / "masks", str(number), np.ones(SIZE, np.uint8))
    data = opened(tmp_path)
    assert data[1]["id"] == "1"
    with pytest.raises(DataError, match=r"2\.png: this image is 16-bit, but .* is 8-bit"):
        data[2]
    with pytest.raises(DataError, match=r"value_range=\[0,4095\] is for images of another type"):
        opened(tmp_path, value_range=[0, 4095])[0]
    for wrong in ([1, 0], [0], "0,1", [0, float("nan")]):
        with pytest.raises(ConfigError, match=r"value_range=.*must be null or two numbers"):
            opened(tmp_path, value_range=wrong)


@pytest.mark.parametrize("turned", ["x.jpg", "x.png"])
def test_mask_that_fits_only_what_is_stored(tmp_path: Path, turned: str) -> None:
    for folder, name in (("images", "x.jpg"), ("masks", "x.png")):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / name, Image.new("L", (9, 7)), 6 if name == turned else 1)
    message = rf"the mask is .*by its EXIF orientation {turned} is turned"
    with pytest.raises(DataError, match=message):
        opened(tmp_path)[0]


def test_limit_of_pixels(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        write(tmp_path / folder, "0", Image.new("L", SIZE))
    opened(tmp_path, max_pixels=63)[0]
    with pytest.raises(DataError, match=r"0\.png: .* 7×9 .* data\.dataset\.max_pixels=63 allows"):
        opened(tmp_path, max_pixels=62)[0]


def test_endings_that_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "masks", "1", Image.new("L", SIZE))
    (write(tmp_path / "images", "0", Image.new("L", SIZE)).with_name("1.dcm")).write_bytes(b"")
    write(tmp_path / "masks", "0", Image.new("L", SIZE))
    with pytest.raises(DataError, match=r"1 of 2 images missing, .*; 1\.dcm: DICOM is not read"):
        opened(tmp_path)
    with missing_allowed():  # as the check opens it
        data = opened(tmp_path)
    with pytest.raises(DataError, match=r"No such file .*; 1\.dcm: DICOM is not read"):
        data[1]
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(DataError, match=r"no picture in this folder; 1\.dcm: DICOM is not read"):
        opened(tmp_path)


def test_heic(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="requirements/heic.txt")
    pixels = np.kron(np.random.default_rng(0).integers(0, 255, (*SIZE, 3)), np.ones((8, 8, 1)))
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "x.HEIC", quality=-1)
    assert np.abs(read_image(tmp_path / "x.HEIC") - pixels).mean() < 2
    jobs, left_out = find_photos(str(tmp_path), tmp_path / "out")
    assert [path.name for path in jobs] == ["x.HEIC"]
    assert not left_out
