"""confusion.csv and images.csv, the tables of an evaluation."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fcn.files import write_text


def write_confusion(path: Path, confusion: Tensor, class_names: Sequence[str]) -> None:
    """The confusion matrix in pixels: a row for each label, a column for each prediction.

    Args:
        path: the file to write.
        confusion: (K, K); rows are labels.
        class_names: of the K classes.
    """
    names = [escape_formula(name) for name in class_names]
    rows = ([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))
    _write(path, ["label", *names], rows)


def write_images(path: Path, images: Iterable[tuple[str, float, float]]) -> None:
    """A row for each image. Its cells are empty where all pixels of the image are void.

    Args:
        path: the file to write.
        images: (id, pixel accuracy, mean IoU) of each.
    """
    rows = (
        [escape_formula(name), *("" if math.isnan(score) else score for score in scores)]
        for name, *scores in images
    )
    _write(path, ["id", "pixel_acc", "miou"], rows)


def escape_formula(name: str) -> str:
    """A name that a spreadsheet shows as it is, where it would compute one that begins with "=".

    OWASP's advice against "CSV injection": an apostrophe in front.
    """
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(head)
    writer.writerows(rows)
    write_text(path, text.getvalue())
