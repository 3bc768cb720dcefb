"""report.html: an evaluation, or the comparison of two, as one file that needs no network.

    python evaluate.py ckpt=runs/.../checkpoints/best.ckpt report.images=60
    python evaluate.py "compare=[runs/A,runs/B]"

This file prepares plain data. The page, its style and its script are Jinja2 templates in
templates/, which escape every value that comes from outside: names of classes and images, paths,
the command. The file is ASCII, so that it is shown correctly whatever encoding a server or an
editor assumes. report_images.py makes its pictures.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fcn.checkpoint import MODEL_FOLDER
from fcn.datasets import SegmentationDataset
from fcn.evaluation.boundaries import WIDTHS
from fcn.evaluation.report_images import choose_images, describe_image, encode
from fcn.evaluation.result import Result
from fcn.figures.masks import Palette
from fcn.files import write_text

LARGEST = 19_500_000  # bytes of the file: below 20 MB, whether these are 10^6 or 2^20 bytes
AROUND = 4000  # bytes to keep free for titles and texts around the images
# The longest side of a picture in pixels, and its WebP quality. For each image, the first of these
# is used with which the image takes no more than its share of the file.
SIZES = ((480, 82), (400, 76), (320, 70), (240, 60), (160, 50), (96, 35))
LEFT, RIGHT, TOP, BOTTOM = 34, 344, 16, 186  # edges of the boundary curve, in units of its SVG


def percent(value: float, sign: str = "") -> str:
    """A fraction in percent with one decimal; `sign="+"` shows the sign of positive ones too.

    NaN, where there was nothing to divide by, is a dash.
    """
    return "–" if math.isnan(value) else f"{100 * value:{sign}.1f}".replace("-", "−")


TEMPLATES = Environment(
    loader=PackageLoader("fcn.evaluation"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"percent": percent, "sortable": "{:.6f}".format}
TEMPLATES.tests["absent"] = math.isnan


def write_report(
    path: Path, results: Sequence[Result], data: SegmentationDataset, *, images: int, command: str
) -> None:
    """Write one evaluation, or the comparison of two on the same images.

    Args:
        path: the file to write.
        results: one, or A and B, with predictions if `images` is not 0.
        data: the images that were scored; those to show are read again.
        images: how many to show at most, a third each of the worst, the median and the best. They
            are as large as the limit on the file lets them be.
        command: the command line that made this.

    Raises:
        WriteError: the file cannot be written.
    """
    names = run_names([Path(result.metrics["checkpoint"]) for result in results])
    lettered = {"": results[0]} if len(results) == 1 else dict(zip("AB", results, strict=True))
    content = {
        "title": " against ".join(names) if len(names) > 1 else f"Evaluation of {names[0]}",
        "results": lettered,
        "curve": _boundary_curve(lettered),
        "void": data.void,
        "command": command,
        **_classes(results, data.palette),
    }
    page = TEMPLATES.get_template("report.html")
    empty = page.render(content, gallery={"wanted": 1, "chosen": 1, "shown": 0, "groups": []})
    gallery = _gallery(lettered, data, images, LARGEST - len(_ascii_html(empty)))
    write_text(path, _ascii_html(page.render(content, gallery=gallery)))


def run_names(checkpoints: Sequence[Path]) -> list[str]:
    """The `run_name` of each of one or two checkpoints.

    Where the two would have the same, it is the end of the path, as long as it takes to tell them
    apart: best.ckpt and last.ckpt of one run, or A/export/best and B/export/best.
    """
    names = [run_name(path) for path in checkpoints]
    paths = [_handed_on(path).absolute().parts for path in checkpoints]
    length = 0
    while len({*names}) < len({*paths}):
        length += 1
        names = [Path(*parts[-length:]).as_posix() for parts in paths]
    return names


def run_name(checkpoint: Path) -> str:
    """`<name>/<date_time>` of a run's checkpoint, or the name of the file or folder itself."""
    path = _handed_on(checkpoint)
    parents = path.absolute().parents
    if parents[0].name == "checkpoints" and len(parents) > 3:
        return f"{parents[2].name}/{parents[1].name}"
    return path.name


def _handed_on(checkpoint: Path) -> Path:
    """The folder that export.py wrote, if these are the weights in one. Others stay as they are."""
    return checkpoint.parent if checkpoint.name == MODEL_FOLDER[0] else checkpoint


