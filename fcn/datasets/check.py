"""Read every pair of a data set before a training run does, and say what is wrong with it.

    python -m fcn.datasets.check data=voc2012 data.root=/data
    python -m fcn.datasets.check data=folder data.root=my_data 'data.dataset.classes=[ground,cat]'

It takes the settings that train.py takes (`experiment=` too, and `data.limit=` for a first look at
a part of the data), and `output=FOLDER` (default: check) for data_check.png, a picture of some
samples as image | label | overlay. It downloads nothing unless it is given data.download=true.

It exits with 1 if it finds an error: a file that is missing or broken, an unknown label, an image
and a mask of different sizes, or an image in both train and val. Such an image is found by its id,
or by its content: two files are one image if their pixels are equal once decoded.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from tqdm.contrib.concurrent import thread_map

from fcn import cli
from fcn.datasets import Sample, SegmentationDataset
from fcn.datasets.reading import (
    MismatchedSizeError,
    UnknownLabelError,
    check_disjoint,
    missing_allowed,
)
from fcn.errors import DataError
from fcn.figures.legend import legend_entries, one_line
from fcn.figures.masks import colourise, labels_in, overlay, resize_to_fit
from fcn.figures.panels import Cell, draw_sheet
from fcn.files import atomic_write

if TYPE_CHECKING:
    from fcn.datamodule import SegmentationDataModule

SHOWN = 40  # errors that are printed; of more, only the number
PICTURED = 3  # samples of each split in data_check.png
# The words for each kind of error in the summary of a split.
KINDS: dict[type[DataError], str] = {
    UnknownLabelError: "with unknown labels",
    MismatchedSizeError: "of two sizes",
}


class Facts(NamedTuple):
    """What is noted of one pair of image and mask."""

    size: tuple[int, int]  # height and width
    pixels: np.ndarray  # (256,), the number of pixels with each label
    content: bytes  # a hash of the image's pixels


class Survey:
    """What is in one split. Every pair is read, whatever is wrong with the ones before it.

    Attributes:
        errors: of the pairs that cannot be used.
        good: indices of the others.
        sizes: how many images there are of each (height, width).
        pixels, images: (256,), how many pixels have each label, and how many masks.
        contents: for the hash of each image, the id of the first one that has it.
    """

    def __init__(self, split: str, data: SegmentationDataset) -> None:
        self.split, self.data = split, data
        self.errors: list[DataError] = []
        self.good: list[int] = []
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.pixels = np.zeros(256, np.int64)
        self.images = np.zeros(256, np.int64)
        self.contents: dict[bytes, str] = {}
        # Threads are enough, since Pillow releases Python's lock while it decodes.
        found = thread_map(self._read, range(len(data)), desc=split, leave=False, disable=None)
        for index, facts in enumerate(found):
            if isinstance(facts, DataError):
                self.errors.append(facts)
                continue
            self.good.append(index)
            self.sizes[facts.size] += 1
            self.pixels += facts.pixels
            self.images += facts.pixels > 0
            self.contents.setdefault(facts.content, data.ids[index])

    def _read(self, index: int) -> Facts | DataError:
        try:
            sample = self.data[index]
        except DataError as error:
            return error
        height, width = sample["mask"].shape
        image = sample["image"].permute(1, 2, 0).numpy().tobytes()  # (3, H, W) -> (H, W, 3)
        # The size is part of the hash: images of 2×8 and 4×4 pixels can have the same bytes.
        content = hashlib.blake2b(image, digest_size=16, salt=f"{height}×{width}".encode())
        pixels = np.bincount(sample["mask"].numpy().ravel(), minlength=256)
        return Facts((height, width), pixels, content.digest())

    def describe(self) -> Iterator[str]:
        """Lines that say how many pairs there are, what is wrong with some, and their sizes."""
        kinds = Counter(KINDS.get(type(error), "missing or broken") for error in self.errors)
        bad = "".join(f", {number} {kind}" for kind, number in kinds.items())
        yield f"{self.split}: {len(self.data)} pairs, {len(self.good)} good{bad}"
        if self.sizes:
            heights, widths = zip(*self.sizes, strict=True)
            common = ", ".join(f"{w}×{h} ({n})" for (h, w), n in self.sizes.most_common(3))
            yield (
                f"  {min(widths)} to {max(widths)} wide, {min(heights)} to {max(heights)} high; "
                f"most often {common}"
            )

    def samples(self) -> list[Sample]:
        """Some of the good pairs, from all over the split."""
        step = max(1, len(self.good) // PICTURED)
        return [self.data[index] for index in self.good[::step][:PICTURED]]


def class_table(surveys: Sequence[Survey], data: SegmentationDataset) -> Iterator[str]:
    """The lines of a table: pixels, share and images of each class in each split."""
    names = {k: one_line(name, 60) for k, name in enumerate(data.classes)} | {data.void: "void"}
    wide = max(map(len, names.values()))
    heads = (f"{s.split + ' pixels':>18} {'%':>6} {'images':>7}" for s in surveys)
    yield f"{'label':>5} {'class':{wide}}{''.join(heads)}"
    for k, name in names.items():
        line = f"{k:>5} {name:{wide}}"
        for s in surveys:
            share = 100 * s.pixels[k] / max(s.pixels.sum(), 1)
            line += f"{s.pixels[k]:>18,} {share:>6.2f} {s.images[k]:>7,}"
        yield line
    for s in surveys:
        unseen = [names[k] for k in range(len(data.classes)) if not s.pixels[k]]
        if unseen:
            yield f"never in {s.split}: {', '.join(unseen)}"


def images_in_both(train: Survey, val: Survey) -> Iterator[DataError]:
    """An error for the ids that training and validation share, and one for each equal image."""
    try:
        check_disjoint(train.data.ids, val.data.ids)
    except DataError as error:
        yield error
    for content, name in train.contents.items():
        other = val.contents.get(content, name)
        if other != name:  # an id that is in both splits is in the error above
            yield DataError(f"{name} of {train.split} and {other} of {val.split}: one picture")


def draw(samples: Sequence[Sample], data: SegmentationDataset, width: int = 300) -> Image.Image:
    """A row of image | label | overlay for each sample, and a legend of all classes in them.

    Args:
        width: of a column, in pixels. A tall image is limited to a height of three widths.
    """
    rows: list[list[Cell]] = []
    found: set[int] = set()
    for sample in samples:
        labels = labels_in(sample["mask"])
        found.update(labels)
        names = ", ".join(data.classes[k] for k in labels if k != data.void)
        image = resize_to_fit(sample["image"], width, 3 * width)  # (3, h, width)
        mask = resize_to_fit(sample["mask"], width, 3 * width)  # (h, width)
        colours = colourise(mask, data.palette, data.void)  # (3, h, width)
        both = overlay(image, mask, data.palette)
        rows.append([(image, sample["id"]), (colours, names), (both, "")])
    legend = legend_entries(found, data.classes, data.palette, data.void)
    headings = ("image", "label", "overlay")
    return draw_sheet(rows, headings=headings, legend=legend, width=width)


def check(datamodule: "SegmentationDataModule", output: Path) -> int:
    """Read training and validation data, print what is found, and draw some samples.

    Args:
        datamodule: opens the splits.
        output: the folder for data_check.png; it is made if there are samples to draw.

    Returns:
        The number of errors.
    """
    surveys: list[Survey] = []
    errors: list[DataError] = []
    for split in (datamodule.train_split, datamodule.val_split):
        try:
            with missing_allowed():  # a missing file is an error of its pair, not of the split
                data = datamodule.open(split, download=datamodule.download)
        except DataError as error:
            errors.append(error)
            continue
        survey = Survey(split, data)
        surveys.append(survey)
        errors += survey.errors
        print(*survey.describe(), sep="\n")
    if len(surveys) == 2:
        errors += images_in_both(*surveys)
    samples = [sample for survey in surveys for sample in survey.samples()]
    if samples:
        data = surveys[0].data
        print(*class_table(surveys, data), sep="\n")
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(output / "data_check.png") as part:
            draw(samples, data).save(part, "PNG")
        print(f"some samples: {output / 'data_check.png'}")
    return _print_errors(errors)


def _print_errors(errors: Sequence[DataError]) -> int:
    """Print each error once and in one line, but no more than `SHOWN`; return their number."""
    texts = (" ".join(map(str.strip, str(error).splitlines())) for error in errors)
    lines = list(dict.fromkeys(one_line(text, 1000) for text in texts))
    for line in lines[:SHOWN]:
        print(f"error: {line}")
    if len(lines) > SHOWN:
        print(f"… and {len(lines) - SHOWN} more")
    print(f"errors: {len(lines)}" if lines else "no errors")
    return len(lines)


def main(arguments: Sequence[str]) -> None:
    """Compose the settings as train.py does, and check the data that they name."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    output = Path("check")
    overrides = ["data.download=false"]
    for argument in arguments:
        if argument.startswith("output="):
            output = Path(argument.removeprefix("output="))
        elif not argument.startswith("resume="):  # a command line of train.py may have it
            overrides.append(cli.quoted(argument))
    with cli.short_messages():
        if check(cli.build(cli.compose(overrides), "data"), output):
            raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
