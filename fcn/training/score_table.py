"""Scores on the terminal: a line at each validation, and the table of classes at the end.

evaluate.py prints the same table. `callbacks.score_table=null` trains without it.
"""

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fcn.figures.legend import one_line
from fcn.metrics import SCORES


class ScoreTable(Callback):
    """Prints the scores of each validation, and at the end those of every class."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        loss, scores = pl_module.val_loss, pl_module.scores
        print(
            f"step {trainer.global_step}: val loss {loss:.4f}, mIoU {scores['miou']:.4f}, "
            f"pixel accuracy {scores['pixel_acc']:.4f}",
            flush=True,
        )

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if trainer.is_global_zero and pl_module.scores is not None:
            print_scores(pl_module.scores, pl_module.class_names)


def print_scores(scores: Mapping[str, Any], class_names: list[str]) -> None:
    """Print the four metrics and the IoU of every class, in percent as papers do."""
    table = Table(title="IoU by class, %")
    table.add_column("class")
    table.add_column("IoU", justify="right")
    for name, iou in zip(class_names, scores["iou"], strict=True):
        table.add_row(Text(one_line(name, 60)), "absent" if math.isnan(iou) else f"{100 * iou:.1f}")
    table.add_section()
    for name in SCORES:
        table.add_row(name, f"{100 * scores[name]:.2f}")
    Console().print(table)
