"""The picture at the top of the README: what skips add, on generated shapes.

    for n in 32 16 8; do python train.py experiment=quickstart model=fcn${n}s name=skips$n; done
    python docs/skips.py CKPT32 CKPT16 CKPT8 docs/skips.png --images 1 0 3

A row for each of the first validation images: image | label | FCN-32s | FCN-16s | FCN-8s. Above the
predictions the mean IoU over the whole split, as evaluate.py counts it; below, that of the image.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchmetrics.classification import MulticlassConfusionMatrix

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # fcn runs from the checkout

from fcn.checkpoints import checkpoint_data, read_checkpoint
from fcn.config import short_messages
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError
from fcn.metrics import segmentation_scores
from fcn.prediction import load_model
from fcn.visualize import VOID_COLOUR, Cell, colourise, fit, image_iou, iou_text, sheet, whole


def shapes_of(checkpoint: Path) -> dict[str, Any]:
    """Settings of the generated pictures that a checkpoint's run was judged on."""
    settings = dict(checkpoint_data(checkpoint)["dataset"])
    if settings.pop("_target_") != "fcn.datasets.shapes.Shapes":
        raise ConfigError(f"{checkpoint}: trained on photographs, which may not be shown here")
    settings.pop("_partial_", None)
    return settings


@torch.inference_mode()
def draw(checkpoints: Sequence[Path], output: Path, images: Sequence[int], width: int) -> None:
    """One column for each checkpoint, one row for each image, by its number in the split."""
    settings, *others = map(shapes_of, checkpoints)
    if any(other != settings for other in others):
        raise ConfigError("the checkpoints' runs had different pictures")
    data = Shapes(split="val", **settings)
    samples = [data[number] for number in images]
    every = [data[number] for number in range(len(data))]
    names, palette = data.classes, data.palette
    headings = ["image", "label"]
    seen = {int(k) for s in samples for k in s["mask"].unique()}
    cells: list[list[Cell]] = [
        [
            (fit(s["image"], width, width), ""),
            (colourise(fit(s["mask"], width, width), palette), ""),
        ]
        for s in samples
    ]
    for path in checkpoints:
        model, confusion = load_model(path), MulticlassConfusionMatrix(len(names), ignore_index=255)
        masks = []
        for start in range(0, len(every), 8):
            batch = every[start : start + 8]
            scores = model.scores(torch.stack([s["image"] for s in batch]))  # (8, K, S, S)
            masks += list(scores.argmax(1).cpu().to(torch.uint8))  # (S, S) each
            confusion.update(torch.stack(masks[start:]), torch.stack([s["mask"] for s in batch]))
        miou = segmentation_scores(confusion.compute())["miou"]
        stride = read_checkpoint(path)["hyper_parameters"]["stride"]
        headings.append(f"FCN-{stride}s, mean IoU {miou:.3f}")
        for row, number, sample in zip(cells, images, samples, strict=True):
            iou = image_iou(sample["mask"], masks[number], len(names))
            seen |= {int(k) for k in masks[number].unique()}
            row.append((colourise(fit(masks[number], width, width), palette), iou_text(iou)))
    legend = [*((names[k], palette[k]) for k in sorted(seen - {255})), ("void", VOID_COLOUR)]
    with whole(output) as part:
        sheet(cells, headings=headings, legend=legend, width=width).save(part, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What skips add, on generated shapes.")
    parser.add_argument("checkpoints", nargs=3, type=Path, metavar="CKPT", help="32s, 16s, 8s")
    parser.add_argument("output", type=Path, metavar="PICTURE")
    parser.add_argument("--images", nargs="+", type=int, default=[0, 1, 2, 3], metavar="NUMBER")
    parser.add_argument("--width", type=int, default=192, help="of a column, in pixels")
    options = parser.parse_args(arguments)
    with short_messages():
        draw(options.checkpoints, options.output, options.images, options.width)


if __name__ == "__main__":
    main()
