"""Pictures: masks in colour, panels of image | label | prediction, and training curves."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: there may be no screen

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch import Tensor  # noqa: E402

from fcn.csv_logger import Row, read_column  # noqa: E402

Palette = Sequence[Sequence[int]]
VOID_COLOUR = (224, 224, 192)  # VOC's own


def colourise(mask: Tensor, palette: Palette, void: int = 255) -> Tensor:
    """Class indices (H, W) -> colours (3, H, W) uint8; void in VOC's cream."""
    colours = torch.zeros(256, 3, dtype=torch.uint8)
    colours[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    colours[void] = torch.tensor(VOID_COLOUR, dtype=torch.uint8)
    return colours[mask.long()].permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def overlay(image: Tensor, mask: Tensor, palette: Palette, alpha: float = 0.6) -> Tensor:
    """The colours of a mask (H, W) over an image (3, H, W) uint8; background (0) stays clear."""
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
    font = ImageFont.load_default(13)
    gap, head = 6, 22
    heights = [max(1, round(width * image.shape[1] / image.shape[2])) for image, _, _ in rows]
    seen = sorted({int(k) for _, *masks in rows for m in masks for k in m.unique()} - {void})
    per_line = max(1, (3 * (width + gap)) // 130)
    legend = 20 * -(-(len(seen) + 1) // per_line) + gap
    size = (3 * width + 4 * gap, 2 * head + sum(h + gap for h in heights) + legend)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 4), title, "black", font)
    for column, text in enumerate(("image", "label", "prediction")):
        draw.text((gap + column * (width + gap), head + 2), text, "black", font)

    top = 2 * head
    for (image, label, prediction), height in zip(rows, heights, strict=True):
        pictures = (image, colourise(label, palette, void), colourise(prediction, palette, void))
        for column, picture in enumerate(pictures):
            smooth = Image.Resampling.BILINEAR if column == 0 else Image.Resampling.NEAREST
            tile = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((width, height), smooth)
            canvas.paste(tile, (gap + column * (width + gap), top))
        top += height + gap

    entries = [(class_names[k], tuple(palette[k])) for k in seen] + [("void", VOID_COLOUR)]
    for number, (name, colour) in enumerate(entries):
        x, y = gap + 130 * (number % per_line), top + 20 * (number // per_line)
        draw.rectangle((x, y + 2, x + 14, y + 16), colour, "black")
        draw.text((x + 20, y + 2), name, "black", font)
    return canvas


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Loss over optimizer steps above, scores of validation below, from rows of metrics.csv."""
    figure, (losses, scores) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    rows = list(rows)
    losses.plot(*read_column(rows, "train/loss"), color="C0", lw=0.5, alpha=0.35, label="loss, raw")
    steps, mean = read_column(rows, "train/loss_mean")
    _, spread = read_column(rows, "train/loss_std")
    low, high = np.subtract(mean, spread), np.add(mean, spread)
    losses.fill_between(steps, low, high, color="C0", alpha=0.12, lw=0, label="mean ± std, windowed")
    losses.plot(*read_column(rows, "train/loss_smooth"), color="C0", lw=2.2, label="loss, smoothed")
    losses.plot(*read_column(rows, "val/loss"), "o-", color="C3", ms=4, label="val loss")
    _, raw = read_column(rows, "train/loss")
    if raw:  # one wild batch shall not flatten the rest
        losses.set_ylim(0, 1.05 * max(np.quantile(raw, 0.99), *mean[-1:]))
    losses.set_ylabel("cross-entropy")
    losses.legend(loc="upper right")
    for name, label, colour in (
        ("val/miou", "mean IoU", "C2"),
        ("val/pixel_acc", "pixel accuracy", "C7"),
    ):
        scores.plot(*read_column(rows, name), "o-", color=colour, ms=4, label=label)
    scores.set(ylim=(0, 1), ylabel="validation", xlabel="optimizer step")
    scores.legend(loc="upper left")
    for axes in (losses, scores):
        axes.grid(alpha=0.25)
    part = path.with_name(f".{path.name}")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)
    plt.close(figure)
