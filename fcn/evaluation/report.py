"""report.html: an evaluation, or the comparison of two, as one file that needs no network.

    python evaluate.py ckpt=runs/.../checkpoints/best.ckpt report.images=60
    python evaluate.py compare=[runs/A,runs/B]

This file prepares plain data. The page, its style and its script are Jinja2 templates in
templates/, which escape every value that comes from outside: names of classes and images, paths,
the command. The file is ASCII, so that no editor and no server can get its characters wrong. Its
pictures are made in report_images.py.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fcn.datasets import SegmentationDataset
from fcn.evaluation.report_images import make_gallery
from fcn.evaluation.result import Result
from fcn.figures.masks import Palette
from fcn.files import write_text

LARGEST = 19_500_000  # bytes of the file: below 20 MB, whether these are 10^6 or 2^20 bytes
DENSE = 32  # with more classes, cells of the confusion matrix are small and show no numbers
LEFT, RIGHT, TOP, BOTTOM = 34, 344, 16, 186  # edges of the boundary curve, in units of its SVG


def write_report(
    path: Path,
    results: Sequence[Result],
    data: SegmentationDataset,
    *,
    images: int,
    command: str,
) -> None:
    """Write one evaluation, or the comparison of two on the same images.

    Args:
        path: the file to write.
        results: one, or A and B, with predictions if `images` is not 0.
        data: the images that were scored; those to show are read again.
        images: how many to show at most, a third each of the worst, the median and the best. They
            are as large as the limit on the file lets them be.
        command: that made this, as it was typed.

    Raises:
        WriteError: the file cannot be written.
    """
    letters = ("A", "B") if len(results) > 1 else ("",)
    names = [run_name(Path(result.metrics["checkpoint"])) for result in results]
    content = {
        "title": " against ".join(names) if len(names) > 1 else f"Evaluation of {names[0]}",
        "results": [
            {"letter": letter, "metrics": result.metrics}
            for letter, result in zip(letters, results, strict=True)
        ],
        **_classes(results, data.palette),
        **_boundaries(results, letters),
        "confusion": [_heat_map(*pair) for pair in zip(results, letters, strict=True)],
        "void": data.void,
        "command": command,
    }
    templates = _templates()
    page, figure = templates.get_template("report.html"), templates.get_template("macros.html")
    empty = page.render(content, gallery={"chosen": 1, "shown": 0, "groups": []})
    gallery = make_gallery(
        results,
        data,
        wanted=images,
        budget=LARGEST - len(ascii_html(empty)),
        render=lambda image: ascii_html(figure.module.figure(image)),  # type: ignore[attr-defined]
    )
    write_text(path, ascii_html(page.render(content, gallery=gallery)))


def run_name(checkpoint: Path) -> str:
    """`<name>/<date_time>` of a run's checkpoint, or the name of the file itself."""
    parents = checkpoint.absolute().parents
    if parents[0].name == "checkpoints" and len(parents) > 3:
        return f"{parents[2].name}/{parents[1].name}"
    return checkpoint.name


def ascii_html(html: str) -> Markup:
    """HTML with a character reference for each character beyond ASCII.

    Lone surrogates get one too: names of files need not be UTF-8.
    """
    return Markup(html.encode("ascii", "xmlcharrefreplace").decode("ascii"))


def absent(value: float | None) -> bool:
    """Whether there is no score, because there was nothing to divide by."""
    return value is None or math.isnan(value)


