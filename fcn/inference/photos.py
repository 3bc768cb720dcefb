"""Photographs and videos on disk: finding them, and where the results of each go.

    jobs, left_out = find_photos("photos", Path("predictions"))      # {photograph: target}
    jobs = voc_photos("/data", None, "comp5", Path("predictions"))   # for VOC's evaluation server

A target is the path of a result without its ending: `result_path` adds one of these endings.
"""

import os
from collections import Counter
from contextlib import suppress
from glob import escape, glob, has_magic
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from fcn.datasets.pictures import open_picture, why_no_picture
from fcn.datasets.reading import check_exist, read_ids
from fcn.datasets.voc2012 import ARCHIVE, list_path
from fcn.errors import ConfigError, DataError, check_choice, check_text, need_packages, refuse
from fcn.files import expanded

Jobs = dict[Path, Path]  # photographs or videos, and the target of each
LeftOut = dict[Path, str]  # files, and why they are no photographs to segment
# The endings of videos, and FFmpeg's names of their formats. Others are not opened: a play list, of
# whatever name, makes FFmpeg open the files and addresses that are in it.
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
FORMATS = {"format_whitelist": "mov,matroska,avi,mpeg,mpegts,mpegvideo"}
# How the names of results end. A photograph has the first two, a video the others.
MASK, OVERLAY, OVERLAY_VIDEO, LEGEND = ".png", "_overlay.jpg", "_overlay.mp4", "_legend.png"
MARK = "fcn predict.py"  # in each result: PNG's text "Software", or a JPEG's or video's comment
OWN_RESULT = "it is a result of an earlier run"


