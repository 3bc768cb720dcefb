"""Pictures: masks in colour, panels of image | label | prediction, and training curves."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure  # not pyplot: it would look for a screen
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fcn.csv_logger import Row, read_column

Palette = Sequence[Sequence[int]]
VOID_COLOUR = (224, 224, 192)  # VOC's own
INK, FAINT = (30, 30, 30), (150, 150, 150)


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


def panel(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    class_names: Sequence[str],
    palette: Palette,
    void: int = 255,
    title: str = "",
    width: int = 240,
) -> Image.Image:
    """A row each of image | label | prediction, and a legend of the classes that occur.

    Args:
        rows: (image (3, H, W) uint8, label (H, W), prediction (H, W)), of any sizes.
        width: of a column, in pixels; images keep their shape.
    """
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    gap, line = 10, 22
    lefts = [gap + column * (width + gap) for column in range(3)]
    heights = [max(1, round(width * image.shape[1] / image.shape[2])) for image, _, _ in rows]
    seen = sorted({int(k) for _, *masks in rows for m in masks for k in m.unique()} - {void})
    entries = [(class_names[k], tuple(palette[k])) for k in seen] + [("void", VOID_COLOUR)]
    entry = max(90, 24 + round(max(font.getlength(name) for name, _ in entries)) + gap)
    per_line = max(1, (3 * (width + gap)) // entry)
    top = gap + (line + 2 if title else 0)  # of the columns' names
    below = top + line + sum(height + gap for height in heights)  # top of the legend
    canvas = Image.new(
        "RGB", (gap + 3 * (width + gap), below + line * -(-len(entries) // per_line) + gap), "white"
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, gap - 2), title, INK, bold)
    for left, text in zip(lefts, ("image", "label", "prediction"), strict=True):
        draw.text((left, top), text, INK, font)

    top += line
    for (image, label, prediction), height in zip(rows, heights, strict=True):
        pictures = (image, colourise(label, palette, void), colourise(prediction, palette, void))
        for column, (left, picture) in enumerate(zip(lefts, pictures, strict=True)):
            smooth = Image.Resampling.BILINEAR if column == 0 else Image.Resampling.NEAREST
            pixels = picture.cpu().permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
            canvas.paste(Image.fromarray(pixels).resize((width, height), smooth), (left, top))
        top += height + gap

    for number, (name, colour) in enumerate(entries):
        x, y = gap + entry * (number % per_line), below + line * (number // per_line)
        draw.rectangle((x, y + 2, x + 15, y + 17), colour, FAINT)
        draw.text((x + 22, y + 10), name, INK, font, anchor="lm")
    return canvas


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Loss over optimizer steps above, scores of validation below, from rows of metrics.csv."""
    rows = list(rows)
    figure = Figure(figsize=(9, 7), layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    raw_steps, raw = read_column(rows, "train/loss")
    steps, mean = read_column(rows, "train/loss_mean")
    _, spread = read_column(rows, "train/loss_std")
    smooth_steps, smooth = read_column(rows, "train/loss_smooth")
    val_steps, val = read_column(rows, "val/loss")
    losses.plot(raw_steps, raw, color="C0", lw=0.5, alpha=0.45, label="raw, each step")
    if len(mean) == len(spread):
        low, high = np.subtract(mean, spread), np.add(mean, spread)
        losses.fill_between(
            steps, low, high, color="C0", alpha=0.13, lw=0, label="mean ± std of a window"
        )
    losses.plot(smooth_steps, smooth, color="C0", lw=2.4, label="smoothed")
    losses.plot(val_steps, val, "o-", color="C3", lw=1.6, ms=4, label="validation")
    if raw:  # one wild batch shall not flatten the rest
        highest = [v for v in (np.quantile(raw, 0.99), *smooth, *val) if 0 < v < math.inf]
        losses.set_ylim(0, 1.05 * max(highest, default=1.0))
    losses.set(title="loss (cross-entropy)")

    for name, label, colour in (
        ("val/miou", "mean IoU", "C2"),
        ("val/pixel_acc", "pixel accuracy", "C7"),
    ):
        at, values = read_column(rows, name)
        scores.plot(at, values, "o-", color=colour, lw=1.6, ms=4, label=label)
        if values:
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
    losses.legend(loc="upper right", frameon=False)
    scores.legend(loc="upper left", frameon=False)
    for axes in (losses, scores):
        axes.title.set(fontsize=11, horizontalalignment="left", x=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    part = path.with_name(f".{path.name}")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)
