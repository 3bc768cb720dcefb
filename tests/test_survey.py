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

from fcn.datamodule import SegmentationDataModule as Data
from fcn.datasets import check, survey
from fcn.datasets.check import some_samples
from fcn.datasets.folder import Folder
from fcn.datasets.shapes import Shapes
from fcn.datasets.survey import Survey, balanced_weights, before_training
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import DataError

Capsys, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
LABELS = np.zeros((8, 10), np.uint8)
LABELS[2:6, 3:8] = 1  # a quarter of all pixels
BINARY = LABELS * 255
BORDER = LABELS.copy()
BORDER[1, 3:8] = 255
THREE: dict[str, Any] = {"classes": ["ground", "cat", "dog"]}


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: Patch) -> None:
    """The picture of the check takes longer than all the rest; test_check.py looks at it."""
    monkeypatch.setattr(check, "draw", lambda samples, data: Image.new("L", (1, 1)))


def palette_picture(labels: np.ndarray, colours: Any) -> Image.Image:
    picture = Image.fromarray(labels)
    picture.putpalette([channel for colour in colours for channel in colour])
    return picture


def opened(root: Path, masks: list[Any], *, images: Any = (), **settings: Any) -> Data:
    """A data module on these masks, of which the last is validated on."""
    for i, mask in enumerate(masks):
        write(root / "masks", f"p{i}", mask)
        image = images[i] if images else Image.effect_noise((10, 8), 90)
        write(root / "images", f"p{i}", image, "tif" if images else "jpg")
    (root / "val.txt").write_text(f"p{len(masks) - 1}\n")
    limit = settings.pop("limit", None)
    dataset = partial(Folder, **{"classes": ["ground", "cat"], "val": "val.txt"} | settings)
    datamodule = Data(dataset=dataset, root=root, num_workers=0, limit=limit)
    datamodule.setup("fit")
    return datamodule


def judged(datamodule: Data, output: Path) -> str:
    """What stops training, after the same has stopped the check; empty if nothing does."""
    errors = check.check(datamodule, output)
    try:
        before_training(datamodule)
    except DataError as error:
        assert errors
        return str(error)
    assert not errors
    return ""


def problem(root: Path, masks: list[Any], **settings: Any) -> str:
    return judged(opened(root, masks, **settings), root)


VOID_MISTAKES: list[Any] = [
    (BINARY, {}, "cat"),
    (np.where(LABELS == 1, LABELS, 255), {}, "ground"),
    (BINARY, THREE, "cat, dog"),
    (np.where(LABELS == 0, 7, LABELS), THREE | {"void": 7}, "ground, dog"),
    (BINARY, {"palette": [[0, 0, 0], [9, 9, 9]], "void": [255, 255, 255]}, "cat"),
]


@pytest.mark.parametrize(("mask", "settings", "missing"), VOID_MISTAKES)
def test_a_class_taken_for_void(tmp_path: Path, mask: Any, settings: Any, missing: str) -> None:
    text = problem(tmp_path, [mask] * 3, **settings)
    assert f"no pixel of {missing} in the 2 training masks" in text
    assert 'data.dataset.void=null "data.dataset.palette=[[0,0,0],[255,255,255]]"' in text
    assert "add data.limit=2 (all images)" in text
    assert len(text.splitlines()) == 1


def test_a_missing_class_beside_void_at_borders(tmp_path: Path) -> None:
    text = problem(tmp_path, [BORDER] * 3, **THREE)
    assert "no pixel of dog in the 2 training masks" in text
    assert "into the training list, or remove it from data.dataset.classes. If" in text
    assert "data.dataset.void" not in text


MIXTURES: list[Any] = [
    ([LABELS, *[BINARY] * 4], "4 of 5 masks hold only ground and void"),
    ([*[LABELS] * 4, BINARY], "1 of 5 masks hold only ground and void"),  # the validation mask
    ([*[BORDER] * 3, LABELS, *[BORDER * (LABELS == 0)] * 2], ""),  # crops beside an object
    ([BORDER, *[BORDER * (LABELS == 0)] * 20], ""),  # a rare class, and a field of view
    ([LABELS, 255 + 0 * LABELS, LABELS], ""),  # an image that nobody has labelled
]


