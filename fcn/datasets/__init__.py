"""Data sets for semantic segmentation: one file each, with its classes, palette, source, reader.

They share no base class and no registry: a data set is whatever satisfies `SegmentationDataset`,
and `conf/data/*.yaml` names it by its import path.
"""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

from torchvision import tv_tensors

from fcn.errors import DataError

VOID = 255  # the label of pixels that are ignored in every loss and every score


class Sample(TypedDict):
    """One image with its labels, as a data set gives it and a transform takes it."""

    image: tv_tensors.Image  # (3, H, W) uint8, RGB
    mask: tv_tensors.Mask  # (H, W) uint8: class index, or VOID
    id: str  # names the sample in messages, panels and predicted files


class Labels(NamedTuple):
    """What the labels 0, 1, 2, … mean, and the colour (R, G, B) that each is shown in."""

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


class SegmentationDataset(Protocol):
    """What the data module asks of a data set.

    `classes[k]` and `palette[k]` (RGB, 0 to 255) belong to label k; `void` is never one of these.
    `ids` has one name for each sample, in order; the data module may shorten it. What is wrong with
    the data raises `DataError` with the file's name, in the constructor where that is cheap;
    nothing is skipped silently.

    The data module asks for classes and palette before any data is there: they are the class's own
    attributes, or, where settings decide, what a class method `labels(**settings) -> Labels` gives.
    """

    def __init__(
        self, *, split: str, root: str | Path | None = None, download: bool = False
    ) -> None: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]: ...

    @property
    def void(self) -> int: ...

    @property
    def ids(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def find_dataset(name: object) -> Any:
    """The data set class that a checkpoint names, such as "fcn.datasets.voc2012.VOC2012".

    A checkpoint may come from anybody, so that only a class that a file of this folder defines is
    taken: nothing else is imported.

    Raises:
        DataError: it is none of these.
    """
    module, _, attribute = str(name).rpartition(".")
    if re.fullmatch(r"fcn\.datasets\.\w+", module) and find_spec(module) is not None:
        found = getattr(import_module(module), attribute, None)
        if isinstance(found, type) and found.__module__ == module:
            return found
    raise DataError(
        f"the checkpoint's data set {name} is none of fcn/datasets/; choose the data with data=..."
    )
