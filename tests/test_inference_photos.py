"""fcn/inference/photos.py: which photographs are found, how they are read, where results go."""

from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from test_predict import noise

from fcn.errors import ConfigError
from fcn.inference.photos import find_photos, read_photo, voc_photos


def test_globs(tmp_path: Path) -> None:
    for name in ("a/x.jpg", "a/b/x.jpg", "a/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    output = tmp_path / "out"

    def found(pattern: str) -> set[str]:
        jobs = find_photos(str(tmp_path / pattern), output)
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


def test_readers(tmp_path: Path) -> None:
    pixels = noise(20, 30)
    expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    photo = Image.fromarray(pixels)
    for name in ("x.png", "x.bmp", "x.tif", "x.ppm"):
        photo.save(tmp_path / name)
        assert torch.equal(read_photo(tmp_path / name), expected)
    photo.convert("RGBA").save(tmp_path / "opaque.png")
    assert torch.equal(read_photo(tmp_path / "opaque.png"), expected)
    Image.new("RGBA", (3, 2), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert read_photo(tmp_path / "clear.png").unique().tolist() == [255]

    grey = pixels[..., 0].copy()
    for name, values in {
        "l.png": grey,
        "i16.png": grey.astype(np.uint16) * 257,
        "i16.tif": grey.astype(np.uint16) * 256,
        "i32.tif": grey.astype(np.int32) * 257,
        "f.tif": grey.astype(np.float32) / 255,
    }.items():
        Image.fromarray(values).save(tmp_path / name)
        assert torch.equal(read_photo(tmp_path / name), torch.from_numpy(grey).expand(3, 20, 30))
    modes = ["P", "1", "CMYK", "LA"]
    if int(PIL.__version__.partition(".")[0]) >= 13:  # older ones cannot read what they wrote
        modes.append("YCbCr")
    for mode in modes:
        file = tmp_path / f"{mode}.tif"
        photo.convert(mode).save(file)
        assert read_photo(file).shape == (3, 20, 30)

    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side
    photo.save(tmp_path / "turned.png", exif=turned)
    assert torch.equal(read_photo(tmp_path / "turned.png"), expected.flip(1).transpose(1, 2))
    assert torch.equal(read_photo(tmp_path / "turned.png", upright=False), expected)