def percent(value: float | None, sign: str = "") -> str:
    """A fraction in percent with one decimal; `sign="+"` shows the sign of positive ones too."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:{sign}.1f}".replace("-", "−")


@cache  # compiling them takes longer than filling them in
def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates"), encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"percent": percent, "sortable": "{:.6f}".format}
    templates.tests["absent"] = absent
    return templates


def _classes(results: Sequence[Result], palette: Palette) -> dict[str, Any]:
    """The table of classes: `columns` with their kind, and in `classes` a row for each class."""
    confusion = results[-1].confusion.double().cpu().numpy()  # (K, K)
    correct, labelled = confusion.diagonal(), confusion.sum(1)  # (K,)
    wrong = confusion - np.diag(correct)
    ious = [np.array(list(result.metrics["iou"].values()), np.float64) for result in results]
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN
        accuracy, precision = correct / labelled, correct / confusion.sum(0)
        share = labelled / labelled.sum()
    if len(results) > 1:
        a, b = ious
        columns = [("IoU, A", "bar", a), ("IoU, B", "bar", b), ("B − A", "change", b - a)]
    else:
        columns = [("IoU", "bar", ious[0]), ("accuracy", "bar", accuracy)]
        columns.append(("precision", "bar", precision))
    columns.append(("of all pixels", "plain", share))

    names = list(results[0].metrics["iou"])
    rows = []
    for k, name in enumerate(names):
        other = int(wrong[k].argmax())
        rows.append(
            {
                "name": name,
                "colour": palette[k],
                "cells": [float(values[k]) for _, _, values in columns],
                "confused_with": names[other],
                "confused_share": wrong[k, other] / max(labelled[k], 1),
            }
        )
    heads = [{"name": name, "kind": kind} for name, kind, _ in columns]
    return {"columns": heads, "classes": rows}


def _boundaries(results: Sequence[Result], letters: Sequence[str]) -> dict[str, Any]:
    """Mean IoU near boundaries: `boundary`, rows of a table, and `curve`, coordinates of an SVG."""
    near = [result.metrics["boundary_miou"] for result in results]
    everywhere = [result.metrics["miou"] for result in results]
    rows = [{"within": f"{width} px", "scores": [n[width] for n in near]} for width in near[0]]
    rows.append({"within": "all pixels", "scores": everywhere})
    known = [value for scores in near for value in scores.values() if not absent(value)]
    if not known:
        return {"boundary": rows, "curve": None}

    low, high = math.floor(10 * min(known + everywhere)), math.ceil(10 * max(known + everywhere))
    high = max(high, low + 1)  # tenths of mean IoU at the ends of the vertical axis

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (10 * value - low) / (high - low), 1)

    widest = math.log(max(map(int, near[0])))  # the horizontal axis is logarithmic
    x = {w: round(LEFT + (RIGHT - LEFT) * math.log(int(w)) / widest, 1) for w in near[0]}
    lines = [
        {
            "letter": letter,
            "points": [(x[w], y(value)) for w, value in scores.items() if not absent(value)],
            "all_pixels": y(total),
        }
        for letter, scores, total in zip(letters, near, everywhere, strict=True)
    ]
    ticks = [{"percent": 10 * tenth, "y": y(tenth / 10)} for tenth in range(low, high + 1)]
    return {"boundary": rows, "curve": {"ticks": ticks, "widths": x, "lines": lines}}


def _heat_map(result: Result, letter: str) -> dict[str, Any]:
    """A confusion matrix: pixel counts, and the text and depth of colour of each cell."""
    counts: list[list[int]] = result.confusion.tolist()
    rows = []
    for label, row in enumerate(counts):
        shares = [count / max(1, sum(row)) for count in row]
        rows.append([_heat_cell(share, label == k) for k, share in enumerate(shares)])
    return {"letter": letter, "counts": counts, "rows": rows, "dense": len(counts) > DENSE}


def _heat_cell(share: float, correct: bool) -> dict[str, str]:
    """A cell of the diagonal has the class `d`; one that is dark, and needs light text, has `f`."""
    depth = math.sqrt(share)
    kinds = ["d"] * correct + ["f"] * (depth > 0.62)
    return {
        "classes": " ".join(kinds),
        "depth": f"{depth:.2f}" if share else "",
        "percent": f"{100 * share:.0f}" if share >= 0.005 else "",
    }
