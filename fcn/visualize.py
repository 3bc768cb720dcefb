"""Draw the curves of runs that have ended, or are still going on.

    python -m fcn.visualize runs/fcn32s/2026-01-31_12-00-00 runs/fcn8s/2026-02-01_12-00-00
    python -m fcn.visualize runs/sweep/2026-01-31_12-00-00 --output sweep.png

Of one run: loss, learning rate and validation scores, like the curves.png in its folder. Of several
runs, or of all runs of a sweep: smoothed loss and validation mean IoU on the same axes. The picture
is comparison.png in the current folder, if no other is named.
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from fcn.cli import short_messages
from fcn.errors import ConfigError, WriteError, reason
from fcn.figures.comparison import compare_runs
from fcn.figures.curves import DRAWN, Columns, draw_curves, series
from fcn.runs.metrics import read_numbers

LONGEST_CHANGES = 80  # characters of a run's settings in the legend


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the runs named on the command line, and print where the picture is."""
    parser = argparse.ArgumentParser(
        prog="python -m fcn.visualize",
        description="Loss and mean IoU of several runs in one figure; of one run, all its curves.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="the folder of a run, or of a sweep"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison.png"),
        metavar="FILE",
        help=".png, .pdf or .svg (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    with short_messages():
        runs = read_runs(options.runs)
        try:
            if len(runs) == 1:
                draw_curves(next(iter(runs.values())), options.output)
            else:
                names = run_names(list(runs))
                compare_runs(dict(zip(names, runs.values(), strict=True)), options.output)
        except (WriteError, ValueError) as error:  # ValueError: matplotlib has no such format
            raise ConfigError(f"--output: {reason(error)}") from error
        print(options.output)


def read_runs(folders: Sequence[Path]) -> dict[Path, Columns]:
    """The columns of metrics.csv of each run; of a sweep's folder, those of all its runs.

    A run of a sweep that has logged nothing yet is left out, with a line on stderr.

    Returns:
        For each run's folder, as an absolute path, its columns.

    Raises:
        ConfigError: a folder is not that of a run or a sweep, or there is nothing to draw in it.
    """
    runs: dict[Path, Columns] = {}
    for folder in folders:
        found = _runs_in(folder)
        if not found:
            raise ConfigError(f"{folder}: no run folder (it has no metrics.csv)")
        for run in found:
            columns = _read(run)
            if columns is not None:
                runs[run.resolve()] = columns
            elif run == folder:
                raise ConfigError(f"{run / 'metrics.csv'}: nothing to draw in it yet")
            else:
                print(f"left out: {run} has nothing to draw yet", file=sys.stderr)
    if not runs:
        raise ConfigError(f"{folders[0]}: none of its runs has anything to draw yet")
    return runs


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself, if it is a run; else the runs below it, job 2 before job 10."""
    if (folder / "metrics.csv").is_file():
        return [folder]
    jobs = [path.parent for path in folder.glob("*/metrics.csv")]
    return sorted(jobs, key=lambda path: (len(path.name), path.name))


def _read(run: Path) -> Columns | None:
    """The columns of one run's metrics.csv, or None if it has no number that is drawn."""
    path = run / "metrics.csv"
    try:
        columns = read_numbers(path)
        drawn = [series(columns, name) for name in DRAWN]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path}: {reason(error)}") from error
    return columns if any(len(steps) for steps, _ in drawn) else None


def run_names(runs: Sequence[Path]) -> list[str]:
    """A short name for each run, for the legend.

    It is the folder's name, with as many of its parents as it takes to be unique, and the settings
    in which the runs differ.
    """
    ends = Counter(run.parts[-n:] for run in runs for n in range(1, len(run.parts) + 1))
    changes = [_changes(run) for run in runs]
    keys = dict.fromkeys(key for change in changes for key in change)  # a set that keeps its order
    varied = [key for key in keys if len({change.get(key) for change in changes}) > 1]
    names = []
    for run, change in zip(runs, changes, strict=True):
        tails = (run.parts[-n:] for n in range(1, len(run.parts) + 1))
        name = "/".join(next(tail for tail in tails if ends[tail] == 1))
        text = " ".join(f"{key}={change[key]}" for key in varied if key in change)
        if len(text) > LONGEST_CHANGES:
            text = f"{text[: LONGEST_CHANGES - 1]}…"
        names.append(f"{name}  {text}".strip())
    return names


