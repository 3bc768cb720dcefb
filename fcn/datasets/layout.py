"""Your own data: the files of the image and the mask of each id, and the ids of each split.

    images, masks = Files(root, "images", ""), Files(root, "masks", "_mask")
    names = all_ids(images, masks)
    splits = split_ids(names, list(images.parts), {"val": draw(names, 0.2, seed=0)})

fcn/datasets/folder.py, which describes the layouts on disk, calls these.
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence, Set
from pathlib import Path, PurePath

from fcn.datasets import reading
from fcn.datasets.pictures import is_picture, why_no_picture
from fcn.errors import ConfigError, DataError
from fcn.files import expanded

# How ids begin if each split has a folder, by the names of these folders in lower case.
PARTS = {"train": "train/", "training": "train/", "test": "test/", "testing": "test/"}
PARTS |= {"val": "val/", "valid": "val/", "validation": "val/"}


class Files(dict[str, Path]):
    """The images, or the masks, by their ids.

    Args:
        base: what `folder` is relative to.
        folder: the folder. It may have a folder for each split in it, or the other way round:
            `folder`/train, or train/`folder`. Ids then begin with "train/".
        suffix: what follows the id in the name of a file, before the ending.

    Raises:
        DataError: there is no such folder, or no picture in it, or there are two of one name.
    """

    def __init__(self, base: Path, folder: str, suffix: str) -> None:
        self.folder = base / expanded(folder)
        self.suffix, self.parts = suffix, {"": self.folder}
        self._places: dict[str, Path] = {}  # the folder of each split, even if it does not exist
        for inside in (True, False):
            parts: dict[str, Path] = {}
            places: dict[str, Path] = {}  # for splits without such a folder: where it would be
            for entry in sorted((self.folder if inside else base).glob("*")):
                part = PARTS.get(entry.name.lower(), "")
                path = entry if inside else entry / folder
                if not part or path == self.folder:  # equal if `folder` is absolute
                    continue
                if not path.is_dir():
                    places.setdefault(part, path)
                elif part in parts:
                    split = f"{parts[part]} and {path} are both folders of the split {part[:-1]}"
                    raise DataError(f"{split}; keep one of them")
                else:
                    parts[part] = path
            if {"train/", "val/"} <= parts.keys():
                if any(map(is_picture, self.folder.glob("[!.]*"))):
                    raise DataError(
                        f"{self.folder}: there are pictures outside of train and val too; move "
                        "them into one of these folders, or elsewhere"
                    )
                self.parts, self._places = parts, places | parts
                break
        else:  # train and val are not both there; `parts` are the folders of splits in `base`
            if parts and not self.folder.is_dir():
                raise DataError(self._incomplete(base, parts))
        for part, path in self.parts.items():
            self |= {part + name: file for name, file in _pictures(path, suffix).items()}

    def _incomplete(self, base: Path, parts: dict[str, Path]) -> str:
        """The message that only some splits have a folder, and that these are not read."""
        # In this order, "train/" is first if it is there, and "test/" is last.
        found = [parts[part] for part in ("train/", "val/", "test/") if part in parts]
        names = [path.relative_to(base).as_posix() for path in found]
        top = names[0].partition("/")[0]
        return (
            f"{self.folder.absolute()}: there is no such folder, only {' and '.join(names)}. "
            "Folders of splits are read only if those of train and val (or training, and valid or "
            f"validation) are both there. To read that of {top} alone, and to validate on a share "
            "of it, name it in both settings, as in "
            f"data.dataset.images={top}/images data.dataset.masks={top}/masks"
        )

    def path(self, name: str) -> Path:
        """The file of an id. If there is none, the path shows where it belongs."""
        part = name[: name.find("/") + 1]
        folder = self._places.get(part, self.folder / part)
        return self.get(name, folder / f"{name.removeprefix(part)}{self.suffix}.*")


def all_ids(of_images: Files, of_masks: Files) -> list[str]:
    """The ids of all images and masks, in order.

    Raises:
        DataError: no image has a mask.
    """
    # Both may lie in one folder. A file that is in both belongs to the longer suffix.
    longer = max(of_images, of_masks, key=lambda files: len(files.suffix))
    taken = set(longer.values())
    images, masks = (
        {name for name, path in files.items() if files is longer or path not in taken}
        for files in (of_images, of_masks)
    )
    if not images & masks:
        split = [files.folder for files in (of_images, of_masks) if "" not in files.parts]
        if len(split) == 1:
            raise DataError(
                f"{split[0]}: only the images, or only the masks, have a folder for each split; "
                "move both into folders train and val, or neither"
            )
        raise DataError(
            f"{of_images.folder}: no image has a mask of its name in {of_masks.folder}; the first "
            f"files are {min(of_images.values()).name} and {min(of_masks.values()).name}. With "
            "data.dataset.mask_suffix=_x, the mask of a.jpg is a_x.png"
        )
    return sorted(images | masks)


def _pictures(folder: Path, suffix: str) -> dict[str, Path]:
    """The pictures in a folder whose names end with `suffix`, by what stands before it.

    Hidden files are ignored. "é" is one character or two, depending on the system that wrote the
    name; both become the same id.
    """
    if not folder.is_dir():
        raise DataError(f"{folder.absolute()}: there is no such folder; see data.root")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem = unicodedata.normalize("NFC", path.stem)
        if is_picture(path) and stem.endswith(suffix) and not stem.startswith("."):
            name = stem.removesuffix(suffix)
            if name in files:
                raise DataError(
                    f"{path}: {files[name].name} has the same name except for its ending; keep one "
                    "of the two"
                )
            files[name] = path
    if not files:
        which = f" whose name ends with {suffix}" if suffix else ""
        entries = sorted(folder.glob("[!.]*"))
        folders = [path.name for path in entries if path.is_dir()]
        others = [path for path in entries if not is_picture(path)]
        why = f"; {others[0].name}: {why_no_picture(others[0])}" if others else ""
        if folders:
            why = (
                f", but the folder {folders[0]}. Pictures in folders of it are read only if these "
                "are named train and val (or training, and valid or validation) and both are there"
            )
        raise DataError(f"{folder.absolute()}: there is no picture{which} in this folder{why}")
    return files


def read_list(file: Path, suffix: str, names: Set[str]) -> list[str]:
    """The ids in a text list. A line may also be the name or the path of an image.

    Args:
        file: the list.
        suffix: what the names of images have behind the id.
        names: all ids. One of them may itself end like a picture, such as "a.jpg" of "a.jpg.png".
    """
    ids = []
    for line in reading.read_lines(file):
        name = PurePath(re.split(r"[/\\]", unicodedata.normalize("NFC", line))[-1])
        known = (name.stem if is_picture(name) else name.name).removesuffix(suffix)
        ids.append(name.name if known not in names and name.name in names else known)
    reading.check_once(ids, file)
    return ids


def split_ids(
    names: list[str], parts: Sequence[str], lists: dict[str, list[str]]
) -> dict[str, list[str]]:
    """The ids of each split.

    Args:
        names: all ids.
        parts: "", or how the ids of each split begin if it has a folder, such as "train/".
        lists: the ids of train, of val or of both, if there are no such folders.
    """
    if "" not in parts:
        if lists:
            raise ConfigError(
                f"data.dataset.{min(lists)} must be null: the folders train and val already say "
                "which pairs are in which split"
            )
        lists = {part[:-1]: [name for name in names if name.startswith(part)] for part in parts}
    rest = sorted(set(names).difference(*lists.values()))
    return {"all": names, "train": rest, "val": rest, "test": []} | lists


def draw(names: Sequence[str], share: float, seed: int) -> list[str]:
    """The ids to validate on, where there are no lists.

    The names are ordered by a hash, so that a new image does not change the order of the others.
    """

    def position(name: str) -> bytes:
        return hashlib.md5(os.fsencode(f"{seed}/{name}")).digest()

    count = max(1, round(share * len(names)))
    return sorted(sorted(names, key=position)[:count])
