"""The progress bar on the terminal.

python train.py trainer.enable_progress_bar=false      # without it
"""

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar

from fcn.training.loss_statistics import LossStatistics


class ProgressBar(RichProgressBar):
    """Lightning's bar, over the steps of the whole run, with the smoothed loss and val mIoU."""

    @property
    def total_train_batches(self) -> int | float:
        if self.trainer.max_steps == -1:
            return math.inf
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning would show the number of the epoch here, but a run is one endless epoch. There
        # is no public way to change this text.
        return f"{'Training':{len(self.validation_description)}}"

    def get_metrics(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        """The smoothed loss and the last mean IoU, both of which Python has already read.

        Lightning's own method would wait for the device at every step.
        """
        metrics: dict[str, Any] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LossStatistics):
                metrics["loss"] = callback.smooth
        if pl_module.scores is not None:
            metrics["val mIoU"] = pl_module.scores["miou"]
        return metrics
