"""What W&B gets at the end of a run: the IoU of each class, and the confusion matrix.

A run without W&B's logger ignores this callback (`callbacks.wandb_scores`).
"""

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger


class WandbScores(Callback):
    """Logs two charts of the last validation: `iou_by_class` and `confusion_matrix`.

    The first is a bar chart. The second is a table of pixel counts, with a row for each label and a
    column for each prediction.
    """

    def __init__(self) -> None:
        self.step, self.confusion = 0, list[list[int]]()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            # torchmetrics keeps the sum over all processes, which the module has just computed.
            self.step, self.confusion = trainer.global_step, pl_module.confusion.compute().tolist()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Send the last validation to W&B, if it is a logger."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not self.confusion or not loggers or not trainer.is_global_zero:
            return
        import wandb

        names = pl_module.class_names
        ious = [
            [name, None if math.isnan(iou) else iou]
            for name, iou in zip(names, pl_module.scores["iou"], strict=True)
        ]
        counts = [[name, *row] for name, row in zip(names, self.confusion, strict=True)]
        for logger in loggers:
            bars = wandb.Table(["class", "IoU"], data=ious)
            tables = {
                "iou_by_class": wandb.plot.bar(bars, "class", "IoU", title="IoU by class"),
                "confusion_matrix": wandb.Table(["label \\ prediction", *names], data=counts),
            }
            logger.log_metrics(tables, self.step)  # type: ignore[arg-type]
