"""curves.png: losses, rate and scores of the run, drawn anew after every validation."""

import gc
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from fcn.figures.curves import draw_curves
from fcn.runs.metrics import read_numbers
from fcn.training.optional import optional_file


class Curves(Callback):
    """Draws curves.png from metrics.csv."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            run = Path(trainer.default_root_dir)
            with optional_file(run / "curves.png"):
                draw_curves(read_numbers(run / "metrics.csv"), run / "curves.png")
            # A figure is a cycle of references to several MB, which Python frees late by itself.
            # This is fast, since train.py has frozen all objects that were there before training.
            gc.collect()