@pytest.mark.parametrize(("masks", "share"), MIXTURES)
def test_labels_among_masks_of_0_and_255(tmp_path: Path, masks: list[Any], share: str) -> None:
    text = problem(tmp_path, masks)
    assert share in text
    assert (text == "") == (share == "")


def test_void_and_missing_classes_that_are_meant(tmp_path: Path, capsys: Capsys) -> None:
    settings = {"void": None, "palette": [[0, 0, 0], [255, 255, 255]]}  # what the error proposes
    meant = opened(tmp_path, [BINARY] * 3, **settings)
    assert judged(meant, tmp_path) == ""
    assert Survey("train", meant.open("train")).pixels[:2].tolist() == [2 * 60, 2 * 20]
    assert problem(tmp_path, [BINARY] * 3, limit=2) == ""
    assert problem(tmp_path, [LABELS] * 3, **THREE) == ""  # no pixel is void
    out = capsys.readouterr().out
    assert "read 2 of 2 masks of train and 1 of 1 masks of val in " in out
    assert out.count("warning: never in train: dog\n") == 2  # by the check, and before training


def test_published_data_may_lack_classes(own_voc: Path, tmp_path: Path, capsys: Capsys) -> None:
    datamodule = Data(dataset=VOC2012, root=own_voc, num_workers=0)
    datamodule.setup("fit")
    assert judged(datamodule, tmp_path) == ""
    assert "warning: never in train: bicycle, bird" in capsys.readouterr().out
    for path in (own_voc / "VOCdevkit" / "VOC2012" / "SegmentationClass").iterdir():
        write_mask(path, np.array(Image.open(path)).clip(max=1) * np.uint8(255))
    assert "no pixel of aeroplane, bicycle" in judged(datamodule, tmp_path)


GREY_LABELS = LABELS.copy()
GREY_LABELS[0, :2] = 2
SAME = palette_picture(LABELS, VOC2012.palette[:3])
RED_IS_2 = palette_picture(LABELS * 2, [(0, 0, 0), (9, 9, 9), VOC2012.palette[1]])
COLOURS = THREE | {"palette": [[255, 255, 255], [255, 0, 0], [0, 0, 0]]}
BLACK_IS_VOID: dict[str, Any] = {"palette": [[255, 255, 255], [255, 0, 0]], "void": [0, 0, 0]}
COLOURED = palette_picture(LABELS, [(255, 255, 255), (255, 0, 0)]).convert("RGB")
BOAT, PERSON = (palette_picture(LABELS * np.uint8(k), VOC2012.palette) for k in (4, 15))
VOC: dict[str, Any] = {"classes": [str(k) for k in range(21)], "limit": 9}
IS_GREY = "p3.png: this mask is grey, but"


CONTRADICTIONS: list[Any] = [
    # Palettes: the same label in two colours, and the same colour for two labels.
    ([SAME, palette_picture(LABELS, [(0, 0, 0), (0, 128, 0)])], {}, "label 1 is"),
    ([SAME, RED_IS_2], THREE, "(128, 0, 0) is label 2"),
    ([SAME, palette_picture(LABELS, [*VOC2012.palette[:2], (7, 7, 7)])], {}, ""),  # not used
    # One mask saved in grey, with a brightness that is a label.
    ([Image.fromarray(LABELS == 1), LABELS, BINARY], {}, IS_GREY),
    ([PERSON, BOAT, BOAT.convert("L")], VOC, IS_GREY),  # the brightness of a boat is 15
    # The palette of a program that makes files smaller: a number for each grey value there is.
    ([palette_picture(LABELS, [(0, 0, 0), (2, 2, 2)]), GREY_LABELS, LABELS], THREE, "palette"),
    ([palette_picture(LABELS, [(0, 0, 0), (99, 99, 99)]), GREY_LABELS, LABELS], THREE, ""),
    ([Image.fromarray(LABELS == 1), BORDER, BORDER], {}, "by a palette, or because it has 1 bit"),
    # Colours of data.dataset.palette, and one mask in grey; or the other way round.
    ([COLOURED, COLOURED, np.full_like(LABELS, 255)], COLOURS, IS_GREY),
    ([COLOURED, COLOURED, LABELS], COLOURS, ""),
    ([COLOURED, COLOURED, LABELS == 9], BLACK_IS_VOID, "the values 0 of the grey one"),
    ([LABELS, np.zeros_like(LABELS), COLOURED], COLOURS, "p3.png: this mask is coloured, but"),
]


