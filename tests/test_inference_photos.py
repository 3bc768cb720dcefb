"""fcn/inference/photos.py: which photographs are found, which are not, and where results go."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fcn.datasets.pictures import read_image
from fcn.errors import ConfigError, DataError
from fcn.inference.photos import OWN_RESULT, find_photos, voc_photos
from fcn.inference.predictor import Predictor, save_png

PICTURE = Image.new("L", (3, 2))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_targets(tmp_path: Path) -> None:
    """Sub-folders are kept. The legend of a video is not named as the mask of a photograph is."""
    pytest.importorskip("av")
    touch(tmp_path, "a/x.jpg", "a/b/x.jpg", "a/y.png")
    touch(tmp_path, "v/street.mp4", "v/street_LEGEND.jpg", "v/a.jpg", "v/a_legend.jpg")
    output = tmp_path / "out"
    for pattern, expected in (
        ("**/x.jpg", {"a/x", "a/b/x"}),
        ("a/*", {"x", "y"}),
        ("a/*/../../a/*.png", {"y"}),
        ("a/b/x.jpg", {"x"}),
        ("v", {"street.mp4", "street_LEGEND.jpg", "a", "a_legend"}),
    ):
        jobs, _ = find_photos(str(tmp_path / pattern), output)
        assert {target.relative_to(output).as_posix() for target in jobs.values()} == expected
    for pattern in ("none.jpg", "*.gif", "**/*.txt"):
        with pytest.raises(ConfigError, match="no image there"):
            find_photos(str(tmp_path / pattern), output)


def test_files_of_the_user_are_not_overwritten(tmp_path: Path) -> None:
    """Such as a label beside its photograph. An earlier result is."""
    pytest.importorskip("av")
    touch(tmp_path, "x.jpg", "y.mp4", "z.png")
    for photo, taken in (("x.jpg", "x.png"), ("x.jpg", "x_overlay.jpg"), ("y.mp4", "y_legend.png")):
        save_png(PICTURE, tmp_path / taken)
        find_photos(str(tmp_path / photo), tmp_path)
        PICTURE.save(tmp_path / taken)
        with pytest.raises(ConfigError, match=rf"^output=.*{photo} would .*{taken}, which was not"):
            find_photos(str(tmp_path / photo), tmp_path)
        (tmp_path / taken).unlink()
    with pytest.raises(ConfigError, match=r"would overwrite .*z\.png, which is a photograph"):
        find_photos(str(tmp_path / "z.png"), tmp_path)


def test_results_above_the_photographs(tmp_path: Path) -> None:
    photo, result = tmp_path / "photos" / "x.png", tmp_path / "photos" / "y.png"
    touch(tmp_path, "photos/x.png")
    save_png(PICTURE, result)
    for pattern in ("photos", "photos/*.png"):
        found = find_photos(str(tmp_path / pattern), tmp_path)
        assert found == ({photo: tmp_path / "x"}, {result: OWN_RESULT})


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
def test_links_and_pipes(tmp_path: Path) -> None:
    """A picture is taken once, where links lead in a circle, and nobody waits for a pipe."""
    photos, pipe = tmp_path / "photos", tmp_path / "photos" / "pipe.png"
    touch(tmp_path, "photos/x.jpg", "photos/a/x.jpg", "out/notes.txt")
    (photos / "a" / "self").symlink_to("..")
    (photos / "lost.jpg").symlink_to("nothing")
    (photos / "same.jpg").symlink_to("x.jpg")
    os.mkfifo(pipe)
    jobs, left_out = find_photos(str(photos), tmp_path / "out")
    names = ["a/x.jpg", "lost.jpg", "same.jpg", "x.jpg"]
    assert [path.relative_to(photos).as_posix() for path in jobs] == names
    assert left_out == {pipe: "it is a pipe or a device, not a file"}
    os.mkfifo(tmp_path / "out" / "x.png")
    with pytest.raises(ConfigError, match=r"x\.png, which was not written by predict"):
        find_photos(str(photos / "x.jpg"), tmp_path / "out")
    with pytest.raises(DataError, match=r"pipe\.png: .* this image: it is a folder, a pipe"):
        read_image(pipe)  # as data=folder does, too


def test_a_closed_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A glob passes over it. The user that runs tests may be allowed everything."""
    photos, closed = tmp_path / "photos", tmp_path / "photos" / "closed"
    others = [photos / ".hidden", photos / "out"]
    for folder in (closed, *others):
        folder.mkdir(parents=True)
    shut, access = {closed, *others}, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path not in shut and access(path, mode))
    with pytest.raises(ConfigError, match=r"no image there.*\n.*1\n  .*closed: .*permission"):
        find_photos(str(photos), photos / "out")
    touch(photos, "a.jpg")
    jobs, left_out = find_photos(str(photos), photos / "out")
    assert [*left_out] == [closed]
    assert len(jobs) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows drops `link/..` from a path by itself")
