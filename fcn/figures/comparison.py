"""Several runs in one figure: their curves on the same axes, or their best scores over settings.

    compare_runs({"fcn32s": columns, "fcn8s": others}, Path("comparison.png"))
    draw_sweep(rows, ["optimizer.lr", "model"], sweep / "sweep.png")

`columns` are those of a metrics.csv, as `fcn.figures.curves` has them; `rows` are those of a
sweep.csv.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from fcn.figures.curves import FAST, Columns, save_figure, series
from fcn.figures.legend import one_line

SCORE = "best/val/miou"  # the column of sweep.csv that a sweep is judged by
LONGEST_LABEL = 20  # characters of a value below an axis


@rc_context(FAST)
def compare_runs(runs: Mapping[str, Columns], path: Path) -> None:
    """Draw smoothed loss and validation mean IoU of several runs on the same axes.

    Args:
        runs: columns of each run's metrics.csv; the keys name the runs in the legend.
        path: the picture to write, in the format of its ending.

    Raises:
        WriteError, ValueError: as `fcn.figures.curves.save_figure`.
    """
    figure = Figure(figsize=(9, 7 + 0.2 * len(runs)), layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True)
    if len(runs) <= 10:
        colours = colormaps["tab10"](range(10))
    else:
        colours = colormaps["turbo"](np.linspace(0, 1, len(runs)))
    lines, labels = [], []
    for colour, (name, columns) in zip(colours, runs.items(), strict=False):
        smooth = series(columns, "train/loss_smooth")
        lines += losses.plot(*smooth, color=colour, lw=1.6)
        steps, values = series(columns, "val/miou")
        scores.plot(steps, values, "o-", color=colour, lw=1.6, ms=4)
        best = f" (best mIoU {values.max():.3f})" if len(values) else ""
        labels.append(_literal(name + best))
    # The axis is logarithmic, so that one run that diverged does not make the others look flat.
    losses.set(yscale="log", title="smoothed loss (cross-entropy)")
    losses.yaxis.set_major_formatter(PlainLogFormatter())
    losses.yaxis.set_minor_formatter(PlainLogFormatter())
    scores.set(xlabel="optimizer step", title="validation mean IoU", ylim=(0, None))
    figure.legend(lines, labels, loc="outside lower center", frameon=False)
    save_figure(figure, path)


def draw_sweep(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], path: Path) -> None:
    """Draw the best mean IoU of each run over each setting that the sweep varied.

    Nothing is written if no run has a score yet, or no setting was varied.

    Args:
        rows: of sweep.csv, one for each run.
        keys: the settings that differ between the runs, which are columns of the table.
        path: the picture to write, in the format of its ending.

    Raises:
        WriteError, ValueError: as `fcn.figures.curves.save_figure`.
    """
    scored = [row for row in rows if row.get(SCORE) is not None]
    if not scored or not keys:
        return
    across = min(3, len(keys))
    down = -(-len(keys) // across)  # rounded up
    figure = Figure(figsize=(max(4.5, 3.4 * across), 0.5 + 3 * down), layout="constrained")
    panels = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    for axes, key in zip(panels, keys, strict=False):
        runs = [(str(row[key]), float(row[SCORE])) for row in scored if key in row]
        _draw_setting(axes, runs)
        axes.set(title=key)
    for axes in panels[len(keys) :]:
        axes.remove()
    figure.supylabel("best validation mean IoU", fontsize=10)
    save_figure(figure, path, margin=0.08)


def _draw_setting(axes: Axes, runs: Sequence[tuple[str, float]]) -> None:
    """A point for each run, and a line through the median score of each value.

    Args:
        runs: the setting's value, as it was written, and the score of each run.
    """
    values = list(dict.fromkeys(value for value, _ in runs))  # each once, in order
    numbers = _as_numbers(values)
    # Values that are no numbers, such as names of models, stand side by side.
    places = numbers or range(len(values))
    at = np.array([places[values.index(value)] for value, _ in runs])  # (runs,)
    scores = np.array([score for _, score in runs])  # (runs,)
    xs = np.unique(at)
    medians = [np.median(scores[at == x]) for x in xs]
    axes.plot(xs, medians, color="C2", lw=1.6, zorder=1)
    axes.scatter(at, scores, s=18, color="C2", alpha=0.6, lw=0, zorder=2)
    if numbers and min(numbers) > 0 and max(numbers) >= 20 * min(numbers):
        axes.set_xscale("log")
    if len(values) <= 6 or not numbers:
        labels = [one_line(value, LONGEST_LABEL) for value in values]
        style: dict[str, Any] = {}
        if sum(map(len, labels)) > 30:  # there is no room for them side by side
            style = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(places, [_literal(label) for label in labels], **style)
        axes.minorticks_off()


def _as_numbers(texts: Sequence[str]) -> list[float] | None:
    """The texts as numbers, or None if one of them is no finite number."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _literal(text: str) -> str:
    """A text with its dollar signs escaped: matplotlib reads what is between two as a formula."""
    return text.replace("$", r"\$")


class PlainLogFormatter(LogFormatter):
    """Labels of a logarithmic axis as plain numbers: 0.6 where LogFormatter has 6e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""
