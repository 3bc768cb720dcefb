"""curves.png: losses, learning rate and scores of the run, drawn again after every validation.

python train.py callbacks.curves=null      # without this picture
"""

import gc
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from fcn.figures.curves import draw_curves
from fcn.files import optional_file
from fcn.runs.metrics import read_numbers


class Curves(Callback):
    """Draws curves.png from metrics.csv."""

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            run = Path(trainer.default_root_dir)
            with optional_file(run / "curves.png"):
                draw_curves(read_numbers(run / "metrics.csv"), run / "curves.png")
            # The objects of a figure, several MB, refer to each other in a circle. Left to itself,
            # Python frees them late. Collecting them takes no time, because fcn/training/fit.py has
            # excluded all objects that existed before training.
            gc.collect()