def test_the_folder_above_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one that the system finds, above what the link leads to."""
    here, other = tmp_path / "here", tmp_path / "other"
    touch(tmp_path, "here/x.jpg", "other/x.jpg", "other/deep/y.jpg")
    (here / "link").symlink_to(other / "deep")
    monkeypatch.chdir(here)
    for pattern, expected in (
        ("link/../x.jpg", {other / "x.jpg": here / "out" / "x"}),
        ("link/../*.jpg", {other / "x.jpg": here / "out" / "x"}),
        ("*/../x.jpg", {other / "x.jpg": here / "out" / "other" / "x"}),
        ("link/../deep", {other / "deep/y.jpg": here / "out" / "y"}),
        ("../here/link", {here / "link/y.jpg": here / "out" / "y"}),  # the user's name of it
    ):
        assert find_photos(pattern, Path("out"))[0] == expected, pattern
    jobs, _ = find_photos("x.jpg", Path("link/../out"))
    assert jobs == {here / "x.jpg": other / "out" / "x"}


def test_longest_side_of_an_overlay(tmp_path: Path) -> None:
    """The mask keeps its size, and the overlay has what a JPEG can have."""
    image = torch.zeros(3, 66_000, 2, dtype=torch.uint8)
    predictor = Predictor(scores=lambda image: image, class_names=["a"], palette=[(0, 0, 0)])
    predictor.write_results(image, image[0], tmp_path / "x")
    with Image.open(tmp_path / "x.png") as mask, Image.open(tmp_path / "x_overlay.jpg") as overlay:
        assert (mask.height, overlay.height) == (66_000, 65_500)


def test_legend_of_a_line_scan(tmp_path: Path) -> None:
    """Its letters follow the height too: they would be 400 pixels high."""
    image = torch.zeros(3, 3, 20_000, dtype=torch.uint8)
    predictor = Predictor(scores=lambda image: image, class_names=["a"], palette=[(0, 0, 0)])
    predictor.write_results(image, image[0], tmp_path / "x")
    with Image.open(tmp_path / "x_overlay.jpg") as overlay:
        assert overlay.height < 60


def test_photos_of_voc(own_voc: Path, tmp_path: Path) -> None:
    folder, results = own_voc / "VOCdevkit/VOC2012", tmp_path / "results/VOC2012/Segmentation"
    lists = folder / "ImageSets/Segmentation"

    def targets(comp: str, split: str | None = None) -> list[str]:
        jobs = voc_photos(own_voc, split, comp, tmp_path)
        return [path.relative_to(results).as_posix() for path in jobs.values()]

    names = (lists / "val.txt").read_text(encoding="utf-8").split()
    assert targets("comp5") == [f"comp5_val_cls/{name}" for name in names]
    shutil.rmtree(folder / "SegmentationClass")  # of the test images, nobody has masks
    (lists / "test.txt").write_text("2007_000032\n", encoding="utf-8")
    mask = results / "comp6_test_cls/2007_000032.png"
    mask.parent.mkdir(parents=True)
    save_png(PICTURE, mask)  # results of an earlier run are replaced
    assert targets("comp6") == ["comp6_test_cls/2007_000032"]
    PICTURE.save(mask)  # another program's are not
    for comp, split, message in (
        ("comp6", None, r"would overwrite .*test_cls.*, which was not written by predict"),
        ("comp5", "../x", r"split=\.\./x: must be the name of a list"),
        ("comp5", " ", "split= : must be null or the name of a list"),
        ("comp7", "val", "comp=comp7: must be one of comp5, comp6"),
    ):
        with pytest.raises(ConfigError, match=message):
            targets(comp, split)