def _ascii_html(html: str) -> Markup:
    """HTML with a character reference for each character beyond ASCII.

    Lone surrogates get one too: names of files need not be UTF-8.
    """
    return Markup(html.encode("ascii", "xmlcharrefreplace").decode("ascii"))


def _gallery(
    results: Mapping[str, Result], data: SegmentationDataset, wanted: int, room: int
) -> dict[str, Any]:
    """The images of the report: a third each of the worst, the median and the best.

    In a comparison, images are ranked by the change of their mean IoU from A to B. The more images
    there are, the smaller are their pictures. An image that is too large even in the smallest size
    is left out.

    Args:
        results: one result under "", or two under "A" and "B".
        data: the images that were scored.
        wanted: how many images to show at most.
        room: the bytes that they may take together.

    Returns:
        `groups` of (title, HTML of each figure), how many images were `wanted`, how many `chosen`,
        which have a score, and how many are `shown`.
    """
    miou = np.array([[row[2] for row in result.images.rows] for result in results.values()])
    titles, ranking = ("Worst", "Median", "Best"), miou[0]  # (N,)
    if len(results) > 1:
        titles, ranking = ("B loses most", "Median", "B gains most"), miou[1] - miou[0]
    chosen = choose_images(ranking.tolist(), wanted)
    count = sum(map(len, chosen))
    share = (room - AROUND) // max(1, count)  # bytes for each image
    groups = []
    for title, indices in zip(titles, chosen, strict=True):
        figures = [_figure(results, data, index, share) for index in indices]
        groups.append((title, [figure for figure in figures if figure]))
    shown = sum(len(html) for _, html in groups)
    return {"groups": groups, "wanted": wanted, "chosen": count, "shown": shown}


def _figure(
    results: Mapping[str, Result], data: SegmentationDataset, index: int, largest: int
) -> Markup:
    """The HTML of one image in the best quality that fits into `largest` bytes; empty if none does.

    Args:
        index: the place of the image in `data`.
    """
    render: Any = TEMPLATES.get_template("macros.html").module
    image = describe_image(results, data, index)
    for side, quality in SIZES:
        pictures = {
            key: encode(f"i{index}-{key}", alt, pixels, side, quality)
            for key, (alt, pixels) in image["pictures"].items()
        }
        html = _ascii_html(render.figure(image | {"pictures": pictures}))
        if len(html) <= largest:
            return html
    return Markup()


def _classes(results: Sequence[Result], palette: Palette) -> dict[str, Any]:
    """The table of classes: the names of the columns that show bars, and a row for each class."""
    confusion = results[-1].confusion.double().cpu().numpy()  # (K, K)
    correct, labelled = confusion.diagonal(), confusion.sum(1)  # (K,)
    ious = [list(result.metrics["iou"].values()) for result in results]
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN
        accuracy, precision = correct / labelled, correct / confusion.sum(0)
        share = labelled / labelled.sum()
    bars = {"IoU": ious[0], "accuracy": accuracy, "precision": precision}
    if len(results) > 1:
        bars = {"IoU, A": ious[0], "IoU, B": ious[1]}

    taken = confusion / np.maximum(labelled, 1)[:, None]  # (K, K): shares of each label
    np.fill_diagonal(taken, 0)
    names = list(results[0].metrics["iou"])
    rows = [
        {
            "name": name,
            "colour": palette[k],
            "bars": [values[k] for values in bars.values()],
            "share": share[k],
            "taken_for": names[taken[k].argmax()],
            "taken_share": taken[k].max(),
        }
        for k, name in enumerate(names)
    ]
    return {"bars": list(bars), "classes": rows}


def _boundary_curve(results: Mapping[str, Result]) -> dict[str, Any] | None:
    """Mean IoU near boundaries, as coordinates of an SVG; None if no label has a boundary."""
    # The horizontal axis is logarithmic.
    x = {str(w): round(LEFT + (RIGHT - LEFT) * math.log(w, WIDTHS[-1]), 1) for w in WIDTHS}

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * value, 1)

    lines = []
    for letter, result in results.items():
        near = result.metrics["boundary_miou"].items()
        points = [(x[width], y(value)) for width, value in near if not math.isnan(value)]
        if not points:
            return None
        all_pixels = y(result.metrics["miou"])
        lines.append({"letter": letter, "points": points, "all_pixels": all_pixels})
    ticks = [{"percent": percent, "y": y(percent / 100)} for percent in range(0, 101, 20)]
    return {"ticks": ticks, "widths": x, "lines": lines}
