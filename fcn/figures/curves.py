"""The curves of one run: loss, learning rate and validation scores over the optimizer steps.

    draw_curves(columns, run / "curves.png")

`columns` are the columns of a run's metrics.csv: for each name such as "train/loss" the values of
all rows (rows,), NaN where nothing was logged in that row; "step" is the optimizer step.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would look for a screen

from fcn.files import atomic_write

Columns = Mapping[str, np.ndarray]

# Columns that give a curve of their own. A run that has none of these has nothing to draw.
DRAWN = ("train/loss_smooth", "train/loss", "train/lr", "val/loss", "val/miou", "val/pixel_acc")
# A curve may have 100,000 points, and a picture has only 1,000 columns. With this setting
# matplotlib leaves out points that would move a line by less than a pixel, in half the time.
FAST: Any = {"path.simplify_threshold": 1.0}
MOST_POINTS = 2000  # of the band around a curve, which matplotlib does not simplify


@rc_context(FAST)
def draw_curves(columns: Columns, path: Path) -> None:
    """Draw a run's loss, learning rate and validation scores, one below the other.

    Args:
        path: the picture to write, in the format of its ending (.png, .pdf, .svg).

    Raises:
        WriteError: the file cannot be written.
        ValueError: there is no such format.
    """
    figure = Figure(figsize=(9, 8), layout="constrained")
    losses, rates, scores = figure.subplots(3, 1, sharex=True, height_ratios=(6, 1.3, 4))
    _draw_losses(losses, columns)

    rates.plot(*series(columns, "train/lr"), color="C1", lw=1.4)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rates.set(title="learning rate", ylim=(0, None))

    _draw_scores(scores, columns)
    scores.set(xlabel="optimizer step")
    save_figure(figure, path)


def _draw_losses(axes: Axes, columns: Columns) -> None:
    """The loss of each step, its smoothed course within one standard deviation, and validation."""
    raw = series(columns, "train/loss")
    smooth = series(columns, "train/loss_smooth")
    validation = series(columns, "val/loss")
    axes.plot(*raw, color="C7", lw=0.5, alpha=0.5, label="raw, each step")

    steps, middle, spread = series(columns, "train/loss_smooth", "train/loss_std")
    some = slice(None, None, 1 + len(steps) // MOST_POINTS)
    low, high = (middle - spread)[some], (middle + spread)[some]
    axes.fill_between(
        steps[some], low, high, color="C0", alpha=0.25, lw=0, label="smoothed ± one std"
    )
    axes.plot(*smooth, color="C0", lw=2.2, label="smoothed")
    axes.plot(*validation, "o-", color="C3", lw=1.6, ms=4, label="validation")

    # The largest hundredth of the training losses is ignored in choosing the scale. Otherwise one
    # batch with a huge loss would make everything else look flat.
    tops = [np.quantile(values, 0.99) for _, values in (raw, smooth) if len(values)]
    positive = [value for value in (*tops, *validation[1]) if value > 0]
    axes.set(title="loss (cross-entropy)", ylim=(0, 1.05 * max(positive, default=1.0)))
    axes.legend(loc="upper right", frameon=False)


def _draw_scores(axes: Axes, columns: Columns) -> None:
    """Mean IoU and pixel accuracy of each validation; the best of each is written above it."""
    curves = (("val/miou", "mean IoU", "C2"), ("val/pixel_acc", "pixel accuracy", "C7"))
    for name, label, colour in curves:
        steps, values = series(columns, name)
        axes.plot(steps, values, "o-", color=colour, lw=1.6, ms=4, label=label)
        if len(values):
            best = int(np.argmax(values))
            axes.annotate(
                f"{values[best]:.3f}",
                (steps[best], values[best]),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                color=colour,
            )
    axes.set(ylim=(0, 1.08), yticks=np.arange(0, 1.01, 0.2), title="validation scores")
    axes.legend(loc="upper left", frameon=False)


def series(columns: Columns, *names: str) -> list[np.ndarray]:
    """The steps, then the values of each metric (n,), where all of these are finite numbers.

    A metric that the run has not logged has no values: n is 0.
    """
    steps = columns.get("step", np.empty(0))
    missing = np.full(len(steps), np.nan)
    found = [steps, *(columns.get(name, missing) for name in names)]
    finite = np.isfinite(found).all(0)  # (rows,)
    return [values[finite] for values in found]


def save_figure(figure: Figure, path: Path, margin: float = 0.02) -> None:
    """Give all axes of a figure the look of this project, and write it.

    Args:
        path: the picture. Its ending gives the format (.png, .pdf, .svg); without one it is a PNG.
        margin: empty share of the axes' width, left and right of the data.

    Raises:
        WriteError: the file cannot be written.
        ValueError: there is no such format.
    """
    for axes in figure.axes:
        axes.title.set(fontsize=11, horizontalalignment="left", x=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=margin)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=110, format=path.suffix[1:] or "png")
