"""Data sets for semantic segmentation. Each is one file, with its classes, palette and source.

    data = VOC2012(split="val", root="data", download=True)     # from fcn.datasets.voc2012
    sample = data[0]                                            # image, mask and id

There is no registry: a data set is any class that satisfies `SegmentationDataset`, and
`conf/data/*.yaml` names it by its import path. Those that read files share `reading.Pairs`.
"""

import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, TypedDict

from torchvision import tv_tensors

from fcn.errors import DataError, check_text, check_whole, refuse

NO_LICENCE = "not stated"
VOID = 255  # the label of pixels that are ignored in every loss and every score


class Sample(TypedDict):
    """One image with its labels, as a data set gives it and a transform takes it."""

    image: tv_tensors.Image  # (3, H, W) uint8, RGB
    mask: tv_tensors.Mask  # (H, W) uint8: class index, or VOID
    id: str  # the name of the sample in messages, panels and predicted files


class Labels(NamedTuple):
    """The names of the labels 0, 1, 2, ..., and the colour (R, G, B) that each is shown in."""

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


class SegmentationDataset(Protocol):
    """What the data module asks of a data set.

    `classes[k]` and `palette[k]` (RGB, 0 to 255) belong to label k; `void` is never one of these
    labels. `ids` has one name for each sample, in order; the data module may shorten this list.
    The constructor takes `split`, `root` and `download` by name. It may have further arguments.
    Data that is missing or damaged raises a `DataError` with the file's name: in the constructor if
    a quick look shows it, else when the sample is read. No sample is skipped silently.

    The data module asks for classes and palette before any data is on disk. They are therefore
    attributes of the class; or, where they depend on the constructor's arguments, the class has a
    class method `labels(**arguments) -> Labels`.

    A data set may inherit from this class, but need not.

    A data set may have a method `read_labels(index)`, which returns the mask (H, W) of a sample as
    an array without reading its image. train.py then reads the masks before it trains.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    void: int = VOID
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Sample: ...


def check_labels(class_names: Any, palette: Any, void: Any) -> None:
    """Refuse what cannot be the names of classes, their colours and the label of void pixels.

    Raises:
        ConfigError: one of them cannot. The message begins with "name=value".
    """
    if not isinstance(class_names, list | tuple) or not 2 <= len(class_names) <= VOID:
        refuse("class_names", class_names, f"a list of 2 to {VOID} names")
    for name in class_names:
        check_text("class_names", name, wanted="a list of names, each of them a text")
    if palette is not None:
        colours = palette if isinstance(palette, list | tuple) else ()
        if not len(class_names) <= len(colours) <= 256 or not all(map(is_colour, colours)):
            wanted = f"null or a colour [R, G, B] for each of {len(class_names)} classes"
            refuse("palette", palette, wanted)
    check_whole("void", void, len(class_names), 255)


def is_byte(value: object) -> bool:
    """Whether this is a whole number from 0 to 255."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def is_colour(value: object) -> bool:
    """Whether this is a colour (R, G, B)."""
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(is_byte, value))


def data_licence(name: object) -> str:
    """What is known of the licence of a data set, by its name as in `find_dataset`.

    A data set states it as `licence`, an attribute of its class.
    """
    try:
        return str(getattr(find_dataset(name), "licence", NO_LICENCE))
    except DataError:
        return NO_LICENCE


def find_dataset(name: object) -> Any:
    """The class of a data set, by its name, such as "fcn.datasets.voc2012.VOC2012".

    The name comes from a checkpoint, and a checkpoint may come from anybody. Only a class that a
    file in this folder defines is accepted, and nothing else is imported.

    Raises:
        DataError: it is no such class.
    """
    module, _, attribute = str(name).rpartition(".")
    if re.fullmatch(r"fcn\.datasets\.\w+", module) and find_spec(module) is not None:
        found = getattr(import_module(module), attribute, None)
        if isinstance(found, type) and found.__module__ == module:
            return found
    raise DataError(
        f"the checkpoint's data set {name} is none of fcn/datasets/; choose the data with data=..."
    )
