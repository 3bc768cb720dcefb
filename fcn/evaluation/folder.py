"""The folder of an evaluation: metrics.json, confusion.csv, images.csv and report.html.

    metrics = write_folder(output, [result], data, images=12, command="python evaluate.py")

This is the last step of evaluate.py. report.py makes the report.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fcn.datasets import SegmentationDataset
from fcn.evaluation.report import write_report
from fcn.evaluation.result import Result, compare
from fcn.files import write_csv, write_json, writing

FILES = ("metrics.json", "confusion.csv", "images.csv", "report.html")


def write_folder(
    output: Path, results: Sequence[Result], data: SegmentationDataset, *, images: int, command: str
) -> dict[str, Any]:
    """Write one evaluation, or the comparison of two, which has no CSV files.

    Args:
        output: the folder, which exists.
        results: one, or A and B.
        data, images, command: for `fcn.evaluation.report.write_report`.

    Returns:
        What metrics.json holds.

    Raises:
        WriteError: something cannot be written.
    """
    if len(results) > 1 and _holds_evaluation(output):  # its tables are of another checkpoint
        for name in ("confusion.csv", "images.csv"):
            with writing(output / name):
                (output / name).unlink(missing_ok=True)
    metrics = results[0].metrics if len(results) == 1 else compare(*results)
    write_json(output / "metrics.json", metrics)
    if len(results) == 1:
        write_confusion(output / "confusion.csv", results[0].confusion, list(metrics["iou"]))
        write_images(output / "images.csv", results[0].images.rows)
    write_report(output / "report.html", results, data, images=images, command=command)
    return metrics


def _holds_evaluation(folder: Path) -> bool:
    """Whether the metrics.json in a folder is that of an evaluation, which has tables beside it.

    A comparison writes no tables. If the metrics.json is that of a comparison or of another
    program, files with the names of the tables are the user's own.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(metrics, dict) and {"checkpoint", "boundary_miou"} <= metrics.keys()


def write_confusion(path: Path, confusion: Tensor, class_names: Sequence[str]) -> None:
    """The confusion matrix in pixels: a row for each label, a column for each prediction.

    Args:
        path: the file to write.
        confusion: (K, K); rows are labels.
        class_names: of the K classes.
    """
    names = [escape_formula(name) for name in class_names]
    rows = ([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))
    write_csv(path, [["label", *names], *rows])


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
    write_csv(path, [["id", "pixel_acc", "miou"], *rows])


def escape_formula(name: str) -> str:
    """Put an apostrophe before a name that a spreadsheet would compute, such as "=1+1".

    This is OWASP's advice against "CSV injection".
    """
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