def result_path(target: Path, ending: str) -> Path:
    """Where a result goes. The target may have a dot in its name, which is part of it."""
    return target.with_name(target.name + ending)


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its ending."""
    return path.suffix.lower() in VIDEOS


def open_video(path: Path) -> Any:
    """Open a video with PyAV, which must be installed.

    Raises:
        av.FFmpegError: it is damaged, or in none of the formats that are read.
    """
    import av

    return av.open(str(path), options=FORMATS)


def find_photos(pattern: str, output: Path) -> tuple[Jobs, LeftOut]:
    """Find photographs and videos, and choose the names of their results.

    Sub-folders are kept: photos/a/x.jpg becomes output/a/x.png and output/a/x_overlay.jpg. Where a
    folder holds x.jpg and x.tif, the results of both would have these names. Then they keep their
    endings: x.jpg.png and x.jpg_overlay.jpg. So do x.mp4 and x_legend.jpg.

    Args:
        pattern: a file; or a folder, which stands for all pictures and videos in it and in all
            folders below; or a glob such as 'photos/**/*.jpg'.
        output: the folder for results.

    Returns:
        The photographs and their targets; and the other files that were found, and why they are
        left out: files that are no pictures, hidden pictures, results of earlier runs, pipes,
        videos if PyAV is not installed, and in a folder, those below it that may not be opened.
        Hidden files that are no pictures are not mentioned. A single file is never left out.

    Raises:
        ConfigError: there are no photographs, or a result would overwrite one, or what predict.py
            has not written.
    """
    check_text("input", pattern, wanted="a file, a folder or a glob")
    given, output = expanded(pattern), absolute(output)
    if given.is_file():
        root, found = given.parent, [str(given)]
    elif given.is_dir():
        root, found = given, glob(f"{escape(str(given))}/**/*", recursive=True, include_hidden=True)
    else:
        root = Path(*takewhile(lambda part: not has_magic(part), given.parts))
        found = glob(str(given), recursive=True)
    # A link to a folder above it would show every picture 40 times. Each is taken once, where its
    # path is the shortest. Two links to one file are two pictures.
    once: dict[tuple[str, str], Path] = {}
    for path in sorted(map(Path, found), key=lambda path: (len(path.parts), path)):
        key = os.path.realpath(path.parent), path.name
        once.setdefault(key, absolute(path))
    paths = sorted(path for path in once.values() if not os.path.isdir(path))
    # A glob may lead out of its own root again: a/*/../../b/*.png
    root = Path(os.path.commonpath([absolute(root), *(path.parent for path in paths)]))
    folders = (absolute(given), *once.values()) if given.is_dir() else ()
    closed = (path for path in folders if _is_closed_folder(path, root, output))
    photos, left_out = [], dict.fromkeys(closed, "its pictures cannot be listed: permission denied")
    for path in paths:
        why = None if given.is_file() else _why_left_out(path, root, output)
        if why is None:
            photos.append(path)
        elif why:
            left_out[path] = why
    if not photos:
        lines = [f"input={pattern}: no image there; it takes a file, a folder or a glob"]
        raise ConfigError("\n".join([*lines, *describe(left_out)]))
    if any(map(is_video, photos)):
        need_packages("av", extra="video")  # also to know the results of earlier runs
    return _targets(photos, root, output), left_out


def _is_closed_folder(path: Path, root: Path, output: Path) -> bool:
    """Whether this is a folder that the user may not list, so that a glob silently skips it.

    Hidden folders and the folder for results do not count: their pictures are left out in any case.
    """
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    results = output in (path, *path.parents) and path != root
    return os.path.isdir(path) and not results and not os.access(path, os.R_OK | os.X_OK)


def absolute(path: Path) -> Path:
    """The same file or folder, absolute and without `..`, so that names are relative to the input.

    `link/..` is the folder above what the link leads to. So links before the last `..` are
    resolved, and those after it keep their names. On Windows, which drops `link/..` from a path by
    itself, `realpath` does so too.
    """
    parts = path.parts
    if ".." not in parts:
        return Path(os.path.abspath(path))
    end = len(parts) - parts[::-1].index("..")  # just behind the last one
    return Path(os.path.realpath(Path(*parts[:end])), *parts[end:])


def _why_left_out(path: Path, root: Path, output: Path) -> str | None:
    """Why a file in a folder or a glob is no photograph to segment; None: it is one.

    An empty reason is for files that nobody would ask for: hidden ones that are no pictures.
    """
    why = why_no_picture(path)
    if is_video(path):
        why = None if find_spec("av") else "a video needs pip install -r requirements/video.txt"
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return "" if why else "it is hidden"
    if os.path.exists(path) and not os.path.isfile(path):  # a link to nothing is tried, and fails
        return why or "it is a pipe or a device, not a file"
    if why is None and is_result(path):
        return OWN_RESULT
    if root in output.parents and output in path.parents:
        return why or "it is in the folder for results"
    return why


def describe(left_out: LeftOut) -> list[str]:
    """Lines that name each file that was left out and why. Results of earlier runs are counted."""
    own = sum(why == OWN_RESULT for why in left_out.values())
    lines = [f"  {path}: {why}" for path, why in left_out.items() if why != OWN_RESULT]
    if own:
        lines.append(f"  {own} results of earlier runs")
    return [f"files left out: {len(left_out)}", *lines] if lines else []


def is_result(path: Path) -> bool:
    """Whether predict.py has written this picture or video."""
    if not os.path.isfile(path):
        return False  # to open a pipe would be to wait for it
    if path.name.endswith(OVERLAY_VIDEO) and find_spec("av"):
        import av

        with suppress(av.FFmpegError), open_video(path) as video:
            return bool(video.metadata.get("comment") == MARK)
    if not path.name.endswith((MASK, OVERLAY)):  # a legend is a .png, too
        return False
    with suppress(DataError), open_picture(path, max_pixels=2**63) as picture:
        marks = picture.info.get("Software"), picture.info.get("comment")  # of PNG and JPEG
        return bool({MARK, MARK.encode()} & set(marks))
    return False


def _targets(photos: list[Path], root: Path, output: Path) -> Jobs:
    """The target of each photograph, in the same sub-folder of `output` as it has in `root`.

    Raises:
        ConfigError: a result would overwrite a photograph, or what predict.py has not written.
    """
    # How often each name would be taken, by a photograph without its ending or with it.
    taken = Counter((p.parent, x) for p in photos for x in _names(p, p.stem) | _names(p, p.name))
    inputs = set(map(os.path.realpath, photos))
    jobs = {}
    for path in photos:
        unique = all(taken[path.parent, name] == 1 for name in _names(path, path.stem))
        target = output / path.relative_to(root).with_name(path.stem if unique else path.name)
        for ending in (OVERLAY_VIDEO, LEGEND) if is_video(path) else (MASK, OVERLAY):
            result = result_path(target, ending)
            if os.path.realpath(result) in inputs:
                _refuse(path, result, output, "is a photograph or a video")
            _check_own(path, result, output)
        jobs[path] = target
    return jobs


def _check_own(path: Path, result: Path, output: Path) -> None:
    """Refuse to overwrite a file that predict.py has not written."""
    if os.path.lexists(result) and not is_result(result):
        _refuse(path, result, output, "was not written by predict.py")


def _refuse(path: Path, result: Path, output: Path, why: str) -> NoReturn:
    raise ConfigError(
        f"output={output}: a result of {path.name} would overwrite {result}, which {why}; choose "
        "another folder for the results"
    )


def _names(path: Path, stem: str) -> set[str]:
    """The names without ending that the results of a photograph or video take, in lower case.

    A video x.mp4 also takes x_legend, which the mask of a photograph x_legend.jpg would take. Names
    are compared in lower case, as some file systems do not tell x.png from X.PNG.
    """
    names = {stem, stem + LEGEND.removesuffix(MASK)} if is_video(path) else {stem}
    return set(map(str.casefold, names))


def voc_photos(root: str | Path | None, split: str | None, comp: str, output: Path) -> Jobs:
    """The images of a VOC list, and the targets that VOC's evaluation server asks for.

    Args:
        root: the folder that holds VOCdevkit/VOC2012.
        split: the name of a list. None: test if `root` has the official test list, else val.
        comp: comp5; or comp6 for a network that was trained on other data than VOC's.
        output: the folder for results. The server takes the folder results/ in it.

    Raises:
        ConfigError: `split` is no name, `comp` is neither comp5 nor comp6, or a result would
            overwrite what predict.py has not written.
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
    for path, target in jobs.items():
        _check_own(path, result_path(target, MASK), output)
    return jobs
