"""What an evaluation needs beside the module's own metrics: each image and the pixels near
boundaries scored, results written."""

import csv
import logging
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from fcn.checkpoint import read_checkpoint
from fcn.metrics import segmentation_scores
from fcn.module import SegmentationModule
from fcn.runs import atomic_write

log = logging.getLogger(__name__)

WIDTHS = (1, 2, 3, 5, 10, 20, 40)  # of the bands around label boundaries, in pixels
# The first of WIDTHS that reaches a pixel at distance 0, 1, ..., 40 from the boundary's pixels
NARROWEST = np.searchsorted(WIDTHS, np.arange(1, WIDTHS[-1] + 2)).astype(np.int32)


def open_checkpoint(path: Path) -> tuple[SegmentationModule, dict[str, Any]]:
    return SegmentationModule.load_from_checkpoint(path), read_checkpoint(path)


class ImageScores(Callback):
    """Scores of each image alone, in the loader's order, and of the pixels near boundaries.

    The work is done in a thread beside the network's.

    Args:
        ids: of the images.
        keep: also keep the predictions, compressed: some 10 KB for a photograph of VOC's.
    """

    def __init__(self, ids: Sequence[str], *, keep: bool = False) -> None:
        self.ids, self.keep = ids, keep
        self.rows: list[tuple[str, float, float]] = []  # id, pixel accuracy, mean IoU
        self.predictions: list[tuple[tuple[int, ...], bytes]] = []  # shape, zlib of uint8
        self.bands: np.ndarray | int = 0  # (bands, K, K): pixels of each ring around boundaries
        self.pending: list[Future[None]] = []
        self.pool = ThreadPoolExecutor(1)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, SegmentationModule)
        masks, predictions = batch["mask"].cpu().numpy(), outputs["prediction"].cpu().numpy()
        classes, void = len(pl_module.class_names), pl_module.void
        for mask, prediction in zip(masks, predictions, strict=True):
            if len(masks) > 1:  # the border of the padding is none of the labels'
                mask, prediction = _trim(mask, prediction, void)
            self.pending.append(self.pool.submit(self._score, mask, prediction, classes, void))
        while self.pending and (self.pending[0].done() or len(self.pending) > 8):
            self.pending.pop(0).result()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for future in self.pending:
            future.result()
        self.pending = []
        self.pool.shutdown()

    def _score(self, mask: np.ndarray, prediction: np.ndarray, classes: int, void: int) -> None:
        """Count one image, (H, W) each."""
        bands = band_confusions(mask, prediction, classes, void)
        scores = segmentation_scores(torch.from_numpy(bands.sum(0)))
        self.bands = self.bands + bands
        if self.keep:
            self.predictions.append((prediction.shape, zlib.compress(prediction.tobytes(), 1)))
        self.rows.append((self.ids[len(self.rows)], scores["pixel_acc"], scores["miou"]))

    def prediction(self, index: int, shape: tuple[int, ...]) -> np.ndarray:
        """(H, W) uint8 of an image, if predictions are kept; 0 where `_trim` has cut it."""
        stored, packed = self.predictions[index]
        whole = np.zeros(shape, np.uint8)
        whole[: stored[0], : stored[1]] = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(
            stored
        )
        return whole

    def boundary_miou(self) -> dict[str, float]:
        """Mean IoU over all images within each of WIDTHS pixels of a label boundary."""
        within = torch.from_numpy(np.cumsum(self.bands, 0))  # (bands, K, K)
        return {
            str(w): segmentation_scores(c)["miou"] for w, c in zip(WIDTHS, within, strict=False)
        }

    def write(self, path: Path) -> None:
        """One row an image; nothing where all of it is void."""
        with atomic_write(path) as file:
            writer = csv.writer(file)
            writer.writerow(("id", "pixel_acc", "miou"))
            for name, *values in self.rows:
                writer.writerow((no_formula(name), *("" if v != v else v for v in values)))


def write_confusion(path: Path, confusion: Tensor, class_names: Sequence[str]) -> None:
    """The confusion matrix in pixels: a row for each label, a column for each prediction."""
    with atomic_write(path) as file:
        writer = csv.writer(file)
        names = list(map(no_formula, class_names))
        writer.writerow(("label", *names))
        for name, row in zip(names, confusion.tolist(), strict=True):
            writer.writerow((name, *row))


def no_formula(name: str) -> str:
    """A name that a spreadsheet will not compute: as OWASP has it, an apostrophe goes before."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


@dataclass
class Result:
    """One checkpoint on one split."""

    metrics: dict[str, Any]  # what metrics.json holds
    confusion: Tensor  # (K, K) pixels; rows are labels
    images: ImageScores

    def write_tables(self, folder: Path) -> None:
        """confusion.csv and images.csv."""
        names = list(self.metrics["iou"])
        write_confusion(folder / "confusion.csv", self.confusion, names)
        self.images.write(folder / "images.csv")


def band_confusions(
    mask: np.ndarray, prediction: np.ndarray, classes: int, void: int
) -> np.ndarray:
    """The confusion matrix of one image (H, W), split by the distance from label boundaries.

    The trimap of Kohli et al. (IJCV 2009), Krähenbühl and Koltun (NIPS 2011) and DeepLab, which is
    a band around VOC's void pixels. Here a boundary is wherever neighbouring labels (up, down,
    left, right) differ, and void is such a label: bands start at the edge of the void line that
    VOC draws around objects, and at direct contacts of classes where data has no void. The pixels
    at the boundary are the band of width 1; a band of width w holds what is at most w - 1 pixels
    (Euclidean) from these. Void pixels count nowhere; the picture's own border is no boundary.

    Returns:
        (bands + 1, K, K): pixels that are in the i-th of WIDTHS and in no narrower one; then the
        rest. Their sum is the image's confusion matrix.
    """
    edge = np.zeros(mask.shape, bool)
    for axis in (0, 1):
        one, two = (np.moveaxis(mask, axis, 0)[part] for part in (np.s_[1:], np.s_[:-1]))
        edges = np.moveaxis(edge, axis, 0)  # a view
        edges[1:] |= one != two
        edges[:-1] |= one != two
    if edge.any():
        distance = np.ceil(distance_transform_edt(~edge)).astype(np.int32)
        band = NARROWEST[np.minimum(distance, WIDTHS[-1])]  # (H, W)
    else:
        band = np.full(mask.shape, len(WIDTHS), np.int32)
    place = (band * classes + mask) * classes + prediction
    counts = np.bincount(place[mask != void], minlength=(len(WIDTHS) + 1) * classes**2)
    return counts.reshape(-1, classes, classes)


def _trim(mask: np.ndarray, prediction: np.ndarray, void: int) -> tuple[np.ndarray, np.ndarray]:
    """Without the rows at the bottom and the columns at the right that are void throughout."""
    known = mask != void
    height, width = (
        len(line) - int(line[::-1].argmax()) if line.any() else len(line)
        for line in (known.any(1), known.any(0))
    )
    return mask[:height, :width], prediction[:height, :width]
