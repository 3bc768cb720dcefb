"""The scores of each image alone, computed by a callback during a validation.

images = ImageScores(keep=True)
pl.Trainer(callbacks=[images], ...).validate(module, datamodule.eval_dataloader(data))
images.rows[0]        # ("2007_000033", 0.91, 0.55): id, pixel accuracy, mean IoU
"""

import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from fcn.evaluation.boundaries import WIDTHS, band_confusions
from fcn.metrics import segmentation_scores
from fcn.module import SegmentationModule


class ImageScores(Callback):
    """Scores of each image, in the order of the loader, and of the pixels near boundaries.

    A thread computes the scores of a batch while the network computes the next batch.

    Args:
        keep: also keep the predictions. Compressed, one takes some 10 KB for a photograph of VOC.

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
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Hand the images of a batch to the thread, once it has scored those before."""
        self._wait()
        assert isinstance(pl_module, SegmentationModule)
        masks = batch["mask"].cpu().numpy()  # (N, H, W) uint8
        predictions = outputs["prediction"].cpu().numpy()  # (N, H, W) uint8
        classes, void = len(pl_module.class_names), pl_module.void
        for i, (name, (height, width)) in enumerate(zip(batch["id"], batch["size"], strict=True)):
            # Without the padding of the batch: it is void, and its edge would be a boundary.
            mask, prediction = masks[i, :height, :width], predictions[i, :height, :width]
            self._pending.append(self._pool.submit(self.add, name, mask, prediction, classes, void))

    def on_validation_end(self, *_: Any) -> None:
        """Score the last batch."""
        self._wait()
        self._pool.shutdown()

    def _wait(self) -> None:
        """Wait until the thread has scored all images, and raise an error that it had."""
        for future in self._pending:
            future.result()
        self._pending = []

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

    def prediction(self, index: int) -> np.ndarray:
        """The prediction (H, W) uint8 of an image by its index, if `keep` is set."""
        shape, packed = self._predictions[index]
        # A copy, because what frombuffer gives cannot be written to, of which torch warns.
        return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(shape).copy()
