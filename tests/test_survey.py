"""What is read before training and by the check: classes that are void, palettes, late errors."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_mask
from PIL import Image
from test_folder import write
from test_pictures import save

from fcn.datamodule import SegmentationDataModule
from fcn.datasets import survey
from fcn.datasets.check import check, some_samples
from fcn.datasets.folder import Folder
from fcn.datasets.shapes import Shapes
from fcn.datasets.survey import Survey, balanced_weights, before_training
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import DataError

LABELS = np.zeros((8, 10), np.uint8)
LABELS[2:6, 3:8] = 1  # a quarter of all pixels
VOC_COLOURS = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
BOAT = [4, 15]  # in VOC's colours, the brightness of a boat is the label of a person


def palette_picture(labels: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    picture = Image.fromarray(labels)
    picture.putpalette([channel for colour in colours for channel in colour])
    return picture


def opened(
    root: Path, masks: list[np.ndarray | Image.Image], **settings: Any
) -> SegmentationDataModule:
    """A data module on these masks, of which the last is validated on."""
    for i, mask in enumerate(masks):
        write(root / "images", f"p{i}", Image.effect_noise((10, 8), 90), "jpg")
        write(root / "masks", f"p{i}", mask)
    (root / "val.txt").write_text(f"p{len(masks) - 1}\n")
    limit = settings.pop("limit", None)
    dataset = partial(Folder, **{"classes": ["ground", "cat"], "val": "val.txt"} | settings)
    datamodule = SegmentationDataModule(dataset=dataset, root=root, num_workers=0, limit=limit)
    datamodule.setup("fit")
    return datamodule


def problem(datamodule: SegmentationDataModule, output: Path) -> str:
    """What stops training, after the same has stopped the check; empty if nothing does."""
    errors = check(datamodule, output)
    try:
        before_training(datamodule)
    except DataError as error:
        assert errors
        return str(error)
    assert not errors
    return ""


BINARY = LABELS * 255
THREE = {"classes": ["ground", "cat", "dog"]}


@pytest.mark.parametrize(
    ("mask", "settings", "missing"),
    [
        (BINARY, {}, "cat"),
        (palette_picture(BINARY, [(i, i, i) for i in range(256)]), {}, "cat"),
        (np.where(LABELS == 1, LABELS, 255), {}, "ground"),
        (np.where(LABELS == 0, 255, LABELS), THREE, "ground, dog"),
        (BINARY, THREE, "cat, dog"),
        (np.where(LABELS == 0, 7, LABELS), THREE | {"void": 7}, "ground, dog"),
        (BINARY, {"palette": [[0, 0, 0], [9, 9, 9]], "void": [255, 255, 255]}, "cat"),
    ],
)
def test_a_class_that_is_taken_for_void(
    tmp_path: Path, mask: Any, settings: dict[str, Any], missing: str
) -> None:
    text = problem(opened(tmp_path, [mask] * 3, **settings), tmp_path)
    assert f"no pixel of {missing} in the 2 training masks" in text
    assert "data.dataset.void=null 'data.dataset.palette=[[0,0,0],[255,255,255]]'" in text
    assert "data.limit=2 trains" in text
    assert len(text.splitlines()) == 1


BORDER = LABELS.copy()
BORDER[1, 3:8] = 255


def test_a_missing_class_beside_void_at_borders(tmp_path: Path) -> None:
    text = problem(opened(tmp_path, [BORDER] * 3, **THREE), tmp_path)
    assert "no pixel of dog in the 2 training masks" in text
    assert "into the training list, or remove it from data.dataset.classes. If" in text
    assert "data.dataset.void" not in text


@pytest.mark.parametrize(
    ("masks", "share"),
    [
        ([LABELS, *[BINARY] * 4], "4 of 5 masks hold only ground and void"),
        ([*[LABELS] * 4, BINARY], "1 of 5 masks hold only ground and void"),  # the validation mask
        ([*[BORDER] * 3, LABELS, *[BORDER * (LABELS == 0)] * 2], ""),  # crops beside an object
        ([BORDER, *[BORDER * (LABELS == 0)] * 20], ""),  # a rare class, and a field of view
        ([LABELS, 255 + 0 * LABELS, LABELS], ""),  # an image that nobody has labelled
    ],
)
def test_labels_among_masks_of_0_and_255(
    tmp_path: Path, masks: list[np.ndarray | Image.Image], share: str
) -> None:
    text = problem(opened(tmp_path, masks), tmp_path)
    assert share in text
    assert (text == "") == (share == "")


def test_void_and_missing_classes_that_are_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"void": None, "palette": [[0, 0, 0], [255, 255, 255]]}  # what the error proposes
    meant = opened(tmp_path, [BINARY] * 3, **settings)
    assert problem(meant, tmp_path) == ""
    assert Survey("train", meant.open("train")).pixels[:2].tolist() == [2 * 60, 2 * 20]
    assert problem(opened(tmp_path, [BINARY] * 3, limit=2), tmp_path) == ""
    assert problem(opened(tmp_path, [LABELS] * 3, **THREE), tmp_path) == ""  # no pixel is void
    out = capsys.readouterr().out
    assert "read 2 of 2 masks of train and 1 of 1 masks of val in " in out
    assert out.count("warning: never in train: dog\n") == 2  # by the check, and before training


@pytest.mark.slow
def test_published_data_may_lack_classes_but_not_all(
    own_voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datamodule = SegmentationDataModule(dataset=VOC2012, root=own_voc, num_workers=0)
    datamodule.setup("fit")
    assert problem(datamodule, tmp_path) == ""
    assert "warning: never in train: bicycle, bird" in capsys.readouterr().out
    for path in (own_voc / "VOCdevkit" / "VOC2012" / "SegmentationClass").iterdir():
        write_mask(path, np.array(Image.open(path)).clip(max=1) * np.uint8(255))
    assert "no pixel of aeroplane, bicycle" in problem(datamodule, tmp_path)


GREY_LABELS = LABELS.copy()
GREY_LABELS[0, :2] = 2
SAME = palette_picture(LABELS, VOC_COLOURS)
RED_IS_2 = palette_picture(LABELS * 2, [(0, 0, 0), (9, 9, 9), (128, 0, 0)])
COLOURS: dict[str, Any] = THREE | {"palette": [[255, 255, 255], [255, 0, 0], [0, 0, 0]]}
BLACK_IS_VOID: dict[str, Any] = {"palette": [[255, 255, 255], [255, 0, 0]], "void": [0, 0, 0]}
COLOURED = palette_picture(LABELS, [(255, 255, 255), (255, 0, 0)]).convert("RGB")


@pytest.mark.parametrize(
    ("masks", "settings", "message"),
    [
        # Palettes: the same label in two colours, and the same colour for two labels.
        ([SAME, palette_picture(LABELS, [(0, 0, 0), (0, 128, 0)])], {}, "label 1 is"),
        ([SAME, RED_IS_2], THREE, r"\(128, 0, 0\) is label 2"),
        ([SAME, palette_picture(LABELS, [*VOC_COLOURS[:2], (7, 7, 7)])], {}, ""),  # not used
        ([SAME, RED_IS_2], THREE | {"palette": [[0, 0, 0], [128, 0, 0], [1, 1, 1]]}, ""),
        # One mask saved in grey: labels, a brightness that is no label, and one that is.
        ([SAME, SAME, LABELS], {}, ""),
        ([SAME, SAME, SAME.convert("L")], {}, "found 38"),
        (
            [palette_picture(LABELS, [(0, 0, 0), (255, 255, 255)]), LABELS, BINARY],
            {},
            "p3.png: this",
        ),
        ([Image.fromarray(LABELS == 1), LABELS, BINARY], {}, "brightness"),
        # The palette of a program that makes files smaller: a number for each grey value there is.
        ([palette_picture(LABELS, [(0, 0, 0), (2, 2, 2)]), GREY_LABELS, LABELS], THREE, "palette"),
        ([palette_picture(LABELS, [(0, 0, 0), (99, 99, 99)]), GREY_LABELS, LABELS], THREE, ""),
        ([Image.fromarray(LABELS == 1), GREY_LABELS, LABELS], THREE, ""),
        # Colours of data.dataset.palette, and one mask in grey.
        ([COLOURED, COLOURED, COLOURED.convert("L")], COLOURS, "labels must be|brightness"),
        ([COLOURED, COLOURED, np.full_like(LABELS, 255)], COLOURS, "this mask is grey, but"),
        ([COLOURED, COLOURED, np.zeros_like(LABELS)], COLOURS, "p3.png: this mask is grey, but"),
        ([COLOURED, COLOURED, LABELS], COLOURS, ""),
        ([COLOURED, COLOURED, np.zeros_like(LABELS)], BLACK_IS_VOID, "this mask is grey, but"),
        ([COLOURED, COLOURED, LABELS == 9], BLACK_IS_VOID, "the values 0 of the grey one"),
        # Grey masks, and one in colours.
        ([LABELS, np.zeros_like(LABELS), COLOURED], COLOURS, "p3.png: this mask is coloured, but"),
    ],
)
def test_masks_that_contradict_each_other(
    tmp_path: Path, masks: list[Any], settings: dict[str, Any], message: str
) -> None:
    text = problem(opened(tmp_path, [masks[0], *masks], **settings), tmp_path)
    assert (text == "") == (message == "")
    if message:
        assert any(part in text for part in message.replace("\\", "").split("|"))
        assert text.startswith(str(tmp_path / "masks"))


def test_brightness_of_a_boat(tmp_path: Path) -> None:
    """A VOC mask that was converted to grey: its labels are valid, and mean something else."""
    boat, person = (LABELS * np.uint8(label) for label in BOAT)
    for name, mask in (("p0", person), ("p1", boat), ("p3", boat)):
        (tmp_path / "masks").mkdir(exist_ok=True)
        write_mask(tmp_path / "masks" / f"{name}.png", mask)
    masks = [Image.open(tmp_path / "masks" / f"{name}.png") for name in ("p0", "p1", "p3")]
    grey = masks[1].convert("L")
    assert set(np.unique(np.array(grey))) == {0, BOAT[1]}
    settings = {"classes": [str(k) for k in range(21)], "limit": 9}
    datamodule = opened(tmp_path, [masks[0], masks[1], grey, masks[2]], **settings)
    with pytest.raises(DataError, match=r"p2\.png: this mask is grey, .*p0\.png is coloured"):
        before_training(datamodule)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (LABELS * 7, r"p2\.png: labels must be .* found 7"),
        (LABELS[:, :-1], r"p2\.png: the mask is 9×8, its image 10×8"),
    ],
)
def test_bad_validation_mask(tmp_path: Path, mask: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        before_training(opened(tmp_path, [LABELS, LABELS, mask]))


def test_many_errors_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        before_training(opened(tmp_path, [LABELS * 7] * 9))
    *shown, last = str(error.value).splitlines()
    assert len(shown) == 3
    assert last == "and 6 more errors"  # train.py adds the command of the check


def test_what_there_is_no_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datamodule = opened(tmp_path, [BINARY, BINARY, LABELS * 7])
    monkeypatch.setattr(survey, "SECONDS", -1)
    before_training(datamodule)
    out = capsys.readouterr().out
    assert "read 0 of 2 masks of train and 0 of 1 masks of val in " in out
    assert "never" not in out  # a class is missing only if all masks were read


def test_generated_data_is_not_read_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    dataset = partial(Shapes, size=48, train_length=3, val_length=2)
    datamodule = SegmentationDataModule(dataset=dataset, num_workers=0)
    datamodule.setup("fit")
    before_training(datamodule)
    assert capsys.readouterr().out == ""
    assert Survey("train", datamodule.open("train")).pixels.sum() == 3 * 48 * 48


def test_balanced_weights() -> None:
    pixels = np.array([60, 0, 20, 20])
    weights = balanced_weights(pixels)
    assert weights == pytest.approx([100 / 60 / 3, 1, 100 / 20 / 3, 100 / 20 / 3], abs=1e-6)
    assert np.dot(weights, pixels) / pixels.sum() == pytest.approx(1)
    assert balanced_weights(np.zeros(2)) == [1, 1]


def write_deep(root: Path, values: list[np.ndarray]) -> SegmentationDataModule:
    datamodule = opened(root, [LABELS] * len(values))
    for i, array in enumerate(values):
        (root / "images" / f"p{i}.jpg").unlink()
        write(root / "images", f"p{i}", np.roll(array, i), "tif")
    datamodule.train_data = datamodule.val_data = None
    datamodule.setup("fit")
    return datamodule


RAMP = np.linspace(200, 4000, 80).reshape(8, 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([RAMP.astype(np.uint16)] * 3, r"data.dataset.value_range=\[0,4095\]"),
        ([RAMP.astype(np.float32)] * 3, r"exceed the range from 0 to 1; data.dataset.value_range="),
        ([RAMP.astype(np.uint16) * 16] * 3, None),
        ([(RAMP / 5000).astype(np.float32)] * 3, None),
        ([(RAMP / 100).astype(np.uint8)] * 3, None),  # dark images of 8 bits are not stopped
        ([*[RAMP.astype(np.uint8)] * 2, RAMP.astype(np.uint16) * 16], r"p2\.tif: .* is 16-bit"),
    ],
)
def test_range_of_values(tmp_path: Path, values: list[np.ndarray], message: str | None) -> None:
    datamodule = write_deep(tmp_path, values)
    if message is None:
        assert problem(datamodule, tmp_path) == ""
        return
    assert check(datamodule, tmp_path) >= 1
    with pytest.raises(DataError, match=message):
        before_training(datamodule)


def test_range_is_a_setting_of_the_data(tmp_path: Path) -> None:
    write_deep(tmp_path, [RAMP.astype(np.uint16)] * 3)
    data = Folder(split="all", root=tmp_path, classes=["a", "b"], value_range=[200, 4000])
    image = data[0]["image"]
    assert (image.min(), image.max()) == (0, 255)
    assert Survey("all", data).errors == []


def noise(low: float, high: float, kind: str = "uint16") -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, (8, 10)).astype(kind)


def with_text(values: np.ndarray, share: float, value: float) -> np.ndarray:
    values.ravel()[: round(share * values.size)] = value
    return values


@pytest.mark.parametrize(
    ("values", "proposal"),
    [
        ([noise(0, 4095)] * 9 + [noise(0, 4095) * 16], "[0,4095] spreads"),
        (
            [with_text(noise(0, 4095), 0.05, 65535)] * 3,
            "[0,4095] spreads them from black to white (",
        ),
        ([with_text(noise(0.01, 1, "float32"), 0.0125, -9999)] * 3, "[0,1] spreads"),
    ],
)
def test_values_that_hide_the_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: list[np.ndarray], proposal: str
) -> None:
    """One file of another scale, text of 5 % in the images, no data as -9999: said once."""
    datamodule = write_deep(tmp_path, values)
    capsys.readouterr()
    text = problem(datamodule, tmp_path)
    assert f"data.dataset.value_range={proposal}" in text
    assert len(text.splitlines()) == 1
    assert "errors: 1\n" in capsys.readouterr().out


def test_range_that_clips_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 bits in a PGM: Pillow spreads them over 16, so that no range is needed."""
    datamodule = opened(tmp_path, [LABELS] * 3)
    for i in range(3):
        (tmp_path / "images" / f"p{i}.jpg").unlink()
        head, content = b"P5\n10 8\n4095\n", np.roll(noise(0, 4095), i).astype(">u2")
        (tmp_path / "images" / f"p{i}.pgm").write_bytes(head + content.tobytes())
    for value_range, warnings in ((None, 0), ([0, 4095], 2), ([0, 60000], 0)):
        dataset = partial(Folder, classes=["a", "b"], val="val.txt", value_range=value_range)
        datamodule = SegmentationDataModule(dataset=dataset, root=tmp_path, num_workers=0)
        datamodule.setup("fit")
        assert problem(datamodule, tmp_path) == ""
        out = capsys.readouterr().out
        assert out.count("of the pixels of 3 images lie outside of data.dataset.") == warnings


