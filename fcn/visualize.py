"""Pictures: masks in colour, panels, animations, and training curves.

    python -m fcn.visualize runs/fcn32s/2026-01-31_12-00-00 runs/fcn8s/2026-02-01_12-00-00
    python -m fcn.visualize runs/sweep/2026-01-31_12-00-00 --output sweep.png

The smoothed loss and validation mean IoU of several runs, or of all runs of a sweep, in one figure
(default: comparison.png in the current folder). Of a single run, all its curves.
"""

import argparse
import csv
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure  # not pyplot: it would look for a screen
from matplotlib.ticker import LogFormatter
from omegaconf import OmegaConf
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fcn.config import short_messages
from fcn.csv_logger import Columns, read_numbers
from fcn.errors import ConfigError, reason
from fcn.metrics import segmentation_scores

Palette = Sequence[Sequence[int]]
Cell = tuple[Tensor, str]  # a picture (3, h, w) uint8, and the line of text below it
VOID_COLOUR = (224, 224, 192)  # VOC's own
INK, FAINT = (30, 30, 30), (150, 150, 150)
RIGHT, WRONG, UNJUDGED = (240, 240, 240), (204, 51, 17), (150, 150, 150)  # lightness differs too
DRAWN = (
    *("train/loss_smooth", "train/loss", "train/loss_std", "train/lr"),
    *("val/loss", "val/miou", "val/pixel_acc"),
)
GAP, LINE = 10, 22  # pixels between pictures, and of a line of text


