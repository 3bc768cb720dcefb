"""Photographs on disk: finding them, reading them, and where the results of each go.

    jobs = find_photos("photos/**/*.jpg", Path("predictions"))       # {photograph: target}
    jobs = voc_photos("/data", None, "comp5", Path("predictions"))   # for VOC's evaluation server
    image = read_photo(Path("photo.jpg"))                            # (3, H, W) uint8

A target is the path of a result without its ending: `mask_path` and `overlay_path` complete it.
"""

import os
import warnings
from collections import Counter
from glob import escape, glob, has_magic
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fcn.datasets.reading import check_exist, is_picture, open_picture, read_ids
from fcn.datasets.voc2012 import ARCHIVE, list_path
from fcn.errors import ConfigError, check_choice, check_text, reason, refuse
from fcn.runs.folder import output_folder

Jobs = dict[Path, Path]  # photographs, and the target of each


def results_folder(output: str | None, checkpoint: Path) -> Path:
    """The folder for results: `output`, or predictions/ in the run that a checkpoint is of."""
    check_text("output", output, wanted="a folder", optional=True)
    return Path(output).expanduser() if output else output_folder(checkpoint, "predictions")


def create_folder(folder: Path) -> None:
    """Create the folder for results if it does not exist.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={folder}: {reason(error)}") from error


def mask_path(target: Path) -> Path:
    """Where the mask of a photograph goes."""
    return target.with_name(f"{target.name}.png")


def overlay_path(target: Path) -> Path:
    """Where the overlay of a photograph goes."""
    return target.with_name(f"{target.name}_overlay.jpg")


def find_photos(pattern: str, output: Path) -> Jobs:
    """Find photographs, and choose the names of their results.

    Sub-folders are kept: photos/a/x.jpg becomes output/a/x.png and output/a/x_overlay.jpg. Where a
    folder holds x.jpg and x.tif, the results of both would have these names. Then they keep their
    endings: x.jpg.png and x.jpg_overlay.jpg.

    Args:
        pattern: a file; or a folder, which stands for all pictures in it and in all folders below;
            or a glob such as 'photos/**/*.jpg'. From folders and globs, hidden files are left out,
            and so are files in `output`, which are the results of an earlier run.
        output: the folder for results.

    Raises:
        ConfigError: there are no photographs, or a result would overwrite one.
    """
    check_text("input", pattern, wanted="a file, a folder or a glob")
    given, output = Path(pattern).expanduser(), Path(os.path.abspath(output))
    if given.is_file():
        root, found = given.parent, [str(given)]
    elif given.is_dir():
        root, found = given, glob(f"{escape(str(given))}/**/*", recursive=True)
    else:
        root = Path(*takewhile(lambda part: not has_magic(part), given.parts))
        found = glob(str(given), recursive=True)
    paths = sorted({Path(os.path.abspath(path)) for path in found})
    # A glob may lead out of its own root again: a/*/../../b/*.png
    root = Path(os.path.commonpath([os.path.abspath(root), *(path.parent for path in paths)]))
    photos = paths
    if not given.is_file():  # a single file is read whatever its ending is
        photos = [path for path in paths if is_picture(path) and not path.is_dir()]
        if output != root:
            photos = [path for path in photos if output not in path.parents]
    if not photos:
        raise ConfigError(f"input={pattern}: no image there; it takes a file, a folder or a glob")
    return _targets(photos, root, output)


def _targets(photos: list[Path], root: Path, output: Path) -> Jobs:
    """The target of each photograph, in the same sub-folder of `output` as it has in `root`.

    Raises:
        ConfigError: a result would overwrite a photograph.
    """
    # How often each name would be taken, by a photograph without its ending or with it. Some file
    # systems do not tell x.png from X.PNG.
    taken = Counter((p.parent, name.casefold()) for p in photos for name in {p.stem, p.name})
    inputs = set(map(os.path.realpath, photos))
    jobs = {}
    for path in photos:
        unique = taken[path.parent, path.stem.casefold()] == 1
        target = output / path.relative_to(root).with_name(path.stem if unique else path.name)
        results = {os.path.realpath(result) for result in (mask_path(target), overlay_path(target))}
        if inputs & results:
            raise ConfigError(
                f"output={output}: a result of {path.name} would overwrite a photograph"
            )
        jobs[path] = target
    return jobs


def voc_photos(root: str | Path | None, split: str | None, comp: str, output: Path) -> Jobs:
    """The images of a VOC list, and the targets that VOC's evaluation server asks for.

    Args:
        root: the folder that holds VOCdevkit/VOC2012.
        split: the name of a list. None: test if `root` has the official test list, else val.
        comp: comp5; or comp6 for a network that was trained on other data than VOC's.
        output: the folder for results. The server takes the folder results/ in it.

    Raises:
        ConfigError: `split` is no name, or `comp` is neither comp5 nor comp6.
        DataError: the tree, its list or an image is missing.
    """
    check_text("split", split, wanted="the name of a list", optional=True)
    if split is not None and Path(split).name != split:  # a path would lead out of the tree
        refuse("split", split, "the name of a list")
    check_choice("comp", comp, ("comp5", "comp6"))
    folder = ARCHIVE.find(root, download=False)
    if split is None:
        split = "test" if list_path(folder, "test").is_file() else "val"
    ids = read_ids(list_path(folder, split))
    results = output / "results" / "VOC2012" / "Segmentation" / f"{comp}_{split}_cls"
    jobs = {folder / "JPEGImages" / f"{name}.jpg": results / name for name in ids}
    check_exist(jobs, what="images")
    return jobs


def read_photo(path: Path, *, upright: bool = True) -> Tensor:
    """Read a photograph, whatever its mode: transparency over white, 16 bits cut to 8.

    Args:
        upright: whether to turn it as its EXIF orientation says.

    Returns:
        (3, H, W) uint8 RGB.

    Raises:
        Exception: of nearly any type, from Pillow, for a damaged file.
    """
    with warnings.catch_warnings(action="ignore"), open_picture(path) as file:
        photo = ImageOps.exif_transpose(file) if upright else file
        if photo.mode[0] in "IF":  # I, I;16, I;16B and F, which convert("RGB") would clip at 255
            return _grey_to_rgb(np.asarray(photo, np.float32), sixteen_bits=";" in photo.mode)
        if photo.has_transparency_data:
            photo = photo.convert("RGBA")
            photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
        pixels = np.array(photo.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W), a view


def _grey_to_rgb(values: np.ndarray, *, sixteen_bits: bool) -> Tensor:
    """Grey values (H, W) of more than 8 bits -> (3, H, W) uint8.

    Where the file does not say which value is white, the smallest that the values allow is taken:
    1, 255 or 65535, and above that the largest value.
    """
    values = np.nan_to_num(values)
    largest = values.max()
    divisor = next((d for d in (1 / 256, 1, 256) if largest <= 256 * d), largest / 255)
    if sixteen_bits:
        divisor = 256
    grey = (values / divisor).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(grey).expand(3, -1, -1).contiguous()  # (H, W) -> (3, H, W)