def save_frames(path: Path) -> None:
    frames = [Image.effect_noise((10, 8), 90) for _ in range(2)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "save", "message"),
    [
        ("p2.jpg", lambda path: Image.new("CMYK", (10, 8)).save(path), "mode CMYK is not read"),
        ("p2.tif", lambda path: Image.new("LAB", (10, 8)).save(path), "mode LAB is not read"),
        ("p2.gif", save_frames, "it has 2 pages"),
        ("p2.png", save_frames, "it has 2 pages"),
    ],
)
def test_bad_validation_image(tmp_path: Path, name: str, save: Any, message: str) -> None:
    """What the reader refuses by the head of a file is refused before training too."""
    opened(tmp_path, [LABELS] * 3)
    (tmp_path / "images" / "p2.jpg").unlink()
    save(tmp_path / "images" / name)
    dataset = partial(Folder, classes=["a", "b"], val="val.txt")
    datamodule = SegmentationDataModule(dataset=dataset, root=tmp_path, num_workers=0)
    datamodule.setup("fit")
    assert f"{name}: cannot read this image: {message}" in problem(datamodule, tmp_path)


@pytest.mark.parametrize(
    ("size", "orientation", "mask_orientation", "turned"),
    [
        ((10, 8), 3, 1, 1),
        ((10, 8), 3, 3, 0),
        ((8, 8), 6, 1, 1),
        ((8, 10), 6, 1, 0),
        ((10, 8), 1, 1, 0),
    ],
)
def test_images_that_exif_turns(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    size: tuple[int, int],
    orientation: int,
    mask_orientation: int,
    turned: int,
) -> None:
    """Of some orientations, the size does not show whether the mask fits what is stored."""
    upright = LABELS[:, : size[0]] if size[0] == size[1] else LABELS
    datamodule = opened(tmp_path, [upright] * 9)
    for i in range(9):
        save(tmp_path / "images" / f"p{i}.jpg", Image.effect_noise(upright.shape[::-1], 90))
    save(tmp_path / "images" / "p5.jpg", Image.effect_noise(size, 90), orientation)
    save(tmp_path / "masks" / "p5.png", Image.fromarray(upright), mask_orientation)
    assert problem(datamodule, tmp_path) == ""
    line = "warning: 1 images are turned by EXIF and their masks are not: look at data_check.png"
    assert capsys.readouterr().out.count(line) == turned
    first = some_samples(Survey("train", datamodule.open("train"), images=True))[0]
    assert (first["id"] == "p5") == bool(turned)
