"""Read every pair of a data set before a training run does, and say what is wrong with it.

    python -m fcn.datasets.check data=voc2012 data.root=/data
    python -m fcn.datasets.check data=folder data.root=my_data "data.dataset.classes=[ground,cat]"

It takes the settings that train.py takes (`experiment=` too, and `data.limit=` for a first look at
a part of the data), and `output=FOLDER` (default: check) for data_check.png, a picture of some
samples as image | label | overlay. It downloads nothing unless it is given data.download=true.

It exits with 1 if it finds an error, such as a file that is missing or broken, an unknown label, an
image and a mask of different sizes, values outside of their range, or an image in both train and
val. The last is found by its id, or by its content: two files are one image if their pixels are
equal once decoded. docs/data.md lists all errors.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from fcn import cli
from fcn.datasets import Sample, SegmentationDataset, reading
from fcn.datasets.survey import Survey, balanced_weights, find_errors
from fcn.datasets.value_range import RangeError, clipping
from fcn.errors import DataError
from fcn.figures.legend import legend_entries, one_line
from fcn.figures.masks import colourise, labels_in, overlay, resize_to_fit
from fcn.figures.panels import Cell, draw_sheet
from fcn.files import atomic_write, create_folder, expanded

if TYPE_CHECKING:
    from fcn.datamodule import SegmentationDataModule

SHOWN = 40  # errors that are printed; of more, only the number
PICTURED = 3  # samples of each split in data_check.png
# The words for each kind of error in the summary of a split.
KINDS: dict[type[DataError], str] = {
    reading.UnknownLabelError: "with unknown labels",
    reading.MismatchedSizeError: "of two sizes",
    RangeError: "of another type or range",
}


def describe(survey: Survey) -> Iterator[str]:
    """Lines that say how many pairs there are, what is wrong with some, their sizes and types."""
    kinds = Counter(KINDS.get(type(error), "missing or broken") for error in survey.errors)
    bad = "".join(f", {number} {kind}" for kind, number in kinds.items())
    yield f"{survey.split}: {len(survey.data)} pairs, {len(survey.good)} good{bad}"
    sizes = Counter(pair.size for pair in survey.pairs.values() if pair.size is not None)
    if sizes:
        heights, widths = zip(*sizes, strict=True)
        common = ", ".join(f"{w}×{h} ({n})" for (h, w), n in sizes.most_common(3))
        yield (
            f"  {min(widths)} to {max(widths)} wide, {min(heights)} to {max(heights)} high; "
            f"most often {common}"
        )
    facts = [fact for fact in survey.facts.values() if fact.type != "8-bit"]
    if facts:
        low, high = min(f.lowest for f in facts), max(f.highest for f in facts)
        yield f"  images with {facts[0].type} values, {low:g} to {high:g}"


def some_samples(survey: Survey) -> list[Sample]:
    """A few of the good pairs: first those that EXIF turns, then others from all over the split."""
    step = max(1, len(survey.good) // PICTURED)
    turned = [index for index in survey.good if survey.pairs[index].turned]
    chosen = list(dict.fromkeys([*turned, *survey.good[::step]]))
    return [survey.data[index] for index in chosen[:PICTURED]]


def class_table(surveys: Sequence[Survey], train_split: str) -> Iterator[str]:
    """The lines of a table: pixels, share and images of each class in each split.

    The weights of the classes follow if the first split is the one to train on.
    """
    data = surveys[0].data
    names = {k: one_line(name, 60) for k, name in enumerate(data.classes)} | {data.void: "void"}
    wide = max(map(len, names.values()))
    heads = (f"{s.split + ' pixels':>18} {'%':>6} {'images':>7}" for s in surveys)
    yield f"{'label':>5} {'class':{wide}}{''.join(heads)}"
    for k, name in names.items():
        line = f"{k:>5} {name:{wide}}"
        for s in surveys:
            share = 100 * s.pixels[k] / max(s.pixels.sum(), 1)
            line += f"{s.pixels[k]:>18,} {share:>6.2f} {s.masks[k]:>7,}"
        yield line
    if surveys[0].split == train_split:
        weights = balanced_weights(surveys[0].pixels[: len(data.classes)])
        yield f"model.class_weights=balanced would be [{', '.join(f'{w:.4g}' for w in weights)}]"
    for s in surveys:
        unseen = [one_line(name, 60) for name in s.unseen_classes()]
        if unseen:
            yield f"warning: never in {s.split}: {', '.join(unseen)}"


def images_in_both(train: Survey, val: Survey) -> Iterator[DataError]:
    """An error for the ids that training and validation share, and one for each equal image."""
    try:
        reading.check_disjoint(train.data.ids, val.data.ids)
    except DataError as error:
        yield error
    first = {pair.content: train.data.ids[i] for i, pair in reversed(train.pairs.items())}
    for index, pair in val.pairs.items():
        name, other = first.get(pair.content), val.data.ids[index]
        if pair.content and name not in (None, other):  # an id in both is in the error above
            yield DataError(
                f"{name} of {train.split} and {other} of {val.split} are the same picture: take it "
                "out of one of the splits"
            )


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

    Each error is printed once and in one line, but no more than `SHOWN` of them.

    Args:
        datamodule: opens the splits.
        output: the folder for data_check.png. A new one is not kept if there are no samples.

    Raises:
        ConfigError: the folder cannot be written.

    Returns:
        The number of errors.
    """
    with create_folder(output, "data_check.png"):
        errors = _report(datamodule, output)
    texts = (" ".join(map(str.strip, str(error).splitlines())) for error in errors)
    lines = list(dict.fromkeys(one_line(text, 1000) for text in texts))  # each once
    for line in lines[:SHOWN]:
        print(f"error: {line}")
    if len(lines) > SHOWN:
        print(f"… and {len(lines) - SHOWN} more")
    print(f"errors: {len(lines)}" if lines else "no errors")
    return len(lines)


