"""data.batch_size=auto: the largest batch whose training step fits on the GPU, found by trying.

Lightning's tuner takes real steps on images of noise, as large as the largest that training can
meet, so that a batch that fits here always fits. `python -m fcn.memory` predicts the same number in
seconds, without a GPU.
"""

import logging
import tempfile
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader, Dataset

from fcn.module import SegmentationModule


class Noise(Dataset[dict[str, Any]]):
    """`length` images (3, H, W) of noise, each with a mask (H, W)."""

    def __init__(self, length: int, size: tuple[int, int]) -> None:
        self.length, self.size = length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.randint(256, (3, *self.size), dtype=torch.uint8)
        return {"image": image, "mask": image[0] % 2}


class NoiseModule(pl.LightningDataModule):
    """Loaders of noise; the tuner changes `batch_size`."""

    def __init__(self, length: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.data, self.batch_size = Noise(length, size), 1

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()  # not used, but Lightning asks for one


def largest_batch(
    module: SegmentationModule, size: tuple[int, int], *, most: int, **trainer: Any
) -> int:
    """The largest number of images in a batch whose training step fits into memory.

    Args:
        module: takes the steps. Afterwards its weights are what they were before.
        size: height and width of the largest images, in pixels.
        most: the largest number to try.
        trainer: the arguments of Lightning's Trainer that memory depends on, such as precision.
    """
    logging.getLogger("pytorch_lightning.tuner").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:  # the tuner keeps the weights here
        quiet = pl.Trainer(
            default_root_dir=folder,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **trainer,
        )
        noise = NoiseModule(most, size)
        Tuner(quiet).scale_batch_size(
            module, datamodule=noise, mode="binsearch", steps_per_trial=2, init_val=1, margin=0
        )
    return noise.batch_size
