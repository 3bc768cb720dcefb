"""data.batch_size=auto: the largest batch whose training step fits on the GPU, found by trying.

Lightning's tuner takes real steps on images of noise, as large as the largest that training can
meet, so that a batch that fits here always fits. `python -m fcn.memory` predicts the same number in
seconds, without a GPU, for images of VOC2012's size or crops.
"""

import logging
import tempfile
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader

from fcn.module import SegmentationModule


class Noise(pl.LightningDataModule):
    """`length` images of noise in batches of `batch_size`, which the tuner changes."""

    def __init__(self, length: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.length, self.size, self.batch_size = length, size, 1

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.length), self.batch_size, collate_fn=self._batch)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()  # not used, but Lightning asks for one

    def _batch(self, indices: list[int]) -> dict[str, Tensor]:
        image = torch.randint(256, (len(indices), 3, *self.size), dtype=torch.uint8)
        return {"image": image, "mask": image[:, 0] % 2}  # (N, 3, H, W) and (N, H, W)


def largest_batch(
    module: SegmentationModule, size: tuple[int, int], *, most: int, **trainer: Any
) -> int:
    """The largest number of images in a batch whose training step fits into memory.

    Args:
        module: takes the steps. Afterwards its weights are what they were before.
        size: height and width of the largest images, in pixels.
        most: the largest number that is of use; the tuner may try more.
        trainer: the arguments of Lightning's Trainer that memory depends on, such as precision.
    """
    logging.getLogger("pytorch_lightning.tuner").setLevel(logging.ERROR)
    # The tuner does not end where it cannot double or raise the size any more, because the images
    # are used up. So there are more of them than fit into any memory; none exists before its turn.
    noise = Noise(2**20, size)
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
        Tuner(quiet).scale_batch_size(
            module, datamodule=noise, mode="binsearch", steps_per_trial=2, init_val=1, margin=0
        )
    return min(noise.batch_size, most)