def _report(datamodule: "SegmentationDataModule", output: Path) -> list[DataError]:
    """Read both splits, print and draw what is found; return what is wrong."""
    surveys: list[Survey] = []
    errors: list[DataError] = []
    for split in (datamodule.train_split, datamodule.val_split):
        try:
            # A missing file is an error of its pair, and not of the split.
            with reading.missing_allowed():
                data = datamodule.open(split, download=datamodule.download)
        except DataError as error:
            errors.append(error)
            continue
        surveys.append(Survey(split, data, images=True))
        print(*describe(surveys[-1]), sep="\n")
    if len(surveys) == 2:
        train, val = surveys
        errors += find_errors(train, val, limit=datamodule.limit)
        errors += images_in_both(train, val)
        warning = clipping(train.facts | val.facts, train.value_range)
        if warning:
            print(warning)
    else:
        errors += [error for survey in surveys for error in survey.errors]
    samples = [sample for survey in surveys for sample in some_samples(survey)]
    if samples:
        print(*class_table(surveys, datamodule.train_split), sep="\n")
        with atomic_write(output / "data_check.png") as part:
            draw(samples, surveys[0].data).save(part, "PNG")
        print(f"some samples: {output / 'data_check.png'}")
        turned = sum(pair.turned for survey in surveys for pair in survey.pairs.values())
        if turned:
            print(
                f"warning: {turned} images are turned by EXIF and their masks are not: look at "
                "data_check.png whether they fit"
            )
    return errors


def main(arguments: Sequence[str]) -> None:
    """Compose the settings as train.py does, and check the data that they name."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    output: str | None = None
    overrides = ["data.download=false"]
    with cli.short_messages():
        for argument in arguments:
            if argument.startswith("output="):
                output = cli.path_in(argument)
            elif not argument.startswith("resume="):  # a command line of train.py may have it
                overrides.append(argument)
        if check(cli.build(cli.compose(overrides), "data"), expanded(output or "check")):
            raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
