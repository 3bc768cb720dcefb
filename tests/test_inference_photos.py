"""fcn/inference/photos.py: which photographs are found, which are not, and where results go."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from fcn.datasets.pictures import read_image
from fcn.errors import ConfigError, DataError
from fcn.inference.photos import OWN_RESULT, find_photos, voc_photos
from fcn.inference.predictor import Predictor, save_png


def test_globs(tmp_path: Path) -> None:
    for name in ("a/x.jpg", "a/b/x.jpg", "a/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    output = tmp_path / "out"

    def found(pattern: str) -> set[str]:
        jobs, _ = find_photos(str(tmp_path / pattern), output)
        return {target.relative_to(output).as_posix() for target in jobs.values()}

    assert found("**/*.jpg") == {"a/x", "a/b/x"}
    assert found("a/*") == {"x", "y"}
    assert found("a/*/../../a/*.png") == {"y"}
    assert found("a/b/x.jpg") == {"x"}
    for pattern in ("none.jpg", "*.gif", "**/*.txt"):
        with pytest.raises(ConfigError, match="no image there"):
            found(pattern)
    with pytest.raises(ConfigError, match="overwrite"):
        find_photos(str(tmp_path / "a" / "y.png"), tmp_path / "a")


def test_files_of_the_user_are_not_overwritten(tmp_path: Path) -> None:
    """Such as a label beside its photograph. An earlier result is."""
    pytest.importorskip("av")
    for name in ("x.jpg", "y.mp4", "z.jpg"):
        (tmp_path / name).touch()
    save_png(Image.new("L", (3, 2)), tmp_path / "z.png")
    for photo, taken in (("x.jpg", "x.png"), ("x.jpg", "x_overlay.jpg"), ("y.mp4", "y_legend.png")):
        find_photos(str(tmp_path / photo), tmp_path)
        Image.new("L", (3, 2)).save(tmp_path / taken)
        with pytest.raises(ConfigError, match=rf"^output=.*{photo} would .*{taken}, which has not"):
            find_photos(str(tmp_path / photo), tmp_path)
        (tmp_path / taken).unlink()
    assert find_photos(str(tmp_path / "z.jpg"), tmp_path)[0] == {tmp_path / "z.jpg": tmp_path / "z"}


def test_the_legend_of_a_video_is_no_mask(tmp_path: Path) -> None:
    pytest.importorskip("av")
    for name in ("street.mp4", "street_LEGEND.jpg", "a.jpg", "a_legend.jpg"):
        (tmp_path / name).touch()
    jobs, _ = find_photos(str(tmp_path), tmp_path / "out")
    targets = {target.name for target in jobs.values()}
    assert targets == {"street.mp4", "street_LEGEND.jpg", "a", "a_legend"}


@pytest.mark.parametrize("pattern", ["photos", "photos/*.png"])
def test_results_above_the_photographs(tmp_path: Path, pattern: str) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "x.png").touch()
    save_png(Image.new("L", (3, 2)), photos / "y.png")
    jobs, left_out = find_photos(str(tmp_path / pattern), tmp_path)
    assert (jobs, left_out) == ({photos / "x.png": tmp_path / "x"}, {photos / "y.png": OWN_RESULT})


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
def test_links_and_pipes(tmp_path: Path) -> None:
    """A picture is taken once, where links lead in a circle, and nobody waits for a pipe."""
    photos = tmp_path / "photos"
    (photos / "a").mkdir(parents=True)
    for name in ("x.jpg", "a/x.jpg"):
        (photos / name).touch()
    (photos / "a" / "self").symlink_to("..")
    (photos / "lost.jpg").symlink_to("nothing")
    (photos / "same.jpg").symlink_to("x.jpg")
    os.mkfifo(photos / "pipe.png")
    jobs, left_out = find_photos(str(photos), tmp_path / "out")
    names = ["a/x.jpg", "lost.jpg", "same.jpg", "x.jpg"]
    assert [path.relative_to(photos).as_posix() for path in jobs] == names
    assert left_out == {photos / "pipe.png": "it is a pipe or a device, not a file"}
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "x.png")
    with pytest.raises(ConfigError, match=r"x\.png, which has not the mark"):
        find_photos(str(photos / "x.jpg"), tmp_path / "out")
    with pytest.raises(
        DataError, match=r"pipe\.png: cannot read this image: it is a folder, a pipe"
    ):
        read_image(photos / "pipe.png")  # as data=folder does, too


def test_longest_side_of_an_overlay(tmp_path: Path) -> None:
    """The mask keeps its size, and the overlay has what a JPEG can have."""
    image = torch.zeros(3, 66_000, 2, dtype=torch.uint8)
    predictor = Predictor(scores=lambda image: image, class_names=["a"], palette=[(0, 0, 0)])
    predictor.write_results(image, image[0], tmp_path / "x")
    with Image.open(tmp_path / "x.png") as mask, Image.open(tmp_path / "x_overlay.jpg") as overlay:
        assert (mask.height, overlay.height) == (66_000, 65_500)


@pytest.mark.parametrize(
    ("split", "comp", "message"),
    [
        ("../x", "comp5", r"split=\.\./x: must be the name of a list"),
        (" ", "comp5", "split= : must be null or the name of a list"),
        ("val", "comp7", "comp=comp7: must be one of comp5, comp6"),
    ],
)
def test_voc_settings_that_cannot_work(tmp_path: Path, split: str, comp: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        voc_photos(tmp_path, split, comp, tmp_path)