@pytest.mark.parametrize(("masks", "settings", "message"), CONTRADICTIONS)
def test_contradicting_masks(tmp_path: Path, masks: Any, settings: Any, message: str) -> None:
    text = problem(tmp_path, [masks[0], *masks], **settings)
    assert message in text
    assert text.startswith(str(tmp_path / "masks")) == (message != "")


BAD_PAIRS: list[Any] = [
    ("masks/p2.png", LABELS * 7, "p2.png: labels must be 0 to 1 or 255 (void), found 7"),
    ("masks/p2.png", LABELS[:, :-1], "p2.png: the mask is 9×8, its image 10×8"),
    # What the reader refuses by the head of a file is refused before training too.
    ("images/p2.jpg", None, "p2.jpg: cannot read this image: mode CMYK is not read"),
]


@pytest.mark.parametrize(("name", "picture", "message"), BAD_PAIRS)
def test_bad_validation_pair(tmp_path: Path, name: str, picture: Any, message: str) -> None:
    datamodule = opened(tmp_path, [LABELS] * 3)
    cmyk = Image.new("CMYK", (10, 8))
    (cmyk if picture is None else Image.fromarray(picture)).save(tmp_path / name)
    assert message in judged(datamodule, tmp_path)


def test_many_errors_are_counted(tmp_path: Path, monkeypatch: Patch, capsys: Capsys) -> None:
    monkeypatch.setattr(check, "SHOWN", 2)
    lines = problem(tmp_path, [LABELS * 7] * 9).splitlines()
    assert len(lines) == 3 + 1
    assert lines[-1] == "and 6 more errors"  # train.py adds the command of the check
    out = capsys.readouterr().out
    assert out.count("error: ") == 2
    assert "… and 7 more\nerrors: 9\n" in out


def test_what_there_is_no_time_for(tmp_path: Path, monkeypatch: Patch, capsys: Capsys) -> None:
    monkeypatch.setattr(survey, "SECONDS", -1)
    before_training(opened(tmp_path, [BINARY, BINARY, LABELS * 7]))
    out = capsys.readouterr().out
    assert "read 0 of 2 masks of train and 0 of 1 masks of val in " in out
    assert "never" not in out  # a class is missing only if all masks were read


def test_generated_data_is_not_read_before_training(capsys: Capsys) -> None:
    dataset = partial(Shapes, size=48, train_length=3, val_length=2)
    datamodule = Data(dataset=dataset, num_workers=0)
    datamodule.setup("fit")
    before_training(datamodule)
    assert capsys.readouterr().out == ""
    assert Survey("train", datamodule.open("train")).pixels.sum() == 3 * 48 * 48


def test_no_weights_of_classes_without_the_training_masks(
    tiny_voc: Path, tmp_path: Path, capsys: Capsys
) -> None:
    for split, number in (("none", 0), ("train", 1)):
        check.check(Data(dataset=VOC2012, root=tiny_voc, train_split=split), tmp_path)
        out = capsys.readouterr().out
        assert "val: 4 pairs, 4 good" in out
        assert out.count("model.class_weights=balanced would be") == number


