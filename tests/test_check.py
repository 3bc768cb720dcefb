"""The data check: what it prints, draws and exits with, on good and on damaged data."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_VOC, write_mask
from PIL import Image

from fcn.datasets import check
from fcn.datasets.check import main
from fcn.datasets.reading import check_disjoint
from fcn.datasets.survey import balanced_weights
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import DataError
from fcn.figures.masks import VOID_COLOUR

IDS = list(TINY_VOC)
Capsys = pytest.CaptureFixture[str]


def run(capsys: Capsys, root: Path, *more: str, status: int = 0) -> tuple[str, list[str]]:
    """What was printed, and the errors in it."""
    arguments = ["data=voc2012", f"data.root={root}", f"output={root / 'out'}", *more]
    code = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == status
    captured = capsys.readouterr()
    text = captured.out + captured.err.replace("\r", "\n")
    return text, [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_good_data(own_voc: Path, capsys: Capsys) -> None:
    text, errors = run(capsys, own_voc)
    assert not errors
    assert text.splitlines()[-1] == "no errors"
    assert "train: 6 pairs, 6 good" in text
    assert "50 to 96 wide, 37 to 96 high" in text
    assert "96×64 (1)" in text
    plane = next(line for line in text.splitlines() if " aeroplane " in line).split()
    assert (plane[0], plane[4], plane[7]) == ("1", "1", "1")  # one image in train and one in val
    assert "warning: never in val: bicycle, bird" in text
    rows = text.partition("label class")[2].splitlines()[1:23]  # 21 classes and void
    pixels = [int(row.split()[2].replace(",", "")) for row in rows]
    balanced = ", ".join(f"{weight:.4g}" for weight in balanced_weights(np.array(pixels[:21])))
    assert f"model.class_weights=balanced would be [{balanced}]" in text
    assert sum(pixels) == sum(w * h for w, h, _, _ in list(TINY_VOC.values())[:6])
    with Image.open(own_voc / "out" / "data_check.png") as picture:
        assert picture.width == 940  # three columns of 300, and the gaps
        colours = {colour for _, colour in picture.getcolors(2**24)}
        assert len(colours) > 1000
        assert {VOC2012.palette[1], VOID_COLOUR} <= colours  # in the legend: aeroplane and void
        assert VOC2012.palette[2] not in colours  # bicycle, which is in no mask


def test_every_kind_of_error(own_voc: Path, capsys: Capsys) -> None:
    voc = own_voc / "VOCdevkit" / "VOC2012"
    (voc / "SegmentationClass" / f"{IDS[0]}.png").unlink()
    (voc / "JPEGImages" / f"{IDS[1]}.jpg").write_bytes(b"junk")
    write_mask(voc / "SegmentationClass" / f"{IDS[2]}.png", np.full((80, 80), 77, np.uint8))
    write_mask(voc / "SegmentationClass" / f"{IDS[3]}.png", np.zeros((5, 6), np.uint8))
    with Image.open(voc / "JPEGImages" / f"{IDS[4]}.jpg") as picture:  # other bytes, equal pixels
        picture.save(voc / "JPEGImages" / "copy.png")
    (voc / "JPEGImages" / "copy.png").rename(voc / "JPEGImages" / f"{IDS[6]}.jpg")
    write_mask(voc / "SegmentationClass" / f"{IDS[6]}.png", np.zeros((72, 96), np.uint8))
    with (voc / "ImageSets" / "Segmentation" / "val.txt").open("a") as file:
        file.write(f"{IDS[5]}\n")
    text, errors = run(capsys, own_voc, status=1)
    missing, broken, unknown, sizes, overlap, twin = errors
    assert f"{IDS[0]}.png: cannot read this mask: No such file" in missing
    assert f"{IDS[1]}.jpg: cannot read this image" in broken
    assert f"{IDS[2]}.png: labels must be" in unknown
    assert "found 77" in unknown
    assert f"{IDS[3]}.png: the mask is 6×5" in sizes
    assert f"1 of 5 evaluation images are trained on too: {IDS[5]}" in overlap
    assert f"{IDS[4]} of train and {IDS[6]} of val are the same picture" in twin
    assert "train: 6 pairs, 2 good, 2 missing or broken, 1 with unknown labels, 1 of two" in text
    assert text.splitlines()[-1] == "errors: 6"
    assert (own_voc / "out" / "data_check.png").is_file()


NOTHING = [
    ("data.limit=1", "VOC2012 not found"),
    ("--data.limit=1", "--data.limit=1: a setting has no hyphens in front"),
    ("data=folder", "data.dataset.classes=null: must be"),
]


@pytest.mark.parametrize(("setting", "message"), NOTHING)
def test_nothing_to_read(tmp_path: Path, capsys: Capsys, setting: str, message: str) -> None:
    _, (error,) = run(capsys, tmp_path, setting, status=1)
    assert message in error
    assert list(tmp_path.iterdir()) == []  # downloads nothing, though voc2012 would


def test_disjoint() -> None:
    check_disjoint(["a", "b"], ["c"])
    with pytest.raises(DataError, match=r"4 of 5 .*too: a, b, c, …\."):
        check_disjoint(["d", "c", "b", "a"], ["a", "b", "c", "d", "e"])


def test_help(capsys: Capsys) -> None:
    main(["--help"])
    assert "data=folder" in capsys.readouterr().out


def test_a_wrong_path_is_a_line(capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        check.main(["output='it's'", "data=shapes"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: output='it's': this does not read")


def test_as_a_command(
    own_voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    root, output = tmp_path / "ro,o't", tmp_path / "a, b (ä)"  # Hydra's grammar would read these
    own_voc.rename(root)
    data = ["data=voc2012", f"data.root={root}", "data.val_split=train", "data.limit=2"]
    monkeypatch.setattr(sys, "argv", ["check", *data, f"output='{output}'", "resume=a=b"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(check.__file__, run_name="__main__")
    assert stop.value.code == 1
    assert "2 of 2 evaluation images are trained on too" in capsys.readouterr().out
    assert (output / "data_check.png").is_file()
