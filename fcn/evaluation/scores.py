"""The scores of each image alone, as a callback of a validation.

images = ImageScores(keep=True)
pl.Trainer(callbacks=[images], ...).validate(module, datamodule.eval_dataloader(data))
images.rows[0]        # ("2007_000033", 0.91, 0.55): id, pixel accuracy, mean IoU
"""

import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from fcn.evaluation.boundaries import WIDTHS, band_confusions
from fcn.metrics import segmentation_scores
from fcn.module import SegmentationModule

MOST_WAITING = 8  # images whose scores may still be due, so that memory does not fill up


class ImageScores(Callback):
    """Scores of each image, in the order of the loader, and of the pixels near boundaries.

    A thread computes them while the network sees the next image.

    Args:
        keep: also keep the predictions, compressed: some 10 KB for a photograph of VOC.

    Attributes:
        rows: (id, pixel accuracy, mean IoU) of each image. NaN if all of its pixels are void.
        bands: (bands + 1, K, K), the sum of `band_confusions` over all images.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep
        self.rows: list[tuple[str, float, float]] = []
        self.bands: np.ndarray = np.zeros((len(WIDTHS) + 1, 1, 1), np.int64)
        self._predictions: list[tuple[tuple[int, ...], bytes]] = []  # shape, compressed uint8
        self._pending: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(1)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Hand the images of a batch to the thread."""
        assert isinstance(pl_module, SegmentationModule)
        masks = batch["mask"].cpu().numpy()  # (N, H, W) uint8
        predictions = outputs["prediction"].cpu().numpy()  # (N, H, W) uint8
        classes, void = len(pl_module.class_names), pl_module.void
        for name, mask, prediction in zip(batch["id"], masks, predictions, strict=True):
            if len(masks) > 1:  # the batch was padded with void, which would make a boundary
                mask, prediction = without_padding(mask, prediction, void)
            image = (name, mask, prediction, classes, void)
            self._pending.append(self._pool.submit(self.add, *image))
        while self._pending and (self._pending[0].done() or len(self._pending) > MOST_WAITING):
            self._pending.pop(0).result()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the thread, and raise what went wrong in it."""
        for future in self._pending:
            future.result()
        self._pending = []
        self._pool.shutdown()

    def add(
        self, name: str, mask: np.ndarray, prediction: np.ndarray, classes: int, void: int
    ) -> None:
        """Score the next image.

        Args:
            name: its id.
            mask, prediction: (H, W) uint8.
            classes: how many there are.
            void: the label of pixels that are ignored.
        """
        bands = band_confusions(mask, prediction, classes, void)
        scores = segmentation_scores(torch.from_numpy(bands.sum(0)))
        self.bands = self.bands + bands
        if self.keep:
            self._predictions.append((prediction.shape, zlib.compress(prediction.tobytes(), 1)))
        self.rows.append((name, scores["pixel_acc"], scores["miou"]))

    def prediction(self, index: int, shape: tuple[int, ...]) -> np.ndarray:
        """The prediction of an image, if `keep` is set.

        Args:
            index: of the image.
            shape: (H, W) of the image. `without_padding` may have cut void borders off; they are
                class 0 here.

        Returns:
            (H, W) uint8.
        """
        kept, packed = self._predictions[index]
        full = np.zeros(shape, np.uint8)
        full[: kept[0], : kept[1]] = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(kept)
        return full


def without_padding(
    mask: np.ndarray, prediction: np.ndarray, void: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut off the rows at the bottom and the columns at the right that are void throughout.

    Args:
        mask, prediction: (H, W).
        void: the label of padding.
    """
    known = mask != void
    height, width = mask.shape
    if known.any():
        height = int(np.flatnonzero(known.any(1))[-1]) + 1
        width = int(np.flatnonzero(known.any(0))[-1]) + 1
    return mask[:height, :width], prediction[:height, :width]