def test_balanced_weights() -> None:
    pixels = np.array([60, 0, 20, 20])
    weights = balanced_weights(pixels)
    assert weights == pytest.approx([100 / 60 / 3, 1, 100 / 20 / 3, 100 / 20 / 3], abs=1e-6)
    assert np.dot(weights, pixels) / pixels.sum() == pytest.approx(1)
    assert balanced_weights(np.zeros(2)) == [1, 1]


def noise(low: float, high: float, kind: str = "uint16") -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, (8, 10)).astype(kind)


def with_text(values: np.ndarray, share: float, value: float) -> np.ndarray:
    values.ravel()[: round(share * values.size)] = value
    return values


def deep(root: Path, values: list[np.ndarray], **settings: Any) -> Data:
    images = [np.roll(array, i) for i, array in enumerate(values)]  # all are different pictures
    return opened(root, [LABELS] * len(values), images=images, **settings)


VALUES: list[Any] = [
    ([noise(0, 40, "uint8")] * 3, ""),  # dark images of 8 bits are not stopped
    # One file of another scale, text of 5 % in the images, and no data as -9999.
    ([noise(0, 4095)] * 9 + [noise(0, 4095) * 16], "data.dataset.value_range=[0,4095] spreads"),
    ([with_text(noise(0, 4095), 0.05, 65535)] * 3, "spreads them from black to white ("),
    ([with_text(noise(0.01, 1, "float32"), 0.0125, -9999)] * 3, "value_range=[0,1] spreads"),
]


@pytest.mark.parametrize(("values", "message"), VALUES)
def test_range_of_values(tmp_path: Path, capsys: Capsys, values: list[Any], message: str) -> None:
    """What is wrong is said once, and not for each image."""
    text = judged(deep(tmp_path, values), tmp_path)
    assert message in text
    assert len(text.splitlines()) == bool(message)
    assert ("errors: 1\n" if message else "no errors\n") in capsys.readouterr().out


def test_range_that_clips_much(tmp_path: Path, capsys: Capsys) -> None:
    for value_range, warnings in ((None, 0), ([0, 4095], 2), ([0, 60000], 0)):
        datamodule = deep(tmp_path, [noise(0, 4095) * 16] * 3, value_range=value_range)
        assert judged(datamodule, tmp_path) == ""
        out = capsys.readouterr().out
        assert out.count("of the pixels of 3 images lie outside of data.dataset.") == warnings
    ramp = np.linspace(200, 4000, 80).reshape(8, 10).astype(np.uint16)
    image = deep(tmp_path, [ramp] * 2, value_range=[200, 4000]).open("train")[0]["image"]
    assert (image.min(), image.max()) == (0, 255)


@pytest.mark.parametrize(
    ("size", "turns", "turned"),
    [((10, 8), (3, 1), 1), ((10, 8), (3, 3), 0), ((8, 8), (6, 1), 1), ((8, 10), (6, 1), 0)],
)
def test_images_that_exif_turns(
    tmp_path: Path, capsys: Capsys, size: tuple[int, int], turns: tuple[int, int], turned: int
) -> None:
    """Of some orientations of image and mask, the size does not show whether both are turned."""
    upright = LABELS[:, : size[0]] if size[0] == size[1] else LABELS
    datamodule = opened(tmp_path, [upright] * 9)
    for i in range(9):
        write(tmp_path / "images", f"p{i}", Image.effect_noise(upright.shape[::-1], 90), "jpg")
    save(tmp_path / "images" / "p5.jpg", Image.effect_noise(size, 90), turns[0])
    save(tmp_path / "masks" / "p5.png", Image.fromarray(upright), turns[1])
    assert judged(datamodule, tmp_path) == ""
    line = "warning: 1 images are turned by EXIF and their masks are not: look at data_check.png"
    assert capsys.readouterr().out.count(line) == turned
    first = some_samples(Survey("train", datamodule.open("train"), images=True))[0]
    assert (first["id"] == "p5") == bool(turned)
