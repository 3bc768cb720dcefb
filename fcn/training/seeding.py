"""The random numbers of dropout, which are the same in a resumed and in an uninterrupted run.

fcn/training/trainer.py adds this callback to every run.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from fcn.loader_process import random_generator


class DropoutSeeds(Callback):
    """Seeds torch before each batch with a function of (seed, batch, process).

    A checkpoint therefore need not hold the state of a random generator, and the processes of a
    distributed run drop different units.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        seed = random_generator(self.seed, batch_idx, trainer.global_rank).integers(2**63)
        torch.manual_seed(int(seed))
