"""Read every pair of a data set before a training run does, and say what is wrong with it.

    python -m fcn.datasets.check data=voc2012 data.root=/data
    python -m fcn.datasets.check data=folder data.root=my_data 'data.dataset.classes=[ground,cat]'

Takes what train.py takes (`experiment=` too, and `data.limit=` for a first look), and
`output=FOLDER` (default: check) for data_check.png: some samples as image | label | both. Downloads
nothing unless told data.download=true. Exits 1 if there is an error: a file that is missing or
broken, an unknown label, sizes that differ, or an image in both train and val, be it by id or by
content (equal pixels once decoded, whatever the files are).
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from fcn.config import check_values, short_messages
from fcn.datasets import Sample, SegmentationDataset
from fcn.datasets.reading import (
    MismatchedSizeError,
    UnknownLabelError,
    check_disjoint,
    missing_allowed,
)
from fcn.errors import DataError
from fcn.visualize import colourise, one_line, overlay

SHOWN = 40  # lines of errors
PICTURED = 3  # samples of each split
KINDS = {UnknownLabelError: "with unknown labels", MismatchedSizeError: "of two sizes"}


class Survey:
    """All of one split, read; an error in one pair does not keep the rest from being read."""

    def __init__(self, split: str, data: SegmentationDataset) -> None:
        self.split, self.data = split, data
        self.errors: list[DataError] = []
        self.good: list[int] = []  # indices of pairs without an error
        self.sizes: Counter[tuple[int, int]] = Counter()  # (height, width)
        self.pixels = np.zeros(256, np.int64)  # of each label
        self.images = np.zeros(256, np.int64)  # with each label
        self.contents: dict[bytes, str] = {}  # hash of an image: id
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow frees the GIL
            found = pool.map(self._read, range(len(data)))
            for index, pair in enumerate(tqdm(found, split, len(data), leave=False, disable=None)):
                if isinstance(pair, DataError):
                    self.errors.append(pair)
                    continue
                size, pixels, content = pair
                self.good.append(index)
                self.sizes[size] += 1
                self.pixels += pixels
                self.images += pixels > 0
                self.contents.setdefault(content, data.ids[index])

    def _read(self, index: int) -> tuple[tuple[int, int], np.ndarray, bytes] | DataError:
        try:
            sample = self.data[index]
        except DataError as error:
            return error
        height, width = sample["mask"].shape
        image = sample["image"].permute(1, 2, 0).numpy().tobytes()  # (H, W, 3)
        content = hashlib.blake2b(image, digest_size=16, salt=f"{height}×{width}".encode())
        pixels = np.bincount(sample["mask"].numpy().ravel(), minlength=256)
        return (height, width), pixels, content.digest()

    def describe(self) -> Iterator[str]:
        """Counts and sizes, as lines."""
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


def table(surveys: list[Survey], data: SegmentationDataset) -> Iterator[str]:
    """Pixels and images of each class in each split, as lines."""
    names = {k: one_line(name, 60) for k, name in enumerate(data.classes)} | {data.void: "void"}
    wide = max(map(len, names.values()))
    heads = (f"{s.split + ' pixels':>18} {'%':>6} {'images':>7}" for s in surveys)
    yield f"{'label':>5} {'class':{wide}}{''.join(heads)}"
    for k, name in names.items():
        shares = (100 * s.pixels[k] / max(s.pixels.sum(), 1) for s in surveys)
        cells = (
            f"{s.pixels[k]:>18,} {share:>6.2f} {s.images[k]:>7,}"
            for s, share in zip(surveys, shares, strict=True)
        )
        yield f"{k:>5} {name:{wide}}{''.join(cells)}"
    for s in surveys:
        unseen = [names[k] for k in range(len(data.classes)) if not s.pixels[k]]
        if unseen:
            yield f"never in {s.split}: {', '.join(unseen)}"


def shared(train: Survey, val: Survey) -> Iterator[DataError]:
    """What training and validation have in common, by id and by content."""
    try:
        check_disjoint(train.data.ids, val.data.ids)
    except DataError as error:
        yield error
    for content, name in train.contents.items():
        other = val.contents.get(content, name)
        if other != name:  # one id in both has been told
            yield DataError(f"{name} of {train.split} and {other} of {val.split}: one picture")


def draw(samples: list[Sample], data: SegmentationDataset, width: int = 300) -> Image.Image:
    """A row for each sample: image | label | both, under its classes in their colours."""
    rows = []
    for sample in samples:
        image, mask = sample["image"], sample["mask"]
        colours = colourise(mask, data.palette, data.void)
        strip = torch.cat((image, colours, overlay(image, mask, data.palette)), 2)  # (3, H, 3 W)
        height = min(max(1, round(width * image.shape[1] / image.shape[2])), 3 * width)
        picture = Image.fromarray(strip.permute(1, 2, 0).numpy()).resize((3 * width, height))
        row = Image.new("RGB", (3 * width, height + 24), "white")
        row.paste(picture, (0, 24))
        pen, left = ImageDraw.Draw(row), 4.0
        labels = [k for k in mask.unique().tolist() if k != data.void]
        for text, colour in [(sample["id"], None), *((data.classes[k], k) for k in labels)]:
            text = one_line(text, 40)
            if colour is not None:
                pen.rectangle((left, 6, left + 11, 17), data.palette[colour])
            pen.text((left + 15, 12), text, "black", anchor="lm")
            left += 30 + pen.textlength(text)
        rows.append(row)
    page = Image.new("RGB", (3 * width, sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        page.paste(row, (0, sum(above.height for above in rows[:number])))
    return page


def check(config: dict[str, Any], make: Callable[..., SegmentationDataset], output: Path) -> int:
    """Look at training and validation data, print what is found; the number of errors.

    Args:
        config: the data settings, resolved.
        make: opens a split, from (split, root, download).
        output: the folder for data_check.png.
    """
    surveys: list[Survey] = []
    errors: list[DataError] = []
    for split in (config["train_split"], config["val_split"]):
        try:
            with missing_allowed():
                data = make(split=split, root=config["root"], download=config["download"])
        except DataError as error:
            errors.append(error)
            continue
        del data.ids[config["limit"] or len(data) :]
        surveys.append(Survey(split, data))
        errors += surveys[-1].errors
        print(*surveys[-1].describe(), sep="\n")
    if len(surveys) == 2:
        errors += shared(*surveys)
    samples = []
    for s in surveys:
        step = max(1, len(s.good) // PICTURED)
        samples += [s.data[index] for index in s.good[::step][:PICTURED]]
    if samples:
        print(*table(surveys, data), sep="\n")
        output.mkdir(parents=True, exist_ok=True)
        draw(samples, data).save(output / "data_check.png")
        print(f"some samples: {output / 'data_check.png'}")
    texts = (one_line(" ".join(map(str.strip, str(e).splitlines())), 1000) for e in errors)
    lines = list(dict.fromkeys(texts))
    print(*(f"error: {line}" for line in lines[:SHOWN]), sep="\n", end="\n" if lines else "")
    if len(lines) > SHOWN:
        print(f"… and {len(lines) - SHOWN} more")
    print(f"errors: {len(lines)}" if lines else "no errors")
    return len(lines)


def main(arguments: list[str]) -> None:
    """Compose the settings as train.py does, and check the data they name."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    conf = Path(__file__).resolve().parents[2] / "conf"
    output = ["check", *(a.removeprefix("output=") for a in arguments if a.startswith("output="))]
    overrides = [a for a in arguments if not a.startswith(("output=", "resume="))]
    with short_messages(HydraException, OmegaConfBaseException):
        with initialize_config_dir(str(conf), version_base="1.3"):
            cfg = compose("train", ["data.download=false", *overrides])
        config: Any = OmegaConf.to_container(cfg.data, resolve=True)
        check_values({"data": config})
        make = instantiate(cfg.data.dataset, _convert_="all")
        if check(config, make, Path(output[-1])):
            raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