def colourise(mask: Tensor, palette: Palette, void: int = 255) -> Tensor:
    """Class indices (H, W) -> colours (3, H, W) uint8; void in VOC's cream."""
    colours = torch.zeros(256, 3, dtype=torch.uint8)
    colours[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    colours[void] = torch.tensor(VOID_COLOUR, dtype=torch.uint8)
    return colours[mask.cpu().long()].permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def overlay(image: Tensor, mask: Tensor, palette: Palette, alpha: float = 0.6) -> Tensor:
    """The colours of a mask (H, W) over an image (3, H, W) uint8; background (0) stays clear."""
    image, mask = image.cpu(), mask.cpu()
    blend = (1 - alpha) * image + alpha * colourise(mask, palette)
    return torch.where(mask == 0, image, blend.round().to(torch.uint8))


def error_map(label: Tensor, prediction: Tensor, void: int = 255) -> Tensor:
    """Label and prediction (H, W) -> (3, H, W) uint8: right light, wrong red, void grey."""
    label, prediction = label.cpu(), prediction.cpu()
    kind = torch.where(label == void, 2, (label != prediction).long())
    return torch.tensor((RIGHT, WRONG, UNJUDGED), dtype=torch.uint8)[kind].permute(2, 0, 1)


def image_iou(label: Tensor, prediction: Tensor, num_classes: int, void: int = 255) -> float:
    """Mean IoU of one image (H, W), over the classes in label or prediction; NaN if all is void."""
    confusion = multiclass_confusion_matrix(
        prediction, label, num_classes, ignore_index=void, validate_args=False
    )
    return segmentation_scores(confusion)["miou"]


def iou_text(iou: float) -> str:
    """As captions have it."""
    return "all void" if math.isnan(iou) else f"IoU {iou:.3f}"


def to_pil(picture: Tensor) -> Image.Image:
    """An image (3, H, W) or a mask (H, W), uint8, as Pillow has it."""
    pixels = picture.cpu().to(torch.uint8).numpy()
    return Image.fromarray(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels)


def fit(picture: Tensor, width: int, height: int) -> Tensor:
    """An image (3, H, W), or a mask (H, W) by nearest pixels, as large as fits into a box."""
    h, w = picture.shape[-2:]
    scale = min(width / w, height / h)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    smooth = Image.Resampling.BILINEAR if picture.ndim == 3 else Image.Resampling.NEAREST
    pixels = torch.from_numpy(np.array(to_pil(picture).resize(size, smooth)))
    return pixels.permute(2, 0, 1) if picture.ndim == 3 else pixels  # (h, w, 3) -> (3, h, w)


def one_line(text: str, most: int) -> str:
    """A name from outside, to be drawn or printed: what no screen shows, or obeys, left out."""
    text = "".join(c if c.isprintable() else " " for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def sheet(
    rows: Sequence[Sequence[Cell]],
    *,
    headings: Sequence[str],
    legend: Sequence[tuple[str, Sequence[int]]] = (),
    title: str = "",
    width: int = 240,
) -> Image.Image:
    """Pictures in rows and columns, text below each, and a legend of names and colours.

    Args:
        rows: pictures of any height, no wider than `width`.
        headings: of the columns.
        width: of a column, in pixels.
    """
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    legend = [(one_line(name, 40), colour) for name, colour in legend]
    heights = [max(picture.shape[1] for picture, _ in row) + LINE + GAP for row in rows]
    entry = 24 + GAP + max([66, *(round(font.getlength(name)) for name, _ in legend)])
    per_line = max(1, (len(headings) * (width + GAP)) // entry)
    top = GAP + (LINE + 2 if title else 0)
    below = top + LINE + sum(heights)  # top of the legend
    canvas = Image.new(
        "RGB",
        (GAP + len(headings) * (width + GAP), below + LINE * -(-len(legend) // per_line) + GAP),
        "white",
    )
    draw = ImageDraw.Draw(canvas)

    def write(left: int, top: int, text: str) -> None:
        text = one_line(text, 200)
        while len(text) > 1 and font.getlength(text) > width:
            text = f"{text[:-2]}…"
        draw.text((left, top), text, INK, font)

    draw.text((GAP, GAP - 2), title, INK, bold)
    lefts = [GAP + column * (width + GAP) for column in range(len(headings))]
    for left, heading in zip(lefts, headings, strict=True):
        write(left, top, heading)
    top += LINE
    for row, height in zip(rows, heights, strict=True):
        for left, (picture, text) in zip(lefts, row, strict=True):
            canvas.paste(to_pil(picture), (left, top))
            write(left, top + picture.shape[1] + 3, text)
        top += height
    for number, (name, colour) in enumerate(legend):
        x, y = GAP + entry * (number % per_line), below + LINE * (number // per_line)
        draw.rectangle((x, y + 2, x + 15, y + 17), tuple(colour), FAINT)
        draw.text((x + 22, y + 10), name, INK, font, anchor="lm")
    return canvas


def panel(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    class_names: Sequence[str],
    palette: Palette,
    void: int = 255,
    title: str = "",
    width: int = 240,
    ids: Sequence[str] | None = None,
) -> Image.Image:
    """A row each of image | label | prediction | errors, and a legend of the classes that occur.

    Args:
        rows: (image (3, H, W) uint8, label (H, W), prediction (H, W)), of any sizes.
        width: of a column, in pixels; images keep their shape, but none is higher than 1.5 widths.
        ids: of the images.
    """
    cells: list[list[Cell]] = []
    seen: set[int] = set()
    for (image, label, prediction), name in zip(rows, ids or [""] * len(rows), strict=True):
        iou = image_iou(label, prediction, len(class_names), void)
        wrong = int(((label != prediction) & (label != void)).sum())
        share = wrong / max(1, int((label != void).sum()))
        seen |= {int(k) for mask in (label, prediction) for k in mask.unique()} - {void}
        image, label, prediction = (
            fit(x, width, width * 3 // 2) for x in (image, label, prediction)
        )
        cells.append(
            [
                (image, name),
                (colourise(label, palette, void), ""),
                (colourise(prediction, palette, void), iou_text(iou)),
                (error_map(label, prediction, void), f"{100 * share:.1f} % wrong"),
            ]
        )
    legend = [(class_names[k], palette[k]) for k in sorted(seen)]
    return sheet(
        cells,
        headings=("image", "label", "prediction", "errors: red; void: grey"),
        legend=[*legend, ("void", VOID_COLOUR)],
        title=title,
        width=width,
    )


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


def draw_curves(columns: Columns, path: Path) -> None:
    """A run's loss, learning rate and validation scores over steps, from metrics.csv."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    losses, rates, scores = figure.subplots(3, 1, sharex=True, height_ratios=(6, 1.3, 4))
    raw, smooth, val = (
        _series(columns, name) for name in ("train/loss", "train/loss_smooth", "val/loss")
    )
    losses.plot(*_thinned(*raw), color="C7", lw=0.5, alpha=0.5, label="raw, each step")
    steps, middle, spread = _series(columns, "train/loss_smooth", "train/loss_std")
    every = slice(None, None, 1 + len(steps) // 2000)
    low, high = (middle - spread)[every], (middle + spread)[every]
    losses.fill_between(
        steps[every], low, high, color="C0", alpha=0.25, lw=0, label="smoothed ± one std"
    )
    losses.plot(*_thinned(*smooth), color="C0", lw=2.2, label="smoothed")
    losses.plot(*val, "o-", color="C3", lw=1.6, ms=4, label="validation")
    tops = [np.quantile(v, 0.99) for _, v in (raw, smooth) if len(v)]  # one wild batch is no scale
    losses.set_ylim(0, 1.05 * max([v for v in (*tops, *val[1]) if v > 0], default=1.0))
    losses.set(title="loss (cross-entropy)")
    losses.legend(loc="upper right", frameon=False)

    rates.plot(*_thinned(*_series(columns, "train/lr")), color="C1", lw=1.4)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rates.set_ylim(bottom=0)
    rates.set(title="learning rate")

    for name, label, colour in (
        ("val/miou", "mean IoU", "C2"),
        ("val/pixel_acc", "pixel accuracy", "C7"),
    ):
        at, values = _series(columns, name)
        scores.plot(at, values, "o-", color=colour, lw=1.6, ms=4, label=label)
        if len(values):
            best = int(np.argmax(values))
            scores.annotate(
                f"{values[best]:.3f}",
                (at[best], values[best]),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                color=colour,
            )
    scores.set(ylim=(0, 1.08), xlabel="optimizer step", title="validation scores")
    scores.set_yticks(np.arange(0, 1.01, 0.2))
    scores.legend(loc="upper left", frameon=False)
    _save(figure, path)


def compare_runs(runs: Mapping[str, Columns], path: Path) -> None:
    """Smoothed loss and mean IoU of several runs on the same axes; the keys are their names."""
    figure = Figure(figsize=(9, 7 + 0.2 * len(runs)), layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True)
    few = len(runs) <= 10
    colours = colormaps["tab10" if few else "turbo"](
        range(10) if few else np.linspace(0, 1, len(runs))
    )
    lines, labels = [], []
    for colour, (name, columns) in zip(colours, runs.items(), strict=False):
        lines += losses.plot(
            *_thinned(*_series(columns, "train/loss_smooth")), color=colour, lw=1.6
        )
        steps, values = _series(columns, "val/miou")
        scores.plot(steps, values, "o-", color=colour, lw=1.6, ms=4)
        best = f" (best mIoU {values.max():.3f})" if len(values) else ""
        labels.append((name + best).replace("$", r"\$"))  # no formula
    losses.set(yscale="log", title="smoothed loss (cross-entropy)")  # one that diverged hides none
    for formatted in (losses.yaxis.set_major_formatter, losses.yaxis.set_minor_formatter):
        formatted(Plain())
    scores.set(xlabel="optimizer step", title="validation mean IoU")
    scores.set_ylim(bottom=0)
    figure.legend(lines, labels, loc="outside lower center", frameon=False)
    _save(figure, path)


def draw_sweep(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], path: Path) -> None:
    """The best mean IoU of each run over each of the swept settings; no file if none has one.

    Args:
        rows: of sweep.csv.
        keys: the settings, columns of the table.
    """
    scored = [row for row in rows if row.get("best/val/miou") is not None]
    if not scored or not keys:
        return
    across = min(3, len(keys))
    down = -(-len(keys) // across)
    figure = Figure(figsize=(max(4.5, 3.4 * across), 0.5 + 3 * down), layout="constrained")
    panels = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    for axes, key in zip(panels, keys, strict=False):
        runs = [(str(row[key]), float(row["best/val/miou"])) for row in scored if key in row]
        texts = list(dict.fromkeys(text for text, _ in runs))
        numbers = _numbers(texts)
        places = numbers or [float(place) for place in range(len(texts))]
        at = np.array([places[texts.index(text)] for text, _ in runs])
        scores = np.array([score for _, score in runs])
        middle = [(x, float(np.median(scores[at == x]))) for x in sorted(set(places))]
        axes.plot(*zip(*middle, strict=True), color="C2", lw=1.6, zorder=1)
        axes.scatter(at, scores, s=18, color="C2", alpha=0.6, lw=0, zorder=2)
        if numbers and min(numbers) > 0 and max(numbers) >= 20 * min(numbers):
            axes.set_xscale("log")
        if len(texts) <= 6 or not numbers:
            labels = [f"{text[:19]}…" if len(text) > 20 else text for text in texts]
            many = sum(map(len, labels)) > 30
            axes.set_xticks(
                places,
                [label.replace("$", r"\$") for label in labels],
                rotation=30 if many else 0,
                ha="right" if many else "center",
                rotation_mode="anchor",
            )
            axes.minorticks_off()
        axes.set(title=key)
    for axes in panels[len(keys) :]:
        axes.remove()
    figure.supylabel("best validation mean IoU", fontsize=10)
    _save(figure, path, margin=0.08)


def _numbers(texts: Sequence[str]) -> list[float] | None:
    """As numbers, if all are."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


class Plain(LogFormatter):
    """0.6 where LogFormatter has 6e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _series(columns: Columns, *names: str) -> list[np.ndarray]:
    """Steps and the values of each metric (n,), where all of them are finite numbers."""
    steps = columns.get("step", np.empty(0))
    series = [steps, *(columns.get(name, np.full(len(steps), np.nan)) for name in names)]
    good = np.isfinite(series).all(0)
    return [values[good] for values in series]


def _thinned(steps: np.ndarray, values: np.ndarray, *, parts: int = 2000) -> tuple[np.ndarray, ...]:
    """Of many points (n,), the lowest and the highest of each stretch, so that no peak is lost."""
    stretch = len(values) // parts
    if stretch < 3:
        return steps, values
    whole = len(values) // stretch * stretch
    blocks = values[:whole].reshape(-1, stretch)
    pairs = np.sort(np.stack((blocks.argmin(1), blocks.argmax(1)), 1), 1)  # (stretches, 2)
    kept = (pairs + np.arange(0, whole, stretch)[:, None]).ravel()
    kept = np.append(kept, np.arange(whole, len(values)))
    return steps[kept], values[kept]


def _save(figure: Figure, path: Path, margin: float = 0.02) -> None:
    for axes in figure.axes:
        axes.title.set(fontsize=11, horizontalalignment="left", x=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=margin)
    with whole(path) as part:
        figure.savefig(part, dpi=110, format=path.suffix[1:] or "png")


def read_runs(folders: Sequence[Path]) -> dict[Path, Columns]:
    """What metrics.csv has of each run; of a sweep's folder, of all its runs that have some.

    Raises:
        ConfigError: a folder is none of a run or a sweep, or has nothing to draw.
    """
    runs: dict[Path, Columns] = {}
    for folder in folders:
        found = [folder]
        if not (folder / "metrics.csv").is_file():
            jobs = [path.parent for path in folder.glob("*/metrics.csv")]
            found = sorted(jobs, key=lambda path: (len(path.name), path.name))
        if not found:
            raise ConfigError(f"{folder}: no run folder (it has no metrics.csv)")
        for run in found:
            try:
                columns = read_numbers(run / "metrics.csv")
                drawn = [_series(columns, name) for name in DRAWN]
            except (OSError, ValueError, csv.Error) as error:
                raise ConfigError(f"{run}/metrics.csv: {reason(error)}") from error
            if any(len(steps) for steps, _ in drawn):
                runs[run.resolve()] = columns
            elif run == folder:
                raise ConfigError(f"{run}/metrics.csv: nothing to draw in it yet")
            else:
                print(f"left out: {run} has nothing to draw yet", file=sys.stderr)
    if not runs:
        raise ConfigError(f"{folders[0]}: none of its runs has anything to draw yet")
    return runs


def run_names(runs: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as tell equal ones apart, and what was changed."""
    ends = Counter(run.parts[-n:] for run in runs for n in range(1, len(run.parts) + 1))
    changes = [_changes(run) for run in runs]
    keys = dict.fromkeys(key for change in changes for key in change)
    varied = [key for key in keys if len({change.get(key) for change in changes}) > 1]
    names = []
    for run, change in zip(runs, changes, strict=True):
        tails = (run.parts[-n:] for n in range(1, len(run.parts) + 1))
        name = "/".join(next(tail for tail in tails if ends[tail] == 1))
        text = " ".join(f"{key}={change[key]}" for key in varied if key in change)
        names.append(f"{name}  {text}".strip() if len(text) <= 80 else f"{name}  {text[:79]}…")
    return names


def _changes(run: Path) -> dict[str, str]:
    """What overrides.yaml says was changed on the command line."""
    try:
        overrides = OmegaConf.to_container(OmegaConf.load(run / "overrides.yaml"), resolve=False)
    except Exception:  # a figure needs no more than metrics.csv
        return {}
    texts = [str(text) for text in overrides or () if "=" in str(text)]
    return dict(text.split("=", 1) for text in texts if not text.startswith("hydra."))


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the runs named on the command line."""
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
        except (OSError, ValueError) as error:
            raise ConfigError(f"--output {options.output}: {reason(error)}") from error
        print(options.output)


if __name__ == "__main__":
    main()
