"""Random numbers of dropout, so that a resumed run draws those that it would have drawn."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from fcn.datamodule import random_generator


class DropoutSeeds(Callback):
    """Seeds torch before each batch with a function of (seed, batch, process).

    So no checkpoint needs the state of a generator, and processes drop different units.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed = random_generator(self.seed, batch_idx, trainer.global_rank).integers(2**63)
        torch.manual_seed(int(seed))
