"""Your own data: a folder of images and a folder of masks with the same names.

    python -m fcn.datasets.check data=folder data.root=my_data "data.dataset.classes=[ground,cat]"
    python train.py data=folder data.root=my_data "data.dataset.classes=[ground,cat]"

To use the same data often, copy conf/data/folder.yaml to conf/data/<name>.yaml and write the
settings there; the data is then `data=<name>`. On disk:

    <images>/<id>.jpg    JPEG, PNG, WebP, TIFF, BMP, GIF, ...: see FORMATS in pictures.py
    <masks>/<id>.png     the label of each pixel, or the colour of its class
    <train>, <val>       optional text lists, with one id (or file name) on each line

Instead of lists there may be a folder for each split: <images>/train and <images>/val with
<masks>/train and <masks>/val, or train/<images>, val/<images> and so on. Ids are then "train/<id>"
and "val/<id>". A folder "test" beside them is the split `test`. Other names of these folders are
"training", "valid", "validation" and "testing".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcn.datasets import VOID, Labels, is_byte, is_colour, reading
from fcn.datasets.layout import Files, all_ids, draw, read_list, split_ids
from fcn.datasets.palettes import Appearance, appearance
from fcn.datasets.voc2012 import voc_palette
from fcn.errors import ConfigError, DataError, check_number, check_text, check_whole, refuse
from fcn.files import expanded

Colours = Sequence[Sequence[int]]
Void = int | Sequence[int] | None


class Folder(reading.Pairs):
    """Pairs of an image and a mask whose names are equal, except for the endings.

    Args:
        split: `train`, `val`, `all`, or `test` if there is a folder for it.
        root: what relative paths start from; None: the current folder.
        download: has no effect, as there is nothing to download.
        images, masks: the two folders, absolute or relative to `root`. They may be the same one, if
            a suffix tells the masks from the images.
        image_suffix, mask_suffix: what follows the id in the names of the files: with "_mask", the
            mask of a.jpg is a_mask.png.
        classes: their names, in the order of the labels.
        palette: None: masks are palette or grey pictures of the labels 0, 1, 2, ... Otherwise a
            colour (R, G, B) for each class: RGB and palette pictures are read by their colours. A
            grey picture is still read as labels, unless all of these colours are grey.
        void: the label, or the colour, of pixels that are ignored in training and in every score;
            None: there are no such pixels. If it is 0, the labels of the classes are 1, 2, 3, ...
        train, val: text lists of the ids of each split. If there is only one of them, all other
            pairs belong to the other split.
        val_share: if there are no lists, the fraction of the pairs to validate on, which are drawn
            at random.
        seed: of that random choice. If an image is added later, hardly any other changes its split.
        value_range: the values of 16-bit or float images that become black and white; None: the
            whole range of their type. The check proposes it.
        max_pixels: the largest number of pixels of an image.

    Raises:
        ConfigError: a setting is missing or cannot work, or two of them contradict each other.
        DataError: a folder or a list is missing, an image has no mask or a mask no image, two files
            have the same name except for the endings, or a list names an id twice. While reading: a
            file is damaged, an image and its mask differ in size, or a mask holds an unknown label
            or colour.
    """

    splits: tuple[str, ...] = ("train", "val", "test", "all")

    @classmethod
    def labels(
        cls,
        *,
        classes: Sequence[str] | None = None,
        palette: Colours | None = None,
        void: Void = VOID,
        **_: object,
    ) -> Labels:
        """The names of the classes and the colours to show them in.

        Args:
            classes, palette, void: as for the constructor, whose other arguments are ignored.

        Raises:
            ConfigError: one of them cannot work.
        """
        names = tuple(classes) if isinstance(classes, list | tuple) else ()
        texts = all(isinstance(name, str) and name.strip() for name in names)
        if not texts or not 2 <= len(set(names)) == len(names) <= VOID:
            refuse(
                "data.dataset.classes",
                classes,
                f"a list of 2 to {VOID} names, each once, in the order of their labels; the "
                "background is a class, void is not",
            )
        if void is not None and not is_byte(void) and not (is_colour(void) and palette):
            wanted = "null, the number of a label up to 255, or, with a palette, a colour [R, G, B]"
            refuse("data.dataset.void", void, wanted)
        if void in range(1, len(names)):
            raise ConfigError(f"data.dataset.void={void} is the label of a class")
        if palette is None:
            return Labels(names, voc_palette(len(names)))
        given = palette if isinstance(palette, list | tuple) else ()
        if len(given) != len(names) or not all(map(is_colour, given)):
            wanted = f"a colour [R, G, B] for each of {len(names)} classes"
            refuse("data.dataset.palette", palette, wanted)
        colours = tuple((r, g, b) for r, g, b in palette)
        void_is_class = isinstance(void, Sequence) and tuple(void) in colours
        if void_is_class or len(set(colours)) < len(colours):
            raise ConfigError(f"data.dataset.palette={palette}: a colour has two meanings")
        return Labels(names, colours)

    def __init__(
        self,
        *,
        split: str = "train",
        root: str | Path | None = None,
        download: bool = False,
        images: str = "images",
        masks: str = "masks",
        image_suffix: str = "",
        mask_suffix: str = "",
        classes: Sequence[str] | None = None,
        palette: Colours | None = None,
        void: Void = VOID,
        train: str | None = None,
        val: str | None = None,
        val_share: float = 0.2,
        seed: int = 0,
        value_range: reading.Range | None = None,
        max_pixels: int = reading.MAX_PIXELS,
    ) -> None:
        self.classes, self.palette = self.labels(classes=classes, palette=palette, void=void)
        check_text("data.dataset.images", images, wanted="the folder of the images")
        check_text("data.dataset.masks", masks, wanted="the folder of the masks")
        for name, suffix in (("image_suffix", image_suffix), ("mask_suffix", mask_suffix)):
            if suffix != "":
                check_text(f"data.dataset.{name}", suffix)
        check_text("data.dataset.train", train, wanted="a text list of ids", optional=True)
        check_text("data.dataset.val", val, wanted="a text list of ids", optional=True)
        check_number("data.dataset.val_share", val_share, above=0, below=1)
        check_whole("data.dataset.seed", seed, 0, 2**63)
        reading.check_split("Folder", split, self.splits)
        self.mask_void = void if isinstance(void, int) else None
        # The colour of each class, and of void, in coloured masks; empty if masks hold labels.
        self._colour_of = dict(enumerate(self.palette)) if palette is not None else {}
        self._grey = all(r == g == b for r, g, b in self._colour_of.values())
        if isinstance(void, Sequence):
            self._colour_of[VOID] = (void[0], void[1], void[2])
        self._colours = {_number(*colour): k for k, colour in self._colour_of.items()}

        base = expanded(root or ".")
        of_images, of_masks = Files(base, images, image_suffix), Files(base, masks, mask_suffix)
        if of_images == of_masks:
            wanted = "set, to tell the masks from the images in this folder"
            refuse("data.dataset.mask_suffix", mask_suffix, wanted)
        names = all_ids(of_images, of_masks)
        given = {"train": train, "val": val}
        files = {key: base / expanded(file) for key, file in given.items() if file}
        lists = {key: read_list(file, image_suffix, {*names}) for key, file in files.items()}
        if not lists and "" in of_images.parts:
            lists["val"] = draw(names, val_share, seed)
        ids = split_ids(names, list(of_images.parts), lists)[split]
        if not ids:
            raise DataError(f"{base / images}: {_no_pairs(split, len(names))}")
        self._list = files.get(split, base)
        self._nowhere = [name for name in ids if name not in of_images and name not in of_masks]
        if self._nowhere:
            count = f"the first of {len(self._nowhere)} such ids, of {len(ids)}"
            text = f"'{self._nowhere[0]}' has neither an image nor a mask"
            reading.refuse_missing(f"{self._list}: {text} ({count})")
        pairs = {name: (of_images.path(name), of_masks.path(name)) for name in ids}
        super().__init__(pairs, value_range=value_range, max_pixels=max_pixels)

    def read_mask(self, path: Path) -> np.ndarray:
        """A mask (H, W) uint8 of labels and VOID, from a picture of labels or of colours.

        Raises:
            DataError: it is damaged, or holds unknown labels or colours.
        """
        picture = reading.read_mask_picture(path, self.max_pixels)
        if self._holds_labels(picture):
            hint = "; a grey mask holds labels: save it in the colours of data.dataset.palette"
            labels = reading.labels_of(picture, path)
            return self.to_mask(labels, path, hint if self._colours else None)
        colours = self._colours_of(picture, path)  # (H, W)
        known = np.array(sorted(self._colours))  # (number of colours,)
        place = np.searchsorted(known, colours).clip(max=len(known) - 1)  # (H, W), indices of known
        unknown = np.unique(colours[known[place] != colours]).tolist()
        if unknown:
            found = ", ".join(map(_colour_text, unknown[:3]))
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            hint, void = "", self.mask_void
            if void is not None and _number(void, void, void) in unknown:
                hint = f"; if these are void, data.dataset.void=[{void},{void},{void}]"
            elif picture.mode == "P":
                hint = "; null if the mask holds labels"
            message = f"{path}: not in data.dataset.palette: {found}{more}{hint}"
            raise reading.UnknownLabelError(message)
        labels = np.array([self._colours[c] for c in known.tolist()], np.uint8)
        return labels[place]  # (H, W)

    def check_listed(self, index: int) -> None:
        """Refuse an id of a list that has neither an image nor a mask.

        Raises:
            DataError: it is such an id.
        """
        if self.ids[index] in self._nowhere:
            text = f"'{self.ids[index]}' has neither an image nor a mask"
            raise DataError(f"{self._list}: {text}")

    def _holds_labels(self, picture: Image.Image) -> bool:
        """Whether the values in a mask are labels, and not colours of data.dataset.palette."""
        is_grey = picture.getbands()[0] in ("1", "L", "I", "F")
        return not self._colours or (is_grey and not self._grey)

    def _colours_of(self, picture: Image.Image, path: Path) -> np.ndarray:
        """The colours (H, W) in a mask, each as one number.

        Raises:
            DataError: below a transparent pixel is a colour of neither the first class nor void.
        """
        if picture.getbands() in (("I",), ("F",)):  # Pillow would clip these values to 255
            grey = reading.labels_of(picture, path).astype(np.int64)
            return _number(grey, grey, grey)
        mode = "RGBA" if picture.has_transparency_data else "RGB"
        pixels = np.array(picture.convert(mode), np.int32)  # (H, W, 3 or 4)
        colours = _number(*np.moveaxis(pixels[..., :3], 2, 0))  # (H, W, 3) -> (H, W)
        if mode == "RGBA":
            clear = np.unique(colours[pixels[..., 3] < 255]).tolist()
            hidden = [c for c in clear if self._colours.get(c) not in (0, VOID)]
            if hidden:
                raise DataError(
                    f"{path}: this mask has transparent pixels above {_colour_text(hidden[0])}, "
                    "which may be no part of it; save it without transparency"
                )
        return colours

    def appearance(self, path: Path) -> Appearance:
        """How the file of a mask shows its labels, so that masks can be compared.

        Raises:
            DataError: the file is damaged, or holds no labels.
        """
        picture = reading.read_mask_picture(path, self.max_pixels)
        if self._holds_labels(picture):
            return appearance(picture, path)
        first = 1 if self.mask_void == 0 else 0
        colours = {k if k == VOID else first + k: c for k, c in self._colour_of.items()}
        return Appearance(is_grey=False, colours=colours)


def _no_pairs(split: str, count: int) -> str:
    """Why a split has none of `count` pairs, and what to change."""
    none = f"no pairs are left for the split '{split}', of {count} in all"
    if split == "test":  # a share or a list makes train and val only
        return f"{none}; it needs a folder of that name beside train and val"
    return f"{none}; change data.dataset.val_share or the lists"


def _number(r: Any, g: Any, b: Any) -> Any:
    """A colour (r, g, b) as one number. For arrays (H, W), an array of such numbers.

    The grey (v, v, v) of a value outside of 0 to 255 is a number outside of those of all colours.
    """
    return r * 0x10000 + g * 0x100 + b


def _colour_text(number: int) -> str:
    """A colour for a message, or the value of a grey that is none."""
    if 0 <= number < 1 << 24:
        return str((number >> 16, number >> 8 & 255, number & 255))
    return str(number // 0x10101)
