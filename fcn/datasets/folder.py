"""Your own data: a folder of images and a folder of masks with the same names.

    python -m fcn.datasets.check data=folder data.root=my_data 'data.dataset.classes=[ground,cat]'
    python train.py data=folder data.root=my_data 'data.dataset.classes=[ground,cat]'

For more than a trial, copy conf/data/folder.yaml to conf/data/<name>.yaml and write there what the
data is; then it is `data=<name>`. On disk:

    <images>/<id>.jpg    JPEG, PNG, WebP, TIFF, BMP, GIF, …: FORMATS in reading.py
    <masks>/<id>.png     the label of each pixel, or its colour
    <train>, <val>       optional text lists, one id (or file name) a line
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from fcn.datasets import VOID, Labels, Sample
from fcn.datasets.reading import (
    LABEL_MODES,
    UnknownLabelError,
    is_picture,
    make_sample,
    read_image,
    read_lines,
    read_picture,
    refuse,
    to_mask,
)
from fcn.datasets.voc2012 import voc_palette
from fcn.errors import ConfigError, DataError

Colours = Sequence[Sequence[int]]


class Folder(Dataset[Sample]):
    """Pairs of files with one stem; splits `train`, `val` and `all`.

    Args:
        split, root, download: as for every data set; nothing is downloaded.
        images, masks: folders, relative to `root` (None: the current folder) or absolute.
        classes: their names, in the order of the labels.
        palette: None: masks are palette or grey pictures of the labels 0, 1, 2, … Or a colour
            (R, G, B) for each class: RGB and palette pictures are read by their colours. A grey
            picture holds labels even then, unless all of these colours are grey.
        void: the label, or the colour, of pixels that count nowhere; None: there are none.
        train, val: text lists. One alone leaves all other pairs to the other split.
        val_share: without lists, the part of the pairs that is for validation.
        seed: of that draw. An image that is added later moves hardly any other.

    Raises:
        ConfigError: settings are incomplete or contradict each other.
        DataError: a folder or list is missing, a file has no partner, two files have one stem; on
            reading, a file is broken, sizes differ, or a mask holds an unknown label or colour.
    """

    void: ClassVar[int] = VOID  # of what is read, whatever it is on disk
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "all")

    @classmethod
    def labels(
        cls,
        *,
        classes: Sequence[str] | None = None,
        palette: Colours | None = None,
        void: int | Sequence[int] | None = VOID,
        **_: object,
    ) -> Labels:
        """Classes and the colours to show them in, from the constructor's settings, checked."""
        names = tuple(classes) if isinstance(classes, list | tuple) else ()
        _need(
            all(isinstance(name, str) and name.strip() for name in names)
            and 2 <= len(set(names)) == len(names) <= VOID,
            f"classes={classes}: must be a list of 2 to {VOID} names, each once, in the order of "
            "their labels; background is one, void is none",
        )
        _need(
            void is None or _is_byte(void) or (_is_colour(void) and palette is not None),
            f"void={void}: must be null, a label up to 255, or, with a palette, a colour [R, G, B]",
        )
        _need(void not in range(len(names)), f"void={void} is the label of a class")
        if palette is None:
            return Labels(names, voc_palette(len(names)))
        _need(
            isinstance(palette, list | tuple)
            and len(palette) == len(names)
            and all(map(_is_colour, palette)),
            f"palette={palette}: must be a colour [R, G, B] for each of {len(names)} classes",
        )
        colours = tuple((r, g, b) for r, g, b in palette)
        twice = len({*colours, *_colour_of(void)}) < len(colours) + len(_colour_of(void))
        _need(not twice, f"palette={palette}: a colour has two meanings")
        return Labels(names, colours)

    def __init__(
        self,
        *,
        split: str = "train",
        root: str | Path | None = None,
        download: bool = False,
        images: str = "images",
        masks: str = "masks",
        classes: Sequence[str] | None = None,
        palette: Colours | None = None,
        void: int | Sequence[int] | None = VOID,
        train: str | None = None,
        val: str | None = None,
        val_share: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.classes, self.palette = self.labels(classes=classes, palette=palette, void=void)
        _need(bool(images and masks), f"images={images}, masks={masks}: name both folders")
        share = isinstance(val_share, float) and 0 < val_share < 1
        _need(share, f"val_share={val_share}: must be between 0 and 1")
        if split not in self.splits:
            raise DataError(f"Folder has no split '{split}': choose from {', '.join(self.splits)}")
        base = Path(root or ".").expanduser()
        self._folders = [base / Path(folder).expanduser() for folder in (images, masks)]
        self._images, self._masks = map(_pictures, self._folders)
        self._void = void if isinstance(void, int) else None
        coded = self.palette if palette is not None else ()
        self._colours = {_code(*colour): label for label, colour in enumerate(coded)}
        self._colours |= {_code(*colour): VOID for colour in _colour_of(void)}
        self._grey = all(r == g == b for r, g, b in coded)

        every = sorted(self._images.keys() | self._masks.keys())
        lists = {
            s: self._listed(base, file) for s, file in (("train", train), ("val", val)) if file
        }
        if not lists:  # by a hash, so that a new image changes nothing for the old ones
            order = sorted(every, key=lambda n: hashlib.md5(os.fsencode(f"{seed}/{n}")).digest())
            lists["val"] = sorted(order[: max(1, round(val_share * len(order)))])
        given = {name for ids in lists.values() for name in ids}
        rest = [name for name in every if name not in given]
        self.ids = every if split == "all" else lists.get(split, rest)
        if not self.ids:
            raise DataError(f"{self._folders[0]}: no pairs are left for the split '{split}'")
        lone = [problem for problem in map(self._lone, self.ids) if problem]
        if lone:
            refuse(f"{len(lone)} of {len(self.ids)} pairs incomplete: {'; '.join(lone[:3])}")

    def _listed(self, base: Path, file: str) -> list[str]:
        """The ids in a text list, which may name files."""
        lines = read_lines(base / Path(file).expanduser())
        return [PurePath(x).stem if is_picture(PurePath(x)) else x for x in lines]

    def _lone(self, name: str) -> str | None:
        """What this pair lacks, if anything."""
        image, mask = self._images.get(name), self._masks.get(name)
        if image and mask:
            return None
        lacking, folder = ("mask", self._folders[1]) if image else ("image", self._folders[0])
        return f"{image or mask or name}: there is no {lacking} of that name in {folder}"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Sample:
        name = self.ids[index]
        lone = self._lone(name)
        if lone:
            raise DataError(lone)
        path = self._masks[name]
        return make_sample(name, read_image(self._images[name]), self._read_mask(path), path)

    def _read_mask(self, path: Path) -> np.ndarray:
        """(H, W) uint8: label or VOID, from labels or colours."""
        picture = read_picture(path, "mask")
        if not self._colours and picture.mode not in LABEL_MODES:
            raise DataError(f"{path}: a mask of mode {picture.mode} needs data.dataset.palette")
        if not self._colours or (picture.mode in LABEL_MODES[1:] and not self._grey):
            return to_mask(np.array(picture), len(self.classes), void=self._void, path=path)
        pixels = np.array(picture.convert("RGB"), np.int32)  # (H, W, 3)
        colours = _code(*np.moveaxis(pixels, 2, 0))  # (H, W)
        known = np.array(sorted(self._colours), np.int32)
        place = np.searchsorted(known, colours).clip(max=len(known) - 1)  # (H, W)
        strange = np.unique(colours[known[place] != colours]).tolist()
        if strange:
            found = ", ".join(str((c >> 16, c >> 8 & 255, c & 255)) for c in strange[:3])
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            hint = "; null if the mask holds labels" if picture.mode == "P" else ""
            raise UnknownLabelError(f"{path}: not in data.dataset.palette{hint}: {found}{more}")
        return np.array([self._colours[c] for c in known.tolist()], np.uint8)[place]


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"data.dataset.{message}")


def _is_byte(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _is_colour(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_byte, value))


def _colour_of(void: int | Sequence[int] | None) -> list[tuple[int, ...]]:
    return [tuple(void)] if isinstance(void, Sequence) else []


def _code(r: Any, g: Any, b: Any) -> Any:
    """A colour, or each of (H, W), as one number."""
    return r << 16 | g << 8 | b


def _pictures(folder: Path) -> dict[str, Path]:
    """The pictures in a folder, by stem; hidden files and others are left alone."""
    if not folder.is_dir():
        raise DataError(f"{folder.absolute()}: there is no such folder; see data.root")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_picture(path) and not path.name.startswith("."):
            if path.stem in files:
                raise DataError(f"{path}: {files[path.stem].name} has the same stem; keep one")
            files[path.stem] = path
    if not files:
        raise DataError(f"{folder.absolute()}: there is no picture in this folder")
    return files
