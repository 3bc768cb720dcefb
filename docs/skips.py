"""The picture at the top of the README: what skip connections add, on generated shapes.

    for n in 32 16 8; do python train.py experiment=quickstart model=fcn${n}s name=skips$n; done
    python docs/skips.py CKPT32 CKPT16 CKPT8 docs/skips.png --images 1 0 3

It has a row of image | label | FCN-32s | FCN-16s | FCN-8s for each of some validation images. Above
the predictions is the mean IoU over the whole split, as evaluate.py computes it; below each
prediction, that of the one image.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # fcn runs from the checkout

from fcn.checkpoint import data_settings, read_checkpoint
from fcn.cli import short_messages
from fcn.datasets import VOID, Sample
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError
from fcn.figures.legend import legend_entries
from fcn.figures.masks import colourise, labels_in, resize_to_fit
from fcn.figures.panels import Cell, draw_sheet
from fcn.files import atomic_write
from fcn.inference.predictor import load_predictor
from fcn.metrics import confusion_matrix, segmentation_scores

BATCH_SIZE = 8


def shapes_settings(path: Path) -> dict[str, Any]:
    """Settings of the generated images that a checkpoint's run was validated on.

    Raises:
        ConfigError: the run had other data; photographs may have a licence against showing them.
            Or the checkpoint does not say which data it had.
    """
    settings = dict((data_settings(read_checkpoint(path)) or {"dataset": {}})["dataset"])
    if settings.pop("class", None) != "fcn.datasets.shapes.Shapes":
        raise ConfigError(
            f"{path}: not known to be of generated shapes; no photograph is shown here"
        )
    return settings


def predictions(path: Path, samples: Sequence[Sample]) -> list[Tensor]:
    """What the network of a checkpoint predicts for each sample: masks (S, S) uint8."""
    network = load_predictor(path)
    masks: list[Tensor] = []
    for start in range(0, len(samples), BATCH_SIZE):
        images = [sample["image"] for sample in samples[start : start + BATCH_SIZE]]
        scores = network.scores(torch.stack(images))  # (N, 3, S, S) -> (N, K, S, S)
        masks += list(scores.argmax(1).cpu().to(torch.uint8))  # (N, S, S)
    return masks


def mean_iou(labels: Sequence[Tensor], masks: Sequence[Tensor], num_classes: int) -> float:
    """Mean IoU over all these pairs of label and prediction, each (S, S); NaN if all is void."""
    stacked = torch.stack(list(masks)), torch.stack(list(labels))
    confusion = confusion_matrix(*stacked, num_classes, VOID)
    return segmentation_scores(confusion)["miou"]


@torch.inference_mode()
def draw(checkpoints: Sequence[Path], output: Path, images: Sequence[int], width: int) -> None:
    """Draw a column for each checkpoint and a row for each image.

    Args:
        images: numbers of the images within the validation split.
        width: of a column, in pixels.
    """
    settings, *others = [shapes_settings(path) for path in checkpoints]
    if any(other != settings for other in others):
        raise ConfigError("the checkpoints' runs had different images")
    data = Shapes(split="val", **settings)
    samples = [data[number] for number in range(len(data))]
    labels = [sample["mask"] for sample in samples]
    names, palette = data.classes, data.palette

    headings = ["image", "label"]
    found = {VOID, *labels_in(*(labels[number] for number in images))}
    rows: list[list[Cell]] = []
    for number in images:
        image = resize_to_fit(samples[number]["image"], width, width)
        label = resize_to_fit(labels[number], width, width)
        rows.append([(image, ""), (colourise(label, palette), "")])
    for path in checkpoints:
        masks = predictions(path, samples)
        stride = read_checkpoint(path)["hyper_parameters"]["stride"]
        headings.append(f"FCN-{stride}s, mean IoU {mean_iou(labels, masks, len(names)):.3f}")
        for row, number in zip(rows, images, strict=True):
            found.update(labels_in(masks[number]))
            iou = mean_iou([labels[number]], [masks[number]], len(names))
            caption = "all void" if math.isnan(iou) else f"IoU {iou:.3f}"
            row.append((colourise(resize_to_fit(masks[number], width, width), palette), caption))
    legend = legend_entries(found, names, palette)
    sheet = draw_sheet(rows, headings=headings, legend=legend, width=width)
    with atomic_write(output) as part:
        sheet.save(part, "PNG", optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture that the command line asks for."""
    parser = argparse.ArgumentParser(description="What skips add, on generated shapes.")
    parser.add_argument("checkpoints", nargs=3, type=Path, metavar="CKPT", help="32s, 16s, 8s")
    parser.add_argument("output", type=Path, metavar="PICTURE", help="a .png to be written")
    parser.add_argument("--images", nargs="+", type=int, default=[0, 1, 2, 3], metavar="NUMBER")
    parser.add_argument("--width", type=int, default=192, help="of a column, in pixels")
    options = parser.parse_args(arguments)
    with short_messages():
        draw(options.checkpoints, options.output, options.images, options.width)


if __name__ == "__main__":
    main()