def _changes(run: Path) -> dict[str, str]:
    """The settings that were given on a run's command line, from its overrides.yaml.

    A damaged or missing file is no error: a figure needs no more than metrics.csv.
    """
    try:
        overrides = OmegaConf.to_container(OmegaConf.load(run / "overrides.yaml"), resolve=False)
    except Exception:
        return {}
    texts = [str(text) for text in overrides or () if "=" in str(text)]
    return dict(text.split("=", 1) for text in texts if not text.startswith("hydra."))


# shim: the names that other modules still import from here; all that follows goes.
import math  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torchmetrics.functional.classification import multiclass_confusion_matrix  # noqa: E402

from fcn.figures.legend import OUTLINE as FAINT  # noqa: E402, F401
from fcn.figures.legend import TEXT_COLOUR as INK  # noqa: E402, F401
from fcn.figures.legend import one_line  # noqa: E402, F401
from fcn.figures.masks import VOID_COLOUR, Palette, colourise, overlay, to_pil  # noqa: E402, F401
from fcn.figures.masks import resize_to_fit as fit  # noqa: E402
from fcn.figures.panels import draw_panels  # noqa: E402
from fcn.figures.panels import draw_sheet as sheet  # noqa: E402
from fcn.metrics import segmentation_scores  # noqa: E402


def image_iou(label: Tensor, prediction: Tensor, num_classes: int, void: int = 255) -> float:
    """Mean IoU of one image (H, W), over the classes in label or prediction; NaN if all is void."""
    confusion = multiclass_confusion_matrix(
        prediction, label, num_classes, ignore_index=void, validate_args=False
    )
    return segmentation_scores(confusion)["miou"]


def iou_text(iou: float) -> str:
    """As captions have it."""
    return "all void" if math.isnan(iou) else f"IoU {iou:.3f}"


def panel(rows, *, class_names, palette, void=255, title="", width=240, ids=None):  # type: ignore
    """As it was before fcn.figures.panels.draw_panels took captions."""
    ious = [image_iou(label, found, len(class_names), void) for _, label, found in rows]
    names = {"class_names": class_names, "palette": palette, "void": void, "ids": ids}
    return draw_panels(rows, title=title, width=width, captions=list(map(iou_text, ious)), **names)


def progress_frame(
    label: Tensor,
    prediction: Tensor,
    *,
    palette: Palette,
    void: int = 255,
    title: str = "",
    captions: tuple[str, str] = ("", ""),
    width: int = 240,
) -> Image.Image:
    """label | prediction, each (H, W), in one palette for all frames, as a GIF wants it: mode P."""
    masks = [
        colourise(fit(mask, width, width * 3 // 2), palette, void) for mask in (label, prediction)
    ]
    cells = list(zip(masks, captions, strict=True))
    picture = sheet([cells], headings=("label", "prediction"), title=title, width=width)
    greys = [(k, k, k) for k in (255, 220, 180, 140, 100, 65, 30)]  # of text
    colours = Image.new("P", (1, 1))
    colours.putpalette([c for colour in [VOID_COLOUR, *greys, *palette][:256] for c in colour])
    return picture.quantize(palette=colours, dither=Image.Dither.NONE)


def animate(frames: Sequence[Path], path: Path, most: int = 40) -> None:
    """A GIF of at most `most` frames, evenly chosen, the last among them; it rests there."""
    chosen = sorted({round(i) for i in np.linspace(0, len(frames) - 1, most)})
    pictures = [Image.open(frames[i]) for i in chosen]
    times = [250] * (len(chosen) - 1) + [2000]  # milliseconds
    with whole(path) as part:
        pictures[0].save(part, save_all=True, append_images=pictures[1:], duration=times, loop=0)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write, so that the file is whole or not there, whenever the process is killed."""
    part = path.with_name(f".{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
